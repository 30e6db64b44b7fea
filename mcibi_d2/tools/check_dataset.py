"""Check a data set before training on it: every file, every value, and a sheet to look at.

``python -m mcibi_d2.tools.check_dataset ade20k_150_train`` reads all of a data set as training
reads it. It prints the number of images beside the published one, images and labels without a
partner, files that cannot be read, labels of another size or with values outside the table, and the
pixels and images of each class; it writes a sheet of images with their labels. The exit status is 0
if all files have their partners and can be trained on, 1 if not. A part of a data set is no fault,
and is said.
"""

import os
import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from matplotlib.figure import Figure
from tabulate import tabulate
from torch.utils.data import Dataset
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.data.classes import Classes
from mcibi_d2.data.datasets import SplitFiles, check_registered, load_records, split_files
from mcibi_d2.data.image_file import MAX_PIXELS
from mcibi_d2.data.mapper import bright_values, fitting_white_level, say_dark
from mcibi_d2.data.own import left_out
from mcibi_d2.data.workers import WorkerLoader
from mcibi_d2.engine import load_config
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.visualization import blend, comparison_sheet

SHOWN_PROBLEMS = 10
PICTURES = 8
PICTURE_SIDE = 480  # pixels


class _Check(Dataset):
    """Record i, read as training reads it.

    It is the pixels of each class, or what is wrong, and the image's :func:`bright_values`.
    """

    def __init__(self, name: str, records: list[dict], white_level: int):
        self.name = name
        self.white_level = white_level
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB image (H, W, 3) and labels (H, W), None in a split without labels."""
        labeled = "sem_seg_file_name" in self.records[i]
        mapper = SemSegMapper(
            labeled,
            augmentations=[],
            image_format="RGB",
            dataset_name=self.name,
            white_level=self.white_level,
            max_pixels=MetadataCatalog.get(self.name).get("max_pixels", MAX_PIXELS),
        )
        sample = mapper(self.records[i])
        image = sample["image"].numpy().transpose(1, 2, 0)
        return image, sample["sem_seg"].numpy() if labeled else None

    def __getitem__(self, i: int) -> tuple[np.ndarray | None, str | None, tuple]:
        metadata = MetadataCatalog.get(self.name)
        count = len(metadata.stuff_classes)
        try:
            labels = self.read(i)[1]
        except InputError as error:
            return None, str(error), (0, 0)
        bright = bright_values(self.records[i]["file_name"])
        if labels is None:
            return np.zeros(count + 1, np.int64), None, bright
        labels = np.where(labels == Classes.of(metadata).ignore_label, count, labels)
        return np.bincount(labels.reshape(-1), minlength=count + 1), None, bright


def _as_it_is(item):
    return item


def _files(name: str) -> SplitFiles:
    """The files of a data set; of one that another project registered, those of its records."""
    check_registered(name, "NAME")
    files = split_files(name)
    if files is not None:
        return files
    records = load_records(name)
    labeled = all("sem_seg_file_name" in r for r in records)
    return SplitFiles(
        {r["file_name"]: r["file_name"] for r in records},
        {r["file_name"]: r["sem_seg_file_name"] for r in records} if labeled else None,
        images_in=name,
    )


def _unpaired(files: SplitFiles) -> list[str]:
    """A sentence for each file without its partner."""
    problems = [f"{image}: listed in {files.images_in}, but not there" for image in files.absent]
    for key in files.unlabeled():
        problems.append(f"{files.images[key]}: no label {key}{files.label_suffix}")
    for key in sorted((files.labels or {}).keys() - files.images.keys()):
        problems.append(f"{files.labels[key]}: no image in {files.images_in}")
    return problems


def check(name: str, workers: int, folder: Path, white_level: int | None = None) -> bool:
    """Check a data set, print what was found, write the sheet and the list of problems.

    Args:
        name: a registered data set.
        workers: processes that read.
        folder: where ``<name>.png`` and, if there are any, ``<name>_problems.txt`` go.
        white_level: ``INPUT.WHITE_LEVEL``; None: that of the data set's config.

    Returns:
        Whether all files have their partners and can be trained on.

    Raises:
        InputError: there is no such data set, or it has no files to check.
    """
    files = _files(name)
    metadata = MetadataCatalog.get(name)
    Classes.of(metadata)  # or say that they are missing
    problems = _unpaired(files)
    problems += left_out(name)
    pairs = files.images.keys() - set(files.unlabeled())
    records = [
        {"file_name": path, "dataset_name": name}
        | ({"sem_seg_file_name": files.labels[key]} if files.labels is not None else {})
        for key, path in files.images.items()
        if key in pairs
    ]
    if not records and not problems:
        raise InputError(f"{files.images_in}: holds no image")
    white_level = metadata.get("white_level", 0) if white_level is None else white_level
    data = _Check(name, records, white_level)
    workers = min(workers, len(records))
    loader = WorkerLoader(
        data, batch_size=None, num_workers=workers, collate_fn=_as_it_is, workers_key="--workers"
    )
    pixels = np.zeros(len(metadata.stuff_classes) + 1, np.int64)
    images = np.zeros_like(pixels)
    readable, brights = [], []
    for i, (counts, problem, bright) in enumerate(tqdm(loader, name, unit="image")):
        if problem:
            problems.append(problem)
            continue
        readable.append(i)
        brights.append(bright)
        pixels += counts
        images += counts > 0

    if files.labels is not None:
        print(_class_table(metadata, pixels, images, len(readable)))
    print(f"\n{name}: {_count_sentence(len(files.images), metadata)}")
    highest = max((value for value, _ in brights), default=0)
    if not white_level and fitting_white_level(highest):
        print(
            f"Its images of 16 bits have values up to {highest:,} alone, of 65,535: too dark. "
            f"INPUT.WHITE_LEVEL {fitting_white_level(highest)} fits them."
        )
    elif 0 < white_level < highest:
        print(
            f"Its images of 16 bits have values up to {highest:,}, above INPUT.WHITE_LEVEL, which "
            f"is {white_level:,}: all from there on are white."
        )
    elif not white_level:
        print("".join(f"{sentence}\n" for sentence in say_dark(brights)), end="")
    if files.labels is None:
        print("It is a test split: it has no labels.")
    folder.mkdir(parents=True, exist_ok=True)
    if readable:
        _sheet(data, readable, metadata).savefig(folder / f"{name}.png", dpi=150)
        print(f"Look at {folder / name}.png")
    _say_problems(problems, folder / f"{name}_problems.txt")
    return not problems


def _count_sentence(count: int, metadata: Metadata) -> str:
    published = metadata.get("published_count")
    if published is None:
        return f"{count:,} images"
    if count == published:
        return f"{count:,} images, as published"
    return f"{count:,} images, not the published {published:,} ({count - published:+,})"


def _class_table(metadata: Metadata, pixels: np.ndarray, images: np.ndarray, read: int) -> str:
    classes = Classes.of(metadata)
    values = metadata.get("label_ids") or range(len(classes.names))
    names = [*classes.names, "(no ground truth)"]
    ignore_label = classes.ignore_label
    ignored = metadata.get("label_ignored") or [ignore_label]
    shown = [*values, f"{ignored[0]}{', ...' * (len(ignored) > 1)}"]
    total, rows = max(1, pixels.sum()), []
    for i, name in enumerate(names):
        rows.append(
            [
                i if i < len(names) - 1 else ignore_label,
                name,
                shown[i],
                f"{pixels[i]:,}",
                f"{100 * pixels[i] / total:.3f}",
                f"{images[i]:,}",
                f"{100 * images[i] / max(1, read):.1f}",
            ]
        )
    headers = ["class", "name", "value in file", "pixels", "% of pixels", "images", "% of images"]
    table = tabulate(
        rows, headers, colalign=("right", "left", *["right"] * 5), disable_numparse=True
    )
    absent = int((pixels[:-1] == 0).sum())
    return table + (f"\n\n{absent} of {len(names) - 1} classes have no pixel here." * bool(absent))


def _say_problems(problems: list[str], file: Path) -> None:
    if not problems:
        file.unlink(missing_ok=True)
        print("No problems.")
        return
    file.write_text("\n".join(problems) + "\n", encoding="utf-8")
    print(f"\n{len(problems):,} problems:")
    print("\n".join(problems[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        print(f"... and {len(problems) - SHOWN_PROBLEMS:,} more")
    print(f"All are in {file}")


def _sheet(data: _Check, readable: list[int], metadata: Metadata) -> Figure:
    """Rows of image, both, labels; from the whole length of the data set."""
    places = np.linspace(0, len(readable) - 1, min(PICTURES, len(readable))).round().astype(int)
    chosen = [readable[i] for i in dict.fromkeys(places.tolist())]
    rows = []
    classes = Classes.of(metadata)
    for i in chosen:
        image, labels = data.read(i)
        scale = PICTURE_SIDE / max(image.shape[:2])
        size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        row = {"image": image}
        if labels is not None:
            labels = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
            row["both"] = blend(image, labels, classes.colors)
            row["labels"] = labels
        rows.append(row)
    sheet = comparison_sheet(rows, classes.names, classes.colors)
    for axis, i in zip(sheet.axes[:: len(rows[0])], chosen, strict=True):
        axis.text(
            0.01, 0.02, os.path.basename(data.records[i]["file_name"]), transform=axis.transAxes,
            fontsize=4, color="white", bbox={"facecolor": "black", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    return sheet


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("check_dataset", __doc__)
    parser.add_argument("name", help="a data set as configs name it, such as ade20k_150_train")
    parser.add_config_file(required=False, of="that describes it (DATASETS.OWN)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all CPUs)")
    parser.add_argument(
        "--output", type=Path, default=Path("output/check_dataset"), help="folder to write"
    )
    parser.add_opts("DATASETS.OWN.VAL_SHARE 0.2")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    load_config(args.config_file, args.opts)  # registers it
    good = check(args.name, max(0, args.workers), args.output)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_tool(main)
