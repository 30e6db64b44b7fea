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


def blend(
    image: np.ndarray, labels: np.ndarray, colors: Sequence[Sequence[int]], opacity: float = 0.6
) -> np.ndarray:
    """An image with its label map laid over it.

    Args:
        image: RGB (H, W, 3) uint8.
        labels: (H, W) class ids; where there is no ground truth the image stays as it is.
        colors: RGB of each class.
        opacity: of the labels.

    Returns:
        RGB (H, W, 3) uint8.
    """
    known = (labels >= 0) & (labels < len(colors))
    mixed = (1 - opacity) * image + opacity * colorize(labels, colors)
    return np.where(known[..., None], mixed.round().astype(np.uint8), image)


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
    label_maps = [picture for row in rows for picture in row.values() if picture.ndim == 2]
    seen = sorted({i for labels in label_maps for i in np.unique(labels).tolist()})
    patches = [
        Patch(color=np.array(colors[i]) / 255, label=class_names[i])
        for i in seen
        if 0 <= i < len(class_names)
    ]
    patches.append(Patch(color=np.array(IGNORE_COLOR) / 255, label="no ground truth"))
    # Sizes in inches. The legend has as many columns as its longest name leaves room for.
    side = 2.4
    width = side * len(titles)
    columns = max(1, int(width / (0.45 + 0.065 * max(len(p.get_label()) for p in patches))))
    top, bottom = 0.3, 0.25 + 0.15 * -(-len(patches) // columns)
    # Of the tallest picture; those much taller than wide are made smaller instead.
    ratio = min(1.5, max(row[titles[0]].shape[0] / row[titles[0]].shape[1] for row in rows))
    figure = Figure(figsize=(width, side * len(rows) * ratio + top + bottom))
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, title in zip(line, titles, strict=True):
            picture = row[title]
            if picture.ndim == 2:
                picture = colorize(picture, colors)
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    height = figure.get_figheight()
    figure.subplots_adjust(0.01, bottom / height, 0.99, 1 - top / height, 0.03, 0.03)
    figure.legend(handles=patches, loc="lower center", ncol=columns, fontsize=7, frameon=False)
    return figure
