"""Accuracy over every pattern of failures, weighted by its probability."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import prod

import torch
from torch import Tensor

from ftnas.nodes.network import SplitNetwork
from ftnas.nodes.partition import Partition

HEALTH_RATES = {  # ResiliNet, Table 1: n1 to n4
    "normal": (0.08, 0.04, 0.01, 0.0),
    "poor": (0.13, 0.09, 0.05, 0.0),
    "hazardous": (0.22, 0.20, 0.15, 0.0),
}
CNN_RATES = {  # ResiliNet, Table 1: m1 to m3
    "normal": (0.04, 0.02, 0.0),
    "poor": (0.10, 0.05, 0.0),
    "hazardous": (0.20, 0.15, 0.0),
}


@dataclass(frozen=True)
class PatternAccuracy:
    """Accuracy while some nodes are down.

    Attributes:
        down: The nodes that are down.
        accuracy: In [0, 1]; exactly 1 / classes, a random guess, where no information reaches the top.
        informed: Whether any does.
    """

    down: tuple[str, ...]
    accuracy: float
    informed: bool


def patterns(partition: Partition) -> list[tuple[str, ...]]:
    """Return all 2^V sets of nodes that may be down, the smallest first."""
    names = list(partition.parents)
    return list(chain.from_iterable(combinations(names, num) for num in range(len(names) + 1)))


def probability(down: Sequence[str], *, failure_rates: Mapping[str, float]) -> float:
    """Return the probability that exactly these nodes are down, each on its own."""
    return prod(rate if name in down else 1.0 - rate for name, rate in failure_rates.items())


@torch.no_grad()
def evaluate(
    network: SplitNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_classes: int,
    never_down: Collection[str] = (),
) -> list[PatternAccuracy]:
    """Measure the accuracy of a network under each pattern of failures.

    Args:
        network: Evaluated in evaluation mode; its mode is put back.
        batches: Inputs float [B, *shape] and labels int64 [B].
        num_classes: For the random guess.
        never_down: Nodes whose failure is not measured; their patterns are left out.

    Raises:
        ValueError: There are no images.
    """
    which = [down for down in patterns(network.partition) if not set(down) & set(never_down)]
    was_training = network.training
    network.eval()
    try:
        informed = [down for down in which if network.carries(down)]
        correct = torch.zeros(len(informed), dtype=torch.int64)
        count = 0
        for inputs, labels in batches:
            count += len(labels)
            for position, down in enumerate(informed):
                logits = network(inputs, down)
                assert logits is not None, down
                correct[position] += (logits.argmax(1) == labels).sum().cpu()
    finally:
        network.train(was_training)
    if count == 0:
        raise ValueError("no images to evaluate on; give at least one batch")
    found = dict(zip(informed, (correct.double() / count).tolist(), strict=True))
    return [PatternAccuracy(down, found.get(down, 1.0 / num_classes), down in found) for down in which]


def average(results: Sequence[PatternAccuracy], *, failure_rates: Mapping[str, float]) -> float:
    """Return the exact expected accuracy: each pattern weighted by its probability.

    Args:
        results: All patterns of the nodes whose rate is above 0; further ones are welcome.
        failure_rates: Of every node, in [0, 1].

    Raises:
        ValueError: Rates outside [0, 1], or nodes whose rates are not given.
    """
    named = {name for result in results for name in result.down}
    unmeasured = {name for name, rate in failure_rates.items() if rate != 0.0} - named
    if unmeasured or not named <= set(failure_rates):
        raise ValueError(f"a failure rate for each of {sorted(named)}, got {sorted(failure_rates)}; give each one")
    for name, rate in failure_rates.items():
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"a failure rate lies in [0, 1], got {rate} for {name!r}")
    return sum(probability(result.down, failure_rates=failure_rates) * result.accuracy for result in results)
