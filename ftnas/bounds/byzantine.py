"""Units that lie by at most delta, one at a time, and what they have to do with units that crash.

Definition 6 of *Fatal Brain Damage*: Delta_B^i = max over |x'_i - x_i| <= delta of |y(x') - y(x)|. Propositions 5 and 6
bound it by the variance under crashes and the other way round, to first order in p and delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftnas.bounds.crashes import CHUNK
from ftnas.bounds.cut import Cut


@torch.no_grad()
def byzantine(cut: Cut, inputs: Tensor, *, delta: float, steps: int = 1) -> Tensor:
    """Search the largest error of one lying unit over 2 ``steps`` values between -delta and delta.

    It is the maximum where the rest is monotone in the unit; elsewhere it is below it, and nears it with ``steps``.

    Args:
        cut: Of units ``value``.
        inputs: float [B, ...].
        delta: By how much a unit may be off, above 0.
        steps: Values tried on each side of the true one; 1 tries the ends alone.

    Returns:
        float64 [B, M, units].

    Raises:
        ValueError: One line: a unit that is a channel, or delta or steps are not positive.
    """
    _check(cut, delta)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    values, rest = cut.values(inputs), cut.rest(inputs)
    before, units = rest(values).double(), cut.num_units(values)
    largest = torch.zeros(units, *before.shape, dtype=torch.float64, device=before.device)
    one = torch.eye(units, dtype=values.dtype, device=values.device).view(units, 1, *values.shape[1:])
    for number in range(1, steps + 1):
        for sign in (-1.0, 1.0):
            moves = (sign * delta * number / steps * one).split(max(1, CHUNK // len(values)))
            parts = [rest((values + move).flatten(0, 1)).double().unflatten(0, (len(move), -1)) for move in moves]
            largest = torch.maximum(largest, (torch.cat(parts) - before).abs())
    return largest.permute(1, 2, 0)


def byzantine_from_variance(cut: Cut, inputs: Tensor, variance: Tensor, *, p: float, delta: float) -> Tensor:
    """Bound the error of one lying unit by the variance under crashes (Proposition 5).

    delta sqrt(Var / (p x_i^2)), up to O(delta^2) and the error of the variance; infinite where x_i is 0, because a
    crash of such a unit tells nothing.

    Args:
        cut: Of units ``value``.
        inputs: float [B, ...].
        variance: float [B, M], of the error under crashes with probability p.
        p: Crash probability, above 0.
        delta: By how much a unit may be off, above 0.

    Returns:
        float64 [B, M, units].

    Raises:
        ValueError: One line: a unit that is a channel, or p or delta is not positive.
    """
    _check(cut, delta)
    _check_p(p)
    size = cut.values(inputs).double().flatten(1).abs()
    size = size[:, None, :].expand(-1, variance.shape[1], -1)
    return torch.where(size == 0, torch.inf, delta * (variance.double() / p).sqrt()[:, :, None] / size)


def variance_from_byzantine(cut: Cut, inputs: Tensor, errors: Tensor, *, p: float, delta: float) -> Tensor:
    """Bound the variance under crashes by the errors of lying units (Proposition 6).

    p sum_i x_i^2 / delta^2 (Delta_B^i)^2, up to p O(delta) and what b3 leaves out.

    Args:
        cut: Of units ``value``.
        inputs: float [B, ...].
        errors: float [B, M, units], as `byzantine` gives them.
        p: Crash probability, above 0.
        delta: With which the errors were found.

    Returns:
        float64 [B, M].

    Raises:
        ValueError: One line: a unit that is a channel, or p or delta is not positive.
    """
    _check(cut, delta)
    _check_p(p)
    size = cut.values(inputs).double().flatten(1)[:, None, :]
    return p * (size * errors.double() / delta).square().sum(dim=2)


def _check(cut: Cut, delta: float) -> None:
    if cut.unit != "value":
        raise ValueError(f"a Byzantine failure is of one value, the cut is by {cut.unit}; cut with unit='value'")
    if not delta > 0.0:
        raise ValueError(f"delta must be above 0, got {delta!r}")


def _check_p(p: float) -> None:
    if not 0.0 < p <= 1.0:
        raise ValueError(f"a crash probability is in (0, 1] here, got {p!r}")
