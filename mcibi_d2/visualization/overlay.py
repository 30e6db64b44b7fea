"""Label maps in colour, alone and side by side."""

from collections.abc import Mapping, Sequence
from functools import cache

import cv2
import numpy as np
from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

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
        image: (H, W, 3) uint8, RGB or BGR.
        labels: (H, W) class ids; where there is no ground truth the image stays as it is.
        colors: of each class, in the image's order of channels.
        opacity: of the labels.

    Returns:
        (H, W, 3) uint8.
    """
    known = (labels >= 0) & (labels < len(colors))
    mixed = cv2.addWeighted(image, 1 - opacity, colorize(labels, colors), opacity, 0)
    return np.where(known[..., None], mixed, image)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def with_legend(
    picture: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
    fixed_size: bool = False,
) -> np.ndarray:
    """A picture with the classes that its labels have beside it, the largest first.

    Args:
        picture: (H, W, 3) uint8, RGB or BGR.
        labels: (h, w) class ids.
        class_names: of all K classes.
        colors: of each class, in the picture's order of channels.
        fixed_size: the result's size depends on that of the picture alone, as the frames of a
            video must; what does not fit is counted in the last line. Else the result is as large
            as the legend needs.

    Returns:
        (H', W', 3) uint8 with H' >= H and W' > W. The picture is in its upper left corner.
    """
    height, width = picture.shape[:2]
    size = min(32, max(11, min(height, width) // 32))
    line, font = round(1.6 * size), _font(size)
    counts = np.zeros(len(class_names), dtype=np.int64)
    for some in np.array_split(labels, 1 + labels.size // 2**22):  # for they become eight bytes
        counts += np.bincount(some.ravel(), minlength=len(counts))[: len(counts)]
    present = np.argsort(-counts, kind="stable")
    present = [k for k in present.tolist() if counts[k]]
    lines = [
        (class_names[k], f"{100 * counts[k] / labels.size:.1f} %", tuple(colors[k]))
        for k in present
    ]
    room = height // line if fixed_size else len(lines)
    if len(lines) > room:
        lines = [*lines[: room - 1], (f"and {len(lines) - room + 1} more", "", None)][:room]
    shown = class_names if fixed_size else [name for name, _, _ in lines]
    # Name, gap, share.
    text = max(map(font.getlength, [*shown, "and 100 more"])) + font.getlength("  100.0 %")
    panel = Image.new(
        "RGB", (round(text + 3 * size), max(height, len(lines) * line)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(panel)
    for number, (name, share, color) in enumerate(lines):
        middle = round((number + 0.5) * line)
        if color is not None:
            box = (size // 2, middle - size // 2, size // 2 + size, middle + size // 2)
            draw.rectangle(box, fill=color, outline=(0, 0, 0))
        draw.text((2 * size, middle), name, fill=(0, 0, 0), font=font, anchor="lm")
        right = panel.width - size // 2
        draw.text((right, middle), share, fill=(0, 0, 0), font=font, anchor="rm")
    result = np.full((panel.height, width + panel.width, 3), 255, np.uint8)
    result[:height, :width] = picture
    result[:, width:] = np.asarray(panel)
    return result


def comparison_sheet(
    rows: Sequence[Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
    opacity: float = 1.0,
) -> Figure:
    """A sheet of pictures: one row per scene, one titled column per key, a legend below.

    Args:
        rows: for each scene, title -> image (H, W, 3) uint8 or label map (H, W). All rows have
            the titles of the first.
        class_names: for the legend, which shows the classes that occur.
        colors: RGB of each class.
        opacity: of label maps; below 1 they are laid over the first picture of their row.

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
            if picture.ndim == 2 and opacity < 1:
                picture = blend(row[titles[0]], picture, colors, opacity)
            elif picture.ndim == 2:
                picture = colorize(picture, colors)
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    height = figure.get_figheight()
    figure.subplots_adjust(0.01, bottom / height, 0.99, 1 - top / height, 0.03, 0.03)
    figure.legend(handles=patches, loc="lower center", ncol=columns, fontsize=7, frameon=False)
    return figure
