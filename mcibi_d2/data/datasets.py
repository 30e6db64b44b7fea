"""The data sets: one table, one loop, and what their folders look like.

Nothing here touches the disk before a data set is used; ``DETECTRON2_DATASETS`` is read then.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from . import scenes
from .files import IMAGE_SUFFIXES, same_file
from .lists import read_list

IGNORE_LABEL = 255


def data_root() -> Path:
    """The folder that the data sets are in: ``DETECTRON2_DATASETS``, by default ``datasets``."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


@dataclass
class SplitFiles:
    """The files of a split as they are on the disk, paired or not.

    Attributes:
        images: path of each image, by the part of the name that it shares with its label.
        labels: path of each label, by the same; None for a split without labels.
        absent: images that the split lists and that are not there.
        images_in: where the images were looked for, for messages.
        labels_in: where the labels were looked for.
        label_suffix: what a label's name adds to the shared part.
    """

    images: dict[str, str]
    labels: dict[str, str] | None
    absent: list[str] = field(default_factory=list)
    images_in: str = ""
    labels_in: str = ""
    label_suffix: str = ".png"

    def unlabeled(self) -> list[str]:
        """The shared parts of the names of images that have no label and should have one."""
        return [] if self.labels is None else [key for key in self.images if key not in self.labels]

    def records(self) -> list[dict]:
        """Detectron2's records.

        Raises:
            InputError: an image is missing, or its label.
        """
        if self.absent:
            raise InputError(
                f"{self.images_in}: {len(self.absent)} of "
                f"{len(self.absent) + len(self.images)} listed images are not there, such as "
                f"{self.absent[0]}"
            )
        if not self.images:
            raise InputError(f"{self.images_in}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        missing = self.unlabeled()
        if missing:
            raise InputError(
                f"{self.labels_in}: no label for {len(missing)} of {len(self.images)} images in "
                f"{self.images_in}, expected {missing[0]}{self.label_suffix} and so on"
            )
        if self.labels is None:
            return [{"file_name": path} for path in self.images.values()]
        return [
            {"file_name": path, "sem_seg_file_name": self.labels[key]}
            for key, path in self.images.items()
        ]


# --- Layouts: what a split's folders look like.


def folders(
    images: tuple[str, ...],
    labels: tuple[str, ...] | None,
    id_list: str | None = None,
    list_needed: bool = False,
    id_digits: int = 0,
    hint: str = "",
) -> SplitFiles:
    """A folder of images and a folder of PNG labels with the same stems.

    Args:
        images: folders below the root, of which the first that exists is taken.
        labels: likewise; None for a split without labels.
        id_list: file beside the folder of images, whose lines are the stems of the split. Without
            one every image of the folder counts.
        list_needed: whether the list must exist, as where the folder holds several splits.
        id_digits: zeros in front of shorter stems of the list.
        hint: what to do if there is no folder of labels.
    """
    image_folder = _existing_folder(images)
    found = _files(image_folder, IMAGE_SUFFIXES)
    absent = []
    list_file = image_folder.parent / id_list if id_list else None
    if list_file and (list_needed or list_file.is_file()):
        if not list_file.is_file():
            raise InputError(f"{list_file}: no such list file, which says what the split holds")
        lines = list_file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        stems = [line.strip().zfill(id_digits) for line in lines if line.strip()]
        if not stems:
            raise InputError(f"{list_file}: lists no image, expected one name a line")
        absent = [f"{stem}.jpg" for stem in stems if stem not in found]
        found = {stem: found[stem] for stem in stems if stem in found}
    if labels is None:
        return SplitFiles(found, None, absent, str(image_folder))
    label_folder = _existing_folder(labels, hint)
    return SplitFiles(
        found, _files(label_folder, (".png",)), absent, str(image_folder), str(label_folder)
    )


def cityscapes(splits: tuple[str, ...], labels: str | None = "gtFine") -> SplitFiles:
    """Folders of cities; the labels are ``*_labelIds.png``, whose values are official ids.

    Args:
        splits: folders of ``leftImg8bit``.
        labels: ``gtFine`` or ``gtCoarse``; None for the test split, whose labels are dummies.
    """
    suffix = f"_{labels}_labelIds.png"
    found: dict[str, str] = {}
    found_labels: dict[str, str] = {}
    image_folders = [_existing_folder((f"cityscapes/leftImg8bit/{split}",)) for split in splits]
    for folder in image_folders:
        found |= _files_of_cities(folder, "_leftImg8bit.png")
    label_folders = [
        _existing_folder((f"cityscapes/{labels}/{split}",)) for split in splits if labels
    ]
    for folder in label_folders:
        found_labels |= _files_of_cities(folder, suffix)
    return SplitFiles(
        found,
        found_labels if labels else None,
        images_in=" and ".join(map(str, image_folders)),
        labels_in=" and ".join(map(str, label_folders)),
        label_suffix=suffix,
    )


def camvid(lists: tuple[str, ...]) -> SplitFiles:
    """List files whose lines are an image and its label.

    Only the last two parts of each path count, below ``CamVid``: the published lists hold paths of
    the machine that they were made on.
    """
    root = data_root() / "CamVid"
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    absent = []
    for name in lists:
        if not (root / name).is_file():
            raise _missing("list file", (f"CamVid/{name}",))
        for paths in read_list(root / name):
            image, label = (root.joinpath(*Path(path).parts[-2:]) for path in paths)
            key = f"{label.parent.name}/{label.stem}"
            if not image.is_file():
                absent.append(str(image))
                continue
            images[key] = str(image)
            if label.is_file():
                labels[key] = str(label)
    if not images and not absent:
        raise InputError(f"{root}: {' and '.join(lists)} list no image")
    return SplitFiles(
        images, labels, absent, " and ".join(str(root / name) for name in lists), str(root)
    )


def _generated(split: str) -> SplitFiles:
    records = scenes.records(split)
    return SplitFiles(
        {record["file_name"]: record["file_name"] for record in records},
        {record["file_name"]: record["sem_seg_file_name"] for record in records},
    )


def _existing_folder(candidates: tuple[str, ...], hint: str = "") -> Path:
    """The first of some folders below the root that exists."""
    for candidate in candidates:
        if (data_root() / candidate).is_dir():
            return data_root() / candidate
    raise _missing("folder", candidates, hint)


def _missing(kind: str, candidates: tuple[str, ...], hint: str = "") -> InputError:
    others = (
        f" (nor {', '.join(candidates[1:])} below the same root)" if len(candidates) > 1 else ""
    )
    return InputError(
        f"{data_root() / candidates[0]}: no such {kind}{others}; the environment variable "
        f"DETECTRON2_DATASETS is {os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}, "
        f"expected the folder that holds the data sets as published; "
        + (hint or "see datasets/README.md")
    )


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Path of each file by its stem, in the order of names; hidden files are left out."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return {
        os.path.splitext(name)[0]: os.path.join(folder, name)
        for name in names
        if name.lower().endswith(suffixes)
    }


def _files_of_cities(folder: Path, suffix: str) -> dict[str, str]:
    """Path of each file of a split of Cityscapes by ``<city>_<sequence>_<frame>``."""
    cities: Iterable[Path] = sorted(path for path in folder.iterdir() if path.is_dir())
    return {
        os.path.basename(path).removesuffix(suffix): path
        for city in cities
        for path in _files(city, (".png",)).values()
        if path.endswith(suffix)
    }


# --- The table.


class _Split(NamedTuple):
    files: Callable[[], SplitFiles]
    published: int | None  # number of images, None if it is not certain


def _ade20k(name: str) -> Callable[[], SplitFiles]:
    base = "ADEChallengeData2016"
    return partial(folders, (f"{base}/images/{name}",), (f"{base}/annotations/{name}",))


def _lip(split: str) -> Callable[[], SplitFiles]:
    # As published, with folders doubled by unzipping, and flat as much code wants it.
    outer = "LIP/TrainVal_images", "LIP/TrainVal_images/TrainVal_images", "LIP"
    annotations = "TrainVal_parsing_annotations"
    label_outer = f"LIP/{annotations}", f"LIP/{annotations}/{annotations}", "LIP"
    return partial(
        folders,
        tuple(f"{folder}/{split}_images" for folder in outer),
        tuple(f"{folder}/{split}_segmentations" for folder in label_outer),
        f"{split}_id.txt",
    )


_LIP_TEST = partial(
    folders,
    (
        "LIP/Testing_images/testing_images",
        "LIP/Testing_images/Testing_images/testing_images",
        "LIP/testing_images",
        "LIP/test_images",
    ),
    None,
    "test_id.txt",
)


def _cihp(name: str, split: str) -> Callable[[], SplitFiles]:
    published = "instance-level_human_parsing"
    bases = published, f"{published}/{published}", f"CIHP/{published}", "CIHP"
    return partial(
        folders,
        tuple(f"{base}/{name}/Images" for base in bases),
        tuple(f"{base}/{name}/Category_ids" for base in bases),
        f"{split}_id.txt",
        # Names have seven digits, which not every copy of the lists writes out.
        id_digits=7,
    )


def _coco_164k(name: str) -> Callable[[], SplitFiles]:
    return partial(
        folders,
        (f"coco_stuff/images/{name}", f"coco/images/{name}", f"coco/{name}"),
        (
            f"coco_stuff/annotations/{name}",
            f"coco/annotations/{name}",
            f"coco/stuffthingmaps/{name}",
        ),
    )


def _coco_10k(split: str) -> Callable[[], SplitFiles]:
    bases = "coco_stuff_10k", "coco/coco_stuff_10k"
    return partial(
        folders,
        tuple(f"{base}/images" for base in bases),
        tuple(f"{base}/labels/{split}" for base in bases),
        f"imageLists/{split}.txt",
        list_needed=True,
        hint="the .mat files become labels by: python datasets/prepare_coco_stuff_10k.py",
    )


_COCO_164K = {
    "train": _Split(_coco_164k("train2017"), 118287),
    "val": _Split(_coco_164k("val2017"), 5000),
}
_COCO_10K = {
    "train": _Split(_coco_10k("train"), 9000),
    "test": _Split(_coco_10k("test"), 1000),
}

# Data set -> (file in metadata/, its splits).
_TABLE: dict[str, tuple[str, dict[str, _Split]]] = {
    "ade20k_150": (
        "ade20k_150",
        {
            "train": _Split(_ade20k("training"), 20210),
            "val": _Split(_ade20k("validation"), 2000),
            "test": _Split(partial(folders, ("release_test/testing",), None), None),
        },
    ),
    "cityscapes_19": (
        "cityscapes_19",
        {
            "train": _Split(partial(cityscapes, ("train",)), 2975),
            "val": _Split(partial(cityscapes, ("val",)), 500),
            "trainval": _Split(partial(cityscapes, ("train", "val")), 3475),
            "test": _Split(partial(cityscapes, ("test",), None), 1525),
            "coarse": _Split(partial(cityscapes, ("train_extra",), "gtCoarse"), 19998),
        },
    ),
    "lip_20": (
        "lip_20",
        {
            "train": _Split(_lip("train"), 30462),
            "val": _Split(_lip("val"), 10000),
            "test": _Split(_LIP_TEST, 10000),
        },
    ),
    "cihp_20": (
        "cihp_20",
        {
            "train": _Split(_cihp("Training", "train"), 28280),
            "val": _Split(_cihp("Validation", "val"), 5000),
        },
    ),
    "coco_stuff_164k": ("coco_stuff_171", _COCO_164K),
    "coco_stuff_10k": ("coco_stuff_171", _COCO_10K),
    # With the 11 ids that have no pixel as classes, as released models of this method count.
    "coco_stuff_182_164k": ("coco_stuff_182", _COCO_164K),
    "coco_stuff_182_10k": ("coco_stuff_182", _COCO_10K),
    "camvid_11": (
        "camvid_11",
        {
            "train": _Split(partial(camvid, ("train.txt",)), 367),
            "val": _Split(partial(camvid, ("val.txt",)), 101),
            "trainval": _Split(partial(camvid, ("train.txt", "val.txt")), 468),
            "test": _Split(partial(camvid, ("test.txt",)), 233),
        },
    ),
    "scenes": (
        "scenes",
        {split: _Split(partial(_generated, split), n) for split, n in scenes.SPLITS.items()},
    ),
}
_SPLITS = {
    f"{dataset}_{split}": row
    for dataset, (_, rows) in _TABLE.items()
    for split, row in rows.items()
}


def split_files(name: str) -> SplitFiles | None:
    """What a registered split has on the disk; None for a data set that is not in the table.

    Raises:
        InputError: a folder or a list is missing or cannot be read.
    """
    return _SPLITS[name].files() if name in _SPLITS else None


def check_registered(name: str, where: str) -> None:
    """Raise an :class:`InputError` with similar names for a data set that is not registered.

    Args:
        name: of a data set.
        where: it was named: a config key or an argument.
    """
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        raise InputError(
            f"{where}: {name!r} is not a registered data set"
            + (f"; close: {', '.join(close)}" if close else "")
        )


def load_records(name: str, labelled: bool = False, own_labels: bool = False) -> list[dict]:
    """The records of any registered data set, at least one.

    Args:
        name: of the data set.
        labelled: whether every record must have a label file.
        own_labels: whether an image may be its own label, as where the "images" are predictions.

    Raises:
        InputError: also where another project's data set raises something else, and where an image
            is its own label.
    """
    check_registered(name, "data set")
    try:
        records = DatasetCatalog.get(name)
        if len(records) == 0:
            raise InputError(f"data set {name} is empty, expected one image or more")
        for key in ("file_name", "sem_seg_file_name")[: 1 + labelled]:
            without = [i for i, record in enumerate(records) if not record.get(key)]
            if without:
                some = records[without[0]].get("file_name", f"record {without[0]}")
                raise InputError(
                    f"data set {name} has no {key} for {len(without)} of {len(records)} images, "
                    f"such as {some}, expected the path of each"
                )
        for i, record in enumerate([] if own_labels else records):
            # Whether links lead to one file is seen where the files are read (`SemSegMapper`).
            image, label = record["file_name"], record.get("sem_seg_file_name")
            if image == label or (i == 0 and label and same_file(image, label)):
                raise InputError(
                    f"{image}: is its own label in {name}, expected a label file beside each image"
                )
        return records
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"data set {name}, which another project registered, cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def register_all_datasets() -> None:
    """Register ``<data set>_<split>`` for the whole table. Doing it twice is harmless."""
    for dataset, (description, splits) in _TABLE.items():
        for split, row in splits.items():
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                DatasetCatalog.register(name, partial(_load, name))
                _set_metadata(name, description, row.published)
    _register_scenes_files()


@cache
def _register_scenes_files() -> None:
    PathManager.register_handler(scenes.ScenesHandler())


def _load(name: str) -> list[dict]:
    """Records that say which data set they are of, for their label table."""
    return [{**record, "dataset_name": name} for record in _SPLITS[name].files().records()]


@cache
def _description(name: str) -> dict:
    return json.loads((files("mcibi_d2.data") / "metadata" / f"{name}.json").read_text())


def _set_metadata(name: str, description: str, published: int | None) -> None:
    described = _description(description)
    classes = described["classes"]
    ids = [c["id"] for c in classes]
    MetadataCatalog.get(name).set(
        stuff_classes=[c["name"] for c in classes],
        stuff_colors=[c["color"] for c in classes],
        label_ids=ids,
        label_ignored=described["ignored"],
        ignore_label=IGNORE_LABEL,
        flip_pairs=described["flip_pairs"],
        evaluator_type="sem_seg",
        # The evaluation servers want the values that the label files have.
        **({"server_ids": ids} if described["server"] else {}),
        **({"published_count": published} if published else {}),
    )
