import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ftnas.stats import (
    bootstrap_means,
    hierarchical_bootstrap,
    hierarchical_paired_difference,
    mean_interval,
    paired_difference,
    proportion_interval,
    rank_correlation,
    seed_difference,
    seed_interval,
)

FALSE_ALARM = 1e-6


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def expect_rate(hits, trials, rate):
    """Assert that a count fits Binomial(trials, rate), two-sided at the stated false-alarm rate."""
    low, high = scipy_stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], trials, rate)
    assert low <= hits <= high, f"{hits} of {trials} is not {rate}"


# Closed forms


def test_mean_interval_by_hand():
    # s = sqrt(2.5), t_4(0.975) = 2.7764451
    interval = mean_interval([1, 2, 3, 4, 5])
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)
    assert (interval.mean, interval.num, interval.method) == (3.0, 5, "Student t")
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), rel=1e-12)


def test_one_value_has_no_bounds_and_equal_values_have_tight_ones():
    one = mean_interval([0.5])
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.high)
    same = mean_interval([0.5] * 4)
    assert (same.low, same.high) == (0.5, 0.5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (862, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_bounds_solve_the_score_equation(successes, trials, level):
    interval = proportion_interval(successes, trials=trials, level=level)
    z = scipy_stats.norm.ppf(0.5 + level / 2)
    for bound in (interval.low, interval.high):
        assert abs(successes / trials - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)
    assert interval.low <= interval.mean <= interval.high
    assert interval.mean == successes / trials


def test_paired_difference_is_the_interval_of_the_differences():
    a, b = [0.8, 0.7, 0.9], [0.5, 0.6, 0.4]
    expected = scipy_stats.ttest_rel(a, b).confidence_interval(0.9)
    interval = paired_difference(a, b, level=0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(0.3) and interval.num == 3


def test_seed_difference_is_welch():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 4)), random.normal(size=(5, 4))
    expected = scipy_stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).confidence_interval(0.95)
    interval = seed_difference(a, b)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.num == 3
    assert math.isnan(seed_difference(a[:1], b).low)
    flat = seed_difference([1.0, 1.0], [0.5, 0.5])
    assert (flat.low, flat.high) == (0.5, 0.5)


def test_a_difference_of_rounding_is_not_clear():
    """The same three accuracies in another order have means that differ in the last bit."""
    a, b = [(0.9 + 0.8 + 0.7) / 3] * 3, [(0.7 + 0.8 + 0.9) / 3] * 3
    assert a != b
    found = [paired_difference(a, b), seed_difference(a, b), hierarchical_paired_difference([a] * 3, [b] * 3)]
    assert [interval.side for interval in found] == [0, 0, 0]
    assert [paired_difference(b, a).side, paired_difference([0.5, 0.5], [0.5 - 1e-6] * 2).side] == [0, 1]


def test_seed_interval_sees_seed_means_only():
    values = np.random.default_rng(0).normal(size=(4, 3, 5))
    interval, expected = seed_interval(values), mean_interval(values.mean(axis=(1, 2)))
    assert (interval.low, interval.high) == (expected.low, expected.high)
    assert "seed" in interval.method


def test_rank_correlation_by_hand():
    # Of 6 pairs one is discordant: tau = (5 - 1) / 6; exact two-sided p for 4 ranks = 8 / 24.
    result = rank_correlation([1, 2, 3, 4], [1, 2, 4, 3])
    assert result.tau == pytest.approx(4 / 6)
    assert result.p_value == pytest.approx(8 / 24)
    constant = rank_correlation([1, 1, 1], [1, 2, 3])
    assert math.isnan(constant.tau) and math.isnan(constant.p_value)


# Coverage


def test_student_interval_covers_as_it_says():
    random = np.random.default_rng(0)
    trials = 2000
    hits = sum(covers(mean_interval(random.normal(0.7, 0.1, size=4), level=0.9), 0.7) for _ in range(trials))
    expect_rate(hits, trials, 0.9)


def test_seed_interval_keeps_its_level_with_three_seeds_and_the_bootstrap_does_not():
    """The optimism that the docstring states: percentile intervals over three seeds cover about 75%, not 95%."""
    random = np.random.default_rng(1)
    trials = 600
    honest = optimistic = 0
    for trial in range(trials):
        values = random.normal(size=(3, 1)) + np.zeros((3, 2))
        honest += covers(seed_interval(values), 0.0)
        optimistic += covers(hierarchical_bootstrap(values, crossed=(1,), resamples=400, seed=trial), 0.0)
    expect_rate(honest, trials, 0.95)
    # Under a true rate of 0.88 so few hits come with probability below 1e-6; the known rate is about 0.75.
    assert optimistic < scipy_stats.binom.ppf(FALSE_ALARM, trials, 0.88)
    assert optimistic > scipy_stats.binom.ppf(FALSE_ALARM, trials, 0.65)


@pytest.mark.parametrize("crossed", [(), (1,)])
def test_bootstrap_covers_with_many_units(crossed):
    """Random effects of 40 seeds and 12 devices; the bootstrap's own error there is below 0.05."""
    random = np.random.default_rng(2)
    trials, hits = 250, 0
    for trial in range(trials):
        device = random.normal(size=(1 if crossed else 40, 12))
        values = random.normal(size=(40, 1)) + 0.3 * device + random.normal(size=(40, 12))
        hits += covers(hierarchical_bootstrap(values, level=0.9, crossed=crossed, resamples=300, seed=trial), 0.0)
    low = scipy_stats.binom.ppf(FALSE_ALARM / 2, trials, 0.85)
    high = scipy_stats.binom.ppf(1 - FALSE_ALARM / 2, trials, 0.95)
    assert low <= hits <= high


# The bootstrap against analytic variances, given the data


RESAMPLES = 20_000
# Relative standard error of a variance over 20,000 near-normal replicates: sqrt(2 / 20,000) = 0.01. Six of them, with
# a fifth more for the excess kurtosis of small samples.
TOLERANCE = 6 * 0.01 * 1.2


def balanced(*shape, seed=0):
    """Random effects of every axis and their interaction, one draw."""
    random = np.random.default_rng(seed)
    values = random.normal(size=shape)
    for axis, size in enumerate(shape):
        values = values + random.normal(size=[size if axis == other else 1 for other in range(len(shape))])
    return values


def effects(values):
    """Population variances of the two-way decomposition: rows, columns, rest."""
    rows = values.mean(1, keepdims=True) - values.mean()
    columns = values.mean(0, keepdims=True) - values.mean()
    rest = values - values.mean() - rows - columns
    return (rows**2).mean(), (columns**2).mean(), (rest**2).mean()


def check_variance(values, crossed, expected):
    replicates = bootstrap_means(values, crossed=crossed, resamples=RESAMPLES, seed=3)
    assert replicates.shape == (RESAMPLES,)
    assert replicates.var() == pytest.approx(expected, rel=TOLERANCE)
    # Mean of replicates is the mean of the data, within 6 standard errors.
    assert abs(replicates.mean() - values.mean()) < 6 * math.sqrt(expected / RESAMPLES)


def test_nested_variance():
    values = balanced(6, 5)
    # Var = [var of seed means + mean within-seed variance / D] / S
    expected = (values.mean(1).var() + values.var(axis=1).mean() / 5) / 6
    check_variance(values, (), expected)


def test_crossed_variance():
    values = balanced(6, 5)
    # The two axes are drawn independently, so the interaction, orthogonal to both, adds var / (S D).
    rows, columns, rest = effects(values)
    check_variance(values, (1,), rows / 6 + columns / 5 + rest / 30)


def test_nested_devices_with_crossed_images():
    values = balanced(4, 3, 6)
    # Condition on the images' weights w, whose covariance is (I / n - 1 / n^2) / n and second moment that + 1 / n^2:
    # the nested variance is a quadratic form in the image-averaged values, so it is summed over the unit forms.
    n = 6
    second = (np.eye(n) / n - 1 / n**2) / n + 1 / n**2

    def nested(a, b):
        """Nested bootstrap covariance of the means of two images' values [4, 3]."""
        between = np.mean(a.mean(1) * b.mean(1)) - a.mean() * b.mean()
        within = np.mean((a * b).mean(1) - a.mean(1) * b.mean(1))
        return (between + within / 3) / 4

    images = values.transpose(2, 0, 1)
    inner = sum(second[i, j] * nested(images[i], images[j]) for i in range(n) for j in range(n))
    check_variance(values, (2,), inner + values.mean((0, 1)).var() / n)


def test_crossed_devices_with_nested_images():
    values = balanced(4, 3, 6)
    rows, columns, rest = effects(values.mean(2))
    # Images are drawn for each slot, so their part adds the mean variance within a unit over all slots.
    check_variance(values, (1,), rows / 4 + columns / 3 + rest / 12 + values.var(axis=2).mean() / (4 * 3 * 6))


def test_all_nested_of_three_levels():
    values = balanced(4, 3, 6)
    seeds, devices = values.mean((1, 2)).var(), values.mean(2).var(axis=1).mean()
    check_variance(values, (), seeds / 4 + devices / 12 + values.var(axis=2).mean() / 72)


def test_crossed_paths_agree():
    """Both axes crossed collapse by matrix products; with an axis of one unit nested and crossed are the same."""
    values = balanced(5, 1, 7)
    rows, columns, rest = effects(values[:, 0])
    for crossed in [(1, 2), (2,)]:
        check_variance(values, crossed, rows / 5 + columns / 7 + rest / 35)


# Differences


def spread(interval):
    return interval.high - interval.low


def test_difference_of_paired_seeds_is_the_bootstrap_of_the_difference():
    a, b = balanced(30, 20, seed=1), balanced(30, 20, seed=2)
    rows, columns, rest = effects(a - b)
    deviation = math.sqrt(rows / 30 + columns / 20 + rest / 600)
    interval = hierarchical_paired_difference(a, b, paired_seeds=True, resamples=RESAMPLES)
    assert interval.mean == pytest.approx((a - b).mean())
    # A 95% quantile over 20,000 replicates has a standard error of 0.9% of the width; near-normal within 3%.
    assert spread(interval) == pytest.approx(2 * 1.95996 * deviation, rel=6 * 0.009 + 0.03)


def test_independent_seeds_add_their_variances_and_share_devices():
    a, b = balanced(30, 20, seed=1), balanced(40, 20, seed=2)
    rows_a, _, rest_a = effects(a)
    rows_b, _, rest_b = effects(b)
    columns = (a.mean(0) - b.mean(0)).var()
    deviation = math.sqrt(rows_a / 30 + rows_b / 40 + columns / 20 + rest_a / 600 + rest_b / 800)
    interval = hierarchical_paired_difference(a, b, resamples=RESAMPLES)
    assert interval.num == 30
    # The interactions of both sides meet the same device draws; uncorrelated through their own seed draws.
    assert spread(interval) == pytest.approx(2 * 1.95996 * deviation, rel=6 * 0.009 + 0.03)


def test_what_both_sides_share_cancels():
    shared = np.random.default_rng(0).normal(size=(1, 10, 50))
    a = np.repeat(shared, 3, axis=0)
    interval = hierarchical_paired_difference(a, a - 0.25, resamples=500)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_replicates_depend_on_the_seed_only():
    values = balanced(3, 4, 5)
    for crossed in [(), (1,), (2,), (1, 2)]:
        first, again, other = (bootstrap_means(values, crossed=crossed, resamples=50, seed=s) for s in (1, 1, 2))
        assert (first == again).all() and (first != other).any()
    assert hierarchical_bootstrap(values, seed=4) == hierarchical_bootstrap(values, seed=4)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 4), (3, 1, 2)])
def test_axes_of_one_unit_work(shape):
    values = balanced(*shape)
    interval = hierarchical_bootstrap(values, resamples=200)
    assert interval.low <= interval.mean <= interval.high or values.size == 1
    assert interval.num == shape[0]


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([[1.0, 2.0]]), "shape [1, 2]"),
        (lambda: mean_interval([1.0, math.nan]), "finite, got nan"),
        (lambda: mean_interval([1.0, 2.0], level=1.0), "level must be in (0, 1), got 1.0"),
        (lambda: proportion_interval(4, trials=3), "got 4 of 3"),
        (lambda: proportion_interval(0, trials=0), "got 0 of 0"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "got 2 and 1"),
        (lambda: bootstrap_means([[1.0, 2.0]], crossed=(0,)), "axes must be in [1, 1], got 0"),
        (lambda: bootstrap_means([[1.0, 2.0]], crossed=(2,)), "axes must be in [1, 1], got 2"),
        (lambda: bootstrap_means([1.0], resamples=0), "at least 1, got 0"),
        (lambda: hierarchical_paired_difference(np.ones((2, 3)), np.ones((2, 4))), "[2, 3] and [2, 4]"),
        (lambda: hierarchical_paired_difference(np.ones((2, 3)), np.ones((4, 3)), paired_seeds=True), "[4, 3]"),
        (lambda: rank_correlation([1.0], [1.0]), "two or more pairs"),
    ],
)
def test_mistakes_get_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
