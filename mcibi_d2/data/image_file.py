"""Image files of any size, or up to a size that is said."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from PIL import Image

from ..errors import InputError

# What Pillow refuses by itself.
MAX_PIXELS = 178_956_970

_lock = threading.Lock()


@contextmanager
def open_image(file: IO[bytes], max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Pillow's image of a file, with a limit of our own in place of Pillow's, which others keep.

    Args:
        file: open.
        max_pixels: height times width (``INPUT.MAX_PIXELS``); 0: no limit.

    Raises:
        InputError: the image has more pixels, from its header, or is a program (EPS); it does not
            name the file.
    """
    with _lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        if image.format == "EPS":
            raise InputError("it is EPS, a program that Ghostscript would run, expected an image")
        width, height = image.size
        if 0 < max_pixels < width * height:
            raise InputError(
                f"{width} x {height} (width x height) are {width * height} pixels, expected at "
                f"most INPUT.MAX_PIXELS {max_pixels} (0: no limit)"
            )
        yield image
