"""Numbers over the iterations of one or several runs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Iteration -> value.
Series = Mapping[int, float]


def curves_figure(
    panels: Mapping[str, Mapping[str, Series]], runs: Sequence[str], columns: int = 3
) -> Figure:
    """One panel per quantity, with a line for each run that has it.

    Args:
        panels: title -> run -> series; at least one. A series of a few values is drawn with dots.
        runs: all that there are; each has its colour in every figure.
        columns: panels side by side.
    """
    lines = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    legend = 0.35 if len(runs) > 1 else 0.0
    figure = Figure(figsize=(3.9 * columns, 2.5 * lines + legend), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for run, values in series.items():
            iterations = sorted(values)
            axis.plot(
                iterations,
                [values[i] for i in iterations],
                color=f"C{runs.index(run) % 10}",
                linewidth=1.4,
                marker="o" if len(iterations) < 12 else "",
                markersize=3.5,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=7.5)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axis.tick_params(labelsize=7.5)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        shown = {run for series in panels.values() for run in series}
        shown = [run for run in runs if run in shown]
        handles = [Line2D([], [], color=f"C{runs.index(run) % 10}") for run in shown]
        figure.legend(handles, shown, loc="outside upper center", ncol=4, fontsize=8, frameon=False)
    return figure
