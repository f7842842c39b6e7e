"""A stream of images through the processes of a trained network, beside the simulation of the same network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftnas.nodes.fitting import samples_of, test_set, trained
from ftnas.nodes.live import LiveAnswer, LiveNetwork
from ftnas.nodes.network import SplitNetwork
from ftnas.nodes.study import LiveConfig, NodesConfig
from ftnas.progress import say, track
from ftnas.rundir import RunDir

PERCENTILES = (50, 95, 99, 100)


@dataclass(frozen=True)
class Step:
    """One batch of a stream.

    Attributes:
        first: Number of its first image.
        images: How many there are.
        down: Nodes that were down.
        lost: Those of them whose loss this batch met.
        latency_s: From the call to the answer.
        correct: Right answers; images / classes, as a random guess has it, where no information reached the top.
        simulated: The same of the simulation.
        same: Whether all logits are those of the simulation, bit for bit.
    """

    first: int
    images: int
    down: list[str]
    lost: list[str]
    latency_s: float
    correct: float
    simulated: float
    same: bool


def run_live(config: NodesConfig, folder: RunDir) -> str:
    """Start the processes of a trained variant, stream test images through them, and write what came of it.

    ``live/steps.json`` has every batch, ``live/live.md`` the table.

    Returns:
        The table, Markdown.

    Raises:
        ValueError: The variant is not trained yet, or there are fewer images than asked for.
        RuntimeError: An answer after a loss came later than the time limit for each node that was lost.
    """
    name = config.live.variant or _first_with_skips(config)
    images = test_set(config, samples_of(config, folder)[1])
    if (config.live.images or 0) > len(images):
        raise ValueError(f"live.images: there are {len(images)} test images, got {config.live.images}")
    chosen = images.subset(range(config.live.images or len(images)))
    for node, image in [*config.live.kill.items(), *config.live.hang.items()]:
        if image >= len(chosen):
            raise ValueError(f"{node}: image {image} is never sent, there are images 0 to {len(chosen) - 1}")
    network = trained(config, name, images, seed=config.seed, folder=folder)
    batches = list(chosen.batches(config.live.batch_size))
    with one_thread():
        steps = stream(network, batches, config.live, num_classes=images.num_classes)
    text = summary(steps, title=f"{name}, seed {config.seed}", limit_s=config.live.time_limit_s)
    stage = folder.stage("live")
    stage.write_json("steps.json", [asdict(step) for step in steps])
    stage.write_text("live.md", text)
    late = [step for step in steps if step.lost and step.latency_s > config.live.time_limit_s * len(step.lost)]
    if late:
        raise RuntimeError(
            f"after the loss of {', '.join(late[0].lost)} the answer took {late[0].latency_s:.2f} s, and "
            f"live.time_limit_s is {config.live.time_limit_s:g}"
        )
    return text


def stream(
    network: SplitNetwork, batches: list[tuple[Tensor, Tensor]], live: LiveConfig, *, num_classes: int
) -> list[Step]:
    """Send batches of inputs float [B, *shape] and labels int64 [B] through processes and through the simulation."""
    steps, first = [], 0
    say(f"starting a process for each of {', '.join(network.order)}")
    with torch.no_grad(), LiveNetwork(network, time_limit_s=live.time_limit_s) as nodes:
        early = nodes(batches[0][0]).lost  # the first call of a process takes longer than any other
        if early:
            raise RuntimeError(
                f"{', '.join(sorted(early))} gave no answer within a third of live.time_limit_s="
                f"{live.time_limit_s:g} before anything was lost; give more"
            )
        with track("images", sum(len(labels) for _, labels in batches)) as bar:
            for inputs, labels in batches:
                for name in _due(live.kill, first, len(labels)):
                    say(f"image {first}: the process of {name} is killed")
                    nodes.kill(name)
                for name in _due(live.hang, first, len(labels)):
                    say(f"image {first}: the process of {name} is stopped")
                    nodes.hang(name)
                answer = nodes(inputs)
                if answer.lost:
                    say(f"image {first}: without {', '.join(sorted(answer.lost))} after {answer.latency_s:.3f} s")
                expected = network(inputs, answer.down)
                steps.append(_step(first, labels, answer, expected, num_classes))
                first += len(labels)
                bar.advance(f"down: {', '.join(sorted(answer.down)) or 'none'}", num=len(labels))
    return steps


def summary(steps: list[Step], *, title: str, limit_s: float) -> str:
    """Return Markdown: latency percentiles and accuracy before, at and after each loss."""
    head = ["nodes that are down", "images", *(f"{p}%" if p < 100 else "max" for p in PERCENTILES)]
    lines = [
        f"{title}; latency of a batch of {steps[0].images}, ms",
        "",
        f"| {' | '.join(head)} | accuracy | simulated |",
    ]
    lines.append("|---" * (len(head) + 2) + "|")
    for label, part in _phases(steps).items():
        images = sum(step.images for step in part)
        times = np.percentile([1000 * step.latency_s for step in part], PERCENTILES)
        rates = [100 * sum(getattr(step, key) for step in part) / images for key in ("correct", "simulated")]
        cells = [label, str(images), *(f"{time:.1f}" for time in times), *(f"{rate:.2f}" for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    differ = sum(not step.same for step in steps)
    lines += ["", f"Batches whose logits differ from the simulation's in any bit: {differ} of {len(steps)}."]
    lines += [
        f"The answer after the loss of {', '.join(step.lost)} took {step.latency_s:.3f} s; the limit is "
        f"{limit_s * len(step.lost):g} s."
        for step in steps
        if step.lost
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the processes of the nodes do: float sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_with_skips(config: NodesConfig) -> str:
    for name, variant in config.variants.items():
        if variant.mode != "vanilla":
            return name
    return next(iter(config.variants))


def _due(planned: dict[str, int], first: int, num: int) -> list[str]:
    return [name for name, image in planned.items() if first <= image < first + num]


def _step(first: int, labels: Tensor, answer: LiveAnswer, expected: Tensor | None, num_classes: int) -> Step:
    def right(logits: Tensor | None) -> float:
        return len(labels) / num_classes if logits is None else float((logits.argmax(1) == labels).sum())

    logits = answer.logits
    same = expected is None if logits is None else expected is not None and torch.equal(logits, expected)
    down, lost = sorted(answer.down), sorted(answer.lost)
    return Step(first, len(labels), down, lost, answer.latency_s, right(logits), right(expected), same)


def _phases(steps: list[Step]) -> dict[str, list[Step]]:
    """Group the steps: by the nodes that are down, the batch that met a loss apart."""
    phases: dict[str, list[Any]] = {}
    for step in steps:
        label = f"{', '.join(step.lost)}: the loss itself" if step.lost else ", ".join(step.down) or "none"
        phases.setdefault(label, []).append(step)
    return phases
