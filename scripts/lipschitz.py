"""Output error of networks over the Lipschitz constant of their activation function (*When Neurons Fail*, Figure 3).

Eight fully connected networks of sigmoid(4 K x), with weights that stay the same for every K; in the first layer of
each the same share of neurons crashes. Printed: how fast error and Fep grow with K where both are smooth, as powers.

    python scripts/lipschitz.py --picture docs/results/error-over-lipschitz
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ftnas import boundplots, plots, rng
from ftnas.bounds import Failures, summarize
from ftnas.bounds.attack import Attack
from ftnas.bounds.fep import Chain, fep

WIDTHS = (32, 64)
DEPTHS = (1, 2, 3, 4)
CONSTANTS = tuple(float(k) for k in np.geomspace(1 / 64, 16, 21))
FAILING = 1 / 8


@torch.no_grad()
def network(depth: int, width: int, constant: float) -> nn.Sequential:
    """Return the network; its weights, uniform in [-1, 1] / sqrt(inputs), depend on depth and width alone.

    The factor 4 K is in the weights before each sigmoid, so that a neuron is what it sends.
    """
    sizes = [64, *[width] * depth, 1]
    layers: list[nn.Module] = []
    with rng.isolated(0, "lipschitz", depth, width):
        for into, out in itertools.pairwise(sizes):
            layers += [nn.Linear(into, out), nn.Sigmoid()]
            nn.init.uniform_(layers[-2].weight, -(into**-0.5), into**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    model = nn.Sequential(*layers[:-1]).double()
    for module in model[:-1:2]:
        module.weight.mul_(4.0 * constant)  # type: ignore[operator]
    return model


def measure(depth: int, width: int, *, samples: int, draws: int) -> dict[str, Any]:
    """Return error and Fep over K; inputs are uniform in [0, 1]."""
    inputs = torch.rand(samples, 64, generator=rng.generator(0, "lipschitz", "inputs"))
    failing, errors, bounds = int(width * FAILING), [], []
    for constant in CONSTANTS:
        summary = summarize(network(depth, width, constant), (64,))
        generator = rng.generator(0, "lipschitz", "failures", depth, width)
        attack = Attack(summary, inputs, Failures())
        errors.append(attack.run(summary.layers[0], failing, draws=draws, generator=generator)["error"])
        bounds.append(fep(Chain.of(summary), [failing] + [0] * (depth - 1), 1.0))
    name = f"{depth} x {width}"
    return {"name": name, "depth": depth, "lipschitz": list(CONSTANTS), "error": errors, "bound": bounds}


def growth(one: Mapping[str, Any], key: str, *, most: float = 0.25) -> float:
    """Return the slope of log error over log K for K up to ``most``."""
    chosen = [(k, value) for k, value in zip(one["lipschitz"], one[key], strict=True) if k <= most]
    return float(np.polyfit(*np.log(np.array(chosen)).T, 1)[0])


def main() -> None:
    """Measure, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--draws", type=int, default=50)
    given = parser.parse_args()
    series = [measure(d, w, samples=given.samples, draws=given.draws) for w in WIDTHS for d in DEPTHS]
    print(
        "| network | power of K, error | power of K, Fep | Fep / error at K = 1/4 | at K = 4 |\n|---|---|---|---|---|"
    )
    for one in series:
        loose = [b / e for b, e in zip(one["bound"], one["error"], strict=True)]
        at = [loose[int(np.argmin(np.abs(np.log(np.array(CONSTANTS) / k))))] for k in (0.25, 4.0)]
        powers = f"{growth(one, 'error'):.2f} | {growth(one, 'bound'):.2f}"
        print(f"| {one['name']} | {powers} | {at[0]:.3g} | {at[1]:.3g} |")
    plots.save(boundplots.error_over_lipschitz(series, title="An eighth of the first layer crashes"), given.picture)


if __name__ == "__main__":
    main()
