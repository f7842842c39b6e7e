"""Several runs of one config with different seeds, taken together: what a new search would give, with intervals.

Every run searches anew, trains anew and measures on devices of its own, so the run is the independent unit: intervals
are Student's t over the runs. Beside it stands the hierarchical bootstrap over run, training seed, device and image.

    for seed in 0 1 2; do ftnas run quickstart seed=$seed "train.seeds=[0,1,2]" --out runs/study-$seed; done
    python scripts/study.py runs/study-* --picture docs/results/quickstart-curves
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ftnas import plots
from ftnas.mistakes import told
from ftnas.records import Comparison, read_comparison
from ftnas.stats import Interval, hierarchical_bootstrap, mean_interval
from ftnas.tables import big, fault_name, rate_label


def accuracies(runs: Sequence[Comparison], fault: str, model: str, rates: Sequence[float]) -> np.ndarray:
    """Return what all runs measured, averaged over rates: float64 [run, training seed, device, image]."""
    found = [run.values(fault, model, rates) for run in runs]
    missing = [number for number, values in enumerate(found) if values is None]
    if missing:
        raise ValueError(f"{model} has no measurement under {fault} at {list(rates)} in run number {missing[0] + 1}")
    arrays = [values[0] for values in found if values is not None]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 3:
        shapes = [list(array.shape) for array in arrays]
        raise ValueError(f"runs must agree in training seeds, devices and images, got {shapes} for {model}")
    return np.stack(arrays)


def check_independent(paths: Sequence[Path]) -> None:
    """Check that all are runs of one config, each with a seed of its own.

    Raises:
        ValueError: One line: two runs with the same seed, or whose configs differ in more than it.
    """
    configs = [_config(path) for path in paths]
    seeds: dict[int, Path] = {}
    for path, config in zip(paths, configs, strict=True):
        seed = config.pop("seed", 0)
        if seed in seeds:
            raise ValueError(f"{path} and {seeds[seed]} have the same seed, {seed}; give runs that differ in seed")
        seeds[seed] = path
        for key in sorted({*config, *configs[0]}):
            if config.get(key) != configs[0].get(key):
                raise ValueError(f"{path} and {paths[0]} are no runs of one config: {key} differs between them")


def _config(path: Path) -> dict[str, Any]:
    """Return what a run was asked for, but for its name, its workers and where its images lie."""
    config = dict(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    data = {key: value for key, value in config.get("data", {}).items() if key not in ("root", "download", "workers")}
    return {**{key: config[key] for key in config if key not in ("name", "description", "pool")}, "data": data}


def over_runs(array: np.ndarray) -> Interval:
    """Return the mean with Student's interval over the runs."""
    return mean_interval(array.reshape(len(array), -1).mean(axis=1))


def percent(interval: Interval, sign: str = "") -> str:
    """Return a mean and its bounds, in percent."""
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def study(paths: Sequence[Path], picture: Path | None) -> str:
    """Return the tables of a study in Markdown, and draw its curves if asked."""
    if len(paths) < 2:
        raise ValueError("a study needs at least two runs, got one")
    check_independent(paths)
    runs = [read_comparison(path / "records.jsonl") for path in paths]
    classes = json.loads((paths[0] / "run.json").read_text(encoding="utf-8"))["num_classes"]
    lines: list[str] = []
    for fault in runs[0].faults:
        rates = runs[0].rates[fault]
        names = [model.name for model in runs[0].models]
        # rate 0 has one device: none. All runs share the test images.
        columns = [[rate] for rate in (0.0, *rates)] + [rates]
        cells = {name: [over_runs(accuracies(runs, fault, name, column)) for column in columns] for name in names}
        lines += [f"### {fault_name(fault)}", "", f"| model | params | FLOPs | clean | {_heads(rates)} | mean |"]
        lines += ["|---|" + "---:|" * (len(columns) + 2)]
        for name in names:
            sizes = [next(model for model in run.models if model.name == name) for run in runs]
            params, flops = (_range([getattr(size, key) for size in sizes]) for key in ("params", "flops"))
            row = " | ".join(percent(interval) for interval in cells[name])
            lines.append(f"| {_md(name)} | {params} | {flops} | {row} |")
        lines += ["", *_differences(runs, fault, names, rates), ""]
        if picture is not None:
            figure = plots.accuracy_curves(
                [_curve(name, [0.0, *rates], cells[name]) for name in names],
                rate_label=rate_label(runs[0].faults[fault]),
                title=f"Accuracy under {fault_name(fault)} faults: mean of {len(runs)} searches",
                chance=1 / classes,
            )
            plots.save(figure, picture)
    return "\n".join(lines)


def _differences(runs: Sequence[Comparison], fault: str, names: list[str], rates: list[float]) -> list[str]:
    first = accuracies(runs, fault, names[0], rates)
    lines = [
        f"| {names[0]} minus | each run | Student over {len(runs)} runs | hierarchical bootstrap |",
        "|---|---|---|---|",
    ]
    for name in names[1:]:
        pairs = first - accuracies(runs, fault, name, rates)
        each = ", ".join(f"{100 * value:+.1f}" for value in pairs.reshape(len(pairs), -1).mean(axis=1))
        bootstrap = hierarchical_bootstrap(pairs, crossed=(3,))
        lines.append(f"| {_md(name)} | {each} | {percent(over_runs(pairs), '+')} | {percent(bootstrap, '+')} |")
    return lines


def _md(text: str) -> str:
    return text.replace("_", "\\_")


def _heads(rates: Sequence[float]) -> str:
    return " | ".join(f"{rate:g}" for rate in rates)


def _range(sizes: Sequence[int]) -> str:
    return big(sizes[0]) if len(set(sizes)) == 1 else f"{big(min(sizes))}–{big(max(sizes))}"


def _curve(name: str, rates: list[float], intervals: Sequence[Interval]) -> plots.Curve:
    chosen = intervals[: len(rates)]
    return plots.Curve(
        name=name,
        rates=rates,
        mean=[interval.mean for interval in chosen],
        low=[max(0.0, interval.low) for interval in chosen],
        high=[min(1.0, interval.high) for interval in chosen],
    )


def main() -> None:
    """Read the runs, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of one config, at least two")
    parser.add_argument("--picture", type=Path, help="write PICTURE.png and PICTURE.svg (one fault model)")
    options = parser.parse_args()
    with told():
        print(study(options.runs, options.picture))


if __name__ == "__main__":
    main()
