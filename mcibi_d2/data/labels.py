"""Label files to class ids, the same way in training and in evaluation."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import InputError
from .classes import class_names, ignore_label
from .image_file import MAX_PIXELS, open_image

_INVALID = np.iinfo(np.int32).min


def read_labels(
    file_name: str,
    dataset_name: str,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read a label file as class ids.

    The values of the file go through the data set's table: ``label_ids`` of its metadata lists the
    file's value of each class, ``label_ignored`` the values without ground truth. A data set
    without ``label_ids`` (another project's) holds class ids and its ``ignore_label`` already.
    ``label_colors`` lists the file's RGB color of each class instead, ``ignored_colors`` the colors
    without ground truth. With ``label_nearest`` each other value or color is taken as the nearest
    of these. With ``label_threshold`` T the values below T are one of the two classes, and those
    from T on the other.

    Args:
        file_name: a 1-, 8- or 16-bit image with one channel, or one with a palette, whose indices
            are the values, or a NumPy file (.npy) of integers. With ``label_colors``: any 8-bit
            image; an alpha channel is not read. With ``label_threshold``, colors count by their
            brightness.
        dataset_name: a registered data set.
        size: expected (height, width).
        max_pixels: a larger file is refused, unless it has this size; 0: none is.

    Returns:
        (height, width) int32: class ids and the metadata's ``ignore_label``.

    Raises:
        InputError: the file cannot be read, is no label image, has another size, or a value or
            color outside the table.
    """
    metadata = MetadataCatalog.get(dataset_name)
    colors, threshold = metadata.get("label_colors"), metadata.get("label_threshold", 0)
    of_image = label_values if colors is None else label_colors
    if size is not None and max_pixels:
        max_pixels = max(max_pixels, math.prod(size))
    of_image = label_brightness if threshold else of_image
    values = read_label_file(file_name, of_image, max_pixels=max_pixels)
    if size is not None and values.shape != tuple(size):
        raise InputError(
            f"{file_name}: labels of {values.shape[0]} x {values.shape[1]} (height x width), "
            f"its image has {size[0]} x {size[1]}"
        )
    if colors is not None:
        return _by_color(file_name, values, metadata)
    table = _table(
        tuple(_class_values(metadata)),
        tuple(_ignored_values(metadata)),
        ignore_label(metadata),
        metadata.get("label_nearest", False),
        threshold,
    )
    if values.dtype.itemsize > 2:
        # -1 is the table's last entry.
        inside = (values >= -1) & (values < 1 << 16)
        labels = np.where(inside, table[np.where(inside, values, 0).astype(np.intp)], _INVALID)
    else:
        labels = table[values]
    if labels.min() == _INVALID:
        wrong = np.unique(values[labels == _INVALID])
        some = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise InputError(
            f"{file_name}: label {some} is not in the table of {dataset_name}, which has "
            f"{_describe(metadata)}"
        )
    return labels


def read_label_file(
    file_name: str,
    of_image: Callable[[Image.Image], np.ndarray],
    kind: str = "label image",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The values of a label file, an image or a NumPy file, as they are stored.

    Args:
        file_name: of the file.
        of_image: such as :func:`label_values`, what an image holds.
        kind: how an error calls the file.
        max_pixels: a larger image is refused; 0: none is.

    Returns:
        (height, width) integers.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            if is_array(file_name):
                # Loading objects would run what is in the file.
                values = np.lib.format.read_array(file, allow_pickle=False)
                values = values.astype(np.uint8) if values.dtype == bool else values
            else:
                with open_image(file, max_pixels) as image:
                    values = of_image(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{file_name}: cannot be read as a {kind} ({error})") from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"{file_name}: an image of shape {values.shape} and type {values.dtype}, expected one "
            f"channel of class ids"
        )
    return values


def is_array(file_name: str) -> bool:
    """Whether a label file is one of NumPy's, by its name."""
    return str(file_name).lower().endswith(".npy")


def label_values(image: Image.Image) -> np.ndarray:
    """The values of a label image: (height, width), of a palette its indices."""
    values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def label_colors(image: Image.Image) -> np.ndarray:
    """The colors of a label image: (height, width) int32, red * 65536 + green * 256 + blue."""
    if image.mode.startswith(("I", "F")):
        # Pillow would clip the values to a byte.
        raise OSError(f"its mode is {image.mode}, expected colors of 8 bits")
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def label_brightness(image: Image.Image) -> np.ndarray:
    """The values of a label image, of colors and palettes their brightness: (height, width)."""
    if image.mode in ("RGB", "RGBA", "LA", "P", "PA", "CMYK"):
        image = image.convert("RGB").convert("L")
    return label_values(image)


def _by_color(file_name: str, colors: np.ndarray, metadata: Metadata) -> np.ndarray:
    known, labels = _color_table(
        tuple(map(tuple, metadata.label_colors)),
        tuple(map(tuple, metadata.get("ignored_colors", ()))),
        ignore_label(metadata),
    )
    place = np.searchsorted(known, colors).clip(max=len(known) - 1)
    unknown = known[place] != colors
    wrong = colors[unknown]
    if len(wrong) and metadata.get("label_nearest", False):
        found, which = np.unique(wrong, return_inverse=True)
        place[unknown] = nearest_colors(found, known)[which.reshape(-1)]
    elif len(wrong):
        found, counts = np.unique(wrong, return_counts=True)
        color, most = int(found[counts.argmax()]), counts.max()
        raise InputError(
            f"{file_name}: color ({color >> 16}, {color >> 8 & 255}, {color & 255}) of {most} "
            f"pixels is not in the table of {metadata.name}, which has {len(known)} colors"
            + (f"; {len(found)} such colors on {len(wrong)} pixels" if len(found) > 1 else "")
        )
    return labels[place]


@cache
def _color_table(
    classes: tuple[tuple, ...], ignored: tuple[tuple, ...], label: int
) -> tuple[np.ndarray, np.ndarray]:
    """Known colors in increasing order, and the class id (or ignore label) of each."""
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in classes + ignored])
    labels = np.array([*range(len(classes)), *(label for _ in ignored)], dtype=np.int32)
    order = known.argsort()
    return known[order].astype(np.int32), labels[order]


@cache
def _table(
    classes: tuple[int, ...],
    ignored: tuple[int, ...],
    label: int,
    nearest: bool = False,
    threshold: int = 0,
) -> np.ndarray:
    """Class id (or ignore label, or invalid) of every value of a label file; last, that of -1."""
    table = np.full((1 << 16) + 1, _INVALID, dtype=np.int32)
    if nearest:
        known = np.array(sorted({*classes, *ignored} - {-1}))
        values = known[nearest_values(np.arange(1 << 16), known)]
        table[:-1] = _table(classes, ignored, label)[values]
    if threshold:
        lower, upper = sorted(range(2), key=lambda k: classes[k])
        table[:threshold], table[threshold:-1] = lower, upper
    table[list(classes)] = np.arange(len(classes))
    table[list(ignored)] = label
    return table


def nearest_values(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Place of the nearest of some known values, which increase; the lower one of two."""
    return np.searchsorted((known[1:] + known[:-1]) / 2, values)


def nearest_colors(colors: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Place of the nearest known color, by the sum of squares; both as :func:`label_colors`."""
    place = np.zeros(len(colors), dtype=np.int64)
    least = np.full(len(colors), np.iinfo(np.int64).max)
    for i, color in enumerate(known.tolist()):
        distance = sum(
            ((colors >> shift & 255).astype(np.int64) - (color >> shift & 255)) ** 2
            for shift in (16, 8, 0)
        )
        place[distance < least] = i
        least = np.minimum(least, distance)
    return place


def _class_values(metadata: Metadata) -> list[int]:
    return metadata.get("label_ids") or list(range(len(class_names(metadata))))


def _ignored_values(metadata: Metadata) -> list[int]:
    # An empty list says that every value is a class.
    ignored = metadata.get("label_ignored")
    return [ignore_label(metadata)] if ignored is None else ignored


def _describe(metadata: Metadata) -> str:
    classes, ignored = _class_values(metadata), _ignored_values(metadata)
    return (
        f"{len(classes)} classes with values {min(classes)}..{max(classes)} and ignores "
        f"{', '.join(map(str, ignored)) or 'none'}"
    )
