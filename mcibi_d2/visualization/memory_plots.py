"""What a feature memory holds, as pictures with the names of the classes."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

# Up to this many classes there is room for the numbers.
_MOST_NUMBERS = 25
_MOST_LETTERS = 26
_MISSING = "0.85"


def cosines_figure(cosines: np.ndarray, names: Sequence[str]) -> Figure:
    """The cosines between the rows of a memory.

    Args:
        cosines: (K, K), nan for a class without a row.
        names: of the K classes.
    """
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    others = others[~np.isnan(others)]
    # From the lowest to the highest of two classes: the ones of the diagonal say nothing.
    low, high = (others.min(), others.max()) if len(others) else (0.0, 1.0)
    return _matrix_figure(
        cosines,
        names,
        "cosine between the rows of the memory",
        ("", ""),
        low,
        high if high > low else low + 1e-6,
        "viridis",
        lambda x: f"{x:.2f}".replace("0.", ".") if abs(x) < 1 else f"{x:.0f}",
    )


def gathered_figure(gathered: np.ndarray, names: Sequence[str]) -> Figure:
    """Which rows of the memory the pixels of each class gather.

    Args:
        gathered: (K, K), line k the mean weights of the pixels of class k on the rows of each
            class; nan for a class without pixels.
        names: of the K classes.
    """
    return _matrix_figure(
        gathered,
        names,
        "mean weight, in percent, on the rows of the memory",
        ("row of the memory", "class of the pixels"),
        0.0,
        max(np.nanmax(gathered, initial=0.0), 1e-6),
        "Blues",
        lambda x: f"{100 * x:.0f}" if x >= 0.005 else "",
    )


def norms_figure(norms: np.ndarray, names: Sequence[str]) -> Figure:
    """The lengths of the rows of a memory, and the classes that have none.

    Args:
        norms: (K, S), nan for a row that is not initialised.
        names: of the K classes.
    """
    count = len(names)
    cell, size = _cell(count)
    cell = min(cell, 0.3)
    labels = [_short(name) for name in names]
    bottom = _text_width(labels, size) + 0.15
    left, right, top, height = 0.7, 0.2, 0.4, 2.6
    width = max(left + right + cell * count, 4.5)
    figure = Figure(figsize=(width, top + height + bottom))
    axis = figure.add_axes(
        (
            left / width,
            bottom / (top + height + bottom),
            1 - (left + right) / width,
            height / (top + height + bottom),
        )
    )
    place = np.arange(count)
    for slot in norms.T:
        axis.vlines(place, 0, np.nan_to_num(slot), color="tab:blue", linewidth=1, alpha=0.6)
        axis.plot(place, slot, "o", color="tab:blue", markersize=3.5)
    empty = np.isnan(norms).any(axis=1)
    axis.plot(place[empty], np.zeros(empty.sum()), "x", color="tab:red", clip_on=False,
              label="not initialised")  # fmt: skip
    if empty.any():
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axis.set_xlim(-0.7, count - 0.3)
    axis.set_ylim(bottom=0)
    axis.set_xticks(place, labels, rotation=90, fontsize=size)
    axis.set_ylabel("length", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    known = int((~np.isnan(norms)).sum())
    axis.set_title(
        f"length of the rows of the memory, {known} of {norms.size} initialised", fontsize=9
    )
    return figure


def _cell(count: int) -> tuple[float, float]:
    """Inches for a class, and the size of its name in points."""
    if count <= _MOST_NUMBERS:
        return 0.36, 8.0
    return (0.19, 7.0) if count <= 60 else (0.115, 5.6)


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"


def _text_width(labels: Sequence[str], size: float) -> float:
    """Inches that the longest label takes, about."""
    return max(map(len, labels)) * size * 0.62 / 72


def _matrix_figure(
    matrix: np.ndarray,
    names: Sequence[str],
    title: str,
    axes_names: tuple[str, str],
    low: float,
    high: float,
    colors: str,
    show: Callable[[float], str],
) -> Figure:
    """A (K, K) matrix in colours, its missing values in gray."""
    count = len(names)
    cell, size = _cell(count)
    labels = [_short(name) for name in names]
    side = max(cell * count, 1.5)
    text = _text_width(labels, size) + 0.15
    named = 0.25 if any(axes_names) else 0.0
    # Of a large matrix the names are on all four sides.
    large = count > 60
    left, bottom = text + named, text + named
    right, top = (text if large else 0) + 0.9, (text if large else 0) + 0.4
    width, height = left + side + right, bottom + side + top
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((left / width, bottom / height, side / width, side / height))
    colormap = colormaps[colors].with_extremes(bad=_MISSING)
    drawn = axis.imshow(np.ma.masked_invalid(matrix), colormap, vmin=low, vmax=high,
                        interpolation="nearest")  # fmt: skip
    axis.set_xticks(range(count), labels, rotation=90, fontsize=size)
    axis.set_yticks(range(count), labels, fontsize=size)
    axis.tick_params(length=0, labeltop=large, labelright=large)
    axis.set_xlabel(axes_names[0], fontsize=9)
    axis.set_ylabel(axes_names[1], fontsize=9)
    figure.text((left + side / 2) / width, 1 - 0.2 / height, title, ha="center", va="center",
                fontsize=9)  # fmt: skip
    bar_height = min(side, 4.0)
    bar = figure.add_axes(
        (
            1 - 0.7 / width,
            (bottom + (side - bar_height) / 2) / height,
            0.14 / width,
            bar_height / height,
        )
    )
    figure.colorbar(drawn, cax=bar).ax.tick_params(labelsize=7)
    if count <= _MOST_NUMBERS:
        _write_numbers(axis, matrix, drawn, show)
    return figure


def _write_numbers(
    axis: Axes, matrix: np.ndarray, drawn: AxesImage, show: Callable[[float], str]
) -> None:
    for (y, x), value in np.ndenumerate(matrix):
        if np.isnan(value):
            continue
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axis.text(x, y, show(value), ha="center", va="center", fontsize=6.5,
                  color="white" if dark else "black")  # fmt: skip
