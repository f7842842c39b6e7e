"""Confidence intervals, paired comparisons, hierarchical bootstrap and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

# Elements gathered at once by the nested bootstrap. Larger arrays leave the cache and are mapped anew each
# time, which was measured to take ten times as long.
_CHUNK = 16_384

ROUNDING = 1e-12
"""Difference of two means of accuracies that rounding alone can make; the smallest real one is far above it."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, or a difference of means, with its two-sided confidence interval.

    Attributes:
        mean: The point estimate.
        low: Lower bound; NaN where ``num`` is too small for one.
        high: Upper bound; NaN where ``num`` is too small for one.
        num: Independent units behind the interval: values, pairs, trials, or training seeds (the smaller
            number where two groups differ).
        method: How it was made, in words, for tables and captions.
        level: Confidence level in (0, 1).
    """

    mean: float
    low: float
    high: float
    num: int
    method: str
    level: float = 0.95

    @property
    def side(self) -> int:
        """1 where it lies above zero, -1 where below, 0 where it includes zero, up to rounding, or has no bounds."""
        return int(self.low > ROUNDING) - int(self.high < -ROUNDING)


def decisive(intervals: Sequence[Interval]) -> Interval:
    """Return the interval that decides about a difference: the first that does not exclude zero, else the first."""
    return next((interval for interval in intervals if not interval.side), intervals[0])


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Kendall's tau-b in [-1, 1] and the two-sided p-value of independence, over ``num`` pairs.

    Both are NaN where one side is constant: there is no ranking to compare then.
    """

    tau: float
    p_value: float
    num: int


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return the mean of independent values with Student's t interval: mean +- t_{n-1} s / sqrt(n).

    Args:
        values: [n], n >= 1. With n = 1 there is no spread to measure and both bounds are NaN.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: ``values`` is empty, not one-dimensional or not finite, or ``level`` is outside (0, 1).
    """
    array = _checked(values, "values", ndim=(1,))
    _check_level(level)
    half = math.nan
    if len(array) > 1:
        quantile = float(stats.t.ppf(0.5 + level / 2, len(array) - 1))
        half = quantile * float(array.std(ddof=1)) / math.sqrt(len(array))
    mean = float(array.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, num=len(array), method="Student t", level=level)


def proportion_interval(successes: int, *, trials: int, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval, the p for which |p_hat - p| = z sqrt(p (1 - p) / n).

    Args:
        successes: In [0, trials].
        trials: n >= 1, independent.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: The counts are out of range, or ``level`` is outside (0, 1).
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    bounds = stats.binomtest(int(successes), int(trials)).proportion_ci(confidence_level=level, method="wilson")
    return Interval(
        mean=successes / trials,
        low=float(bounds.low),
        high=float(bounds.high),
        num=int(trials),
        method="Wilson",
        level=level,
    )


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return mean(a - b) with Student's t interval over the pairs' differences.

    Args:
        a: [n], values of one side.
        b: [n], values of the other, in the same order of units (e.g. the same device seeds).
        level: Confidence level in (0, 1).

    Raises:
        ValueError: Shapes differ, or as ``mean_interval``.
    """
    left, right = _checked(a, "a", ndim=(1,)), _checked(b, "b", ndim=(1,))
    if left.shape != right.shape:
        raise ValueError(f"pairs need as many values on both sides, got {len(left)} and {len(right)}")
    interval = mean_interval(left - right, level=level)
    return replace(interval, method="paired Student t")


def seed_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return Student's t interval over the means of training seeds.

    The honest interval for a handful of seeds: wide with three (t is 4.3 at 95%), but it keeps its level
    where the bootstrap does not. What all seeds share (devices, images) counts as fixed: the statement is
    about new trainings measured on these devices and images.

    Args:
        values: [seed, ...], averaged over all axes but the first.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: As ``mean_interval``.
    """
    interval = mean_interval(_seed_means(values, "values"), level=level)
    return replace(interval, method="Student t over seed means")


def seed_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return mean(a) - mean(b) with Welch's t interval over the means of independent training seeds.

    Args:
        a: [seed, ...], averaged over all axes but the first.
        b: The same for the other side; the number of seeds may differ.
        level: Confidence level in (0, 1).

    Returns:
        Bounds are NaN where a side has one seed.

    Raises:
        ValueError: As ``mean_interval``.
    """
    _check_level(level)
    left, right = _seed_means(a, "a"), _seed_means(b, "b")
    mean, num = float(left.mean() - right.mean()), min(len(left), len(right))
    half = math.nan
    if num > 1:
        parts = [float(side.var(ddof=1)) / len(side) for side in (left, right)]
        variance = sum(parts)
        # Welch-Satterthwaite; no spread on either side makes it 0 / 0, and any t times 0 is 0.
        shares = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (left, right), strict=True))
        freedom = variance**2 / shares if shares > 0 else 1.0
        half = float(stats.t.ppf(0.5 + level / 2, freedom)) * math.sqrt(variance)
    method = "Welch t over seed means"
    return Interval(mean=mean, low=mean - half, high=mean + half, num=num, method=method, level=level)


def bootstrap_means(values: ArrayLike, *, crossed: Sequence[int] = (), resamples: int = 2000, seed: int = 0) -> Array:
    """Return the mean of each bootstrap replicate of a hierarchical sample.

    Every axis is resampled with replacement. A nested axis (the default) is drawn anew within each unit
    drawn above
    it: every seed has its own devices. A crossed axis is drawn once per replicate, for all units: every
        seed was
    measured on the same images.

    Args:
        values: [seed], [seed, device], [seed, device, image], or deeper.
        crossed: Axes drawn once per replicate, of 1 .. ndim - 1.
        resamples: Number R of replicates.
        seed: Of the draws.

    Returns:
        float64 [R].

    Raises:
        ValueError: ``values`` is empty or not finite, ``crossed`` names no axis below the first,
            ``resamples`` < 1.
    """
    array = _checked(values, "values")
    shared = _check_axes(crossed, array.ndim)
    _check_resamples(resamples)
    random = np.random.default_rng(seed)
    # Crossed axes at the end collapse into one matrix product each; only what is left has to be gathered.
    tail = array.ndim
    while tail > 1 and tail - 1 in shared:
        tail -= 1
    means = _collapse(array, array.shape[tail:], [_weights(random, resamples, size) for size in array.shape[tail:]])
    return _resample(means, shared, resamples, random)


def hierarchical_bootstrap(
    values: ArrayLike,
    *,
    level: float = 0.95,
    crossed: Sequence[int] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean with the percentile interval of the hierarchical bootstrap.

    It is optimistic with few units on the first axis: over S seeds it sees (S - 1) / S of their variance
    and has no t correction, so that with three seeds a nominal 95% covers about 75%. Report
    ``seed_interval`` beside it then.

    Args:
        values: As in ``bootstrap_means``.
        level: Confidence level in (0, 1).
        crossed: As in ``bootstrap_means``, e.g. (1, 2) where all seeds share devices and images.
        resamples: Number of replicates.
        seed: Of the draws.

    Raises:
        ValueError: As ``bootstrap_means``, or ``level`` is outside (0, 1).
    """
    _check_level(level)
    array = _checked(values, "values")
    replicates = bootstrap_means(array, crossed=crossed, resamples=resamples, seed=seed)
    return _percentile(float(array.mean()), replicates, len(array), "hierarchical bootstrap", level)


def hierarchical_paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    level: float = 0.95,
    paired_seeds: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return mean(a) - mean(b) with the percentile interval of a bootstrap that respects what the two share.

    Devices and images are common to both and to all seeds: one draw of them serves both sides of a
    replicate. The training seeds of the two sides are drawn independently, or as pairs. Optimistic with few
    seeds, exactly as ``hierarchical_bootstrap``; report ``seed_difference`` beside it then.

    Args:
        a: [seed, ...], e.g. [seed, device, image].
        b: [seed, ...] with the same axes after the first; as many seeds where ``paired_seeds``.
        level: Confidence level in (0, 1).
        paired_seeds: Seed i of ``a`` and of ``b`` belong together (e.g. the same initialisation and batches).
        resamples: Number of replicates.
        seed: Of the draws.

    Raises:
        ValueError: Shapes do not agree, or as ``hierarchical_bootstrap``.
    """
    _check_level(level)
    _check_resamples(resamples)
    left, right = _checked(a, "a"), _checked(b, "b")
    if left.shape[1:] != right.shape[1:] or (paired_seeds and len(left) != len(right)):
        rule = "all axes must agree" if paired_seeds else "all axes after the first must agree"
        raise ValueError(f"{rule}, got shapes {list(left.shape)} and {list(right.shape)}")
    random = np.random.default_rng(seed)
    shared = left.shape[1:]
    means = _collapse(np.concatenate([left, right]), shared, [_weights(random, resamples, n) for n in shared])
    means = np.broadcast_to(means, (resamples, means.shape[1]))
    of_left = _weights(random, resamples, len(left))
    of_right = of_left if paired_seeds else _weights(random, resamples, len(right))
    replicates = np.einsum("rs,rs->r", means[:, : len(left)], of_left)
    replicates = replicates - np.einsum("rs,rs->r", means[:, len(left) :], of_right)
    method = f"hierarchical bootstrap of the difference, {'paired' if paired_seeds else 'independent'} seeds"
    return _percentile(float(left.mean() - right.mean()), replicates, min(len(left), len(right)), method, level)


def rank_correlation(a: ArrayLike, b: ArrayLike) -> RankCorrelation:
    """Return Kendall's tau-b of two scores of the same things, e.g. search rewards and final accuracies.

    Args:
        a: [n], n >= 2.
        b: [n].

    Raises:
        ValueError: Shapes differ, fewer than two pairs, or values are not finite.
    """
    left, right = _checked(a, "a", ndim=(1,)), _checked(b, "b", ndim=(1,))
    if left.shape != right.shape or len(left) < 2:
        raise ValueError(f"rank correlation needs two or more pairs, got {len(left)} and {len(right)} values")
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return RankCorrelation(tau=math.nan, p_value=math.nan, num=len(left))
    result = stats.kendalltau(left, right)
    return RankCorrelation(tau=float(result.statistic), p_value=float(result.pvalue), num=len(left))


def _weights(random: np.random.Generator, resamples: int, size: int) -> Array:
    """Return the share of each of ``size`` units in a draw with replacement, float64 [R, size]."""
    drawn = random.integers(size, size=(resamples, size)) + np.arange(resamples)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size) / size


def _collapse(array: Array, shape: tuple[int, ...], weights: list[Array]) -> Array:
    """Average the last axes, of the given shape, under weights [R, n] of each: [R, ...] ([1, ...] for none)."""
    means = array[None]
    for axis_weights in reversed(weights[: len(shape)]):
        if len(means) == 1:
            means = np.moveaxis(means[0] @ axis_weights.T, -1, 0)
        else:
            means = np.einsum("r...n,rn->r...", means, axis_weights)
    return means


def _resample(means: Array, shared: set[int], resamples: int, random: np.random.Generator) -> Array:
    """Draw every axis of means [R or 1, n_0, n_1, ...] but the first; their means, [R]."""
    sizes = means.shape[1:]
    chunk = max(1, _CHUNK // int(np.prod(sizes)))
    replicates = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        index = np.zeros((count, *([1] * len(sizes))), dtype=np.int64)
        if len(means) > 1:
            index = index + np.arange(start, start + count).reshape(index.shape)
        for axis, size in enumerate(sizes):
            above = [1 if axis in shared else n for n in sizes[:axis]]
            below = [1] * (len(sizes) - axis - 1)
            index = index * size + random.integers(size, size=(count, *above, size, *below))
        replicates.append(means.ravel().take(index).reshape(count, -1).mean(axis=1))
    return np.concatenate(replicates)


def _percentile(mean: float, replicates: Array, num: int, method: str, level: float) -> Interval:
    low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(mean=mean, low=float(low), high=float(high), num=num, method=method, level=level)


def _seed_means(values: ArrayLike, name: str) -> Array:
    array = _checked(values, name)
    means: Array = array.reshape(len(array), -1).mean(axis=1)
    return means


def _checked(values: ArrayLike, name: str, *, ndim: Sequence[int] = ()) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or array.ndim == 0 or (ndim and array.ndim not in ndim):
        raise ValueError(f"{name}: expected a non-empty array of {ndim or 'any'} axes, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: all values must be finite, got {array[~np.isfinite(array)].flat[0]}")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


def _check_axes(crossed: Sequence[int], ndim: int) -> set[int]:
    for axis in crossed:
        if not 1 <= axis < ndim:
            raise ValueError(f"crossed: axes must be in [1, {ndim - 1}], got {axis}")
    return set(crossed)
