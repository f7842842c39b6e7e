"""Pictures of worst cases: bounds by layer against what was seen, tolerance, error over the Lipschitz constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftnas.plots import GRID, INK, MUTED, PALETTE, PAPER, Figure, bare, drawable

_LINES = (
    ("fep", "Fep, any image", "v"),
    ("paths", "sum over paths, any image", "s"),
    ("on_images", "sum over paths, these images", "^"),
)


def bound_against_truth(numbers: Mapping[str, Any]) -> Figure:
    """Draw what one failing neuron of each layer does: bounds, and the largest error seen; below, what is certified.

    Args:
        numbers: Of one model, as `ftnas.tolerance` writes them; for synapses there are bounds alone.
    """
    layers = numbers["layers"]
    places = range(1, len(layers) + 1)
    figure = Figure(figsize=(10.9, 6.4), facecolor=PAPER)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, (key, label, marker) in enumerate(_LINES, start=1):
        if all(key in layer for layer in layers):
            values = [layer[key] for layer in layers]
            top.plot(places, values, marker=marker, color=PALETTE[number], label=label, linewidth=1.6, markersize=4)
    if all("local" in entry for layer in layers for entry in layer.get("measured", ())) and numbers.get("local_images"):
        local = [layer["measured"][0]["local"] for layer in layers]
        seen = [layer["measured"][0]["error_first"] for layer in layers]
        few = f"first {numbers['local_images']}"
        top.plot(
            places, local, marker="D", color=PALETTE[4], label=f"signed effects, {few}", linewidth=1.6, markersize=4
        )
        top.plot(places, seen, color=PALETTE[4], label=f"largest error seen, {few}", linestyle=(0, (1.5, 1.2)))
    if all(layer.get("measured") for layer in layers):
        seen = [layer["measured"][0]["error"] for layer in layers]
        top.plot(places, seen, marker="o", color=INK, label="largest error seen", linewidth=1.6, markersize=4)
    top.axhline(numbers["budget"], color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
    top.set_yscale("log")
    top.set_ylabel("error of a logit, one failure", color=INK)
    top.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _certified(bottom, layers, places)
    for axes in (top, bottom):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        bare(axes)
    bottom.set_xlabel("layer, from the input (dotted above: the budget)", color=INK)
    title = f"{numbers['model']}: {numbers['failures']['kind']} of one neuron, bound and truth"
    top.set_title(drawable(title), loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    figure.subplots_adjust(left=0.08, right=0.765, top=0.94, bottom=0.08, hspace=0.12)
    return figure


def _certified(axes: Any, layers: Sequence[Mapping[str, Any]], places: range) -> None:
    """Draw the share of images whose answers are certified, for each number of failing neurons."""
    counts = sorted({entry["failing"] for layer in layers for entry in layer.get("measured", ())})
    for number, count in enumerate(counts, start=1):
        found = [{e["failing"]: e for e in layer["measured"]}.get(count) for layer in layers]
        kept = [float("nan") if entry is None else 100 * entry["kept"] for entry in found]
        sure = [float("nan") if entry is None else 100 * entry["certified"] for entry in found]
        color = PALETTE[number % len(PALETTE)]
        axes.plot(places, sure, color=color, marker="o", markersize=4, linewidth=1.6, label=f"{count} fail: certified")
        axes.plot(places, kept, color=color, linestyle=(0, (1.5, 1.2)), linewidth=1.4, label="least seen")
        if all(entry is not None and "local_certified" in entry for entry in found):
            signed = [100 * entry["local_certified"] for entry in found if entry is not None]
            axes.plot(
                places, signed, color=color, marker="D", markersize=3, linewidth=0.9, label="signed, first images"
            )
    axes.set_ylim(-4, 104)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("answers kept (%)", color=INK)
    if counts:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower left", bbox_to_anchor=(1.01, 0.0))


def error_over_lipschitz(series: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Draw the output error of several networks over the Lipschitz constant of their activation function.

    Args:
        series: One a network: ``name``, and for each of ``lipschitz`` the ``error`` seen and the ``bound``.
        title: Above the plot.
    """
    figure = Figure(figsize=(8.6, 4.8), facecolor=PAPER)
    axes = figure.add_axes((0.1, 0.13, 0.62, 0.77))
    for number, one in enumerate(series):
        color = PALETTE[number % len(PALETTE)]
        dash = "-" if number < len(PALETTE) else (0, (5, 1.5))
        axes.plot(
            one["lipschitz"], one["error"], color=color, linestyle=dash, marker="o", markersize=3.5, label=one["name"]
        )
        axes.plot(one["lipschitz"], one["bound"], color=color, linestyle=(0, (1, 2)), linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Lipschitz constant K", color=INK)
    axes.set_ylabel("error of the output (dotted: Fep)", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    bare(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1.0), labelcolor=INK)
    axes.set_title(drawable(title), loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False)
    return figure
