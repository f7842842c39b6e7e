"""Correlations of scores over things, with intervals."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ftnas.stats import Interval

Array = NDArray[np.float64]
Correlation = Literal["kendall", "pearson"]


def correlation_interval(
    a: ArrayLike,
    b: ArrayLike,
    *,
    kind: Correlation = "kendall",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a correlation over things with the percentile interval of the bootstrap that draws things anew.

    Args:
        a: [n] or [k, n]: with k rows, the mean of the rows' correlations, over the same n things drawn for all of them.
        b: As ``a``.
        kind: ``kendall`` (tau-b) or ``pearson``.
        resamples: Bootstrap samples; those in which a side is constant are left out.
        seed: Of the draws.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: Shapes differ, fewer than three things, a side that is constant (or a row in each resample), or
            values are not finite.
    """
    left, right = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (a, b))
    if left.shape != right.shape or left.ndim != 2 or left.shape[1] < 3:
        raise ValueError(
            f"a correlation needs three or more pairs, got values of shapes {left.shape} and {right.shape}"
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("a correlation needs finite values, got NaN or infinity")
    if (np.ptp(left, axis=1) == 0).any() or (np.ptp(right, axis=1) == 0).any():
        raise ValueError("a correlation needs two sides that vary, and one is constant")
    if not 0.0 < level < 1.0 or resamples < 100:
        raise ValueError(f"expected a level in (0, 1) and 100 or more resamples, got {level} and {resamples}")
    num = left.shape[1]
    random = np.random.default_rng(seed)
    drawn = random.multinomial(num, np.full(num, 1.0 / num), size=resamples).astype(np.float64)
    function = _kendall if kind == "kendall" else _pearson
    weights = np.concatenate([np.ones((1, num)), drawn])
    found = np.mean([function(x, y, weights) for x, y in zip(left, right, strict=True)], axis=0)
    varied = found[1:][np.isfinite(found[1:])]
    if not len(varied):
        raise ValueError(
            f"an interval needs resamples in which every row varies, and in each of {resamples} one row is constant; "
            "give more things, or fewer rows"
        )
    low, high = np.quantile(varied, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(
        mean=float(found[0]), low=float(low), high=float(high), num=num, method=f"bootstrap, {kind}", level=level
    )


def _kendall(x: Array, y: Array, weights: Array) -> Array:
    """Return tau-b of weighted things: [n], [n], [resamples, n] to [resamples]; NaN where a side is constant."""
    a, b = (np.sign(side[:, None] - side) for side in (x, y))
    both, one, other = (((weights @ pairs) * weights).sum(axis=1) for pairs in (a * b, np.abs(a), np.abs(b)))
    return _ratio(both, one * other)


def _pearson(x: Array, y: Array, weights: Array) -> Array:
    share = weights / weights.sum(axis=1, keepdims=True)
    a, b = (side - (share @ side)[:, None] for side in (x, y))
    # told by the values themselves: around a mean that is rounded, equal ones vary too
    varies = _varies(x, weights) & _varies(y, weights)
    square = (share * a * a).sum(axis=1) * (share * b * b).sum(axis=1)
    return _ratio((share * a * b).sum(axis=1), np.where(varies, square, 0.0))


def _varies(side: Array, weights: Array) -> NDArray[np.bool_]:
    """Tell in which resamples there are two values: [n], [resamples, n] to [resamples]."""
    there = weights > 0
    return np.where(there, side, -np.inf).max(axis=1) > np.where(there, side, np.inf).min(axis=1)


def _ratio(numerator: Array, square: Array) -> Array:
    root = np.sqrt(square)
    return np.divide(numerator, root, out=np.full_like(root, np.nan), where=root > 0)
