"""Your own data set, as the keys ``DATASETS.OWN`` of a config describe it."""

import hashlib
import logging
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from .classes import palette
from .pairs import FoundPairs, find_pairs

# What this module has registered, and may therefore replace, with its ``DATASETS.OWN``.
_registered: dict[str, CfgNode] = {}


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
    labels |= {"label_nearest": own.LABEL_NEAREST, "label_threshold": own.LABEL_THRESHOLD}
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
            white_level=cfg.INPUT.WHITE_LEVEL,
            max_pixels=cfg.INPUT.MAX_PIXELS,
            **labels,
        )
        _registered[name] = own.clone()


def is_taken(name: str) -> bool:
    """Whether a data set of this name, which is not an own one, is there already."""
    splits = {f"{name}_train", f"{name}_val"}
    return bool((splits - _registered.keys()) & set(DatasetCatalog))


def split_pairs(own: CfgNode, split: str) -> FoundPairs:
    """The pairs of ``train`` or ``val``, and what is left out of their folders.

    Where ``VAL_SHARE`` of ``TRAIN`` is held out, it is the images whose names have the smallest
    hashes: the same ones on every machine, and nearly the same ones after images are added.
    """
    held_out = not own.VAL and own.VAL_SHARE > 0
    source = own.VAL if split == "val" and own.VAL else own.TRAIN
    found = find_pairs(source, own.IMAGE_SUFFIX, own.LABEL_SUFFIX)
    excluded = set(own.EXCLUDED)
    pairs = [pair for pair in found.pairs if pair.name not in excluded]
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
    return found._replace(pairs=pairs)


def left_out(name: str) -> list[str]:
    """A sentence for each file and link of an own data set that is left out; none of others."""
    if name not in _registered:
        return []
    found = split_pairs(_registered[name], name.rpartition("_")[2])
    return [
        f"{path}: no file of its name beside it, left out" for path in found.alone
    ] + found.links


def _records(own: CfgNode, split: str) -> list[dict]:
    """Detectron2's records of a split."""
    pairs, alone, links, _ = split_pairs(own, split)
    # Detectron2 asks for the records of a test set three times.
    if alone:
        log_first_n(
            logging.WARNING,
            f"{own.NAME}_{split}: {len(alone)} images or labels without a partner are left out, "
            f"such as {alone[0]}",
            key="message",
        )
    if links:
        log_first_n(
            logging.WARNING, f"{own.NAME}_{split}: {len(links)} left out; {links[0]}", key="message"
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
        refuse("TRAIN", "[images, labels] or [list or manifest] or [folder of both]")
    for key in ("TRAIN", "VAL"):
        if len(own[key]) > 2 or not all(isinstance(path, str) and path for path in own[key]):
            refuse(key, "[images, labels] or [list or manifest] or [folder of both]")
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
            least = 0 if key == "LABEL_IDS" else -1  # -1 is in NumPy files
            if not isinstance(value, int) or not least <= value <= 65535:
                raise InputError(f"DATASETS.OWN.{key} has {value!r}, expected numbers of 0..65535")
    if own.LABEL_THRESHOLD:
        ids = own.LABEL_IDS or range(count)
        if own.LABEL_NEAREST or own.LABEL_COLORS:
            refuse("LABEL_THRESHOLD", "0 beside LABEL_NEAREST or LABEL_COLORS")
        if count != 2 or not min(ids) < own.LABEL_THRESHOLD <= max(ids):
            refuse("LABEL_THRESHOLD", f"two classes with a value below it and one not, not {ids}")
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
