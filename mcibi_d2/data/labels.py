"""Label files to class ids, the same way in training and in evaluation."""

from functools import cache

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import InputError

_INVALID = np.iinfo(np.int32).min


def read_labels(
    file_name: str, dataset_name: str, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read a label file as class ids.

    The values of the file go through the data set's table: ``label_ids`` of its metadata lists the
    file's value of each class, ``label_ignored`` the values without ground truth. A data set
    without ``label_ids`` (another project's) holds class ids and its ``ignore_label`` already.

    Args:
        file_name: an 8- or 16-bit image with one channel, or one with a palette, whose indices
            are the values.
        dataset_name: a registered data set.
        size: expected (height, width).

    Returns:
        (height, width) int32: class ids and the metadata's ``ignore_label``.

    Raises:
        InputError: the file cannot be read, is no label image, has another size or a value
            outside the table.
    """
    try:
        with PathManager.open(file_name, "rb") as f, Image.open(f) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file_name}: cannot be read as a label image ({error})") from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"{file_name}: an image of shape {values.shape} and type {values.dtype}, expected one "
            f"channel of class ids"
        )
    if size is not None and values.shape != tuple(size):
        raise InputError(
            f"{file_name}: labels of {values.shape[0]} x {values.shape[1]} (height x width), "
            f"its image has {size[0]} x {size[1]}"
        )
    metadata = MetadataCatalog.get(dataset_name)
    table = _table(
        tuple(_class_values(metadata)),
        tuple(_ignored_values(metadata)),
        metadata.get("ignore_label", 255),
    )
    inside = (values >= 0) & (values < len(table))
    labels = table[values] if inside.all() else np.where(inside, table[values * inside], _INVALID)
    if labels.min() == _INVALID:
        wrong = np.unique(values[labels == _INVALID])
        some = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise InputError(
            f"{file_name}: label {some} is not in the table of {dataset_name}, which has "
            f"{_describe(metadata)}"
        )
    return labels


@cache
def _table(classes: tuple[int, ...], ignored: tuple[int, ...], ignore_label: int) -> np.ndarray:
    """Class id (or ignore label, or invalid) of every value of a label file."""
    table = np.full(1 << 16, _INVALID, dtype=np.int32)
    table[list(classes)] = np.arange(len(classes))
    table[list(ignored)] = ignore_label
    return table


def _class_values(metadata: Metadata) -> list[int]:
    if metadata.get("stuff_classes") is None:
        raise InputError(
            f"data set {metadata.name} has no stuff_classes in its metadata, expected class names"
        )
    return metadata.get("label_ids") or list(range(len(metadata.stuff_classes)))


def _ignored_values(metadata: Metadata) -> list[int]:
    return metadata.get("label_ignored") or [metadata.get("ignore_label", 255)]


def _describe(metadata: Metadata) -> str:
    classes, ignored = _class_values(metadata), _ignored_values(metadata)
    return (
        f"{len(classes)} classes with values {min(classes)}..{max(classes)} and ignores "
        f"{', '.join(map(str, ignored))}"
    )
