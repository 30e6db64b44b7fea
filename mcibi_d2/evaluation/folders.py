"""Predictions and labels in folders: which belong together, and what they hold."""

import logging
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from ..data.classes import Classes, ignore_label
from ..data.files import LABEL_SUFFIXES, Found, find_files
from ..data.labels import label_values, read_label_file, read_labels
from ..errors import InputError
from .server_files import CITYSCAPES_NAME

# What the pixels of a prediction's file are: ids 0..K-1, or the values of the data set's labels.
PIXELS = ("classes", "labels")


def image_name(file_name: str | Path) -> str:
    """What an image, its label and its prediction have in common.

    The file's name without its ending; for Cityscapes, ``<city>_<6 digits>_<6 digits>``.
    """
    found = CITYSCAPES_NAME.match(Path(file_name).name)
    return found[1] if found else Path(file_name).stem


def find_predictions(folder: str | Path) -> dict[str, Path]:
    """The PNGs in a folder and the folders in it, by :func:`image_name`.

    Raises:
        InputError: there is none, or two are of one image.
    """
    return _by_image(folder, find_files(folder, (".png",)), "predictions (.png)")


def find_labels(folder: str | Path) -> dict[str, Path]:
    """The label files in a folder and the folders in it, by :func:`image_name`.

    Of Cityscapes, whose folders hold more, these are ``*_labelIds.png``.

    Raises:
        InputError: there is none, or two are of one image.
    """
    found = find_files(folder, (".png", ".mat"))
    if not found.files:
        found = find_files(folder, LABEL_SUFFIXES)
    ids = [path for path in found.files if path.stem.endswith("_labelIds")]
    return _by_image(folder, found._replace(files=ids or found.files), "labels (.png or .mat)")


def _by_image(folder: str | Path, inside: Found, expected: str) -> dict[str, Path]:
    files, links = inside
    for sentence in links:
        logging.getLogger(__name__).warning(sentence)
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, expected {expected}")
    if not files:
        raise InputError(f"{folder}: holds no files, expected {expected}")
    found: dict[str, Path] = {}
    for path in files:
        other = found.setdefault(image_name(path), path)
        if other is not path:
            raise InputError(f"{path}: is of the same image as {other}, expected one file for each")
    return found


def read_prediction(path: str | Path, dataset_name: str, pixels: str = "classes") -> np.ndarray:
    """Read a predicted label map.

    Args:
        path: a 1-, 8- or 16-bit image with one channel, or with a palette, whose indices count.
        dataset_name: a registered data set.
        pixels: of ``PIXELS``; ``labels`` go through the data set's label table.

    Returns:
        (height, width) int32 class ids; -1, which is no class, where ``labels`` say "ignored".

    Raises:
        InputError: the file cannot be read, or has values that are no class.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if pixels == "labels":
        labels = read_labels(str(path), dataset_name)
        return np.where(labels == ignore_label(metadata), np.int32(-1), labels)
    values = read_label_file(str(path), label_values, "prediction")
    classes = len(Classes.of(metadata).names)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"{path}: predicts class {low if low < 0 else high}, but {dataset_name} has the "
            f"classes 0..{classes - 1}"
        )
    return values.astype(np.int32)
