"""Embeddings of features, side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


class Panel(NamedTuple):
    """One scatter plot: its title, points (P, 2), their classes (P,), and a line below it."""

    title: str
    points: np.ndarray
    classes: np.ndarray
    caption: str


def embedding_figure(
    panels: Sequence[Panel], class_names: Sequence[str], colors: Sequence[Sequence[int]]
) -> Figure:
    """Scatter plots beside each other, with one legend of the classes that occur.

    Args:
        panels: at least one.
        class_names: of all classes.
        colors: RGB of each class, 0..255.
    """
    palette = np.array(colors) / 255
    present = sorted({int(k) for panel in panels for k in np.unique(panel.classes)})
    # Sizes in inches. As many columns of names as fit.
    side, width = 5.2, 5.2 * len(panels)
    longest = max(len(class_names[k]) for k in present)
    columns = max(1, int(width / (0.42 + 0.072 * longest)))
    lines = -(-len(present) // columns)
    legend = 0.15 + 0.16 * lines
    height = side + 0.5 + legend
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        # Large sets with small points; a thin line keeps light colours visible on white.
        area = float(np.clip(12000 / len(panel.points), 4, 40))
        axis.scatter(
            *panel.points.T, s=area, c=palette[panel.classes], edgecolors="0.35", linewidths=0.25
        )
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel(panel.caption, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=palette[k],
               markeredgecolor="0.35", markeredgewidth=0.25, label=class_names[k])
        for k in present
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, fontsize=7.5, frameon=False,
        handletextpad=0.1, columnspacing=0.8, labelspacing=0.35, borderaxespad=0.2,
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.015, right=0.985, wspace=0.03,
        bottom=(legend + 0.25) / height, top=1 - 0.3 / height,
    )  # fmt: skip
    return figure
