r"""Networks trained against crashed units, compared: accuracy under crashes, and the variance that b3 and b4 predict.

Every run folder is one arm: the same config, seeds and images with other ``train.recipe.regularizers`` (the paper's
Figures 5 and 6, section 3.5 of *Fatal Brain Damage*). Names of folders end in ``KIND-STRENGTH``; ``nothing`` is the
control. Arms are paired by training seed: first weights and batches are the same.

    ftnas run crashes-small "train.recipe.regularizers=[]" --out runs/crash-nothing
    ftnas run crashes-small --out runs/crash-dropout-0.1 \
        "train.recipe.regularizers=[{name: dropout, layers: relu, rate: 0.1, unit: channel}]"
    python scripts/crash_training.py runs/crash-*
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ftnas import plots
from ftnas.bounds import Cut, linear, single, superposed
from ftnas.config import config_from
from ftnas.data import load
from ftnas.mistakes import told
from ftnas.models import load_model
from ftnas.progress import track
from ftnas.records import read_comparison
from ftnas.regularizers import chain_of, log_fep
from ftnas.rundir import RunDir
from ftnas.stats import mean_interval, paired_difference

P = 0.1
CUTS = ("features.1", "features.4", "features.7")
"""The activation functions of ``ftnas.baselines:chain_of_convolutions``."""


def arm(path: Path, images: Tensor) -> dict[str, Any]:
    """Return what a run measured, by training seed."""
    records = read_comparison(path / "records.jsonl")
    fault, model = next(iter(records.faults)), records.models[0].name
    rates = [0.0, *records.rates[fault]]
    accuracy = []
    for rate in rates:
        values = records.values(fault, model, [rate])
        assert values is not None
        accuracy.append(values[0].reshape(len(values[0]), -1).mean(axis=1))  # of each seed, over devices and images
    found: dict[str, Any] = {"rates": rates, "accuracy": np.array(accuracy).tolist(), "b3": [], "b4": [], "log_fep": []}
    for file in sorted((path / "train" / model).glob("seed-*/model.pt")):
        network, _ = load_model(file, allow_factory=True)
        failing = [(Cut(network, name, unit="channel"), P) for name in CUTS]
        for name, estimate in (("b3", linear), ("b4", single)):
            found[name].append(float(superposed(failing, images, estimate=estimate).variance.sum(dim=1).mean()))
        found["log_fep"].append(float(log_fep([layer.weight for layer in chain_of(network)]).detach()))
    return found


def table(arms: dict[str, dict[str, Any]]) -> str:
    """Return the arms in Markdown: means over seeds, and differences to the control with Student's interval."""
    control = arms["nothing"]
    rates = control["rates"]
    heads = ["arm", "clean", *[f"{rate:g}" for rate in rates[1:]], f"at {P:g} over nothing", "b3", "b4", "log Fep"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    at = rates.index(P)
    for name, found in arms.items():
        cells = [f"{100 * np.mean(values):.1f}" for values in found["accuracy"]]
        gain = paired_difference(found["accuracy"][at], control["accuracy"][at])
        cells.append(
            "" if name == "nothing" else f"{100 * gain.mean:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        )
        cells += [f"{np.mean(found['b3']):.3g}", f"{np.mean(found['b4']):.3g}", f"{np.mean(found['log_fep']):.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def strengths(arms: dict[str, dict[str, Any]], kind: str) -> list[tuple[float, dict[str, Any]]]:
    """Return the arms of a kind by strength, the control first."""
    own = [(float(name.rsplit("-", 1)[1]), found) for name, found in arms.items() if name.startswith(kind + "-")]
    return sorted([(0.0, arms["nothing"]), *own], key=lambda pair: pair[0])


def draw(arms: dict[str, dict[str, Any]]) -> Figure:
    """Draw accuracy, clean and under crashes, and the predicted variance over the strength of each kind."""
    kinds = {"dropout": "rate of dropout", "variance": "weight of the variance", "fep": "weight of log Fep"}
    figure = Figure(figsize=(8.6, 5.2), facecolor=plots.PAPER, layout="constrained")
    at = arms["nothing"]["rates"].index(P)
    for column, (kind, label) in enumerate(kinds.items()):
        points = strengths(arms, kind)
        names = [f"{strength:g}" for strength, _ in points]
        upper, lower = (figure.add_subplot(2, 3, row * 3 + column + 1) for row in (0, 1))
        for title, index, color in (("clean", 0, plots.PALETTE[3]), (f"crashes, p={P:g}", at, plots.PALETTE[1])):
            intervals = [mean_interval(100 * np.array(found["accuracy"][index])) for _, found in points]
            bars = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
            upper.errorbar(
                names, [i.mean for i in intervals], yerr=bars, color=color, marker="o", capsize=2, label=title
            )
        for title, color in (("b3", plots.PALETTE[2]), ("b4", plots.PALETTE[5])):
            lower.plot(
                names, [np.mean(found[title]) for _, found in points], "o-", color=color, label=f"variance, {title}"
            )
        lower.set_yscale("log")
        lower.set_xlabel(label)
        upper.set_title(kind, loc="left", color=plots.INK, fontsize=10)
        upper.set_ylabel("accuracy (%)" if column == 0 else "")
        for axes in (upper, lower):
            plots.bare(axes)
            axes.grid(axis="y", color=plots.GRID, linewidth=0.8)
            if column == 0:
                axes.legend(frameon=False, fontsize=8)
    return figure


def study(paths: Sequence[Path], num_images: int) -> dict[str, dict[str, Any]]:
    """Return all arms by name, the control first."""
    named = {path.name.removeprefix("crash-"): path for path in paths}
    if "nothing" not in named:
        raise ValueError("no run folder named crash-nothing, the control; train it with regularizers=[]")
    with RunDir.open(named["nothing"]) as run:
        images = load(config_from(run.config).data, "test")
    first, _ = next(images.batches(num_images))
    order = ["nothing", *sorted(set(named) - {"nothing"})]
    with track("arms", len(order)) as progress:
        arms = {}
        for name in order:
            arms[name] = arm(named[name], first)
            progress.advance()
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one an arm")
    parser.add_argument("--images", type=int, default=40, help="test images for b3 and b4 (default: 40)")
    parser.add_argument("--out", type=Path, default=Path("runs/bounds-study"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = study(options.runs, options.images)
    print(table(arms))
    options.out.mkdir(parents=True, exist_ok=True)
    plots.save(draw(arms), options.out / "training")
    (options.out / "training.json").write_text(json.dumps(arms) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with told():
        main()
