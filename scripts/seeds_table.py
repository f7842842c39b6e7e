"""Tables of one run whose models were trained from several seeds: accuracy, what faults cost, differences, thresholds.

Intervals are Student's t (differences: Welch's) over training seeds, on the devices and images that all seeds of a
model share. Where points stopped after different numbers of devices, a star is of the devices that both models have.

    python scripts/seeds_table.py runs/saturation-small --lost 3
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftnas import plots
from ftnas.mistakes import told
from ftnas.records import Comparison, read_comparison
from ftnas.stats import Interval, mean_interval, seed_difference
from ftnas.tables import rate_label


def per_seed(run: Comparison, fault: str, model: str, rate: float) -> np.ndarray:
    """Return the accuracy of each training seed, averaged over devices and images: float64 [seed]."""
    found = run.values(fault, model, [rate])
    if found is None:
        raise ValueError(f"{model} was not measured under {fault} at {rate:g}")
    array = found[0]
    return array.reshape(len(array), -1).mean(axis=1)


def threshold(rates: Sequence[float], accuracies: Sequence[float], *, floor: float) -> float:
    """Return the rate at which accuracy falls to ``floor``, linear in log(rate).

    0 where it is lower at the first rate already, so that nothing measured tells where it fell; NaN where it never is.

    Args:
        rates: Ascending, above 0.
        accuracies: At each of them, in [0, 1].
        floor: In [0, 1].
    """
    for index, (rate, accuracy) in enumerate(zip(rates, accuracies, strict=True)):
        if accuracy >= floor:
            continue
        if index == 0:
            return 0.0
        before, above = rates[index - 1], accuracies[index - 1]
        share = (above - floor) / (above - accuracy)
        return math.exp(math.log(before) + share * (math.log(rate) - math.log(before)))
    return math.nan


def found_at(edges: Sequence[float], rates: Sequence[float]) -> str:
    """Return thresholds in words, the lowest first."""
    reached = sorted(edge for edge in edges if not math.isnan(edge))
    words = [f"{edge:.0e}" if edge else f"at most {rates[0]:g}" for edge in reached]
    return ", ".join(words + [f"above {rates[-1]:g}"] * (len(edges) - len(reached)))


def difference(run: Comparison, fault: str, model: str, reference: str, rate: float) -> str:
    """Return the difference of two models in percent, each on its own devices; a star: no interval has 0."""
    found = run.difference(fault, model, reference, rate)
    if found is None:
        return ""
    if found.over_seeds is None:
        return text(found.shown, "+") + (" *" if found.verdict else "")
    own = seed_difference(per_seed(run, fault, model, rate), per_seed(run, fault, reference, rate))
    return text(own, "+") + (" *" if found.verdict and own.side else "")


def text(interval: Interval, sign: str = "") -> str:
    """Return a mean in percent and half the width of its interval."""
    half = "" if math.isnan(interval.low) else f" ± {50 * (interval.high - interval.low):.1f}"
    return f"{100 * interval.mean:{sign}.1f}{half}"


def tables(run: Comparison, *, lost: float) -> str:
    """Return the tables of all fault models, in Markdown; ``lost`` in [0, 1] makes the thresholds."""
    lines: list[str] = []
    names = [model.name for model in run.models]
    for fault, rates in run.rates.items():
        head = " | ".join(f"{rate:g}" for rate in rates)
        lines += [f"{fault}:", "", f"| model | fault-free | {head} | rate at which {100 * lost:g} points are lost |"]
        lines += ["|---|" + "---:|" * (len(rates) + 2)]
        for name in names:
            clean = per_seed(run, fault, name, 0.0)
            found = [per_seed(run, fault, name, rate) for rate in rates]
            cells = [text(mean_interval(values)) for values in (clean, *found)]
            edges = [
                threshold(rates, [values[seed] for values in found], floor=clean[seed] - lost)
                for seed in range(len(clean))
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {found_at(edges, rates)} |")
        lines += ["", f"| minus {names[0]} | fault-free | {head} |", "|---|" + "---:|" * (len(rates) + 1)]
        for name in names[1:]:
            shown = [difference(run, fault, name, names[0], rate) for rate in (0.0, *rates)]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def picture(run: Comparison, fault: str, path: Path) -> None:
    """Draw accuracy over the rate, with intervals over training seeds, to PATH.png and PATH.svg."""
    rates = [0.0, *run.rates[fault]]
    curves = []
    for model in run.models:
        found = [mean_interval(per_seed(run, fault, model.name, rate)) for rate in rates]
        low = [max(0.0, one.mean if math.isnan(one.low) else one.low) for one in found]
        high = [min(1.0, one.mean if math.isnan(one.high) else one.high) for one in found]
        mean = [one.mean for one in found]
        curves.append(plots.Curve(name=model.name, rates=rates, mean=mean, low=low, high=high))
    plots.save(
        plots.accuracy_curves(curves, rate_label=rate_label(run.faults[fault]), title=f"Accuracy under {fault}"), path
    )


def main() -> None:
    """Read a run, print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--lost", type=float, default=3.0, help="points of accuracy, for the thresholds (default: 3)")
    parser.add_argument("--picture", nargs=2, metavar=("FAULT", "PATH"), help="draw one fault model")
    options = parser.parse_args()
    with told():
        run = read_comparison(options.run / "records.jsonl")
        print(tables(run, lost=options.lost / 100))
        if options.picture:
            picture(run, options.picture[0], Path(options.picture[1]))


if __name__ == "__main__":
    main()
