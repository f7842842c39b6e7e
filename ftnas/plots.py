"""Pictures: accuracy curves, cells, search history. matplotlib without pyplot or global state."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ftnas.layout import CHIP, OUTPUT, REACH, Cell, Edge, Line, Plan, edges, ends, half_width, plan_cell, spread
from ftnas.storage import atomic_write

INK = "#1f2328"
MUTED = "#6e7781"
GRID = "#d8dee4"
FILL = "#eaeef2"
PAPER = "#ffffff"

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common colour vision. The first is the ink.
PALETTE = (INK, "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">")
_WIDE = 14.0  # inches, beyond which two cells side by side would shrink their labels out of sight
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

_FAMILIES = (
    ("none", "#8c959f"),
    ("skip", "#009E73"),
    ("sep_conv", "#0072B2"),
    ("dil_conv", "#CC79A7"),
    ("pool", "#E69F00"),
    ("conv", "#D55E00"),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One model over fault rates; all sequences have one entry a rate.

    Attributes:
        name: For the legend.
        rates: Ascending; 0 for the fault-free device.
        mean: Accuracy in [0, 1].
        low: Lower bound of the interval; NaN where there is none.
        high: Upper bound.
    """

    name: str
    rates: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def accuracy_curves(
    curves: Sequence[Curve],
    *,
    rate_label: str = "fault rate",
    title: str = "",
    chance: float | None = None,
) -> Figure:
    """Draw accuracy in percent over the fault rate, with shaded intervals and names at the lines' ends.

    The axis is logarithmic; rate 0 has a place of its own at the left edge, behind a break mark.

    Args:
        curves: One a model, in the order of colours.
        rate_label: Of the x axis.
        title: Above the plot.
        chance: Accuracy of guessing, in [0, 1], as a dotted line; None for no line.

    Raises:
        ValueError: No curve, or none has a rate above 0.
    """
    rates = sorted({rate for curve in curves for rate in curve.rates if rate > 0})
    if not rates:
        raise ValueError("accuracy curves need a fault rate above 0, got none; add rates to the campaign")
    figure = Figure(figsize=(8.6, 4.8), facecolor=PAPER)
    axes = figure.add_axes((0.085, 0.13, 0.63, 0.77), xscale="log", autoscale_on=False)
    step = math.log10(rates[-1] / rates[0]) / max(1, len(rates) - 1) if len(rates) > 1 else 1.0
    zero = 10 ** (math.log10(rates[0]) - 1.15 * max(step, 0.3))
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, zero, index)
    _rate_axis(axes, rates, zero)
    values = [value for curve in curves for value in (*curve.mean, *curve.low, *curve.high) if value == value]
    bottom = min([*values, 1.0 if chance is None else chance])
    axes.set_ylim(max(0.0, 100 * bottom - 4), min(101.5, 100 * max(values) + 4))
    axes.set_ylabel("accuracy (%)", color=INK)
    axes.set_xlabel(drawable(rate_label), color=INK, parse_math=False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if chance is not None:
        axes.axhline(100 * chance, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        corner = (0.006, 100 * chance)
        axes.annotate(
            "chance", corner, xycoords=("axes fraction", "data"), xytext=(2, 3), textcoords="offset points",
            color=MUTED, fontsize=8.5,
        )  # fmt: skip
    bare(axes)
    axes.set_title(drawable(title), loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    _name_lines(axes, curves)
    return figure


def _style(index: int) -> dict[str, Any]:
    dashes = _DASHES[index // len(PALETTE) % len(_DASHES)]
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": dashes,
    }


def _draw_curve(axes: Axes, curve: Curve, zero: float, index: int) -> None:
    order = sorted(range(len(curve.rates)), key=lambda i: curve.rates[i])
    x = np.array([curve.rates[i] or zero for i in order])
    mean, low, high = (100 * np.array([v[i] for i in order], dtype=float) for v in (curve.mean, curve.low, curve.high))
    style = _style(index)
    faulty = x > zero
    banded = np.pad(faulty & (high >= low), 1)
    alone = (high >= low) & ~(faulty & (banded[:-2] | banded[2:]))  # where no band shows the interval
    if not faulty.all():  # the way from the fault-free device is not a measured slope: thin and dashed
        axes.plot(x[:2], mean[:2], color=style["color"], linewidth=1, linestyle=(0, (2, 2)), alpha=0.7)
    bars = _bars(mean, low, high)[:, alone]
    axes.errorbar(x[alone], mean[alone], yerr=bars, fmt="none", ecolor=style["color"], capsize=2.5, elinewidth=1)
    axes.plot(x[~faulty], mean[~faulty], color=style["color"], marker=style["marker"], markersize=6, linestyle="")
    axes.fill_between(x[faulty], low[faulty], high[faulty], color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(x[faulty], mean[faulty], **style, markersize=6, linewidth=2, label="_" + str(index))


def _bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)


def _rate_axis(axes: Axes, rates: list[float], zero: float) -> None:
    """Tick the measured rates, or the decades where those are too close; ``0`` and a break mark at the left."""
    span = math.log10(rates[-1] / zero)
    close = any(math.log10(b / a) < 0.07 * span for a, b in itertools.pairwise(rates))
    ticks = rates
    if close or len(rates) > 9:
        decades = range(math.ceil(math.log10(rates[0]) - 1e-9), math.floor(math.log10(rates[-1]) + 1e-9) + 1)
        ticks = [10.0**decade for decade in decades] or [rates[0], rates[-1]]
    axes.xaxis.set_major_locator(FixedLocator([zero, *ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter(["0", *map(_power, ticks)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(zero * 10 ** (-0.035 * span), rates[-1] * 10 ** (0.03 * span))
    middle = math.sqrt(zero * rates[0])
    for shift in (-0.008, 0.008):
        x = middle * 10 ** (shift * span)
        slant = 10 ** (0.006 * span)
        axes.plot(
            [x / slant, x * slant], [-0.018, 0.018], transform=axes.get_xaxis_transform(),
            color=INK, linewidth=1, clip_on=False,
        )  # fmt: skip


def _power(rate: float) -> str:
    exponent = math.floor(math.log10(rate) + 1e-9)
    factor = f"{rate / 10.0**exponent:.3g}"
    power = rf"10^{{{exponent}}}"
    return f"${power}$" if factor == "1" else rf"${factor}{{\cdot}}{power}$"


def _name_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each name beside its line's end, spread so that none overlap, with a leader to the end."""
    low, high = axes.get_ylim()
    places = []
    for index, curve in enumerate(curves):
        last = max(range(len(curve.rates)), key=lambda i: curve.rates[i])
        places.append(((100 * curve.mean[last] - low) / (high - low), curve.rates[last], index, curve))
    places.sort(key=lambda end: (end[0], -end[2]))
    gap = min(0.075, 1.0 / max(1, len(places)))
    heights = spread([end[0] for end in places], gap=gap)
    size = 9.5 if gap > 0.05 else 7.5
    for (height, rate, index, curve), placed in zip(places, heights, strict=True):
        style = _style(index)
        right = axes.transAxes.inverted().transform(axes.transData.transform((rate, low)))[0]
        axes.plot(
            [right + 0.012, 1.035, 1.05], [height, placed, placed], transform=axes.transAxes,
            color=style["color"], linewidth=0.8, alpha=0.6, clip_on=False,
        )  # fmt: skip
        axes.plot(
            [1.067], [placed], transform=axes.transAxes, clip_on=False, markersize=6, linestyle="",
            color=style["color"], marker=style["marker"],
        )  # fmt: skip
        name = curve.name if len(curve.name) <= 26 else f"{curve.name[:13]}…{curve.name[-12:]}"
        axes.text(
            1.09, placed, drawable(name), transform=axes.transAxes, va="center", fontsize=size, color=INK,
            parse_math=False,
        )  # fmt: skip


def draw_genotype(genotype: Mapping[str, Any], *, title: str | None = None) -> Figure:
    """Draw the normal and the reduction cell, side by side or, where that is too wide to read, one below the other.

    Every primitive is a chip at the node that sums it, in the colour of its family, so that no two labels meet; an
    edge runs from its source to its chip. Edges that compute nothing are dotted grey.

    Args:
        genotype: ``{"normal": {"2": [["sep_conv_3x3", 0], ...], ...}, "reduce": ...}``, 0 and 1 the cell's inputs; and
                ``{"saturation": {"normal": "tanh", ...}}`` where it decides on functions.
        title: Above the cells; None takes the genotype's name.

    Raises:
        ValueError: It has no cells.
    """
    cells = [(name, genotype[name]) for name in ("normal", "reduce") if isinstance(genotype.get(name), Mapping)]
    if not cells:
        raise ValueError(f"a genotype has cells named normal and reduce, got the keys {sorted(map(str, genotype))}")
    plans = [plan_cell(cell) for _, cell in cells]
    widths = [max(x for x, _ in plan.values()) + 1.2 for plan in plans]
    heights = [max(y for _, y in plan.values()) - min(y for _, y in plan.values()) + 1.5 for plan in plans]
    beside = sum(widths) <= _WIDE
    width, height = (sum(widths), max(heights)) if beside else (max(widths), sum(heights))
    figure = Figure(figsize=(width, height + 0.4), facecolor=PAPER)
    left, top = 0.0, height
    names = {"normal": "normal cell", "reduce": "reduction cell"}
    for (name, cell), plan, w, h in zip(cells, plans, widths, heights, strict=True):
        h = height if beside else h
        axes = figure.add_axes((left / width, (top - h) / (height + 0.4), w / width, h / (height + 0.4)))
        left, top = (left + w, top) if beside else (0.0, top - h)
        middle = (max(y for _, y in plan.values()) + min(y for _, y in plan.values())) / 2
        axes.set_xlim(-0.6, w - 0.6)
        axes.set_ylim(middle - h / 2, middle + h / 2)
        axes.axis("off")
        function = (genotype.get("saturation") or {}).get(name)
        label = names[name] if function is None else f"{names[name]}, weights: {drawable(function)}"
        axes.text(-0.3, middle + h / 2 - 0.2, label, color=MUTED, fontsize=10, va="top")
        _draw_cell(axes, cell, plan)
    text = drawable(str(genotype.get("name") or "") if title is None else title)
    at = (0.3 / width, 1 - 0.15 / (height + 0.4))
    figure.text(*at, text, va="top", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    return figure


def _draw_cell(axes: Axes, cell: Cell, plan: Plan) -> None:
    for node in map(int, cell):
        start = plan[node][0] + half_width(node), plan[node][1]
        end = plan[OUTPUT][0] - half_width(OUTPUT), plan[OUTPUT][1]
        _bezier(axes, (start, end), color=GRID, linewidth=1.6)
    for edge in edges(cell):
        _draw_edge(axes, edge, ends(plan, cell, edge), plan[edge.node])
    for node, (x, y) in plan.items():
        text = {0: r"$c_{k-2}$", 1: r"$c_{k-1}$", OUTPUT: "out"}.get(node, str(node))
        wide = half_width(node)
        axes.add_patch(_box((x - wide, y - 0.2), 2 * wide, 0.4, facecolor=FILL, edgecolor=INK, zorder=6))
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK, zorder=7)


def _draw_edge(axes: Axes, edge: Edge, line: Line, target: tuple[float, float]) -> None:
    color, idle = _color(edge.op), edge.op == "none"
    dashes: Any = (0, (1, 2)) if idle else "-"
    _bezier(axes, line, color=color, linestyle=dashes, linewidth=1.3 if idle else 1.7)
    x, y = line[1]
    axes.plot([x + CHIP, target[0]], [y, target[1]], color=color, linewidth=1.2, linestyle=dashes, zorder=1)
    axes.add_patch(_box((x, y - 0.115), CHIP, 0.23, facecolor=PAPER, edgecolor=color, linestyle=dashes, zorder=4))
    label = drawable(edge.op)
    size = 7.8 * min(1.0, 17 / max(1, len(label)))
    style: dict[str, Any] = {"fontsize": size, "color": MUTED if idle else INK, "zorder": 5, "parse_math": False}
    axes.text(x + CHIP / 2, y, label, ha="center", va="center_baseline", **style)


def _box(corner: tuple[float, float], width: float, height: float, **style: Any) -> FancyBboxPatch:
    shape = f"round,pad=0,rounding_size={0.27 * height}"
    return FancyBboxPatch(corner, width, height, boxstyle=shape, linewidth=1.25, **style)


def _bezier(axes: Axes, line: Line, **style: Any) -> None:
    (x0, y0), (x1, y1) = line
    reach = REACH * (x1 - x0)
    outline = Outline([(x0, y0), (x0 + reach, y0), (x1 - reach, y1), (x1, y1)], [1, 4, 4, 4])
    axes.add_patch(PathPatch(outline, facecolor="none", edgecolor=style.pop("color"), zorder=2, **style))


def _color(op: str) -> str:
    return next((color for part, color in _FAMILIES if part in op), "#56B4E9")


def search_history(
    trials: Sequence[Mapping[str, Any]],
    *,
    updates: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> Figure:
    """Draw the reward of every trial with its moving average, and below it the controller's entropy.

    Args:
        trials: ``reward`` in [0, 1] and ``update``, the controller step (missing: its position).
        updates: ``update`` and ``entropy`` relative to its maximum, in [0, 1]; entries without one are left out.
        title: Above the plot.

    Raises:
        ValueError: No trial has a reward.
    """
    points = [
        (float(trial.get("update", index)), float(trial["reward"]))
        for index, trial in enumerate(trials)
        if trial.get("reward") is not None
    ]
    if not points:
        raise ValueError("a search history needs trials with a reward, got none")
    entropy = [(float(u.get("update", i)), float(u["entropy"])) for i, u in enumerate(updates) if "entropy" in u]
    figure = Figure(figsize=(8.6, 4.6 if entropy else 3.2), facecolor=PAPER)
    grid = figure.add_gridspec(
        2 if entropy else 1, 1, height_ratios=[2.4, 1] if entropy else [1], left=0.085, right=0.98, top=0.9,
        bottom=0.12 if entropy else 0.17, hspace=0.12,
    )  # fmt: skip
    upper = figure.add_subplot(grid[0])
    steps, rewards = np.array(points).T
    means = {step: rewards[steps == step].mean() for step in np.unique(steps)}
    width = max(1, len(means) // 20)
    padded = np.cumsum([0.0, *means.values()])
    high = np.arange(1, len(means) + 1)
    low = np.maximum(0, high - width)
    upper.plot(
        steps,
        rewards,
        linestyle="",
        marker="o",
        markersize=3,
        rasterized=len(points) > 2000,
        color=PALETTE[6],
        alpha=0.55,
        label="trial",
    )
    average = (padded[high] - padded[low]) / (high - low)
    upper.plot(list(means), average, color=INK, linewidth=2, label=f"mean of the last {width} steps")
    upper.set_ylabel("reward", color=INK)
    upper.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    upper.set_title(drawable(title), loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    bottom = upper
    if entropy:
        bottom = figure.add_subplot(grid[1], sharex=upper)
        bottom.plot(*np.array(entropy).T, color=PALETTE[1], linewidth=1.6)
        bottom.set_ylim(-0.04, 1.08)
        bottom.set_ylabel("entropy / max", color=INK)
        upper.tick_params(labelbottom=False)
        bottom.grid(color=GRID, linewidth=0.8)
    upper.grid(color=GRID, linewidth=0.8)
    bottom.set_xlabel("controller step", color=INK)
    for axes in {upper, bottom}:
        bare(axes)
    return figure


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write ``path.png`` and ``path.svg``, each in one step; the same figure gives the same bytes.

    Args:
        figure: What to save.
        path: Without a suffix.

    Returns:
        The two paths.
    """
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "ftnas", "svg.fonttype": "path"}):  # put back on leaving
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            metadata = {"Software": None} if suffix == "png" else {"Date": None, "Creator": None}
            figure.savefig(buffer, format=suffix, dpi=160, metadata=metadata)
            written.append(Path(f"{path}.{suffix}"))
            atomic_write(written[-1], buffer.getvalue())
    return written


def pixels(figure: Figure, *, dpi: int = 80) -> np.ndarray:
    """Return a figure as an image, uint8 [height, width, 3]."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def bare(axes: Axes) -> None:
    """Leave the left and the bottom spine, in the colour of the text."""
    axes.set_axisbelow(True)
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def drawable(text: str) -> str:
    """Replace what the font cannot draw, which would be a box and a warning, by ``?``."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return "".join(char if char == "\n" or font.get_char_index(ord(char)) else "?" for char in text)
