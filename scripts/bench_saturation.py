"""What a saturation costs: a forward of a network as it is, saturated (per forward), and folded; medians in ms.

The last columns give what folding takes, once per load of the weights: the function of every weight, written over it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import ftnas
from ftnas import baselines
from ftnas.saturated import FUNCTIONS


def median_ms(model: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Return the median time of a forward, in ms, after three that are not counted."""
    times = []
    with torch.no_grad():
        for _ in range(3 + repeats):
            start = time.perf_counter()
            model(images)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def fold_ms(name: str, function: str, repeats: int) -> float:
    """Return the median time in ms to put the function of every weight in the weight's place."""
    layers = [layer for layer in baselines.create(name).modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    times = []
    with torch.no_grad():
        for _ in range(3 + repeats):
            start = time.perf_counter()
            for layer in layers:
                layer.weight.copy_(FUNCTIONS[function](layer.weight))
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    """Print one line per network, batch and function."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("network batch plain", *(f"{name} {name}-folded {name}-folding" for name in FUNCTIONS))
    for name, repeats in (("resnet20", 40), ("resnet18", 10)):
        for batch in (1, 16):
            images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            row = [median_ms(baselines.create(name).eval(), images, repeats)]
            for function in FUNCTIONS:
                model = ftnas.saturate(baselines.create(name).eval(), function)
                row.append(median_ms(model, images, repeats))
                row.append(median_ms(ftnas.unsaturate(model), images, repeats))
                row.append(fold_ms(name, function, repeats))
            print(name, batch, *(f"{value:.2f}" for value in row))


if __name__ == "__main__":
    main()
