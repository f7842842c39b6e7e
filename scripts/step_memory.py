"""Memory of training steps on a CPU: the peak at a given size, and growth with the number of steps.

Each measurement runs in a process of its own, since a peak cannot be reset: a step of the shared weights of a search,
and one of a discrete network, under adSAF with a clean and a faulty forward. A search holds the momentum of the whole
supernet after some epochs; here it is there from the start.

    python scripts/step_memory.py                 # peaks, 8 cells, 20 channels, 32x32, batch 64 and 128
    python scripts/step_memory.py --steps 2000    # growth over many tiny steps
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftnas.faults import AdSAF
from ftnas.faults.hardware import Hardware
from ftnas.heap import keep_memory
from ftnas.mistakes import positive, to_write
from ftnas.recipe import SgdConfig
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Supernet, build_network, load_space
from ftnas.train import FaultTolerantLoss, move

HARDWARE = Hardware(fault=AdSAF(cells="differential", stuck_at="max"))
MB = 2**20


def resident_mb() -> float:
    """Return the memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MB


def peak_mb() -> float:
    """Return the most memory that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def live_tensors() -> int:
    """Return how many tensors Python knows of."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def steps(kind: str, space: str, *, cells: int, channels: int, batch: int, size: int) -> Callable[[int], None]:
    """Return one training step of a kind (``search`` or ``retraining``) as a function of its number."""
    sized = load_space(space).resized(channels=channels, cells=cells)
    stream = generator(0, "memory")
    images = torch.randn(batch, 3, size, size, generator=stream)
    labels = torch.randint(0, 10, (batch,), generator=stream)
    genotypes = [Genotype.random(sized, generator=stream) for _ in range(20)]
    with isolated(0, "memory"):
        supernet = Supernet(sized, num_classes=10).train()
        network = build_network(genotypes[0], sized, num_classes=10).train()
    model: Any = supernet if kind == "search" else network
    optimizer = SgdConfig(batch_size=batch, lr=0.01, weight_decay=1e-4).optimizer(model)
    loss, parameters = FaultTolerantLoss(model, alpha_l=0.7), list(model.parameters())
    injection = HARDWARE.inject(model, seed=0, errors="soft", draw_on="device").__enter__()

    def step(number: int) -> None:
        genotype = genotypes[number % len(genotypes)]
        forward = partial(supernet, genotype=genotype) if kind == "search" else network
        injection.draw = number
        loss.gradients(forward, injection, images, labels, parameters)
        move(parameters, optimizer, 5.0)

    if kind == "search":  # momentum of all weights, as after some epochs
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)  # zeros would take no memory
    return step


def peak(kind: str, sizes: dict[str, int]) -> dict[str, float]:
    """Return the peak of three steps, and what the process held before the first, in MB."""
    torch.set_num_threads(1)
    keep_memory()
    step = steps(kind, "ftt-weights", **sizes)
    before = resident_mb()
    for number in range(3):
        step(number)
    return {"before_mb": before, "peak_mb": peak_mb()}


def growth(kind: str, number_of_steps: int) -> list[dict[str, float]]:
    """Return memory and live tensors after each tenth of many tiny steps."""
    torch.set_num_threads(1)
    step = steps(kind, "small-8x8", cells=3, channels=4, batch=4, size=8)
    rows = []
    for number in range(1, number_of_steps + 1):
        step(number)
        if number % max(1, number_of_steps // 10) == 0:
            rows.append({"steps": number, "resident_mb": resident_mb(), "tensors": live_tensors()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, help="measure the growth over so many tiny steps, not the peaks")
    sizes = {"cells": 8, "channels": 20, "size": 32}
    parser.add_argument("--cells", type=positive, help="(default: 8)")
    parser.add_argument("--channels", type=positive, help="(default: 20)")
    parser.add_argument("--size", type=positive, help="pixels of the square images (default: 32)")
    parser.add_argument("--batch", type=positive, help="images per step (default: 64 for search, 128 for retraining)")
    parser.add_argument("--json", type=to_write, help="file for the result; it is printed as well")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in (*sizes, "batch") if getattr(options, name) is not None}
    if options.steps and given:
        parser.error(f"--steps takes steps of one tiny size; leave out --{', --'.join(given)}")
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for kind, batch in (("search", 64), ("retraining", 128)):
        sizes = {**sizes, "batch": batch, **given}
        with context.Pool(1) as pool:
            job = (
                pool.apply_async(growth, (kind, options.steps))
                if options.steps
                else pool.apply_async(peak, (kind, sizes))
            )
            found[kind] = job.get() if options.steps else {**sizes, **job.get()}
    text = json.dumps({"torch": torch.__version__, "threads": 1, **found}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
