"""Throughput of the paper's steps on a device, and the whole runs that follow from it: extrapolated, none of them run.

The steps are those of the shipped configs: one of the shared weights and one candidate of the search
`w-ftt-nas-cifar10` (a random genotype each), one of each final training of Table 5, one faulty batch of the campaign.
Images are random; training steps take them as a run does, shuffled and augmented. Every variant of `compute` that is
asked for runs the same steps; `graph` is of final trainings, `joint` of searches.

    python scripts/bench_device.py --device cuda --json device.json
    python scripts/bench_device.py --device cuda --compute plain channels_last+bf16+fused channels_last+bf16+fused+graph
    python scripts/bench_device.py --device cuda --compute tf32 tf32+joint --only search "search, MiBB"
    python scripts/bench_device.py --device cpu --seconds 1 --only search
    python scripts/bench_device.py --host    # what the host takes to issue a step: small tensors, no value read
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftnas import devices
from ftnas.branches import parts_of_a_step
from ftnas.candidates import num_scored
from ftnas.compute import Compute
from ftnas.config import RunConfig, read_config
from ftnas.data import ImageSet
from ftnas.evaluate import score
from ftnas.faults.hardware import Hardware
from ftnas.graphs import WARM_UP, CudaGraph
from ftnas.heap import keep_memory
from ftnas.images import Images
from ftnas.models import build
from ftnas.recipe import SgdConfig
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Supernet, load_space
from ftnas.train import FaultTolerantLoss, gradients_by, move

IMAGES, CLASSES = 50_000, 10
EPOCH = 50
"""Batches after which images are shuffled anew."""
PATHS = 24
"""Random genotypes whose steps are measured in turn: from one to another a step takes up to twice as long."""
SEARCHES = {"search": "w-ftt-nas-cifar10", "search, MiBB": "f-ftt-nas-cifar10"}
TRAININGS = {
    "W-FTT-Net-20": ("train-w-ftt-net-adsaf", "w-ftt-net-20"),
    "ResNet-18": ("train-resnet18-adsaf", "resnet18"),
    "VGG-16": ("train-vgg16-adsaf", "vgg16"),
    "MobileNet-V2": ("train-mobilenet-v2-adsaf", "mobilenet_v2"),
}
COMPUTE = {
    "channels_last": {"channels_last": True},
    "bf16": {"autocast": "bf16"},
    "tf32": {"autocast": "tf32"},
    "fused": {"fused_rounding": True},
    "graph": {"cuda_graph": True},
    "benchmark": {"cudnn_benchmark": True},
}
JOINT = "joint"
"""The part of a variant that computes the clean and the faulty forward of a search's steps as one."""


@dataclass(frozen=True)
class Job:
    """One kind of step: what it does, its images, and how many of it the whole run takes."""

    run: str
    name: str
    step: Callable[[], None]
    images: int
    steps: int


class Bench:
    """The jobs of one variant of `compute` on one device."""

    def __init__(
        self,
        device: torch.device,
        compute: Compute,
        stack: contextlib.ExitStack,
        *,
        pixels: int,
        batch: int | None,
        narrow: bool = False,
        joint: bool = False,
    ) -> None:
        self._device, self._compute, self._stack, self._joint = device, compute, stack, joint
        self._pixels, self._num_images, self._narrow = pixels, batch, narrow
        self._stream = generator(0, "bench-device")

    def _batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_images = self._num_images or num_images
        images = torch.randn(num_images, 3, self._pixels, self._pixels, generator=self._stream)
        labels = torch.randint(0, CLASSES, (num_images,), generator=self._stream)
        return images.to(self._device), labels.to(self._device)

    def _batches(self, recipe: SgdConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give batches for ever, as a run makes them: of random pixels on the device, shuffled and augmented."""
        batch, side = self._num_images or recipe.batch_size, self._pixels
        pixels = torch.randint(0, 256, (EPOCH * batch, 3, side, side), generator=self._stream, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (len(pixels),), generator=self._stream)
        classes = tuple(map(str, range(CLASSES)))
        images = ImageSet(Images(pixels, (3, side, side)), pixels, labels=labels, classes=classes)
        images = images.to(self._device)
        for epoch in itertools.count():
            yield from images.batches(batch, seed=0, epoch=epoch, augment=recipe.augment, drop_last=True)

    def _searching(self, model: nn.Module, recipe: SgdConfig, hardware: Hardware) -> Callable[[Any], None]:
        """Return one step of the shared weights as a function of the forward."""
        injection = self._stack.enter_context(hardware.inject(model, seed=0, errors="soft", draw_on="device"))
        loss = FaultTolerantLoss(model, alpha_l=recipe.alpha_l, compute=self._compute, joint=self._joint)
        optimizer, parameters = recipe.optimizer(model), list(model.parameters())
        sides, batches = parts_of_a_step(model, graphed=False), self._batches(recipe)

        def step(forward: Any) -> None:
            images, labels = next(batches)
            with self._compute.steps():
                loss.gradients(forward, injection, images, labels, parameters, sides)
                move(parameters, optimizer, recipe.grad_clip)

        return step

    def _training(self, model: nn.Module, recipe: SgdConfig, hardware: Hardware) -> Callable[[], None]:
        """Return one step of a final training."""
        injection = self._stack.enter_context(hardware.inject(model, seed=0, errors="soft", draw_on="device"))
        loss = FaultTolerantLoss(model, alpha_l=recipe.alpha_l, compute=self._compute, joint=self._joint)
        optimizer, parameters = recipe.optimizer(model), list(model.parameters())
        graph = CudaGraph() if self._compute.cuda_graph else None
        gradients = gradients_by(model, loss, injection, parameters, graph=graph)
        batches = self._batches(recipe)
        draws = itertools.count()

        def step() -> None:
            images, labels = next(batches)
            with self._compute.steps():
                gradients(images, labels, next(draws))
            move(parameters, optimizer, recipe.grad_clip)

        return step

    def search(self, name: str) -> Iterator[Job]:
        """Give the steps of a search: of the shared weights, and of one candidate."""
        config = read_config(SEARCHES[name])
        stage = config.search
        assert stage is not None
        space = load_space(stage.space)
        space = space.resized(channels=2) if self._narrow else space
        with isolated(0, "bench-device"):
            trained, scored = (Supernet(space, num_classes=CLASSES).to(self._device) for _ in range(2))
        step = self._searching(trained, stage.weights, config.hardware)
        scored.eval()
        injection = config.hardware.inject(scored, seed=0, errors="soft", draw_on="device")
        self._stack.enter_context(injection)
        self._stack.enter_context(injection.weights_shared())
        batch = stage.controller_batch or stage.weights.batch_size
        images, labels = self._batch(batch)

        paths = [Genotype.random(space, generator=generator(number, "bench-device")) for number in range(PATHS)]
        to_train, to_score = itertools.cycle(paths), itertools.cycle(paths)

        def weights_step() -> None:
            step(partial(trained, genotype=next(to_train)))

        def candidate() -> None:
            forward = partial(scored, genotype=next(to_score))
            batch = [(images, labels)]
            score(forward, injection, batch, alpha_r=stage.alpha_r, first_draw=injection.draw, joint=self._joint)

        own = int(IMAGES * stage.split)
        passes = num_scored(IMAGES - own, batch)
        updates = (stage.epochs - stage.warmup_epochs) * (stage.controller_steps or passes)
        derive = stage.derive  # a clean forward, and one for each draw, where a candidate of the search has two
        derived = (derive.samples * (1 + derive.draws) + derive.finalists * (1 + derive.final_draws)) / 2
        yield Job(
            name,
            "shared weights",
            weights_step,
            stage.weights.batch_size,
            stage.epochs * (own // stage.weights.batch_size),
        )
        yield Job(name, "candidate", candidate, batch, updates * stage.rollouts + round(derived * passes))

    def training(self, name: str) -> Iterator[Job]:
        """Give the step of one final training, and a faulty batch of its campaign."""
        config_name, model_name = TRAININGS[name]
        config: RunConfig = read_config(config_name)
        assert config.train is not None and config.campaign is not None
        recipe, campaign = config.train.recipe, config.campaign
        chosen = config.train.models[model_name]
        if self._narrow:
            chosen = chosen.model_copy(update={"channels": 2} if chosen.genotype else {"width": 1 / 16})
        model, evaluated = (
            build(chosen, num_classes=CLASSES, in_channels=3, image_size=self._pixels, seed=0).to(self._device)
            for _ in range(2)
        )
        step = self._training(model.train(), recipe, config.hardware)
        yield Job(name, "training", step, recipe.batch_size, recipe.epochs * (IMAGES // recipe.batch_size))
        evaluated.eval()
        self._stack.enter_context(config.hardware.inject(evaluated, seed=0, errors="hard"))
        images, _ = self._batch(campaign.batch_size)

        @torch.no_grad()
        def evaluation() -> None:
            evaluated(images)

        points = sum(len(sweep.rates) for sweep in campaign.sweeps) * campaign.devices + 1
        yield Job(name, "campaign", evaluation, campaign.batch_size, points * (10_000 // campaign.batch_size))


def seconds_of(job: Job, device: torch.device, *, limit: float, steps: int, passes: int, warm_up: int) -> list[float]:
    """Return the mean seconds of a step in ``passes`` of ``steps`` or more, after ``warm_up``, for about ``limit`` s.

    Within a pass nothing waits for a GPU, as in a run. On a CPU these are seconds of the process, one thread, so that
    other work on the machine counts little.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(warm_up):
        job.step()
    found: list[float] = []
    end = time.perf_counter() + limit
    while len(found) < passes or time.perf_counter() < end:
        wait(device)
        start = clock()
        for _ in range(steps):
            job.step()
        wait(device)
        found.append((clock() - start) / steps)
    return found


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def variant(name: str) -> Compute:
    """Return the `compute` of a name such as ``plain``, ``channels_last+bf16`` or ``tf32+joint``."""
    parts = [] if name == "plain" else name.split("+")
    unknown = [part for part in parts if part not in (*COMPUTE, JOINT)]
    if unknown:
        known = ", ".join((*COMPUTE, JOINT))
        raise argparse.ArgumentTypeError(f"compute is plain, or of {known} joined by +, got {name!r}")
    parts = [part for part in parts if part != JOINT]
    return Compute(**{key: value for part in parts for key, value in COMPUTE[part].items()})


def measure(
    device: torch.device,
    compute: Compute,
    runs: list[str],
    *,
    limit: float,
    pixels: int,
    batch: int | None,
    narrow: bool = False,
    joint: bool = False,
) -> list[dict[str, Any]]:
    """Return one row per kind of step."""
    rows = []
    for run in runs:
        with contextlib.ExitStack() as stack:
            bench = Bench(device, compute, stack, pixels=pixels, batch=batch, narrow=narrow, joint=joint)
            for job in bench.search(run) if run in SEARCHES else bench.training(run):
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = time.perf_counter()
                # a GPU plans each kind of convolution at first sight: all paths are walked twice before
                on_gpu, walks = device.type == "cuda", run in SEARCHES
                steps = (PATHS if walks else 10) if narrow or on_gpu else 3
                warm_up = 2 * PATHS if walks and on_gpu else WARM_UP + 1
                passes = 3 if narrow or on_gpu else 1
                seconds = seconds_of(job, device, limit=limit, steps=steps, passes=passes, warm_up=warm_up)
                whole = time.perf_counter() - start
                # of the host's part, the pass that was disturbed least
                each = min(seconds) if narrow else statistics.median(seconds)
                images = batch or job.images
                row = {"run": job.run, "step": job.name, "images": images, "measured_steps": steps * len(seconds),
                       "ms": 1e3 * each, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
                       "images_per_s": images / each, "whole_run_steps": job.steps,
                       "extrapolated_h": each * job.steps / 3600, "wall_s": whole}  # fmt: skip
                if device.type == "cuda":
                    row["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
                rows.append(row)
                print(f"  {job.run:<13} {job.name:<15} {row['ms']:9.1f} ms  {row['images_per_s']:8.0f} images/s  "
                      f"x {job.steps:>7} = {row['extrapolated_h']:8.2f} h (extrapolated)", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compute",
        nargs="+",
        default=["plain"],
        metavar="VARIANT",
        help=f"plain, or some of {', '.join((*COMPUTE, JOINT))} joined by + (default: plain)",
    )
    parser.add_argument("--only", nargs="+", choices=[*SEARCHES, *TRAININGS], help="(default: all)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of each kind of step, after warming up (default: 5)"
    )
    parser.add_argument("--pixels", type=int, default=32, help="of a side of the square images (default: 32)")
    parser.add_argument("--batch", type=int, help="images of every step, in place of each config's own")
    parser.add_argument(
        "--host",
        action="store_true",
        help="on a CPU, 2 images of 8x8 pixels, 2 channels (baselines: a sixteenth), and by the way that a GPU takes, "
        "on which no value is read: what is left is mostly the host's part",
    )
    parser.add_argument("--json", type=Path, help="file for the result, written after each variant")
    options = parser.parse_args()
    runs = options.only or [*SEARCHES, *TRAININGS]
    if options.host:
        options.device, options.pixels, options.batch = "cpu", 8, 2
        devices.is_readable = lambda _device: False
    try:
        device, variants = torch.device(options.device), {name: variant(name) for name in options.compute}
        torch.zeros(1, device=device)
        for name, compute in variants.items():
            compute.check_device(device, name, obstacle=None)
            others = [run for run in runs if run not in SEARCHES]
            if JOINT not in name.split("+"):
                continue
            compute.check_joint("compute")
            if others:
                raise ValueError(f"{JOINT} is of searches, and not of {others[0]!r}; give --only")
    except (argparse.ArgumentTypeError, RuntimeError, AssertionError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    keep_memory()
    devices.compute_exactly()
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    machine = (
        torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    found: dict[str, Any] = {"device": machine, "torch": torch.__version__, "pixels": options.pixels, "variants": {}}
    for name, compute in variants.items():
        print(f"{name} on {machine}")
        joint = JOINT in name.split("+")
        found["variants"][name] = measure(device, compute, runs, limit=options.seconds, pixels=options.pixels,
                                          batch=options.batch, narrow=options.host, joint=joint)  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
