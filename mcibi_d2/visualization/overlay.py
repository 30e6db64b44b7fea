"""Label maps in colour, alone and side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Pixels without ground truth, in every picture.
IGNORE_COLOR = (60, 60, 60)


def colorize(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Label map (H, W) to RGB (H, W, 3) uint8; values without a colour become dark gray.

    Args:
        labels: class ids; anything outside ``colors`` is without ground truth.
        colors: RGB of each class, the ``stuff_colors`` of a data set's metadata.
    """
    palette = np.array([*colors, IGNORE_COLOR], dtype=np.uint8)
    known = (labels >= 0) & (labels < len(colors))
    return palette[np.where(known, labels, len(colors))]


def comparison_sheet(
    rows: Sequence[Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
) -> Figure:
    """A sheet of pictures: one row per scene, one titled column per key, a legend below.

    Args:
        rows: for each scene, title -> image (H, W, 3) uint8 or label map (H, W). All rows have
            the titles of the first.
        class_names: for the legend, which shows the classes that occur.
        colors: RGB of each class.

    Returns:
        A figure; ``savefig`` writes it.
    """
    titles = list(rows[0])
    height, width = rows[0][titles[0]].shape[:2]
    figure = Figure(figsize=(2.4 * len(titles), 2.4 * len(rows) * height / width + 0.9))
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    seen: set[int] = set()
    for line, row in zip(axes, rows, strict=True):
        for axis, title in zip(line, titles, strict=True):
            picture = row[title]
            if picture.ndim == 2:
                seen |= set(np.unique(picture).tolist())
                picture = colorize(picture, colors)
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    patches = [
        Patch(color=np.array(colors[i]) / 255, label=class_names[i])
        for i in sorted(seen)
        if i < len(class_names)
    ]
    patches.append(Patch(color=np.array(IGNORE_COLOR) / 255, label="no ground truth"))
    bottom = 0.75 / figure.get_figheight()
    figure.subplots_adjust(0.01, bottom, 0.99, 1 - 0.3 / figure.get_figheight(), 0.03, 0.03)
    figure.legend(handles=patches, loc="lower center", ncol=9, fontsize=7, frameon=False)
    return figure
