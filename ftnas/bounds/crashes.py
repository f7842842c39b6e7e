"""The mean and the variance of the error when units crash at random: exact, to first order in p, and by sampling.

The error is Delta = y(x * xi) - y(x), where every unit of a layer crashes independently with probability p (El Mhamdi
et al., *Fatal Brain Damage*, definitions 2 to 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftnas.bounds.cut import Cut

MOST_UNITS = 20
"""Units whose 2^n patterns are all run."""
CHUNK = 4096
"""Samples of a forward."""


@dataclass(frozen=True)
class Moments:
    """What crashes do to the outputs.

    Attributes:
        mean: Of the error, float64 [B, M].
        variance: Of the error, float64 [B, M].
        mean_error: Standard error of the mean, float64 [B, M]; None where nothing was sampled.
    """

    mean: Tensor
    variance: Tensor
    mean_error: Tensor | None = None


@torch.no_grad()
def exact(cut: Cut, inputs: Tensor, *, p: float) -> Moments:
    """Run every pattern of crashes, weighted by its probability.

    Args:
        cut: At most `MOST_UNITS` units.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].

    Raises:
        ValueError: p is no probability, or there are too many units.
    """
    _check(p)
    values = cut.values(inputs)
    units = cut.num_units(values)
    if units > MOST_UNITS:
        raise ValueError(
            f"{units} units have 2^{units} patterns; exact takes {MOST_UNITS} units, use sampled or single"
        )
    alive = (torch.arange(2**units)[:, None] >> torch.arange(units)) % 2 == 1
    dead = units - alive.sum(dim=1).double()
    weight = (p**dead * (1.0 - p) ** (units - dead)).to(inputs.device)[:, None, None]
    errors = _errors(cut, inputs, values, alive.to(inputs.device))
    mean = (weight * errors).sum(dim=0)
    return Moments(mean, (weight * (errors - mean).square()).sum(dim=0))


@torch.no_grad()
def single(cut: Cut, inputs: Tensor, *, p: float) -> Moments:
    """Estimate from all single crashes, bound b4 (Proposition 3): exact to first order in p.

    Args:
        cut: One forward of the rest is run per unit, in batches.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].

    Raises:
        ValueError: p is no probability.
    """
    _check(p)
    values = cut.values(inputs)
    units = cut.num_units(values)
    errors = _errors(cut, inputs, values, ~torch.eye(units, dtype=torch.bool, device=inputs.device))
    return Moments(p * errors.sum(dim=0), p * errors.square().sum(dim=0))


def linear(cut: Cut, inputs: Tensor, *, p: float) -> Moments:
    """Estimate from the Jacobian of the rest, bound b3 (Proposition 4): one backward for all outputs.

    mean = -p sum_i x_i dy/dx_i, variance = p sum_i (x_i dy/dx_i)^2 over units i; a unit of several values counts the
    sum of theirs. Besides the first order in p it needs that no unit alone matters much: where the rest is affine in
    each unit, it equals `single`.

    Args:
        cut: The rest must be differentiable almost everywhere.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].

    Raises:
        ValueError: p is no probability.
    """
    _check(p)
    values = cut.values(inputs).detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = cut.rest(inputs)(values)
    count = outputs.shape[1]
    pick = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[:, None, :].expand(count, *outputs.shape)
    (jacobian,) = torch.autograd.grad(outputs, values, pick, is_grads_batched=True)
    effect = cut.by_unit(jacobian.double() * values.detach().double()).transpose(0, 1)  # [B, M, units]
    return Moments(-p * effect.sum(dim=2), p * effect.square().sum(dim=2))


@torch.no_grad()
def sampled(cut: Cut, inputs: Tensor, *, p: float, samples: int, generator: torch.Generator) -> Moments:
    """Estimate by Monte Carlo, with the standard error of the mean.

    Args:
        cut: As above.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].
        samples: Patterns, the same ones for all inputs; at least 2.
        generator: Draws them, on the CPU.

    Raises:
        ValueError: p is no probability, or fewer than two samples.
    """
    _check(p)
    if samples < 2:
        raise ValueError(f"samples must be at least 2, for a variance, got {samples}")
    values = cut.values(inputs)
    alive = torch.rand(samples, cut.num_units(values), generator=generator) >= p
    errors = _errors(cut, inputs, values, alive.to(inputs.device))
    variance = errors.var(dim=0)
    return Moments(errors.mean(dim=0), variance, (variance / samples).sqrt())


def _errors(cut: Cut, inputs: Tensor, values: Tensor, alive: Tensor) -> Tensor:
    """Return the errors under masks [K, units]: float64 [K, B, M]."""
    rest = cut.rest(inputs)
    before = rest(values).double()
    parts = alive.split(max(1, CHUNK // len(values)))
    found = [rest(cut.masked(values, part).flatten(0, 1)).double().unflatten(0, (len(part), -1)) for part in parts]
    return torch.cat(found) - before


def _check(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
