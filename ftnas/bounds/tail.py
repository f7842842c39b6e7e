"""From mean and variance of the error to the probability that it is large.

Sound for the moments that are given: exact moments bound the true probability; those of b3 or b4 carry their error
into the bound (*Fatal Brain Damage*, section 2.4, "Tail bound").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftnas.bounds.crashes import Moments


def tail(moments: Moments, epsilon: float) -> Tensor:
    """Bound P(|Delta| >= epsilon) of each output: float64 [B, M] in [0, 1].

    The least of three bounds, with a = epsilon - mean and b = epsilon + mean: Markov on the square,
    (Var + mean^2) / epsilon^2; Chebyshev, Var / min(a, b)^2; and Cantelli on both sides, Var / (Var + a^2) +
    Var / (Var + b^2). The last two hold where |mean| < epsilon.

    Args:
        moments: Of the error.
        epsilon: Above 0.

    Raises:
        ValueError: epsilon is not positive.
    """
    _check(epsilon)
    mean, deviation = moments.mean.double(), _deviation(moments)
    above, below = epsilon - mean, epsilon + mean
    # quotients are squared, and not numbers whose squares are 0 or infinite
    square = (deviation / epsilon).square() + (mean / epsilon).square()
    chebyshev = (deviation / torch.minimum(above, below)).square()
    sides = _cantelli(deviation, above) + _cantelli(deviation, below)
    inside = torch.where(mean.abs() < epsilon, torch.minimum(chebyshev, sides), 1.0)
    return torch.minimum(square, inside).clamp(max=1.0)


def tail_above(moments: Moments, epsilon: float) -> Tensor:
    """Bound P(Delta >= epsilon) of each output by Cantelli's inequality: float64 [B, M] in [0, 1].

    Var / (Var + (epsilon - mean)^2) where mean < epsilon, else 1. Of all bounds from mean and variance it is the best.

    Args:
        moments: Of the error.
        epsilon: Any number.
    """
    gap = epsilon - moments.mean.double()
    return torch.where(gap > 0.0, _cantelli(_deviation(moments), gap), 1.0)


def tail_norm(moments: Moments, epsilon: float) -> Tensor:
    """Bound P(|Delta|_2 >= epsilon) over all outputs, as the paper states it: float64 [B] in [0, 1].

    sum over outputs of (Var + mean^2) / epsilon^2, Markov's inequality for the squared norm.

    Args:
        moments: Of the error.
        epsilon: Above 0.

    Raises:
        ValueError: epsilon is not positive.
    """
    _check(epsilon)
    square = (_deviation(moments) / epsilon).square() + (moments.mean.double() / epsilon).square()
    return square.sum(dim=1).clamp(max=1.0)


def _deviation(moments: Moments) -> Tensor:
    """Return the standard deviation; a variance that rounding has left below 0 is 0."""
    return moments.variance.double().clamp_min(0.0).sqrt()


def _cantelli(deviation: Tensor, gap: Tensor) -> Tensor:
    """Return Var / (Var + gap^2) for a gap above 0."""
    return 1.0 / (1.0 + (gap / deviation).square())


def _check(epsilon: float) -> None:
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be above 0, got {epsilon!r}")
