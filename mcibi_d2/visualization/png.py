"""Figures as PNG files and as arrays."""

import io

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
