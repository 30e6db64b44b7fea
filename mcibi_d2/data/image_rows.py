"""Images too large for the memory: some rows at a time, read from the file where its form allows.

pyvips (the extra ``large``) decodes PNG, TIFF and JPEG files from above to below and keeps nothing.
"""

import logging
import os
import struct
from collections.abc import Callable
from types import ModuleType
from typing import IO

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from .image_file import MAX_PIXELS, open_image
from .mapper import TURNS, check_bands, errors_named, upright_image, white_table

_logger = logging.getLogger(__name__)

# By Pillow's name of a format, libvips' reader, and the modes that both make the same pixels of.
_READERS = {
    "PNG": ("pngload", ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")),
    "TIFF": ("tiffload", ("L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B")),
    "JPEG": ("jpegload", ("L", "RGB")),
}
# Of TIFF: tags with the values that they may have; None: the tag may be missing.
_TIFF_TAGS = {
    "BitsPerSample": (258, {(8,), (16,)}),
    # None, LZW, JPEG, deflate (two numbers), PackBits.
    "Compression": (259, {1, 5, 7, 8, 32946, 32773}),
    # Black is zero, RGB, YCbCr.
    "PhotometricInterpretation": (262, {1, 2, 6}),
    "PlanarConfiguration": (284, {1, None}),
    # Alpha that the colors are not multiplied with.
    "ExtraSamples": (338, {(2,), None}),
    # Whole numbers without a sign.
    "SampleFormat": (339, {(1,), None}),
}
# Names of a PNG's texts in which Pillow looks for the orientation.
_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Rows that are decoded together, and pixels that are reduced together.
_DECODED_ROWS = 64
_REDUCED_PIXELS = 2**22


class ImageRows:
    """An image of which some rows at a time are made.

    Args:
        size: (H, W).
        read: the rows of a range, (stop - start, W, 3) uint8, by its start and stop.
    """

    def __init__(self, size: tuple[int, int], read: Callable[[int, int], np.ndarray]):
        self.size = tuple(size)
        self._read = read

    @classmethod
    def of(cls, image: np.ndarray) -> "ImageRows":
        """The rows of an image (H, W, 3) uint8."""
        return cls(image.shape[:2], lambda start, stop: image[start:stop])

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Rows from ``start`` to before ``stop``, (stop - start, W, 3) uint8."""
        return self._read(start, stop)

    def reduced(self, factor: int) -> np.ndarray:
        """The image made smaller by a whole number, (H // factor, W // factor, 3) uint8.

        Each pixel is the mean of factor x factor; what is left over at the right and below is cut.
        """
        height, width = (length // factor for length in self.size)
        small = np.empty((height, width, 3), dtype=np.uint8)
        step = max(1, _REDUCED_PIXELS // (self.size[1] * factor))
        for start in range(0, height, step):
            stop = min(start + step, height)
            rows = self(start * factor, stop * factor)[:, : width * factor]
            small[start:stop] = cv2.resize(
                rows, (width, stop - start), interpolation=cv2.INTER_AREA
            )
        return small


def open_rows(
    file_name: str, image_format: str, white_level: int = 0, max_pixels: int = MAX_PIXELS
) -> ImageRows:
    """The rows of what :func:`mcibi_d2.data.read_image` reads, with the same pixels.

    Without pyvips, and of files that it is not known to read as Pillow does, the whole image is in
    memory; which of them it is, the log says.

    Args:
        file_name: see :func:`read_image`.
        image_format: see :func:`read_image`.
        white_level: see :func:`read_image`.
        max_pixels: see :func:`read_image`.

    Raises:
        InputError: naming the file. That it is torn, only its rows may tell.
    """
    with (
        errors_named(file_name),
        PathManager.open(file_name, "rb") as file,
        open_image(file, max_pixels) as image,
    ):
        check_bands(image)
        size = image.size[::-1]
        pyvips = _pyvips()
        reason = _why_whole(image, file)
        if reason is None and pyvips is None:
            reason = "`pip install pyvips[binary]` (the extra `large`) reads it by rows"
        if reason is None:
            reader = getattr(pyvips.Image, _READERS[image.format][0])
            local = PathManager.get_local_path(file_name)
            return ImageRows(size, _FileReader(file_name, local, reader, image_format, white_level))
        _logger.warning(
            f"{file_name}: all of its {size[1]} x {size[0]} pixels (width x height) are in "
            f"memory: {reason}"
        )
        whole = upright_image(image, white_level=white_level, file=file)
        whole.load()
    width, height = whole.size

    def read(start: int, stop: int) -> np.ndarray:
        rows = whole.crop((0, start, width, stop))
        return np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(rows, image_format))

    return ImageRows((height, width), read)


def _pyvips() -> ModuleType | None:
    try:
        import pyvips
    except (ImportError, OSError):  # not there, or without its library
        return None
    return pyvips


def _why_whole(image: Image.Image, file: IO[bytes]) -> str | None:
    """Why a file cannot be read by rows, or maybe not with the same pixels; None: it can."""
    _, modes = _READERS.get(image.format, ("", ()))
    if not modes:
        return f"{image.format} files are not read by rows"
    if image.mode not in modes:
        return f"{image.format} files of mode {image.mode} are not read by rows"
    if image.format == "PNG" and _has_late_exif(file):
        return "its EXIF tags come after its pixels"
    # Not the method of PNG's own class, which reads the pixels for tags that come after them.
    if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in TURNS:
        return "it is turned, as its EXIF tag says"
    if image.format == "PNG" and (image.info.get("interlace") or image.is_animated):
        return "it is interlaced or animated"
    for name, (tag, values) in _TIFF_TAGS.items() if image.format == "TIFF" else ():
        value = image.tag_v2.get(tag)
        # Of several bands, if they are equal, once.
        value = tuple(sorted(set(value))) if isinstance(value, tuple) else value
        if value not in values:
            return f"TIFF files of {name} {value} are not read by rows"
    return None


def _has_late_exif(file: IO[bytes]) -> bool:
    """Whether a PNG may say only after its pixels how it is turned."""
    file.seek(8)
    pixels = False
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        name = file.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
        if pixels and (kind == b"eXIf" or name.startswith(_EXIF_TEXTS)):
            return True
        pixels |= kind == b"IDAT"
        file.seek(length - len(name) + 4, os.SEEK_CUR)
    return False


class _FileReader:
    """Decodes the rows of a file from above to below. Those from the last start on are kept.

    Rows above these are read by starting again.

    Args:
        file_name: for errors.
        path: of the local file.
        reader: of libvips.
        image_format: ``RGB`` or ``BGR``.
        white_level: see :func:`mcibi_d2.data.read_image`.
    """

    def __init__(
        self, file_name: str, path: str, reader: Callable, image_format: str, white_level: int
    ):
        self._file_name = file_name
        self._path = path
        self._reader = reader
        self._image_format = image_format
        self._white_level = white_level
        self._restart()

    def _restart(self) -> None:
        import pyvips

        with errors_named(self._file_name):
            image = self._reader(self._path, access="sequential", fail_on="error", revalidate=True)
            self._region = pyvips.Region.new(image)
        self._width, self._bands = image.width, image.bands
        self._type = {"uchar": np.uint8, "ushort": np.uint16}[image.format]
        self._first, self._kept = 0, np.empty((0, image.width, 3), dtype=np.uint8)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if start < self._first:
            self._restart()
        kept = self._first + len(self._kept)
        if stop > kept:
            rows = np.empty((stop - start, self._width, 3), dtype=np.uint8)
            there = self._kept[start - self._first :]
            rows[: len(there)] = there
            for top in range(max(start, kept), stop, _DECODED_ROWS):
                bottom = min(top + _DECODED_ROWS, stop)
                rows[top - start : bottom - start] = self._decoded(top, bottom)
            self._first, self._kept = start, rows
        return self._kept[start - self._first : stop - self._first]

    def _decoded(self, start: int, stop: int) -> np.ndarray:
        """Rows that were not decoded before, (stop - start, W, 3 or 1) uint8."""
        with errors_named(self._file_name):
            data = self._region.fetch(0, start, self._width, stop - start)
        values = np.frombuffer(data, self._type).reshape(stop - start, self._width, self._bands)
        # Of gray and of colors, without alpha.
        values = values[..., : 1 if self._bands < 3 else 3]
        if values.dtype == np.uint16:
            table = white_table(self._white_level) if self._white_level else None
            values = (values >> 8).astype(np.uint8) if table is None else table[values]
        return values if self._image_format == "RGB" else values[..., ::-1]
