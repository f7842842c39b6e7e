"""What faults changed: site, bit, value before and after; for looking at single faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ftnas.faults.base import Fault, Plan, Site
from ftnas.faults.memory import hit_positions, storage


@dataclass(frozen=True)
class Change:
    """One value that a fault hit.

    Attributes:
        fault: Name of the fault model.
        layer: Name of the layer.
        call: The how-manieth call of the layer in a forward, from 0.
        index: Of the value in the tensor (a weight's, or the feature's with the sample first).
        bit: The bit that was hit, 0 for the least significant; None for a model that hits whole values.
        before: The stored value without this fault; earlier fault models of the injection have acted.
        after: With it; the same where the fault had no effect.
    """

    fault: str
    layer: str
    call: int
    index: tuple[int, ...]
    bit: int | None
    before: float
    after: float


class Watch:
    """Collects changes, tensor by tensor."""

    def __init__(self) -> None:
        self._parts: list[tuple[Fault, Site, int, Plan, Tensor, Tensor]] = []

    def values(self, tensor: Tensor, plan: Plan) -> Tensor:
        """Return what a tensor holds at the values that a plan hits."""
        return storage(tensor)[hit_positions(plan, tensor)]

    def add(self, fault: Fault, site: Site, call: int, plan: Plan, before_after: Sequence[Tensor]) -> None:
        """Note one application of a plan."""
        before, after = before_after
        self._parts.append((fault, site, call, plan, before, after))

    def changes(self) -> list[Change]:
        """Return everything noted, in the order in which it happened."""
        found = []
        for fault, site, call, plan, before, after in self._parts:
            hit = plan.values_hit().tolist()
            bits = fault.bits_hit(plan).tolist() if fault.num_bits(site) is not None else [None] * len(hit)
            inside = [n for n, value in enumerate(hit) if value < plan.num_values]
            indices = np.unravel_index(np.array([hit[n] for n in inside], dtype=np.int64), plan.shape)
            for n, *index in zip(inside, *(axis.tolist() for axis in indices), strict=True):
                values = float(before[n]), float(after[n])
                found.append(Change(fault.name, site.layer, call, tuple(index), bits[n], *values))
        return found
