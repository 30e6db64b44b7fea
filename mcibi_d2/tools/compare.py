"""Compare two evaluated runs class by class, and show where their predictions differ most.

python -m mcibi_d2.tools.compare output/ade20k/fcn_R50 output/ade20k/mcibi_R50 \\
    --predictions output/fcn_png/predictions output/mcibi_png/predictions

A and B are run folders, or result files (sem_seg_evaluation.json or .pth). The predictions are
folders of class ids, as export_predictions --format png writes them.
"""

import heapq
import math
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

import mcibi_d2  # noqa: F401  registers the data sets
from mcibi_d2 import InputError
from mcibi_d2.data import read_image
from mcibi_d2.data.classes import Classes
from mcibi_d2.data.datasets import check_registered
from mcibi_d2.data.image_file import MAX_PIXELS
from mcibi_d2.data.labels import read_labels
from mcibi_d2.evaluation import Results, read_results
from mcibi_d2.evaluation.folders import find_predictions, image_name, read_prediction
from mcibi_d2.evaluation.results import MEASURES, find_result_file, show
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.visualization import comparison_sheet


def check_comparable(a: Results, b: Results) -> None:
    """Raise an :class:`InputError` for results of other classes or of another data set."""
    if a.classes != b.classes:
        other = next(
            (pair for pair in zip(a.classes, b.classes, strict=False) if pair[0] != pair[1]), None
        )
        found = f"{other[1]!r} where A has {other[0]!r}" if other else f"{len(b.classes)} classes"
        raise InputError(f"B: has {found}, expected the {len(a.classes)} classes of A")
    if a.dataset and b.dataset and a.dataset != b.dataset:
        raise InputError(f"B: is of data set {b.dataset}, expected {a.dataset} as A")


def difference_tables(a: Results, b: Results) -> str:
    """The measures of both, the classes that gain, most first, and those that lose, most first."""
    lines = [
        [
            key,
            f"{a.values[key]:.2f}",
            f"{b.values[key]:.2f}",
            f"{b.values[key] - a.values[key]:+.2f}",
        ]
        for key in MEASURES
        if key in a.values and key in b.values
    ]
    parts = [_table(["", "A", "B", "B - A"], lines)]
    gains = {k: b.values[f"IoU-{k}"] - a.values[f"IoU-{k}"] for k in a.classes}
    present = sorted((k for k in gains if not math.isnan(gains[k])), key=lambda k: -gains[k])
    better = [k for k in present if gains[k] > 0]
    worse = [k for k in reversed(present) if gains[k] < 0]
    for title, classes in (("Better in B", better), ("Worse in B", worse)):
        if classes:
            lines = [_line(k, a, b) for k in classes]
            headers = [title, "IoU of A", "IoU of B", "B - A", "ACC: B - A"]
            if a.confusion is not None:
                headers.append("% of truth")
            parts.append(_table(headers, lines))
    for title, classes in (
        ("The same IoU", [k for k in present if gains[k] == 0]),
        ("Absent", [k for k in a.classes if math.isnan(gains[k])]),
    ):
        if classes:
            parts.append(f"{title}: {', '.join(classes)}")
    return "\n\n".join(parts)


def _line(name: str, a: Results, b: Results) -> list[str]:
    iou, acc = ([r.values[f"{kind}-{name}"] for r in (a, b)] for kind in ("IoU", "ACC"))
    line = [name, *map(show, iou), *(f"{x[1] - x[0]:+.2f}" for x in (iou, acc))]
    if a.confusion is not None:
        truth = a.confusion[:-1, :-1].sum(axis=0)
        line.append(f"{100 * truth[a.classes.index(name)] / truth.sum():.2f}")
    return line


def _table(headers: list[str], lines: list[list[str]]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def find_disagreements(
    dataset: str, folders: tuple[str, str], count: int
) -> list[tuple[float, dict]]:
    """The images that two folders of predictions differ most on.

    Args:
        dataset: a registered data set.
        folders: of the predictions.
        count: how many images are wanted.

    Returns:
        (share of the labelled pixels with two different classes, record), largest first.

    Raises:
        InputError: a prediction is missing or wrong.
    """
    records, predictions = DatasetCatalog.get(dataset), [find_predictions(f) for f in folders]
    found: list[tuple[float, int]] = []
    for number, record in enumerate(tqdm(records, desc="Comparing", unit="image")):
        one, other, truth = _read(record, dataset, folders, predictions)
        labelled = truth != Classes.of(dataset).ignore_label
        share = (one != other)[labelled].mean() if labelled.any() else 0.0
        # Of equal shares the first image comes first.
        heapq.heappush(found, (float(share), -number))
        if len(found) > count:
            heapq.heappop(found)
    return [(share, records[-number]) for share, number in sorted(found, reverse=True)]


def _read(
    record: dict, dataset: str, folders: tuple[str, str], predictions: list[dict[str, Path]]
) -> list[np.ndarray]:
    """Both predictions for an image and its labels, all of one size."""
    if "sem_seg_file_name" not in record:
        raise InputError(
            f"--dataset {dataset}: has no labels for {record['file_name']}, expected a data set "
            f"with labels"
        )
    image = image_name(record["file_name"])
    maps = []
    for folder, files in zip(folders, predictions, strict=True):
        if image not in files:
            raise InputError(f"{folder}: has no {image}.png, expected a prediction for each image")
        maps.append(read_prediction(files[image], dataset))
    truth = read_labels(record["sem_seg_file_name"], dataset)
    for predicted, files in zip(maps, predictions, strict=True):
        if predicted.shape != truth.shape:
            raise InputError(
                f"{files[image]}: {predicted.shape[0]} x {predicted.shape[1]} pixels (height x "
                f"width), expected {truth.shape[0]} x {truth.shape[1]} as its labels"
            )
    return [*maps, truth]


def write_pictures(
    dataset: str, folders: tuple[str, str], names: tuple[str, str], count: int, path: Path
) -> None:
    """A sheet of image, truth, A and B, one row per image, as the paper's Figure 4."""
    rows = []
    predictions = [find_predictions(f) for f in folders]
    for share, record in find_disagreements(dataset, folders, count):
        one, other, truth = _read(record, dataset, folders, predictions)
        image = read_image(
            record["file_name"],
            "RGB",
            record["sem_seg_file_name"],
            MetadataCatalog.get(dataset).get("white_level", 0),
            MetadataCatalog.get(dataset).get("max_pixels", MAX_PIXELS),
        )
        titles = ("image", "ground truth", f"A: {names[0]}", f"B: {names[1]}")
        rows.append(dict(zip(titles, (image, truth, one, other), strict=True)))
        print(f"{record['file_name']}: {100 * share:.1f} % of its pixels differ")
    classes = Classes.of(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison_sheet(rows, classes.names, classes.colors).savefig(path, dpi=150)
    print(f"Look at {path}.")


def run_name(path: str) -> str:
    """How tables and pictures call a run: the folder that holds its results."""
    folder = find_result_file(path).resolve().parent
    return folder.parent.name if folder.name.startswith("inference") else folder.name


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("compare", __doc__)
    parser.add_argument("a", metavar="A", help="the baseline")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    parser.add_argument(
        "--predictions", nargs=2, metavar=("FOLDER_A", "FOLDER_B"), help="for the pictures"
    )
    parser.add_argument("--dataset", metavar="NAME", help="default: that of the result files")
    parser.add_argument("--pictures", type=int, default=6, help="how many rows (6)")
    parser.add_argument(
        "--output", type=Path, default=Path("compare.png"), help="of the pictures (compare.png)"
    )
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    if args.pictures < 1:
        raise InputError(f"--pictures is {args.pictures}, expected at least 1")
    a, b = read_results(args.a), read_results(args.b)
    check_comparable(a, b)
    names = (run_name(args.a), run_name(args.b))
    for letter, name, results in zip("AB", names, (a, b), strict=True):
        print(f"{letter}: {name}" + (f", {results.images} images" if results.images else ""))
        for error in results.errors:
            print(f"   not counted: {error}")
    print(f"\n{difference_tables(a, b)}\n")
    if args.predictions is None:
        print("No pictures: --predictions names no folders.")
        return
    dataset = args.dataset or a.dataset or b.dataset
    if not dataset:
        raise InputError("the result files do not name their data set, expected --dataset NAME")
    check_registered(dataset, "--dataset")
    if Classes.of(dataset).names != a.classes:
        raise InputError(f"--dataset {dataset}: has other classes than the result files")
    write_pictures(dataset, tuple(args.predictions), names, args.pictures, args.output)


if __name__ == "__main__":
    run_tool(main)
