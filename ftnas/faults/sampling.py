"""Exact, sparse drawing of the sites of independent faults."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ftnas import devices

DENSE_ABOVE = 0.15
"""Rate above which one number per site is quicker than one per hit (measured on one CPU core)."""


def bernoulli_sites(population: int, rate: float, *, generator: torch.Generator) -> Tensor:
    """Draw which of ``population`` sites are hit, each independently with probability ``rate``.

    For small rates the gaps between hits are drawn, which are geometric: floor(E / -log(1 - rate)) sites are passed
    over before each hit, with E a standard exponential in float64. On a CPU the result holds exactly the hits. On
    another device its length is fixed beforehand, so that nothing waits for the device: entries equal to
    ``population`` are padding, and the chance that the length does not suffice is under 1e-12.

    Args:
        population: Number of sites.
        rate: Probability of a hit, in [0, 1].
        generator: Where the numbers come from; its device is the device of the result.

    Returns:
        int64 [K], ascending and distinct apart from the padding.
    """
    device = generator.device
    if rate <= 0.0 or population == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if rate >= 1.0:
        return torch.arange(population, device=device)
    if rate > DENSE_ABOVE:
        hit = torch.rand(population, generator=generator, device=device, dtype=torch.float64) < rate
        if devices.is_readable(device):
            return hit.nonzero().squeeze(1)
        order = torch.arange(population, device=device)
        return torch.where(hit, order, population).sort().values
    length = walk_length(population, rate)  # on a CPU the draw goes on where that does not suffice
    sites = _walk(-1, length, rate, population, generator)
    if not devices.is_readable(device):
        return sites
    while int(sites[-1]) < population - 1:
        sites = torch.cat([sites, _walk(int(sites[-1]), length, rate, population, generator)])
    return sites[: int(torch.searchsorted(sites, population))]


def walk_length(population: int, rate: float) -> int:
    """Return a number of entries that holds all hits: for them to outnumber it by chance is under 1e-12 (Chernoff)."""
    expected = population * rate
    return min(population, int(expected + 8.0 * math.sqrt(expected) + 32.0))


def _walk(last: int, length: int, rate: float, population: int, generator: torch.Generator) -> Tensor:
    """Return the next ``length`` hits after site ``last``, those past the population as ``population``; int64."""
    # not exponential_(): its numbers depend on the maker of the CPU (on some it asks MKL), and it is slower
    uniform = torch.rand(length, dtype=torch.float64, generator=generator, device=generator.device)
    gaps = uniform.neg_().log1p_().mul_(1.0 / math.log1p(-rate)).floor_()
    # a gap of a very small rate may be longer than any integer holds
    return gaps.add_(1.0).cumsum(0).add_(float(last)).clamp_(max=float(population)).to(torch.int64)


def random_integers(high: int, length: int, *, generator: torch.Generator) -> Tensor:
    """Draw ``length`` integers uniform over 0 .. high - 1; int64."""
    return torch.randint(0, high, (length,), generator=generator, device=generator.device)


def bernoulli(rate: float, length: int, *, generator: torch.Generator) -> Tensor:
    """Draw ``length`` independent events of probability ``rate``; bool."""
    draws = torch.rand(length, generator=generator, device=generator.device, dtype=torch.float64)
    return draws < rate


def persisting(rate: float, persistence: float) -> float:
    """Return a rate that errors which nobody corrects have multiplied, M_p(t) * rate.

    Raises:
        ValueError: The product is above 1.
    """
    if rate * persistence > 1.0 + 1e-9:
        raise ValueError(f"persistence times the rate must not exceed 1, got {persistence:g} * {rate:g}")
    return min(1.0, rate * persistence)
