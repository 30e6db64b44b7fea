"""Your own data set, as the keys ``DATASETS.OWN`` of a config describe it."""

import colorsys
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from .datasets import data_root, listed_lines

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MANIFESTS = (".json", ".yaml", ".yml")

# What this module has registered, and may therefore replace, with its ``DATASETS.OWN``.
_registered: dict[str, CfgNode] = {}


class Pair(NamedTuple):
    """An image, its label file, and the name that ``EXCLUDED`` and the held-out share know."""

    name: str
    image: Path
    label: Path


def register_own_dataset(cfg: CfgNode) -> None:
    """Register ``<NAME>_train`` and ``<NAME>_val`` of ``DATASETS.OWN``, if it has a name.

    No file is looked at before a data set is used. Doing it twice is harmless; with other values,
    the later ones hold. ``load_config``, ``launch`` and ``Trainer`` do it.

    Args:
        cfg: a config with ``add_mcibi_config``.

    Raises:
        InputError: naming the key, its value and what was expected.
    """
    own, ignore_label = cfg.DATASETS.OWN, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if not own.NAME:
        return
    _check(own, ignore_label)
    if is_taken(own.NAME):
        raise InputError(
            f"DATASETS.OWN.NAME is {own.NAME!r}, which is another data set already, expected "
            f"another name"
        )
    labels = (
        {"label_colors": own.LABEL_COLORS, "ignored_colors": own.IGNORED_COLORS}
        if own.LABEL_COLORS
        else {
            "label_ids": own.LABEL_IDS or list(range(len(own.CLASS_NAMES))),
            "label_ignored": own.LABEL_IGNORED,
        }
    )
    for split in ("train", "val"):
        name = f"{own.NAME}_{split}"
        if name in _registered:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            del _registered[name]
        if not own.TRAIN and split == "train" or not (own.VAL or own.VAL_SHARE) and split == "val":
            continue
        DatasetCatalog.register(name, partial(_records, own.clone(), split))
        MetadataCatalog.get(name).set(
            stuff_classes=list(own.CLASS_NAMES),
            stuff_colors=list(own.CLASS_COLORS) or palette(len(own.CLASS_NAMES)),
            ignore_label=ignore_label,
            evaluator_type="sem_seg",
            **labels,
        )
        _registered[name] = own.clone()


def is_taken(name: str) -> bool:
    """Whether a data set of this name, which is not an own one, is there already."""
    splits = {f"{name}_train", f"{name}_val"}
    return bool((splits - _registered.keys()) & set(DatasetCatalog))


def palette(count: int) -> list[list[int]]:
    """``count`` colors that differ: hues by the golden ratio, at three levels of brightness."""
    return [
        [
            round(255 * part)
            for part in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.8, 0.95 - 0.2 * (i % 3))
        ]
        for i in range(count)
    ]


def find_pairs(source: Sequence[str]) -> tuple[list[Pair], list[Path]]:
    """The pairs of a data set, in order, and the images and labels without a partner.

    Args:
        source: ``DATASETS.OWN.TRAIN`` or ``VAL``: a folder of images and one of labels, searched
            with their subfolders, or one list or manifest file.

    Raises:
        InputError: what is missing, or not as expected, and where.
    """
    paths = [data_root() / Path(part).expanduser() for part in source]
    if len(paths) == 1:
        return _listed(paths[0]), []
    images, labels = ({}, {})
    for folder, found in zip(paths, (images, labels), strict=True):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder{_where(folder, source)}")
        for path in sorted(folder.rglob("*")):
            # Hidden files, such as those that macOS adds to an archive, are no images.
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                key = path.relative_to(folder).with_suffix("").as_posix()
                if key in found:
                    raise InputError(
                        f"{path}: has the name of {found[key].name}, expected one file of a name; "
                        f"a list of pairs can tell them apart"
                    )
                found[key] = path
        if not found:
            raise InputError(f"{folder}: holds no image ({', '.join(SUFFIXES)})")
    both = [key for key in images if key in labels]
    if not both:
        raise InputError(
            f"{paths[1]}: no label has the name of an image: labels are named as "
            f"{min(labels.values()).name}, images as {min(images.values()).name}; a list of pairs "
            f"can say which belong together"
        )
    pairs = [
        Pair(images[key].relative_to(paths[0]).as_posix(), images[key], labels[key]) for key in both
    ]
    alone = [path for key, path in images.items() if key not in labels]
    return pairs, alone + [path for key, path in labels.items() if key not in images]


def _listed(path: Path) -> list[Pair]:
    """The pairs of a list or manifest file; their paths are relative to it."""
    if not path.is_file():
        kind = "list or manifest; two folders are [images, labels]"
        raise InputError(f"{path}: no such {kind}{_where(path, [path])}")
    entries = _manifest(path) if path.suffix.lower() in MANIFESTS else listed_lines(path)
    if not entries:
        raise InputError(f"{path}: lists no image")
    return [
        Pair(image, path.parent / Path(image).expanduser(), path.parent / Path(label).expanduser())
        for image, label in entries
    ]


def _manifest(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(entries, list):
        raise InputError(
            f"{path}: holds {type(entries).__name__}, expected a list of {{image, label}}"
        )
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("image", "label")
        ):
            raise InputError(f"{path}: entry {number} is {entry!r}, expected {{image, label}}")
    return [[entry["image"], entry["label"]] for entry in entries]


def _where(path: Path, source: Sequence) -> str:
    """For an error about a path that was looked for below the data sets' folder."""
    if path.is_absolute() and str(path) in map(str, source):
        return ""
    return (
        f"; paths of DATASETS.OWN are absolute or below DETECTRON2_DATASETS, which is "
        f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
    )


def split_pairs(own: CfgNode, split: str) -> tuple[list[Pair], list[Path]]:
    """The pairs of ``train`` or ``val``, and the files without a partner.

    Where ``VAL_SHARE`` of ``TRAIN`` is held out, it is the images whose names have the smallest
    hashes: the same ones on every machine, and nearly the same ones after images are added.
    """
    held_out = not own.VAL and own.VAL_SHARE > 0
    pairs, alone = find_pairs(own.VAL if split == "val" and own.VAL else own.TRAIN)
    pairs = [pair for pair in pairs if pair.name not in set(own.EXCLUDED)]
    if held_out:
        if len(pairs) < 2:
            raise InputError(
                f"DATASETS.OWN.VAL_SHARE is {own.VAL_SHARE}, but DATASETS.OWN.TRAIN has "
                f"{len(pairs)} images, expected 2 or more to hold some out"
            )
        count = min(max(1, round(own.VAL_SHARE * len(pairs))), len(pairs) - 1)
        ranked = sorted(pairs, key=lambda pair: hashlib.sha256(pair.name.encode()).digest())
        chosen = set(ranked[:count])
        pairs = [pair for pair in pairs if (pair in chosen) == (split == "val")]
    if split == "val":
        # A list may repeat images, to have them more often in training.
        pairs = list(dict.fromkeys(pairs))
    if not pairs:
        raise InputError(f"DATASETS.OWN.{split.upper()}: every image is in EXCLUDED")
    return pairs, alone


def unpaired_files(name: str) -> list[Path]:
    """The images and labels without a partner of an own data set; none of other data sets."""
    if name not in _registered:
        return []
    return split_pairs(_registered[name], name.rpartition("_")[2])[1]


def _records(own: CfgNode, split: str) -> list[dict]:
    """Detectron2's records of a split."""
    pairs, alone = split_pairs(own, split)
    if alone:
        # Detectron2 asks for the records of a test set three times.
        log_first_n(
            logging.WARNING,
            f"{own.NAME}_{split}: {len(alone)} images or labels without a partner are left out, "
            f"such as {alone[0]}",
            key="message",
        )
    return [
        {
            "file_name": str(pair.image),
            "sem_seg_file_name": str(pair.label),
            "dataset_name": f"{own.NAME}_{split}",
        }
        for pair in pairs
    ]


def _check(own: CfgNode, ignore_label: int) -> None:
    """The keys fit together."""
    count = len(own.CLASS_NAMES)

    def refuse(key: str, expected: str) -> None:
        raise InputError(f"DATASETS.OWN.{key} is {own[key]!r}, expected {expected}")

    if not own.TRAIN and not own.VAL:
        refuse("TRAIN", "[images, labels] or [list or manifest]")
    for key in ("TRAIN", "VAL"):
        if len(own[key]) > 2 or not all(isinstance(path, str) and path for path in own[key]):
            refuse(key, "[images, labels] or [list or manifest]")
    if not 0 <= own.VAL_SHARE < 1:
        refuse("VAL_SHARE", "0 <= share < 1")
    if own.VAL and own.VAL_SHARE:
        refuse("VAL_SHARE", "0, for DATASETS.OWN.VAL is given")
    if not count or not all(isinstance(name, str) for name in own.CLASS_NAMES):
        refuse("CLASS_NAMES", "a list of texts (quote numbers, yes and no)")
    repeated = [name for name in own.CLASS_NAMES if own.CLASS_NAMES.count(name) > 1]
    if repeated:
        refuse("CLASS_NAMES", f"different names, but {repeated[0]!r} is there twice")
    if count > ignore_label >= 0:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_label}, which is a class of the {count} "
            f"of DATASETS.OWN.CLASS_NAMES, expected a larger number such as 65535"
        )
    for key in ("CLASS_COLORS", "LABEL_IDS", "LABEL_COLORS"):
        if own[key] and len(own[key]) != count:
            raise InputError(
                f"DATASETS.OWN.{key} has {len(own[key])} entries, expected one for each of the "
                f"{count} DATASETS.OWN.CLASS_NAMES"
            )
    for key in ("CLASS_COLORS", "LABEL_COLORS", "IGNORED_COLORS"):
        for color in own[key]:
            if not (
                isinstance(color, (list, tuple))
                and len(color) == 3
                and all(isinstance(part, int) and 0 <= part <= 255 for part in color)
            ):
                raise InputError(
                    f"DATASETS.OWN.{key} has {color!r}, expected [red, green, blue] of 0..255"
                )
    for key in ("LABEL_IDS", "LABEL_IGNORED"):
        for value in own[key]:
            if not isinstance(value, int) or not 0 <= value <= 65535:
                raise InputError(f"DATASETS.OWN.{key} has {value!r}, expected numbers of 0..65535")
    if own.LABEL_IDS and own.LABEL_COLORS:
        refuse("LABEL_IDS", "[] beside LABEL_COLORS")
    ids, colors = own.LABEL_IDS or range(count), map(tuple, own.LABEL_COLORS)
    for first, second, values in (
        ("LABEL_IDS", "LABEL_IGNORED", [*ids, *set(own.LABEL_IGNORED)]),
        ("LABEL_COLORS", "IGNORED_COLORS", [*colors, *set(map(tuple, own.IGNORED_COLORS))]),
    ):
        repeated = [value for value in values if values.count(value) > 1]
        if repeated and not (first == "LABEL_IDS" and own.LABEL_COLORS):
            raise InputError(
                f"DATASETS.OWN.{first} and {second} have {repeated[0]} twice, expected each once"
            )
