"""How good the estimates of crashed units are: the studies behind docs/results/crash-estimates.md, one by one.

    python scripts/bounds_study.py width          # b3 against b4 over the width of a layer
    python scripts/bounds_study.py superposition  # layers together against the sum of each (the paper's Figure 2)
    python scripts/bounds_study.py decay          # R in the course of a training (Figure 3)
    python scripts/bounds_study.py ranking        # b1 to b4 against Monte Carlo over networks and inputs (Figure 4)

Each prints its figures, and writes NAME.json, NAME.png and NAME.svg to --out. All networks are dense; the trained ones
learn 8x8 digits. The paper is El Mhamdi et al., *Fatal Brain Damage*.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ftnas import bounds, plots
from ftnas.bounds import Cut, Moments, WithLoss
from ftnas.correlations import correlation_interval
from ftnas.data import DataConfig, load
from ftnas.progress import track
from ftnas.rng import generator, isolated

INK, ORANGE, BLUE, GREEN = plots.PALETTE[:4]
WHAT = ("mean", "variance")
Result = tuple[dict[str, Any], Figure]


def dense(widths: Sequence[int], kind: type[nn.Module], seed: int, *, gain: float = 1.0) -> nn.Sequential:
    """Return a dense net in float64, weights from N(0, gain^2 / inputs), biases from N(0, 0.1^2)."""
    layers: list[nn.Module] = []
    with isolated(seed, "net"):
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layer = nn.Linear(a, b)
            nn.init.normal_(layer.weight, std=gain * a**-0.5)
            nn.init.normal_(layer.bias, std=0.1)
            layers += [layer] + ([kind()] if number < len(widths) - 2 else [])
    return nn.Sequential(*layers).double().eval()


def normal(num: int, size: int, seed: int) -> Tensor:
    """Return inputs from N(0, 1), float64 [num, size]."""
    return torch.randn(num, size, generator=generator(seed, "x"), dtype=torch.float64)


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the digits as normalised vectors, float64 [N, 64], and their labels."""
    (images, labels), *_ = load(DataConfig(name="digits"), split).batches(2000)  # type: ignore[arg-type]
    return images.flatten(1).double(), labels


def train(net: nn.Module, steps: int, *, seed: int, decay: float, seen: Callable[[int], None] = lambda _: None) -> None:
    """Train on the digits with Adam, 128 images a step."""
    x, y = digits("train")
    draw = generator(seed, "batches")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005, weight_decay=decay)
    for step in range(steps):
        seen(step)
        chosen = torch.randint(len(x), (128,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    seen(steps)


def relative(found: Tensor, truth: Tensor) -> float:
    """Return mean absolute error over mean absolute value."""
    return float((found - truth).abs().mean() / truth.abs().mean())


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the exponent of a power law, fitted in logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def axes_of(figure: Figure, index: int, num: int, title: str) -> Axes:
    """Return one of several axes side by side."""
    axes = figure.add_subplot(1, num, index + 1)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    plots.bare(axes)
    axes.grid(axis="y", color=plots.GRID, linewidth=0.8)
    return axes


def width(quick: bool) -> Result:
    """Measure what b3 misses of b4 over the width of a layer: three layers of n units, 8 nets, 4 inputs each."""
    ns, seeds = ([16, 64, 256], 2) if quick else ([16, 32, 64, 128, 256, 512, 1024], 8)
    kinds = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
    found: dict[str, Any] = {"widths": ns, "errors": {}, "slopes": {}}
    with track("width", len(kinds) * len(ns)) as progress:
        for name, kind in kinds.items():
            rows: dict[str, list[float]] = {what: [] for what in WHAT}
            for n in ns:
                errors: dict[str, list[float]] = {what: [] for what in WHAT}
                for seed in range(seeds):
                    cut, x = Cut(dense((n, n, n, 1), kind, seed), "1"), normal(4, n, seed)
                    pair = bounds.linear(cut, x, p=1e-3), bounds.single(cut, x, p=1e-3)
                    for what in WHAT:
                        errors[what].append(relative(getattr(pair[0], what), getattr(pair[1], what)))
                for what in WHAT:
                    rows[what].append(float(np.mean(errors[what])))
                progress.advance()
            found["errors"][name] = rows
            found["slopes"][name] = {what: slope(ns, rows[what]) for what in WHAT}
            print(name, {what: f"{found['slopes'][name][what]:.2f}" for what in WHAT}, rows)
    figure = Figure(figsize=(8.6, 3.2), facecolor=plots.PAPER, layout="constrained")
    for index, what in enumerate(WHAT):
        axes = axes_of(figure, index, 2, f"what b3 misses of the {what} of b4")
        for color, name in zip((INK, ORANGE, BLUE), kinds, strict=True):
            label = f"{name}, slope {found['slopes'][name][what]:.2f}"
            axes.loglog(ns, found["errors"][name][what], "o-", color=color, label=label)
        axes.set_xlabel("units of the layer")
        axes.legend(frameon=False, fontsize=8)
    return found, figure


def superposition(quick: bool) -> Result:
    """Compare crashes in two sets of layers with the sum of each: all 25 pairs of disjoint subsets of four layers."""
    nets = 2 if quick else 10
    places = ("input", "1", "3", "5")
    subsets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
    pairs = [(a, b) for a, b in itertools.combinations(subsets, 2) if not set(a) & set(b)]
    found: dict[str, Any] = {"pairs": len(pairs), "nets": nets, "percent": {}}
    for p in (0.01, 0.1):
        errors: dict[str, list[float]] = {what: [] for what in WHAT}
        with track(f"p={p:g}", nets) as progress:
            for seed in range(nets):
                net, x = dense((4, 4, 4, 4, 2), nn.Sigmoid, seed, gain=2.0), normal(4, 4, seed)
                moments = {s: bounds.exact_jointly([(Cut(net, places[layer]), p) for layer in s], x) for s in subsets}
                for a, b in pairs:
                    both = moments[tuple(sorted(a + b))]
                    for what in WHAT:
                        one, two, all_ = (getattr(m, what) for m in (moments[a], moments[b], both))
                        errors[what].append(100 * float((all_ - one - two).norm() / all_.norm()))
                progress.advance()
        found["percent"][f"{p:g}"] = errors
        for what in WHAT:
            low, median, high = np.quantile(errors[what], [0.05, 0.5, 0.95])
            print(f"p={p:g} {what}: median {median:.2f}%, 5% to 95%: {low:.2f}% to {high:.2f}%")
    figure = Figure(figsize=(8.6, 3.0), facecolor=plots.PAPER, layout="constrained")
    for index, (p_name, errors) in enumerate(found["percent"].items()):
        axes = axes_of(figure, index, 2, f"p = {p_name}: error of the sum, percent")
        for color, what in zip((BLUE, ORANGE), WHAT, strict=True):
            axes.hist(errors[what], bins=30, color=color, alpha=0.6, label=what)
        axes.legend(frameon=False)
    return found, figure


def decay(quick: bool) -> Result:
    """Follow loss and R through a training: estimates, Monte Carlo, and what crashes really do to the loss."""
    steps, samples, p = (200, 200, 0.02) if quick else (3000, 300, 0.02)
    net = dense((64, 50, 25, 10), nn.Sigmoid, 0, gain=2.0)
    x, y = digits("train")
    marks = sorted({int(m) for m in np.geomspace(1, steps + 1, 14)})
    found: dict[str, Any] = {"p": p, "steps": [], "curves": {}}

    def seen(step: int) -> None:
        if step + 1 not in marks:
            return
        cut = Cut(net, "1")
        draws = generator(step, "crashes")
        sampled = bounds.sampled(cut, x, p=p, samples=samples, generator=draws)

        def r(moments: Moments) -> float:
            return float(bounds.loss_shift(net, x, y, moments.mean).mean())

        noise = bounds.loss_shift(net, x, y, sampled.mean)
        with_loss = Cut(WithLoss(net, y), "model.1")
        values = {
            "loss": float(F.cross_entropy(net(x), y).detach()),
            "R, Monte Carlo": float(noise.mean()),
            "R, b3": r(bounds.linear(cut, x, p=p)),
            "R, b4": r(bounds.single(cut, x, p=p)),
            "R, gradient of the weights": float(bounds.loss_shift_from_weights(net, "2", x, y, p=p)),
            "change of the loss, b4": float(bounds.single(with_loss, x, p=p).mean.mean()),
        }
        found["steps"].append(step)
        for name, value in values.items():
            found["curves"].setdefault(name, []).append(value)
        print(step, {name: float(f"{value:.4g}") for name, value in values.items()})

    train(net, steps, seed=0, decay=0.0, seen=seen)
    figure = Figure(figsize=(8.6, 3.2), facecolor=plots.PAPER, layout="constrained")
    axes = axes_of(figure, 0, 2, "loss")
    axes.plot(np.array(found["steps"]) + 1, found["curves"]["loss"], "o-", color=BLUE)
    other = axes_of(figure, 1, 2, f"what crashes with p = {p:g} add to it")
    styles = {"R, Monte Carlo": "o", "R, b3": "-", "R, b4": "--", "change of the loss, b4": ":"}
    for color, (name, style) in zip((INK, ORANGE, BLUE, GREEN), styles.items(), strict=True):
        other.plot(np.array(found["steps"]) + 1, found["curves"][name], style, color=color, label=name)
    for each in (axes, other):
        each.set_xscale("log")
        each.set_xlabel("step")
    other.legend(frameon=False, fontsize=8)
    return found, figure


def networks(name: str, num: int) -> tuple[list[nn.Sequential], Tensor]:
    """Return dense nets that differ, and inputs."""
    if name == "random":
        return [dense((20, 20, 20, 1), nn.ReLU, seed, gain=0.5 + seed / num) for seed in range(num)], normal(10, 20, 99)
    nets = []
    with track("train", num) as progress:
        for seed in range(num):
            net = dense((64, 30 + seed % 5 * 10, 25, 10), nn.Sigmoid, seed, gain=2.0)
            train(net, 100 + 40 * (seed % 7), seed=seed, decay=[0.0, 1e-4, 1e-3][seed % 3])
            nets.append(net)
            progress.advance()
    return nets, digits("test")[0][:10]


def predictions(cut: Cut, x: Tensor, *, p: float, samples: int, seed: int) -> dict[str, list[Tensor]]:
    """Return absolute mean and standard deviation of output 0, [B] each, by every bound and by Monte Carlo."""
    upper = bounds.absolute(cut, x, p=p)[:, 0]
    size = bounds.norm(cut, x, p=p, order="inf")
    found = {"b1": [size, size], "b2": [upper, upper]}
    draw = generator(seed, "crashes")
    moments = {
        "b3": bounds.linear(cut, x, p=p),
        "b4": bounds.single(cut, x, p=p),
        "Monte Carlo": bounds.sampled(cut, x, p=p, samples=samples, generator=draw),
    }
    for name, m in moments.items():
        found[name] = [m.mean[:, 0].abs(), m.variance[:, 0].sqrt()]
    return found


def ranking(quick: bool) -> Result:
    """Rank networks and inputs by b1 to b4, beside Monte Carlo: rank loss (0.5 is chance), error, correlation."""
    num, samples, p = (8, 2000, 0.01) if quick else (30, 10_000, 0.01)
    found: dict[str, Any] = {"p": p, "networks": num, "samples": samples, "results": {}}
    for family, layer in (("random", "input"), ("trained", "1")):
        nets, x = networks(family, num)
        with track(family, num) as progress:
            rows = []
            for seed, net in enumerate(nets):
                rows.append(predictions(Cut(net, layer), x, p=p, samples=samples, seed=seed))
                progress.advance()
        for index, what in enumerate(("mean", "deviation")):
            table = {name: torch.stack([row[name][index] for row in rows]).numpy().T for name in rows[0]}
            found["results"][f"{family}, {what}"] = scores(table, resamples=200 if quick else 1000)
    for name, result in found["results"].items():
        print(name)
        for bound, row in result.items():
            low, high = row["correlation"][1:]
            print(
                f"  {bound}: correlation {row['correlation'][0]:.3f} ({low:.3f} to {high:.3f}), rank loss: networks "
                f"{row['rank_loss_networks']:.3f}, inputs {row['rank_loss_inputs']:.3f}, error {row['error']:.3g}"
            )
    return found, ranking_figure(found["results"])


def scores(table: dict[str, np.ndarray], *, resamples: int) -> dict[str, Any]:
    """Return what each bound is worth against Monte Carlo: arrays [inputs, networks]."""
    truth, result = table.pop("Monte Carlo"), {}
    for name, values in table.items():
        pearson = correlation_interval(values, truth, kind="pearson", resamples=resamples)
        result[name] = {
            "correlation": [pearson.mean, pearson.low, pearson.high],
            "rank_loss_networks": rank_loss(values, truth),
            "rank_loss_inputs": rank_loss(values.T, truth.T),
            "error": float(np.median(np.abs(values - truth) / truth)),
        }
    return result


def rank_loss(values: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of pairs in the wrong order, averaged over the rows of [rows, things]."""
    orders = [np.sign(side[:, :, None] - side[:, None, :]) for side in (values, truth)]
    upper = np.triu_indices(values.shape[1], 1)
    return float((orders[0] != orders[1])[:, upper[0], upper[1]].mean())


def ranking_figure(results: dict[str, Any]) -> Figure:
    """Draw rank losses."""
    figure = Figure(figsize=(8.6, 3.2), facecolor=plots.PAPER, layout="constrained")
    for index, (key, title) in enumerate((("rank_loss_networks", "networks"), ("rank_loss_inputs", "inputs"))):
        axes = axes_of(figure, index, 2, f"pairs of {title} in the wrong order")
        for shift, (color, (name, result)) in enumerate(zip((INK, ORANGE, BLUE, GREEN), results.items(), strict=True)):
            places = np.arange(4) + 0.2 * (shift - 1.5)
            axes.bar(places, [row[key] for row in result.values()], 0.2, color=color, label=name)
        axes.set_xticks(range(4), ["b1", "b2", "b3", "b4"])
        axes.axhline(0.5, color=plots.MUTED, linestyle=":")
    axes.legend(frameon=False, fontsize=8)
    return figure


STUDIES: dict[str, Callable[[bool], Result]] = {
    "width": width, "superposition": superposition, "decay": decay, "ranking": ranking,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/bounds-study"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few networks, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, figure = STUDIES[options.study](options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    plots.save(figure, options.out / options.study)
    (options.out / f"{options.study}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
