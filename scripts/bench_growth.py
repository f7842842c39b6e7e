"""How the cost of fault-tolerant steps grows with channels, cells, pixels and images: a formula, fitted and checked.

The time of a step on N images through K cells is taken as c K + N (a M + b V): M are the multiply-accumulates of one
forward of one image, V the values that its layers write. a, b and c are fitted for each kind of step to some sizes
(least squares of the relative error), and the prediction is compared with what other sizes take. One thread,
CPU time, the shortest of several repeats, the same genotypes at every size.

    python scripts/bench_growth.py --json growth.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import HARDWARE, Bed, Bench
from torch import nn

from ftnas.heap import keep_memory
from ftnas.models import count
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Space, build_network, load_space


@dataclass(frozen=True)
class Size:
    """Channels of the first cell, number of cells, pixels of a side, images."""

    channels: int
    cells: int
    pixels: int
    images: int


FITTED = (Size(4, 5, 16, 16), Size(8, 5, 16, 16), Size(4, 8, 16, 16), Size(4, 5, 32, 8), Size(10, 5, 16, 32))
CHECKED = (Size(6, 5, 24, 16), Size(8, 8, 16, 32), Size(12, 8, 32, 16))
STEPS = ("plain", "train", "evaluation", "controller")


def work(genotype: Genotype, space: Space, size: Size) -> tuple[float, float]:
    """Return the multiply-accumulates and the values written of one forward of one image."""
    with isolated(0, "bench-growth"):
        network = build_network(genotype, space, num_classes=10)
    values = 0

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal values
        values += output.numel()

    macs = count(network, (3, size.pixels, size.pixels)).flops / 2
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size.pixels, size.pixels))
    return macs, float(values)


def measured(fault: str, sizes: list[Size], *, genotypes: int, repeats: int) -> list[dict[str, Any]]:
    """Return, for each size, the work of one image and the seconds of each kind of step, averaged over genotypes."""
    space, stream = load_space(HARDWARE[fault][0]), generator(0, "bench-growth")
    chosen = [Genotype.random(space, generator=stream) for _ in range(genotypes)]
    rows = []
    with contextlib.ExitStack() as stack:
        for size in sizes:
            channels, cells, pixels, images = astuple(size)
            bed = Bed(fault, Bench(cells, channels, images, pixels, 1, repeats), stack)
            best = {(name, index): float("inf") for name in STEPS for index in range(genotypes)}
            for repeat in range(repeats + 1):  # the first one warms up
                for index, genotype in enumerate(chosen):
                    for name in STEPS:
                        gc.collect()
                        start = time.process_time()
                        bed.steps[name](genotype)
                        if repeat:
                            best[name, index] = min(best[name, index], time.process_time() - start)
            each = [work(genotype, bed.space, size) for genotype in chosen]
            seconds = {name: sum(best[name, index] for index in range(genotypes)) / genotypes for name in STEPS}
            macs, values = (sum(entry[part] for entry in each) / genotypes for part in (0, 1))
            rows.append({"size": size, "macs": macs, "values": values, "seconds": seconds})
    return rows


def terms(row: dict[str, Any]) -> np.ndarray:
    """Return cells, multiply-accumulates and values of a step at the size of a row, float [3]."""
    size = row["size"]
    return np.array([size.cells, size.images * row["macs"], size.images * row["values"]])


def fit(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return seconds per cell, multiply-accumulate and value, none below 0, by least squares of relative errors."""
    shares = np.array([terms(row) / row["seconds"][name] for row in rows])
    kept = [0, 1, 2]
    while True:  # the term that would be furthest below 0 is left out, one after the other
        found = np.zeros(3)
        scale = shares[:, kept].max(axis=0)
        found[kept] = np.linalg.lstsq(shares[:, kept] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if found.min() >= 0:
            return found
        kept.remove(int(np.argmin(found * shares.max(axis=0))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=sorted(HARDWARE), default="adsaf", help="(default: adsaf)")
    parser.add_argument("--genotypes", type=int, default=3, help="architectures per size (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind per architecture (default: 3)")
    parser.add_argument("--json", type=Path, help="file for the result; it is printed as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows = measured(options.fault, [*FITTED, *CHECKED], genotypes=options.genotypes, repeats=options.repeats)
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "fault": options.fault}
    found["rows"] = [{**row, "size": vars(row["size"])} for row in rows]
    for name in STEPS:
        factors = fit(rows[: len(FITTED)], name)
        checks = []
        for row in rows:
            size, seconds, checked = row["size"], row["seconds"][name], row["size"] in CHECKED
            predicted = float(terms(row) @ factors)
            checks.append({"seconds": seconds, "predicted": predicted, "checked": checked})
            head = f"{name:<11} {'checked' if checked else 'fitted':<8} {size!s:<58}"
            print(f"{head} {seconds:8.3f} s  predicted {predicted:8.3f} s ({predicted / seconds - 1:+.0%})")
        per_cell, per_mac, per_value = (float(factor) for factor in factors)
        found[name] = {"seconds_per_cell": per_cell, "seconds_per_mac": per_mac, "seconds_per_value": per_value}
        found[name]["sizes"] = checks
        print(f"{name:<11} {per_cell:.4f} s K + N ({per_mac * 1e9:.4f} ns M + {per_value * 1e9:.3f} ns V)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
