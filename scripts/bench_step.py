"""What a fault-tolerant step costs, as a ratio to our own plain step: one thread, one process, CPU time.

A step of the shared weights trains one random genotype of the space on one batch, a step of the controller scores one.
Plain: one forward, no fixed point, no faults. Fault-tolerant: a clean and a faulty forward, weights and features
quantized in both. All variants take turns on the same genotype and images in every round, each with a supernet of its
own. The time of a step in a round is the shortest of several repeats, and a ratio is the median over the rounds of the
ratio within a round, so that whatever else the machine does hits little, and all alike. `discrete` is the plain step of
the genotype's discrete network.

    python scripts/bench_step.py --json step.json
    python scripts/bench_step.py --cells 5 --channels 8 --batch 16 --size 16 --rounds 5 --profile
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ftnas.evaluate import score, top1
from ftnas.faults import AdSAF, Injection, MiBB, drawing, hits
from ftnas.faults.hardware import Hardware
from ftnas.heap import keep_memory
from ftnas.mistakes import positive, to_write, told
from ftnas.quantize import FixedPoint
from ftnas.recipe import SgdConfig
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Supernet, build_network, load_space
from ftnas.space.supernet import copy_path
from ftnas.train import FaultTolerantLoss, move

Step = Callable[[Genotype], None]
SGD = SgdConfig(batch_size=1, lr=0.01, weight_decay=1e-4)
HARDWARE = {
    "mibb": ("ftt-features", Hardware(fault=MiBB(mac_error_rate=1e-4)), 0.5),
    "adsaf": ("ftt-weights", Hardware(fault=AdSAF(cells="differential", stuck_at="max")), 0.7),
}
TARGETS = {
    "mibb": {"train": 2.4, "controller": 2.4, "supernet/discrete": 1.05},
    "adsaf": {"train": 2.2, "controller": 2.2, "supernet/discrete": 1.05},
}
PARTS = ("quantization", "drawing", "injection", "convolution", "rest")


@dataclass(frozen=True)
class Bench:
    """The sizes of one measurement."""

    cells: int
    channels: int
    batch: int
    size: int
    rounds: int
    repeats: int


class Bed:
    """The steps of one fault model at one size, each on a supernet of its own, with what they train on."""

    def __init__(self, name: str, bench: Bench, stack: contextlib.ExitStack) -> None:
        space, hardware, alpha = HARDWARE[name]
        self.space = load_space(space).resized(channels=bench.channels, cells=bench.cells)
        stream = generator(0, "bench-step")
        self.images = torch.randn(bench.batch, 3, bench.size, bench.size, generator=stream)
        self.labels = torch.randint(0, 10, (bench.batch,), generator=stream)
        self.stream = stream
        tolerant, plain, scored, evaluated = (self._supernet() for _ in range(4))
        scored.eval()
        evaluated.eval()
        training = stack.enter_context(hardware.inject(tolerant, seed=0, errors="soft", draw_on="device"))
        scoring = stack.enter_context(hardware.inject(scored, seed=0, errors="soft"))
        self._plain = plain
        self.steps: dict[str, Step] = {
            "plain": self._plain_step(plain),
            "train": self._tolerant_step(tolerant, training, alpha),
            "evaluation": partial(self._evaluate, evaluated),
            "controller": partial(self._score, scored, scoring),
        }

    def _supernet(self) -> Supernet:
        with isolated(0, "bench-step"):
            return Supernet(self.space, num_classes=10)

    def _plain_step(self, supernet: Supernet) -> Step:
        optimizer, parameters = SGD.optimizer(supernet), list(supernet.parameters())

        def step(genotype: Genotype) -> None:
            _descend(F.cross_entropy(supernet(self.images, genotype), self.labels), parameters, optimizer)

        return step

    def _tolerant_step(self, supernet: Supernet, hardware: Injection, alpha: float) -> Step:
        optimizer, loss = SGD.optimizer(supernet), FaultTolerantLoss(supernet, alpha_l=alpha)
        parameters = list(supernet.parameters())

        def step(genotype: Genotype) -> None:
            loss.gradients(partial(supernet, genotype=genotype), hardware, self.images, self.labels, parameters)
            move(parameters, optimizer, SGD.grad_clip)

        return step

    @torch.no_grad()
    def _evaluate(self, supernet: Supernet, genotype: Genotype) -> None:
        float((top1(supernet(self.images, genotype)) == self.labels).float().mean())

    def _score(self, supernet: Supernet, hardware: Injection, genotype: Genotype) -> None:
        draw = hardware.draw
        score(
            partial(supernet, genotype=genotype), hardware, [(self.images, self.labels)], alpha_r=0.5, first_draw=draw
        )

    def discrete(self, genotype: Genotype) -> Step:
        """Return the plain step of a genotype's discrete network, built beforehand."""
        with isolated(0, "bench-step"):
            network: nn.Module = build_network(genotype, self.space, num_classes=10)
        copy_path(self._plain, genotype, network)  # type: ignore[arg-type]
        optimizer, parameters = SGD.optimizer(network), list(network.parameters())

        def step(genotype: Genotype) -> None:
            _descend(F.cross_entropy(network(self.images), self.labels), parameters, optimizer)

        return step


def _descend(loss: torch.Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    move(parameters, optimizer, SGD.grad_clip)


def measure(bed: Bed, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each step in every round, the shortest of its repeats; the first round warms up."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        genotype = Genotype.random(bed.space, generator=bed.stream)
        steps = {**bed.steps, "discrete": bed.discrete(genotype)}
        steps["discrete"](genotype)  # a network that is new every round has its buffers made here
        found: dict[str, list[float]] = defaultdict(list)
        for repeat in range(repeats if number else 1):
            names = list(steps)
            turn = (number + repeat) % len(names)  # none always follows the same one
            for name in names[turn:] + names[:turn]:
                gc.collect()
                start = time.process_time()
                steps[name](genotype)
                found[name].append(time.process_time() - start)
        if number:
            for name, each in found.items():
                times[name].append(min(each))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return, for each pair of steps, the median of the ratio within a round, and its smallest and largest value."""
    pairs = {"train": ("train", "plain"), "controller": ("controller", "evaluation"),
             "supernet/discrete": ("plain", "discrete")}  # fmt: skip
    found = {}
    for name, (above, below) in pairs.items():
        each = [a / b for a, b in zip(times[above], times[below], strict=True)]
        found[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    return found


@contextlib.contextmanager
def named_parts() -> Iterator[None]:
    """Give the functions that quantize, draw and inject their names in a profile."""
    places: list[tuple[Any, str, str]] = [
        (FixedPoint, "grid", "quantization"),
        (FixedPoint, "round", "quantization"),
        (drawing.Drawing, "_drawn", "drawing"),
        (hits.Hits, "apply", "injection"),
    ]

    def named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part:{part}"):
                return function(*args, **kwargs)

        return call

    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, named(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)


def part_of(event: Any) -> str:
    """Return the part of a step that a profiler event belongs to: that of the innermost named event around it."""
    while event is not None:
        name = event.name
        if name.startswith("part:"):
            return str(name.removeprefix("part:"))
        if name in ("aten::conv2d", "aten::convolution", "ConvolutionBackward0"):
            return "convolution"
        if name.startswith("_") and name.endswith("Backward"):  # our own autograd functions
            return "quantization"
        event = event.cpu_parent
    return "rest"


def shares(step: Step, genotype: Genotype) -> dict[str, float]:
    """Return the share of each part in the time of one step (of three, profiled; profiling itself adds to `rest`)."""
    step(genotype)
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        for _ in range(3):
            step(genotype)
        total = time.perf_counter() - start
    found = dict.fromkeys(PARTS, 0.0)
    for event in seen.events() or ():
        found[part_of(event)] += event.self_cpu_time_total * 1e-6
    found["rest"] = total - sum(found[part] for part in PARTS[:-1])
    return {part: seconds / total for part, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive, default=8)
    parser.add_argument("--channels", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--size", type=positive, default=32, help="pixels of the square images (default: 32)")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="genotypes, each stepped once by every variant (default: 5)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="steps of each variant per genotype (default: 3)")
    parser.add_argument("--fault", choices=sorted(HARDWARE), action="append", help="may be given again (default: both)")
    parser.add_argument("--profile", action="store_true", help="also print the share of each part of a step")
    parser.add_argument("--json", type=to_write, help="file for the result; it is printed as well")
    options = parser.parse_args()
    bench = Bench(options.cells, options.channels, options.batch, options.size, options.rounds, options.repeats)
    torch.set_num_threads(1)
    keep_memory()
    results: dict[str, Any] = {}
    for name in options.fault or ["mibb", "adsaf"]:
        with contextlib.ExitStack() as stack:
            bed = Bed(name, bench, stack)
            times = measure(bed, bench.rounds, bench.repeats)
            results[name] = {"ratios": ratios(times), "targets": TARGETS[name],
                             "median_s": {step: statistics.median(each) for step, each in times.items()}}  # fmt: skip
            if options.profile:
                genotype = Genotype.random(bed.space, generator=bed.stream)
                results[name]["shares"] = {which: shares(step, genotype) for which, step in bed.steps.items()}
                print(f"{name:<12}", *(f"{part:>13}" for part in PARTS))
                for which, row in results[name]["shares"].items():
                    print(f"  {which:<10}", *(f"{row[part]:13.1%}" for part in PARTS))
    record = {**vars(bench), "threads": 1, "torch": torch.__version__, "machine": platform.machine(), "faults": results}
    text = json.dumps(record, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    with told():
        main()
