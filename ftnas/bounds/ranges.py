"""What neurons can send: intervals that hold for a whole box of inputs, the values of given samples, what was seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftnas.bounds.ops import Box
from ftnas.bounds.summary import Summary


@dataclass(frozen=True, eq=False)
class Ranges:
    """An interval for each value of each node of a summary.

    Attributes:
        boxes: By node, float64 [B, ...]; B is 1 for a box of inputs.
        source: Where they come from: ``intervals`` hold for every input of a box, ``samples`` for the given samples,
            each its own; ``observed`` are the extremes over some samples, which another input may exceed.
    """

    boxes: tuple[Box, ...]
    source: str

    @property
    def certified(self) -> bool:
        """Return whether what follows from them is a statement and not an estimate."""
        return self.source != "observed"


def intervals(summary: Summary, low: Tensor, high: Tensor) -> Ranges:
    """Bound what every node can hold for all inputs in a box, by interval arithmetic.

    Args:
        summary: The network.
        low: Lower ends of the inputs, of a shape that broadcasts to that of a sample, e.g. [C, 1, 1].
        high: Upper ends.

    Raises:
        ValueError: A lower end is above an upper one, or one is not finite.
    """
    shape = summary.nodes[0].shape
    ends = [end.double().to(summary.device).expand(shape)[None] for end in (low, high)]
    if not all(bool(end.isfinite().all()) for end in ends) or bool((ends[0] > ends[1]).any()):
        raise ValueError("a box of inputs has finite ends, the lower one below the upper one")
    return Ranges(tuple(summary.boxes(Box(*ends))), "intervals")


def of_samples(summary: Summary, inputs: Tensor) -> Ranges:
    """Return the values of given samples [B, ...] themselves."""
    return Ranges(tuple(Box(value, value) for value in summary.run(inputs)), "samples")


def observed(summary: Summary, inputs: Tensor) -> Ranges:
    """Return the smallest and largest value that was seen at each place over samples [B, ...]: an estimate."""
    values = summary.run(inputs)
    ends = [(value.amin(dim=0, keepdim=True), value.amax(dim=0, keepdim=True)) for value in values]
    return Ranges(tuple(Box(*end) for end in ends), "observed")


@torch.no_grad()
def spans(ranges: Ranges) -> list[float]:
    """Return the largest magnitude of each node."""
    return [float(box.largest.amax()) for box in ranges.boxes]
