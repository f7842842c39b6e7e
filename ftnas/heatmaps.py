"""What is vulnerable and what protection costs: heat maps, rankings, accuracy over overhead. Drawn as plots.py does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from ftnas.layout import Box, free_place, round_ticks, shorten
from ftnas.plots import FILL, GRID, INK, MUTED, PALETTE, PAPER, bare, drawable
from ftnas.stats import Interval

Array = NDArray[np.float64]

MAX_WRITTEN = 150
"""Cells up to which a heat map writes its values into them."""

_LONGEST = 36  # characters of a name, beyond which its middle is left out
_SMALL = 8.5  # points
_HATCH = "#a5adb6"
_TITLE = 12
# Lightness falls evenly along it, which every common colour vision and a grey print keep; the darkest end is left out.
_COLORS = ListedColormap(colormaps["magma_r"](np.linspace(0.0, 0.88, 256)))


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One way to protect a network: what it costs, and the accuracy under faults with it.

    Attributes:
        name: Written beside the point where there is room; "" for none.
        overhead: In the unit of the axis.
        accuracy: In [0, 1]; bounds of NaN for none.
        chosen: Whether this is the plan to take.
    """

    name: str
    overhead: float
    accuracy: Interval
    chosen: bool = False


def sensitivity_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: ArrayLike,
    *,
    limits: tuple[float, float] | None = None,
    title: str = "",
    value_label: str = "",
) -> Figure:
    """Draw a table of values as colours, e.g. the probability of silent data corruption by layer and bit.

    Cells that were not measured are hatched. Up to 150 cells have their value written in. The figure grows with the
    table: 60 rows and 32 columns stay legible.

    Args:
        rows: Names from top to bottom; what is longer than 36 characters loses its middle.
        columns: Names from left to right.
        values: [rows, columns]; NaN for not measured.
        limits: Values of the lightest and the darkest colour, low < high; what lies outside takes the colour at that
            end. None takes the least (or 0, where none is negative) and the greatest value.
        title: Above the map.
        value_label: What the colours mean, below the title.

    Raises:
        ValueError: The shape is not that of the names, nothing was measured, a value is infinite, or the limits are
            not in order.
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = _check_map(array, (len(rows), len(columns)), limits)
    written = [[_number(value) for value in line] if array.size <= MAX_WRITTEN else [] for line in array]
    names, heads = [_short(name) for name in rows], [_short(name) for name in columns]
    across = max(0.3, *(_width(text, _SMALL) + 0.12 for line in written for text in line), 0.0)
    upright = max(_width(head, 9) for head in heads) > across - 0.06
    foot = (max(_width(head, 9) for head in heads) if upright else 0.15) + 0.15
    width, height = across * len(columns), (0.27 if array.size <= MAX_WRITTEN else 0.19) * len(rows)
    left, above = max(_width(name, 9) for name in names) + 0.3, _head_height(title, value_label)
    note = "hatched: not measured" if np.isnan(array).any() else ""
    ticks = round_ticks(low, high=high)
    marks = [f"{tick:.4g}" for tick in ticks]
    body, bar = max(height, 1.1), max(_width(mark, 9) for mark in marks) + 0.65
    below = max(0.1, foot - (body - height)) + (0.25 if note else 0.05)
    whole = max(left + width + bar, 0.3 + _head_width(title, value_label), 0.3 + _width(note, _SMALL))
    figure = Figure(figsize=(whole, above + body + below), facecolor=PAPER)
    _head(figure, title, value_label)
    axes = _place(figure, (left, below + body - height, width, height))
    norm = Normalize(low, high, clip=True)
    _draw_cells(axes, array, norm, written)
    axes.set_xticks(np.arange(len(columns)) + 0.5, heads, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(np.arange(len(rows)) + 0.5, names, parse_math=False)
    colors = _place(figure, (left + width + 0.22, below + body - min(body, 3.2), 0.16, min(body, 3.2)))
    _draw_scale(colors, norm, ticks, marks)
    if note:
        figure.text(left / whole, 0.1 / (above + body + below), note, color=MUTED, fontsize=_SMALL)
    return figure


def ranking(
    names: Sequence[str],
    intervals: Sequence[Interval],
    *,
    title: str = "",
    value_label: str = "",
    top: int = 30,
) -> Figure:
    """Draw values with their intervals as horizontal whiskers, the largest on top, e.g. layers by vulnerability.

    Args:
        names: Of the things that are ranked; what is longer than 36 characters loses its middle.
        intervals: One a name; without whiskers where bounds are NaN.
        title: Above the plot.
        value_label: Of the axis.
        top: How many to draw, >= 1; a line below says how many there are besides.

    Raises:
        ValueError: No names, not one interval a name, a mean that is not finite, or ``top`` < 1.
    """
    _check_ranks(names, intervals, top)
    order = sorted(range(len(names)), key=lambda index: -intervals[index].mean)
    shown, rest = order[:top], order[top:]
    labels = [_short(names[index]) for index in shown]
    drawn = [intervals[index] for index in shown]
    texts = [_with_bounds(interval) for interval in drawn]
    left = max(_width(label, 9) for label in labels) + 0.3
    right = max(_width(text, _SMALL) for text in texts) + 0.3
    above, below, height = _head_height(title, ""), 0.85 if rest else 0.6, 0.25 * len(shown) + 0.1
    note = f"and {len(rest)} more below, at most {_number(intervals[rest[0]].mean)}" if rest else ""
    whole = max(left + 3.8 + right, 0.3 + _head_width(title, ""), left + 0.3 + _width(note, _SMALL))
    figure = Figure(figsize=(whole, above + height + below), facecolor=PAPER)
    _head(figure, title, "")
    axes = _place(figure, (left, below, whole - left - right, height))
    _draw_ranks(axes, drawn, labels, texts)
    axes.set_xlabel(drawable(value_label), color=INK, fontsize=9.5, parse_math=False)
    if note:
        figure.text(left / whole, 0.12 / (above + height + below), note, color=MUTED, fontsize=_SMALL)
    return figure


def protection_curve(
    points: Sequence[Protection],
    *,
    predicted: Sequence[Protection] | None = None,
    target: float | None = None,
    title: str = "",
    overhead_label: str = "overhead",
) -> Figure:
    """Draw accuracy in percent over what protection costs: measured plans with whiskers, predicted ones hollow.

    Args:
        points: Measured plans; the chosen ones are ringed.
        predicted: Plans whose accuracy was estimated, not measured; None for none.
        target: Accuracy to reach, in [0, 1], as a dotted line; None for no line.
        title: Above the plot.
        overhead_label: Of the x axis, with the unit.

    Raises:
        ValueError: There is no plan, or an overhead or an accuracy is not finite.
    """
    guesses = list(predicted or ())
    _check_plans([*points, *guesses])
    above = _head_height(title, "") + 0.25
    whole, tall = max(7.6, 0.3 + _head_width(title, "")), 3.9 + above
    figure = Figure(figsize=(whole, tall), facecolor=PAPER)
    _head(figure, title, "")
    axes = _place(figure, (0.75, 0.6, whole - 0.95, tall - 0.6 - above))
    _limit(axes, [*points, *guesses], target)
    if target is not None:
        label = f"target {100 * target:.4g}%"
        axes.axhline(100 * target, color=MUTED, linewidth=1.3, linestyle=(0, (1, 2)), label=label, zorder=1)
    _draw_plans(axes, guesses, label="predicted", color=MUTED, markerfacecolor=PAPER, linestyle=(0, (3, 2)))
    level = f"{100 * points[0].accuracy.level:.4g}% interval" if points else ""
    _draw_plans(axes, points, label=f"measured, {level}", color=PALETTE[2], linestyle="-")
    chosen = [plan for plan in [*points, *guesses] if plan.chosen]
    if chosen:
        axes.plot(
            [plan.overhead for plan in chosen], [100 * plan.accuracy.mean for plan in chosen], linestyle="",
            marker="o", markersize=14, markerfacecolor="none", color=PALETTE[1], markeredgewidth=1.8,
            label="chosen", zorder=5,
        )  # fmt: skip
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    bare(axes)
    axes.set_xlabel(drawable(overhead_label), color=INK, fontsize=9.5, parse_math=False)
    axes.set_ylabel("accuracy (%)", color=INK, fontsize=9.5)
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "borderaxespad": 0.3}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1.6, handletextpad=0.5, **style)
    _name_plans(figure, axes, points, guesses)
    return figure


def _check_ranks(names: Sequence[str], intervals: Sequence[Interval], top: int) -> None:
    if not names or len(names) != len(intervals):
        raise ValueError(f"a ranking needs one interval a name, got {len(names)} names and {len(intervals)} intervals")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}; give the number of rows to draw")
    for name, interval in zip(names, intervals, strict=True):
        if not math.isfinite(interval.mean):
            raise ValueError(f"{name}: a ranking needs finite means, got {interval.mean}; leave out what has none")


def _draw_ranks(axes: Axes, drawn: Sequence[Interval], labels: Sequence[str], texts: Sequence[str]) -> None:
    places = np.arange(len(drawn))
    mean, low, high = (np.array([getattr(i, side) for i in drawn]) for side in ("mean", "low", "high"))
    bars = np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)
    style: dict[str, Any] = {"color": PALETTE[2], "markersize": 6, "linewidth": 1.6, "capsize": 2.5}
    axes.errorbar(mean, places, xerr=bars, marker="o", linestyle="", **style)
    least, most = float((mean - bars[0]).min()), float((mean + bars[1]).max())
    start = 0.0 if 0 <= least < most / 2 else least
    margin = 0.03 * ((most - start) or abs(most) or 1.0)
    axes.set_xlim(start - margin, most + margin)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    for place, text in zip(places, texts, strict=True):
        at = axes.get_yaxis_transform()
        axes.text(1.0, float(place), "  " + text, transform=at, va="center", fontsize=_SMALL, color=MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    bare(axes)
    axes.set_yticks(places, labels, parse_math=False)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.locator_params(axis="x", nbins=6)


def _check_plans(plans: Sequence[Protection]) -> None:
    if not plans:
        raise ValueError("a protection curve needs at least one plan, got none; pass measured or predicted plans")
    for plan in plans:
        if not math.isfinite(plan.overhead) or not math.isfinite(plan.accuracy.mean):
            got = f"{plan.overhead} and {plan.accuracy.mean}"
            raise ValueError(f"plan {plan.name}: overhead and accuracy must be finite, got {got}; leave it out")


def _draw_plans(axes: Axes, plans: Sequence[Protection], **style: Any) -> None:
    order = sorted(plans, key=lambda plan: plan.overhead)
    mean, low, high = (100 * np.array([getattr(p.accuracy, side) for p in order]) for side in ("mean", "low", "high"))
    bars = np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)
    x = [plan.overhead for plan in order]
    style = {"marker": "o", "markersize": 6.5, "linewidth": 1.3, "zorder": 3, **style}
    if bars.any():
        axes.errorbar(x, mean, yerr=bars, capsize=3, **style)
    elif order:
        axes.plot(x, mean, **style)


def _limit(axes: Axes, plans: Sequence[Protection], target: float | None) -> None:
    """Leave room around all points, whiskers and the target, for names too; no more than an accuracy can be."""
    least, most = min(plan.overhead for plan in plans), max(plan.overhead for plan in plans) or 1.0
    y = [value for p in plans for value in (p.accuracy.mean, p.accuracy.low, p.accuracy.high) if value == value]
    y += [] if target is None else [target]
    low, high = 100 * np.clip([min(y), max(y)], 0, 1)
    across, up = (most - least) or abs(most), (high - low) or 1.0
    axes.set_xlim(least - 0.07 * across, most + 0.07 * across)
    axes.set_ylim(max(low - 0.09 * up, -1.5), min(high + 0.09 * up, 101.5))


def _name_plans(figure: Figure, axes: Axes, points: Sequence[Protection], guesses: Sequence[Protection]) -> None:
    """Write each name at the first place around its point where it meets nothing; the chosen ones first."""
    to_inch = axes.transData + figure.dpi_scale_trans.inverted()
    whole = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted()).extents
    taken = [box for plans in (points, guesses) for box in _ink(plans, to_inch.transform)]
    for plan in sorted([*points, *guesses], key=lambda plan: not plan.chosen):
        text = _short(plan.name)
        x, y = to_inch.transform((plan.overhead, 100 * plan.accuracy.mean))
        box = free_place((x, y), size=(_width(text, _SMALL), 0.14), inside=whole, taken=taken)
        if text and box:
            taken.append(box)
            at = to_inch.inverted().transform((box[0], (box[1] + box[3]) / 2))
            under = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            style: dict[str, Any] = {"va": "center", "fontsize": _SMALL, "color": INK, "parse_math": False}
            axes.text(float(at[0]), float(at[1]), text, bbox=under, zorder=2.5, **style)


def _ink(plans: Sequence[Protection], place: Callable[[Any], Array]) -> list[Box]:
    """Return boxes that cover points, whiskers and the lines between, in inches."""
    boxes: list[Box] = []
    middles = []
    for plan in sorted(plans, key=lambda plan: plan.overhead):
        x, y = place((plan.overhead, 100 * plan.accuracy.mean))
        middles.append((x, y))
        reach = 0.12 if plan.chosen else 0.06
        boxes.append((x - reach, y - reach, x + reach, y + reach))
        if math.isfinite(plan.accuracy.low):
            low, high = (place((plan.overhead, 100 * v))[1] for v in (plan.accuracy.low, plan.accuracy.high))
            boxes.append((x - 0.05, low - 0.02, x + 0.05, high + 0.02))
    for start, end in itertools.pairwise(middles):
        count = 2 + int(math.dist(start, end) / 0.04)
        steps = np.linspace(start, end, count)
        boxes += [(float(x) - 0.015, float(y) - 0.015, float(x) + 0.015, float(y) + 0.015) for x, y in steps]
    return boxes


def _check_map(array: Array, shape: tuple[int, int], limits: tuple[float, float] | None) -> tuple[float, float]:
    if array.shape != shape or not array.size:
        raise ValueError(f"a map needs one value a row and column, {list(shape)}, got {list(array.shape)}")
    if np.isinf(array).any():
        raise ValueError("a map needs finite values or NaN, got an infinite one; set what was not measured to NaN")
    if np.isnan(array).all():
        raise ValueError("a map needs at least one value that is not NaN, got none; measure something first")
    least, most = float(np.nanmin(array)), float(np.nanmax(array))
    low, high = limits or (min(0.0, least) if least >= 0 else least, most)
    if limits is None and low == high:
        high = low + 1
    if not low < high:
        raise ValueError(f"limits must be low < high, got {low} and {high}; None takes those of the values")
    return low, high


def _draw_cells(axes: Axes, array: Array, norm: Normalize, written: Sequence[Sequence[str]]) -> None:
    axes.pcolormesh(np.ma.masked_invalid(array), cmap=_COLORS, norm=norm, edgecolors=PAPER, linewidth=0.6)
    axes.set_xlim(0, array.shape[1])
    axes.set_ylim(array.shape[0], 0)
    for y, x in np.argwhere(np.isnan(array)):
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=FILL, edgecolor=_HATCH, hatch="/////", linewidth=0))
    for y, line in enumerate(written):
        for x, text in enumerate(line):
            if text:
                color = PAPER if norm(array[y, x]) > 0.45 else INK  # the better contrast of the two
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=_SMALL, color=color)
    _frameless(axes)


def _draw_scale(axes: Axes, norm: Normalize, ticks: Sequence[float], marks: Sequence[str]) -> None:
    steps = np.linspace(norm.vmin or 0.0, norm.vmax or 0.0, 257)
    axes.pcolormesh([0, 1], steps, steps[:-1, None], cmap=_COLORS, norm=norm)
    axes.set_xticks([])
    axes.set_yticks(ticks, marks)
    axes.yaxis.tick_right()
    _frameless(axes)


def _number(value: float) -> str:
    """Write a value in few characters: 12, 0.30, 0.0012, 3e-5, nothing for NaN."""
    if math.isnan(value):
        return ""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:#.2g}".rstrip(".") if 0 < abs(value) < 99.5 else f"{value:.0f}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def _with_bounds(interval: Interval) -> str:
    """Write a mean and its bounds with two digits of half the interval's width."""
    half = (interval.high - interval.low) / 2
    if not half > 0:
        return f"{interval.mean:.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    if digits > 4:
        return f"{interval.mean:.1e} [{interval.low:.1e}, {interval.high:.1e}]"
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _short(name: str) -> str:
    return shorten(drawable(name), longest=_LONGEST)


def _width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a text in inches."""
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    font = font_manager.get_font(font_manager.findfont(properties))
    font.set_size(size, 72)
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / 72


def _head_width(title: str, label: str) -> float:
    return 0.2 + max(_width(drawable(title), _TITLE, bold=True), _width(drawable(label), 9.5))


def _head_height(title: str, label: str) -> float:
    return 0.15 + 0.3 * bool(title) + 0.25 * bool(label)


def _head(figure: Figure, title: str, label: str) -> None:
    width, height = figure.get_size_inches()
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    x, y = 0.15 / width, 1 - 0.13 / height
    figure.text(x, y, drawable(title), color=INK, fontsize=_TITLE, fontweight="bold", **style)
    figure.text(x, y - 0.28 * bool(title) / height, drawable(label), color=MUTED, fontsize=9.5, **style)


def _place(figure: Figure, box: Box) -> Axes:
    """Add axes at (left, bottom, width, height) in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))


def _frameless(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=9, colors=INK, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)
