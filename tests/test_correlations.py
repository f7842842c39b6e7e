"""Correlations with intervals: against SciPy, and what the intervals cover."""

import numpy as np
import pytest
from scipy import stats

from ftnas.correlations import correlation_interval


@pytest.mark.parametrize(("kind", "function"), [("kendall", stats.kendalltau), ("pearson", stats.pearsonr)])
def test_the_mean_is_scipys(kind, function):
    random = np.random.default_rng(0)
    a = random.normal(size=(2, 30))
    b = a + random.normal(size=(2, 30))
    found = correlation_interval(a[0], b[0], kind=kind, resamples=300)
    assert found.mean == pytest.approx(function(a[0], b[0]).statistic)
    both = correlation_interval(a, b, kind=kind, resamples=300)
    assert both.mean == pytest.approx(np.mean([function(x, y).statistic for x, y in zip(a, b, strict=True)]))
    assert both.low < both.mean < both.high and both.num == 30


def test_intervals_cover_what_is_true():
    """The rank correlation of two normals is 2 / pi asin(r). 60 intervals at 95%: 45 or fewer have p = 1e-9."""
    random = np.random.default_rng(1)
    truth, covered = 2 / np.pi * np.arcsin(0.6), 0
    for seed in range(60):
        a, b = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=40).T
        found = correlation_interval(a, b, resamples=100, seed=seed)
        covered += found.low <= truth <= found.high
    assert covered > 45


def test_ties_are_counted_as_scipy_counts_them():
    a, b = [1.0, 1.0, 2.0, 3.0, 3.0], [2.0, 1.0, 1.0, 4.0, 3.0]
    assert correlation_interval(a, b, resamples=100).mean == pytest.approx(stats.kendalltau(a, b).statistic)


def test_resamples_of_equal_values_are_left_out():
    """Against a bootstrap in a loop. The mean of equal values is rounded, so that they differ from it by a little."""
    a, b = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.8]), np.array([0.1, 0.2, 0.15, 0.1, 0.3, 0.9, 0.7])
    drawn = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=2000)
    indices = [np.repeat(np.arange(7), times) for times in drawn]
    varied = [np.corrcoef(a[i], b[i])[0, 1] for i in indices if np.ptp(a[i]) > 0 and np.ptp(b[i]) > 0]
    assert len(varied) < 1900
    found = correlation_interval(a, b, kind="pearson")
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(varied, [0.025, 0.975])))


def test_rows_of_which_one_is_constant_in_every_resample_are_refused():
    """Each of 15 rows is a single one among zeros: a resample in which all vary holds each thing once, p = 3e-6."""
    rows = np.random.default_rng(0).normal(size=(15, 15))
    with pytest.raises(ValueError, match="in each of 200 one row is constant") as caught:
        correlation_interval(np.eye(15), rows, resamples=200)
    assert "\n" not in str(caught.value)


def test_perfect_order_has_no_spread():
    found = correlation_interval([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0], resamples=100)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1, 2], [1, 2], {}, "three or more pairs"),
        ([1, 2, 3], [1, 2], {}, "three or more pairs"),
        ([1, 1, 1], [1, 2, 3], {}, "one is constant"),
        ([1, 2, float("nan")], [1, 2, 3], {}, "finite values"),
        ([1, 2, 3], [1, 2, 3], {"resamples": 1}, "100 or more resamples"),
    ],
)
def test_bad_input_is_one_line(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        correlation_interval(a, b, **options)
