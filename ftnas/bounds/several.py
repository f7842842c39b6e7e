"""Crashes at several layers at once: exact, by sampling, and as the sum of what each layer does alone (Proposition 10).

A unit that is alive but reads crashed ones gives what it computes from them; then it is masked itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ftnas.bounds.crashes import CHUNK, MOST_UNITS, Moments, single
from ftnas.bounds.cut import INPUT, Cut

Failing = Sequence[tuple[Cut, float]]
"""Where units crash, and with which probability: cuts of one model, each at another layer."""


class Estimate(Protocol):
    """What one layer's crashes do: `single`, `linear` or `exact`."""

    def __call__(self, cut: Cut, inputs: Tensor, *, p: float) -> Moments:
        """Return the moments of the error."""


def superposed(failing: Failing, inputs: Tensor, *, estimate: Estimate = single) -> Moments:
    """Add up what each layer's crashes do alone (*Fatal Brain Damage*, Proposition 10): off by O(p^2).

    Args:
        failing: Cuts of one model and their crash probabilities.
        inputs: float [B, ...].
        estimate: How a layer's own share is found.

    Raises:
        ValueError: One line: no layer, different models, or a layer named twice.
    """
    _check(failing)
    parts = [estimate(cut, inputs, p=p) for cut, p in failing]
    return Moments(
        torch.stack([part.mean for part in parts]).sum(dim=0),
        torch.stack([part.variance for part in parts]).sum(dim=0),
    )


@torch.no_grad()
def exact_jointly(failing: Failing, inputs: Tensor) -> Moments:
    """Run every pattern of crashes over all layers, weighted by its probability.

    Args:
        failing: At most `MOST_UNITS` units in all.
        inputs: float [B, ...].

    Raises:
        ValueError: One line: as `superposed`, or there are too many units.
    """
    units = _units(failing, inputs)
    if sum(units) > MOST_UNITS:
        raise ValueError(
            f"{sum(units)} units have 2^{sum(units)} patterns; exact_jointly takes {MOST_UNITS}, use sampled_jointly"
        )
    alive = (torch.arange(2 ** sum(units))[:, None] >> torch.arange(sum(units))) % 2 == 1
    rates = torch.cat([torch.full((num,), p, dtype=torch.float64) for num, (_, p) in zip(units, failing, strict=True)])
    weight = torch.where(alive, 1.0 - rates, rates).prod(dim=1).to(inputs.device)[:, None, None]
    errors = _errors(failing, inputs, alive.to(inputs.device), units)
    mean = (weight * errors).sum(dim=0)
    return Moments(mean, (weight * (errors - mean).square()).sum(dim=0))


@torch.no_grad()
def sampled_jointly(failing: Failing, inputs: Tensor, *, samples: int, generator: torch.Generator) -> Moments:
    """Estimate by Monte Carlo over all layers, with the standard error of the mean.

    Args:
        failing: Cuts of one model and their crash probabilities.
        inputs: float [B, ...].
        samples: Patterns, the same ones for all inputs; at least 2.
        generator: Draws them, on the CPU.

    Raises:
        ValueError: One line: as `superposed`, or fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, for a variance, got {samples}")
    units = _units(failing, inputs)
    masks = [torch.rand(samples, num, generator=generator) >= p for num, (_, p) in zip(units, failing, strict=True)]
    errors = _errors(failing, inputs, torch.cat(masks, dim=1).to(inputs.device), units)
    variance = errors.var(dim=0)
    return Moments(errors.mean(dim=0), variance, (variance / samples).sqrt())


def _errors(failing: Failing, inputs: Tensor, alive: Tensor, units: Sequence[int]) -> Tensor:
    """Return the errors under masks [K, all units]: float64 [K, B, M]."""
    model = failing[0][0].model
    before = model(inputs.clone()).double()
    found = []
    for part in alive.split(max(1, CHUNK // len(inputs))):
        masks = part.split(list(units), dim=1)
        batch = inputs.repeat(len(part), *[1] * (inputs.dim() - 1))
        handles = []
        try:
            for (cut, _), mask in zip(failing, masks, strict=True):
                if cut.layer == INPUT:
                    batch = _masked(cut, batch, mask)
                else:
                    handles.append(model.get_submodule(cut.layer).register_forward_hook(_masking(cut, mask)))
            found.append(model(batch).double().unflatten(0, (len(part), -1)))
        finally:
            for handle in handles:
                handle.remove()
    return torch.cat(found) - before


def _masking(cut: Cut, mask: Tensor) -> Callable[[object, object, Tensor], Tensor]:
    def give(module: object, _args: object, output: Tensor) -> Tensor:
        masked = _masked(cut, output, mask)
        in_place = getattr(module, "inplace", False)  # then what it read is the same memory, read by others too
        return output.copy_(masked) if in_place else masked

    return give


def _masked(cut: Cut, values: Tensor, mask: Tensor) -> Tensor:
    """Mask values [K B, ...] of K patterns in blocks of B by [K, units]."""
    blocks = values.unflatten(0, (len(mask), -1))
    shape = (len(mask), 1, values.shape[1], *[1] * (values.dim() - 2))
    own = mask.view(shape) if cut.unit == "channel" else mask.view(len(mask), 1, *values.shape[1:])
    return torch.where(own > 0, blocks, 0.0).flatten(0, 1)  # NaN and infinities too


def _units(failing: Failing, inputs: Tensor) -> list[int]:
    """Return how many units each cut has."""
    _check(failing)
    return [cut.num_units(cut.values(inputs)) for cut, _ in failing]


def _check(failing: Failing) -> None:
    if not failing:
        raise ValueError("no layer fails; give at least one cut and its crash probability")
    if len({id(cut.model) for cut, _ in failing}) != 1:
        raise ValueError("the cuts are of different models; cut one model at several layers")
    names = [cut.layer for cut, _ in failing]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"layer {twice!r} is named twice; give each layer one crash probability")
    for _, p in failing:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
