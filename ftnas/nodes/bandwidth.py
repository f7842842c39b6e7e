"""What hyperconnections carry, in bytes per image, and the subsets of skips that a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch

from ftnas.nodes.exact import patterns, probability
from ftnas.nodes.network import SplitNetwork
from ftnas.nodes.partition import Link, Skip

VALUE_BYTES = 4
"""A value travels as float32."""

Subset = tuple[Skip, ...]


def link_bytes(network: SplitNetwork) -> dict[Link, int]:
    """Return what one image costs on each hyperconnection while it is active: the source's output, before matching."""
    return {link: VALUE_BYTES * prod(network.shapes[link.source]) for link in network.links}


def expected_bytes(
    network: SplitNetwork, *, failure_rates: Mapping[str, float], skips: Sequence[Skip] | None = None
) -> dict[Link, float]:
    """Return what one image costs on each hyperconnection on average, exactly, over all patterns of failures.

    A hyperconnection carries nothing while it is inactive, its source has nothing to send, or its target is down. The
    network is taken as in use: its mode in evaluation, and of its skips those that are given, None for all in use.
    """
    was_training, absent = network.training, network.absent
    network.eval()
    if skips is not None:
        stay = {(skip.source, skip.to) for skip in skips}
        network.absent = frozenset(k for k in network.links if k.bypassed and (k.source, k.to) not in stay)
    try:
        sums = dict.fromkeys(network.links, 0.0)
        full = link_bytes(network)
        for down in patterns(network.partition):
            chance = probability(down, failure_rates=failure_rates)
            informed = network.informed(down)
            for link in network.links:
                if link.to not in down and link.source in informed and network.active(link, down):
                    sums[link] += chance * full[link]
    finally:
        network.train(was_training)
        network.absent = absent
    return sums


class SkipSubsets:
    """The subsets of some skips that cost no more than a budget: what a controller chooses from (`Choices`).

    Args:
        skips: All that may be kept.
        cost: Of a subset, in bytes per image: 0 for the empty one, and no less with one skip more.
        budget: The most that the kept ones may cost together.
    """

    def __init__(self, skips: Sequence[Skip], *, cost: Callable[[Subset], float], budget: float) -> None:
        if not skips:
            raise ValueError("subsets are of at least one skip, got none")
        self.skips, self.budget = tuple(skips), budget
        self._cost, self._known = cost, dict[Subset, float]()
        self.costs = tuple(self.cost((skip,)) for skip in skips)
        if budget < min(self.costs):
            raise ValueError(
                f"budget: the cheapest skip costs {min(self.costs):g} bytes per image, got {budget:g}; raise it"
            )

    def cost(self, subset: Sequence[Skip]) -> float:
        """Return what a subset costs, in bytes per image."""
        ordered = tuple(skip for skip in self.skips if skip in subset)
        if ordered not in self._known:
            self._known[ordered] = self._cost(ordered)
        return self._known[ordered]

    def all(self) -> list[Subset]:
        """Return every subset within the budget, the smallest first."""
        every = (chosen for num in range(len(self.skips) + 1) for chosen in combinations(self.skips, num))
        return [subset for subset in every if self.cost(subset) <= self.budget]

    def random(self, *, generator: torch.Generator) -> Subset:
        """Draw each skip with probability 1/2, then take random ones out until the budget holds."""
        kept = [skip for skip in self.skips if torch.rand((), generator=generator) < 0.5]
        return self._within(kept, None, generator)

    def mutate(self, genotype: Subset, *, generator: torch.Generator) -> Subset:
        """Put one skip in or take it out; where the budget then breaks, take random others out until it holds."""
        fits = [skip for skip, cost in zip(self.skips, self.costs, strict=True) if cost <= self.budget]
        skip = fits[int(torch.randint(len(fits), (), generator=generator))]
        if skip in genotype:
            return tuple(kept for kept in genotype if kept != skip)
        return self._within([*genotype, skip], skip, generator)

    def validate(self, genotype: Subset) -> None:
        """Raise a ValueError for a subset of other skips, in another order, or beyond the budget."""
        if list(genotype) != [skip for skip in self.skips if skip in genotype]:
            raise ValueError(f"skips: a part of {self._names(self.skips)} in this order, got {self._names(genotype)}")
        if self.cost(genotype) > self.budget:
            raise ValueError(f"skips: {self.cost(genotype):g} bytes per image are above the budget {self.budget:g}")

    def to_decisions(self, genotype: Subset) -> Any:
        """Return 0 or 1 for each skip."""
        return [int(skip in genotype) for skip in self.skips]

    def from_decisions(self, decisions: Any) -> Subset:
        """Return the subset of those decisions."""
        if len(decisions) != len(self.skips) or set(decisions) - {0, 1}:
            raise ValueError(f"decisions: 0 or 1 for each of {len(self.skips)} skips, got {decisions!r}")
        subset = tuple(skip for skip, kept in zip(self.skips, decisions, strict=True) if kept)
        self.validate(subset)
        return subset

    def signature(self) -> dict[str, Any]:
        """Return skips, what each costs alone, and the budget."""
        skips = [[skip.source, skip.to] for skip in self.skips]
        return {"skips": skips, "costs": list(self.costs), "budget": self.budget}

    def _within(self, kept: list[Skip], stays: Skip | None, generator: torch.Generator) -> Subset:
        while self.cost(kept) > self.budget:
            others = [skip for skip in kept if skip != stays]
            kept.remove(others[int(torch.randint(len(others), (), generator=generator))])
        return tuple(skip for skip in self.skips if skip in kept)

    @staticmethod
    def _names(skips: Sequence[Skip]) -> str:
        return ", ".join(f"{skip.source}->{skip.to}" for skip in skips) or "none"
