"""The data sets: one table, one loop, and what their folders look like.

Nothing here touches the disk before a data set is used; ``DETECTRON2_DATASETS`` is read then.
"""

import json
import os
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from . import scenes

IGNORE_LABEL = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def data_root() -> Path:
    """The folder that the data sets are in: ``DETECTRON2_DATASETS``, by default ``datasets``."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def paired_folders(images: str, labels: str) -> list[dict]:
    """Records of a folder of images and a folder of PNG labels with the same stems."""
    image_folder, label_folder = data_root() / images, data_root() / labels
    for folder in (image_folder, label_folder):
        _require(folder.is_dir(), folder, "folder")
    stems = {
        path.stem: path
        for path in sorted(image_folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    if not stems:
        raise InputError(f"{image_folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    available = {path.stem for path in label_folder.glob("*.png")}
    missing = [stem for stem in stems if stem not in available]
    if missing:
        raise InputError(
            f"{label_folder}: no label for {len(missing)} of {len(stems)} images in "
            f"{image_folder}, expected {missing[0]}.png and so on"
        )
    return [
        {"file_name": str(path), "sem_seg_file_name": str(label_folder / f"{stem}.png")}
        for stem, path in stems.items()
    ]


def listed_pairs(folder: str, lists: tuple[str, ...]) -> list[dict]:
    """Records of list files whose lines are an image and its label.

    Only the last two parts of each path count, below ``folder``: the lists of CamVid hold paths of
    the machine that they were made on.
    """
    root = data_root() / folder
    records = []
    for name in lists:
        _require((root / name).is_file(), root / name, "list file")
        for number, line in enumerate((root / name).read_text().splitlines(), 1):
            if not line.strip():
                continue
            paths = line.split()
            if len(paths) != 2:
                raise InputError(
                    f"{root / name}: line {number} is {line!r}, expected an image and a label"
                )
            image, label = (str(root.joinpath(*Path(path).parts[-2:])) for path in paths)
            records.append({"file_name": image, "sem_seg_file_name": label})
    if not records:
        raise InputError(f"{root}: {' and '.join(lists)} list no image")
    return records


def _require(found: bool, path: Path, kind: str) -> None:
    if not found:
        raise InputError(
            f"{path}: no such {kind}; the environment variable DETECTRON2_DATASETS is "
            f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')!s}, expected the folder "
            f"that holds the data sets as published (see datasets/README.md)"
        )


# Data set -> (file in metadata/, its splits: records when first used).
_ADE20K = "ADEChallengeData2016"
_TABLE: dict[str, dict[str, Callable[[], list[dict]]]] = {
    "ade20k_150": {
        split: partial(paired_folders, f"{_ADE20K}/images/{name}", f"{_ADE20K}/annotations/{name}")
        for split, name in (("train", "training"), ("val", "validation"))
    },
    "camvid_11": {
        split: partial(listed_pairs, "CamVid", lists)
        for split, lists in (
            ("train", ("train.txt",)),
            ("val", ("val.txt",)),
            ("trainval", ("train.txt", "val.txt")),
            ("test", ("test.txt",)),
        )
    },
    "scenes": {split: partial(scenes.records, split) for split in scenes.SPLITS},
}


def register_all_datasets() -> None:
    """Register ``<data set>_<split>`` for the whole table. Doing it twice is harmless."""
    for dataset, splits in _TABLE.items():
        for split, load in splits.items():
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                DatasetCatalog.register(name, partial(_load, name, load))
                _set_metadata(name, dataset)
    _register_scenes_files()


@cache
def _register_scenes_files() -> None:
    PathManager.register_handler(scenes.ScenesHandler())


def _load(name: str, load: Callable[[], list[dict]]) -> list[dict]:
    """Records that say which data set they are of, for their label table."""
    return [{**record, "dataset_name": name} for record in load()]


def _set_metadata(name: str, dataset: str) -> None:
    source = files("mcibi_d2.data") / "metadata" / f"{dataset}.json"
    described = json.loads(source.read_text())
    classes = described["classes"]
    MetadataCatalog.get(name).set(
        stuff_classes=[c["name"] for c in classes],
        stuff_colors=[c["color"] for c in classes],
        label_ids=[c["id"] for c in classes],
        label_ignored=described["ignored"],
        ignore_label=IGNORE_LABEL,
        evaluator_type="sem_seg",
    )
