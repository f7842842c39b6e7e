"""Pictures of comparisons: one row for each thing that is compared, a mark with its interval for each condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ftnas.plots import GRID, INK, MUTED, PALETTE, PAPER, bare, drawable
from ftnas.stats import Interval

_MARKERS = ("o", "s", "^", "D", "v", "P")
_ROW = 0.42  # inches


def dot_rows(
    rows: Mapping[str, Sequence[Interval]], conditions: Sequence[str], *, title: str = "", chance: float | None = None
) -> Figure:
    """Draw accuracy in percent, one row for each name, a mark for each condition with its interval.

    Args:
        rows: Name -> one interval for each condition, of accuracies in [0, 1]; NaN bounds are not drawn.
        conditions: Names of the conditions, in the order of colours.
        title: Above the plot.
        chance: Accuracy of guessing, in [0, 1], as a dotted line; None for no line.

    Raises:
        ValueError: No row, or a row of another length than the conditions.
    """
    if not rows:
        raise ValueError("a picture needs something to compare, got no rows")
    longest = max(len(name) for name in rows)
    height = _ROW * len(rows)
    left = 0.25 + 0.075 * min(longest, 40)
    figure = Figure(figsize=(left + 6.0, height + 1.2), facecolor=PAPER)
    width, total = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.5 / total, 5.75 / width, height / total))
    for index, (name, intervals) in enumerate(rows.items()):
        if len(intervals) != len(conditions):
            raise ValueError(f"row {name!r} has {len(intervals)} values, and there are {len(conditions)} conditions")
        if index % 2:
            axes.axhspan(index - 0.5, index + 0.5, color=GRID, alpha=0.35, linewidth=0)
        for place, interval in enumerate(intervals):
            y = index + 0.62 * ((place + 0.5) / len(conditions) - 0.5)
            color = PALETTE[place % len(PALETTE)]
            if interval.low == interval.low:
                axes.plot([100 * interval.low, 100 * interval.high], [y, y], color=color, linewidth=1.6, alpha=0.7)
            label = drawable(conditions[place]) if index == 0 else "_"
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot([100 * interval.mean], [y], marker, color=color, markersize=5.5, label=label, linestyle="")
    if chance is not None:
        axes.axvline(100 * chance, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
    axes.set_xlim(*np.clip(axes.get_xlim(), -1.5, 101.5))  # an interval may end beyond what an accuracy can be
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [drawable(name) for name in rows])
    axes.set_xlabel("accuracy (%)", color=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    bare(axes)
    axes.tick_params(axis="y", length=0)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(left / width - 0.015, 1 - 0.34 / total),
        ncols=len(conditions), frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    at = (0.12 / width, 1 - 0.12 / total)
    figure.text(*at, drawable(title), va="top", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    return figure
