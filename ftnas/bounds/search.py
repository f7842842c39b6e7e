"""The largest numbers of failures that stay within a budget: exact on small nets, greedy with a stated gap else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftnas.bounds.worst import Cost, total

MOST_TABLE = 2**24
"""Numbers that the exact search holds at once."""


@dataclass(frozen=True)
class Found:
    """A distribution of failures over layers within the budget.

    Attributes:
        counts: f_l, in the order of the layers.
        at_most: No distribution within the budget has more failures in all than this.
        exact: Whether every distribution was looked at.
    """

    counts: tuple[int, ...]
    at_most: int
    exact: bool

    @property
    def gap(self) -> int:
        """Return how many more failures the best distribution may have at most."""
        return self.at_most - sum(self.counts)


def tolerances(costs: Sequence[Cost], budgets: Tensor) -> list[int]:
    """Return for each layer how many failures are within the budgets [rows] when no other layer fails."""
    return [cost.tolerance(budgets) for cost in costs]


def largest(costs: Sequence[Cost], budgets: Tensor) -> Found:
    """Find the distribution with the most failures in all.

    Every distribution is looked at where they are few enough. Else layers are filled one after the other, each as far
    as the budget goes, from every first layer, and the best of these is taken. The upper bound comes from a relaxation:
    the cost of a layer is concave in its count, so that it lies above the straight line to its count t alone, and
    filling the cheapest layers by these lines in fractions allows no fewer failures than the best distribution.

    Args:
        costs: Of each layer.
        budgets: float64 [rows], nowhere negative.
    """
    alone = tolerances(costs, budgets)
    tables = [cost.at(torch.arange(t + 1, device=cost.sums.device)) for cost, t in zip(costs, alone, strict=True)]
    counts = _exhaustive(tables, budgets)
    if counts is not None:
        return Found(counts, sum(counts), True)
    counts = _greedy(tables, budgets)
    at_most = max(sum(counts), _relaxed(tables, budgets))
    return Found(counts, at_most, sum(counts) == at_most)


def even(costs: Sequence[Cost], budgets: Tensor, *, samples: int = 1, share: float = 1.0) -> Found:
    """Find the largest share s so that s N_l failures (rounded down) in all layers at once are within the budgets.

    Args:
        costs: Of each layer.
        budgets: float64 [rows].
        samples: How many samples the rows belong to, in blocks of equal length.
        share: Of the samples, that must be within all their budgets; in (0, 1].
    """
    sizes = [cost.components for cost in costs]
    steps = math.lcm(*sizes)  # every share at which a count grows is a whole number of such steps

    def counts(step: int) -> list[int]:
        return [step * size // steps for size in sizes]

    low, high, needed = 0, steps, asked(share, samples)
    while counts(low) != counts(high):
        middle = (low + high + 1) // 2
        kept = within(costs, counts(middle), budgets, samples=samples)
        low, high = (middle, high) if int(kept.sum()) >= needed else (low, middle - 1)
    chosen = tuple(counts(low))
    return Found(chosen, sum(chosen), True)


def asked(share: float, samples: int) -> int:
    """Return how many samples a share of them asks for, at least 1: 7 for 0.07 of 100, whose product is above 7."""
    return max(1, math.ceil(share * samples - 1e-9))


def within(costs: Sequence[Cost], counts: Sequence[int], budgets: Tensor, *, samples: int) -> Tensor:
    """Return which samples are within all their budgets under counts of failures, bool [samples]."""
    return (total(costs, counts) <= budgets).view(samples, -1).all(dim=1)


def _exhaustive(tables: Sequence[Tensor], budgets: Tensor) -> tuple[int, ...] | None:
    """Return the best of all distributions within the budgets; None where they are too many."""
    used, chosen = budgets.new_zeros(1, len(budgets)), torch.zeros(1, 0, dtype=torch.int64, device=budgets.device)
    for table in sorted(tables, key=lambda table: table.shape[1])[:-1]:
        if used.numel() * table.shape[1] > MOST_TABLE:
            return None
        both = (used[:, None] + table.T[None]).flatten(0, 1)
        count = torch.arange(table.shape[1], device=budgets.device).repeat(len(used))[:, None]
        fits = (both <= budgets).all(dim=1)
        used, chosen = both[fits], torch.cat([chosen.repeat_interleave(table.shape[1], dim=0), count], dim=1)[fits]
    order = sorted(range(len(tables)), key=lambda number: tables[number].shape[1])
    last = tables[order[-1]]
    if used.numel() > MOST_TABLE:
        return None
    left = (budgets - used).T.contiguous()  # [rows, K]
    most = (torch.searchsorted(last.contiguous(), left, right=True) - 1).amin(dim=0)
    best = int((chosen.sum(dim=1) + most).argmax())
    found = [*chosen[best].tolist(), int(most[best])]
    placed = dict(zip(order, found, strict=True))
    return tuple(placed[number] for number in range(len(tables)))


def _greedy(tables: Sequence[Tensor], budgets: Tensor) -> tuple[int, ...]:
    """Return the best of filling layers one after the other, once from each first layer."""
    order = sorted(range(len(tables)), key=lambda number: -tables[number].shape[1])
    best: tuple[int, ...] = (0,) * len(tables)
    for first in order:
        counts, used = [0] * len(tables), torch.zeros_like(budgets)
        for number in [first, *(n for n in order if n != first)]:
            table = tables[number]
            left = (budgets - used)[:, None].contiguous()
            counts[number] = int((torch.searchsorted(table.contiguous(), left, right=True) - 1).amin())
            used = used + table[:, counts[number]]
        best = max(best, tuple(counts), key=sum)
    return best


def _relaxed(tables: Sequence[Tensor], budgets: Tensor) -> int:
    """Return an upper bound of the failures of any distribution within the budgets: the least one over the rows."""
    least = sum(table.shape[1] - 1 for table in tables)
    rates = torch.stack([table[:, -1] / max(1, table.shape[1] - 1) for table in tables])  # [layers, rows]
    for row in range(len(budgets)):
        left, filled = float(budgets[row]) * (1 + 1e-12), 0.0
        for number in rates[:, row].argsort().tolist():
            most, rate = tables[number].shape[1] - 1, float(rates[number, row])
            taken = most if rate == 0 else min(most, left / rate)
            filled, left = filled + taken, left - taken * rate
        least = min(least, math.floor(filled + 1e-9))
    return least
