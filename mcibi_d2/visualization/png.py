"""Figures as PNG files and as arrays, and pictures as files."""

import io
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Pixels per inch of the figures that go to TensorBoard and into reports.
DPI = 130


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def rgb(file: bytes) -> np.ndarray:
    """A PNG file as (H, W, 3) uint8."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture to a file, by the ending of its name.

    Not by OpenCV itself, which changes names outside ASCII on Windows.

    Args:
        path: ``.jpg`` or ``.png``.
        picture: (H, W, 3) uint8 BGR, or (H, W) uint8 or, as PNG, uint16.

    Raises:
        OSError: the file cannot be written, or the picture has no such form.
    """
    done, file = cv2.imencode(path.suffix, picture)
    if not done:
        raise OSError(f"OpenCV cannot write {path.suffix} of {picture.shape} {picture.dtype}")
    path.write_bytes(file)
