"""What workers of Ray cost and bring: candidates scored by one process, by one worker and by two, in turn.

All score the same candidates of one supernet with one thread each, the weights' way to the workers included. The
variants take turns in every round; figures are wall-clock medians over the rounds.

- efficiency: time of the one process over (workers x time of the workers);
- efficiency without Ray: the same of two plain processes, each with half of the candidates; what the cores can give;
- overhead: what one worker takes longer per candidate than the process, also as a share of the evaluation;
- dispatch: a task that does nothing, on two workers;
- broadcast: the weights of the paper's supernet from the driver's model into a worker's, in parts.

    python scripts/bench_pool.py --json pool.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ftnas.candidates import Candidates, FlatWeights, Terms
from ftnas.faults.hardware import Hardware
from ftnas.heap import keep_memory
from ftnas.pool import Box, InProcess, Pool, PoolConfig
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Supernet, load_space
from ftnas.workers import RayPool, start_ray

FAULT = {"fault": {"name": "mibb", "mac_error_rate": 1e-4}, "layers": "conv2d"}


def silent(*_: Any, **__: Any) -> None:
    """Take events and forget them."""


def make_supernet(space: str) -> Supernet:
    """Return a supernet of a shipped space for ten classes."""
    with isolated(0, "bench"):
        return Supernet(load_space(space), num_classes=10)


def batch_of(side: int, num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one batch of random images float32 [num, 3, side, side] and labels int64 [num]."""
    stream = generator(0, "bench")
    images = torch.randn(num, 3, side, side, generator=stream)
    return [(images, torch.randint(10, (num,), generator=stream))]


class Alone:
    """A process of its own that scores the same candidates without Ray: what two cores can give at all."""

    def __init__(self, options: argparse.Namespace) -> None:
        keep_memory()
        torch.set_num_threads(1)
        candidates, self._genotypes, self._images = work(options)
        self._candidates = candidates(InProcess(threads=1))

    def __call__(self, part: slice) -> list[Any]:
        """Score a part of the candidates."""
        return score_all(self._candidates, self._genotypes[part], self._images)


def alone(options: argparse.Namespace, ends: Connection) -> None:
    """Do parts until there are no more."""
    score = Alone(options)
    while (part := ends.recv()) is not None:
        ends.send(score(part))


class TwoProcesses:
    """Two such processes, each with every other candidate. A context manager."""

    def __init__(self, options: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        pairs = [spawn.Pipe() for _ in range(2)]
        self._ends = [end for end, _ in pairs]
        self._processes = [spawn.Process(target=alone, args=(options, other), daemon=True) for _, other in pairs]

    def __enter__(self) -> TwoProcesses:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            end.send(None)
            process.join()

    def __call__(self) -> list[Any]:
        """Score all candidates."""
        for first, end in enumerate(self._ends):
            end.send(slice(first, None, 2))
        halves = [end.recv() for end in self._ends]
        return [score for pair in itertools.zip_longest(*halves) for score in pair if score is not None]


def work(options: argparse.Namespace) -> tuple[Callable[[Pool], Candidates], list[Genotype], Any]:
    """Return what makes candidates of a pool, the genotypes, and the images."""
    supernet = make_supernet(options.space)
    stream = generator(0, "bench genotypes")
    genotypes = [Genotype.random(supernet.space, generator=stream) for _ in range(options.candidates)]
    hardware = Hardware.model_validate(FAULT)
    make = partial(Candidates, supernet=supernet, hardware=hardware, events=silent)
    return make, genotypes, batch_of(options.side, options.images)


def scoring(pools: dict[str, Pool], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds that each way takes for all candidates, one figure per round."""
    make, genotypes, images = work(options)
    ways: dict[str, Callable[[], Any]] = {}
    for name, pool in pools.items():
        ways[name] = partial(score_all, make(pool), genotypes, images)
    times: dict[str, list[float]] = {name: [] for name in [*ways, "2 processes"]}
    found = {}
    with TwoProcesses(options) as ways["2 processes"]:
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way()
                if number > 0:  # the first round starts processes and fills caches
                    times[name].append(time.perf_counter() - start)
            if any(scores != found["process"] for scores in found.values()):
                raise RuntimeError("the ways do not agree")
    return times


def score_all(candidates: Candidates, genotypes: Sequence[Genotype], images: Any) -> list[Any]:
    """Score the candidates on a new version of the weights."""
    with candidates.weights(seed=0):
        return candidates.score(genotypes, images, Terms(alpha_r=0.5))


class Load:
    """The worker's part of a broadcast: fetch the vector, copy it into the model; returns seconds of both."""

    def __init__(self, supernet: Supernet) -> None:
        self._flat = FlatWeights(supernet)

    def __call__(self, vector: Box[Any]) -> tuple[float, float]:
        """Take one version of the weights."""
        start = time.perf_counter()
        fetched = vector.get()
        middle = time.perf_counter()
        self._flat.write(fetched)
        return middle - start, time.perf_counter() - middle


def broadcast(pool: Pool, options: argparse.Namespace) -> dict[str, float]:
    """Return the median milliseconds of each part of a broadcast to one worker, and of the whole."""
    supernet = make_supernet(options.broadcast_space)
    flat, job = FlatWeights(supernet), pool.put(Load(supernet))
    parts: list[list[float]] = []
    for _ in range(4 * options.rounds + 2):
        start = time.perf_counter()
        vector = flat.read()
        read = time.perf_counter()
        box = pool.put(vector)
        put = time.perf_counter()
        fetch, load = next(iter(pool.map(job, [box]))).get()
        parts.append([read - start, put - read, fetch, load, time.perf_counter() - start])
    names = ("read", "put", "fetch", "load", "total")
    medians = [statistics.median(column) for column in zip(*parts[2:], strict=True)]
    size = {"parameters": sum(p.numel() for p in supernet.parameters()), "megabytes": vector.nbytes / 1e6}
    return size | {f"{name}_ms": 1e3 * value for name, value in zip(names, medians, strict=True)}


def dispatch(pool: Pool, num: int = 1000) -> float:
    """Return the milliseconds of a task that does nothing, the driver's part and Ray's included."""
    job = pool.put(nothing)
    for size in (10, num):
        start = time.perf_counter()
        for _ in pool.map(job, range(size)):
            pass
    return 1e3 * (time.perf_counter() - start) / num


def nothing(task: int) -> int:
    """Do nothing."""
    return task


def summary(times: dict[str, list[float]], candidates: int) -> dict[str, Any]:
    """Return efficiency and overhead from the rounds' medians."""
    names = ("process", "1 worker", "2 workers", "2 processes")
    process, one, two, bare = (statistics.median(times[name]) for name in names)
    return {
        "candidate_s": process / candidates,
        "efficiency_1": process / one,
        "efficiency_2": process / (2 * two),
        "efficiency_2_without_ray": process / (2 * bare),
        "overhead_ms": 1e3 * (one - process) / candidates,
        "overhead_share": (one - process) / process,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="small-16x16", help="space of the candidates (default: small-16x16)")
    parser.add_argument("--side", type=int, default=16, help="height and width of the images (default: 16)")
    parser.add_argument("--images", type=int, default=250, help="images per candidate (default: 250)")
    parser.add_argument("--candidates", type=int, default=24, help="candidates per round (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--broadcast-space", default="ftt-weights", help="of the broadcast (default: ftt-weights)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    stop = start_ray(None, cpus=3)
    try:
        workers = {f"{number} worker{'s' * (number > 1)}": number for number in (1, 2)}
        pools: dict[str, Pool] = {"process": InProcess(threads=1)}
        pools |= {name: RayPool(PoolConfig(workers=number), events=silent) for name, number in workers.items()}
        times = scoring(pools, options)
        result = summary(times, options.candidates) | {"broadcast": broadcast(pools["1 worker"], options)}
        result["dispatch_ms"] = dispatch(pools["2 workers"])
        for pool in pools.values():
            pool.close()
    finally:
        stop()
    result |= {"seconds": times, "cores": os.cpu_count(), "torch": torch.__version__, "machine": platform.machine()}
    result |= {"options": {key: str(value) for key, value in vars(options).items() if key != "json"}}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
