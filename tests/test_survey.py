"""Sampling of faults against closed forms, brute force over small populations, and exact or simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ftnas.stats import proportion_interval
from ftnas.survey import MIN_DEVICES, Stratum, allocate, devices_for, enough, sample_size, stratified_interval

FALSE_ALARM = 1e-6


def stratum(population, trials, successes, name="conv1"):
    return Stratum(name=name, population=population, trials=trials, successes=successes)


# Sample size


@pytest.mark.parametrize(
    ("population", "margin", "level", "expected"),
    # t^2 / (4 e^2) for an infinite population, by hand with t = 1.959964 and 2.575829; the last by the formula.
    [(10**12, 0.01, 0.95, 9604), (10**12, 0.01, 0.99, 16588), (10**12, 0.05, 0.95, 385), (1000, 0.05, 0.95, 278)],
)
def test_sample_size_by_hand(population, margin, level, expected):
    assert sample_size(population, margin=margin, level=level) == expected


@pytest.mark.parametrize("population", [1, 2, 3, 10, 97, 1000, 123_456, 10**12])
@pytest.mark.parametrize("margin", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("proportion", [0.5, 0.01])
def test_sample_size_is_the_smallest_that_keeps_the_margin(population, margin, proportion):
    def half(n):
        if n == population:
            return 0.0
        variance = proportion * (1 - proportion) / n * (population - n) / (population - 1)
        return scipy_stats.norm.ppf(0.95) * math.sqrt(variance)

    n = sample_size(population, margin=margin, level=0.9, proportion=proportion)
    assert 1 <= n <= population
    assert half(n) <= margin * (1 + 1e-12)
    assert n == 1 or half(n - 1) > margin


# Allocation


@pytest.mark.parametrize(
    ("populations", "total", "minimum", "expected"),
    [
        ([100, 200, 700], 10, 1, [1, 2, 7]),
        ([1, 1, 1], 2, 0, [1, 1, 0]),  # equal remainders: the earlier ones
        ([1, 1000], 11, 5, [1, 10]),  # the minimum is the whole stratum
        ([10, 10, 980], 20, 5, [5, 5, 10]),
        ([3, 5], 8, 1, [3, 5]),
        ([10**12, 3 * 10**12], 7, 1, [2, 5]),  # 1.75 and 5.25
    ],
)
def test_allocation_by_hand(populations, total, minimum, expected):
    assert allocate(populations, total, minimum=minimum) == expected


def test_allocation_keeps_its_promises():
    random = np.random.default_rng(0)
    for _ in range(300):
        populations = (10 ** random.uniform(0, 6, size=random.integers(1, 9))).astype(int).tolist()
        minimum = int(random.integers(0, 20))
        least = sum(min(minimum, size) for size in populations)
        total = int(random.integers(least, sum(populations) + 1))
        shares = allocate(populations, total, minimum=minimum)
        assert sum(shares) == total
        above = []
        for size, share in zip(populations, shares, strict=True):
            assert min(minimum, size) <= share <= size
            if share > min(minimum, size):
                above.append((size, share))
        # Strata above their minimum share alike: one trial less in one never is too much against another.
        for (size, share), (other_size, other) in itertools.permutations(above, 2):
            assert (share - 1) * other_size < (other + 1) * size


# Intervals


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (10, 30), (30, 30), (40, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_one_large_stratum_is_wilson(successes, trials, level):
    interval = stratified_interval([stratum(10**13, trials, successes)], level=level)
    wilson = proportion_interval(successes, trials=trials, level=level)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((wilson.low, wilson.mean, wilson.high))
    assert (interval.num, interval.level) == (trials, level)


def test_bounds_solve_the_score_equation_of_the_finite_population():
    interval = stratified_interval([stratum(10**9, 4 * 10**8, 10**8)])
    for bound in (interval.low, interval.high):
        variance = bound * (1 - bound) / (4 * 10**8) * (6 * 10**8) / (10**9 - 1)
        assert abs(bound - 0.25) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-3)  # of 1.3e-5; in 1e-9


@pytest.mark.parametrize(("successes", "expected"), [(1, 0.05129), (2, 0.35536), (3, 0.81769)])
def test_few_successes_get_the_exact_bound(successes, expected):
    # The mean of a Poisson distribution at which so many or more are seen with 5%.
    trials = 10**6
    interval = stratified_interval([stratum(10**15, trials, successes)])
    assert interval.low * trials == pytest.approx(expected, rel=1e-4)
    mirrored = stratified_interval([stratum(10**15, trials, trials - successes)])
    assert (1 - mirrored.high) * trials == pytest.approx(expected, rel=1e-4)


def test_equal_strata_without_success_count_as_one_sample():
    """The worst case of equal strata is one common proportion: its bound, not the strata's bounds added up."""
    interval = stratified_interval([stratum(10**12, 100, 0)] * 50)
    assert interval.low == interval.mean == 0
    assert interval.high == pytest.approx(proportion_interval(0, trials=5000).high, rel=1e-6)


def test_the_score_bound_of_two_strata_by_brute_force():
    """All pairs of proportions on a grid: those most likely for their weighted sum, and the sum that is just kept."""
    strata = [stratum(3 * 10**12, 40, 10), stratum(10**12, 25, 15)]
    grid = np.linspace(1e-6, 1 - 1e-6, 400_001)
    w, n, x = np.array([0.75, 0.25]), (40, 25), (10, 15)
    estimate = 0.75 * 0.25 + 0.25 * 0.6

    def excess(p):
        second = (p - w[0] * grid) / w[1]
        inside = (second > 0) & (second < 1)
        a, b = grid[inside], second[inside]
        log = x[0] * np.log(a) + (n[0] - x[0]) * np.log1p(-a) + x[1] * np.log(b) + (n[1] - x[1]) * np.log1p(-b)
        best = int(log.argmax())
        q = np.array([a[best], b[best]])
        return abs(p - estimate) / math.sqrt(float((w**2 * q * (1 - q) / n).sum()))

    interval = stratified_interval(strata)
    assert interval.mean == pytest.approx(estimate)
    for bound in (interval.low, interval.high):
        assert excess(bound) == pytest.approx(1.959964, abs=1e-4)


def test_strata_that_were_tried_fully_add_no_width():
    sampled = stratum(1000, 50, 10)
    alone = stratified_interval([sampled])
    both = stratified_interval([sampled, stratum(1000, 1000, 300)])
    assert both.mean == pytest.approx(alone.mean / 2 + 0.15)
    # Up to the outward rounding to one fault of 2000.
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2, abs=1.01 / 2000)
    whole = stratified_interval([stratum(1000, 1000, 300), stratum(5, 5, 0)])
    assert whole.low == whole.mean == whole.high == 300 / 1005
    assert whole.method == "all faults tried"


@pytest.mark.parametrize(
    "strata",
    [
        [stratum(1, 1, 1), stratum(10**12, 3, 3)],
        [stratum(2, 1, 0), stratum(2, 1, 1)],
        [stratum(10, 10, 0), stratum(100, 99, 0)],
        [stratum(10**12, 10**6, 0), stratum(5, 1, 1)],
        [stratum(10**15, 1, 0), stratum(10**15, 10**9, 10**9)],
    ],
)
@pytest.mark.parametrize("level", [0.01, 0.5, 0.95, 0.999999])
def test_bounds_stay_within_what_is_possible(strata, level):
    interval = stratified_interval(strata, level=level)
    population = sum(part.population for part in strata)
    seen = sum(part.successes for part in strata)
    unseen = population - sum(part.trials for part in strata)
    assert seen / population <= interval.low <= interval.mean <= interval.high <= (seen + unseen) / population


# Coverage, exact: every outcome of every population with its hypergeometric probability


def exact_coverage(sizes, trials):
    """Return the coverage at 95% of every population, an array over the number of effects in each stratum."""
    total, width = sum(sizes), len(sizes)
    chances = [
        scipy_stats.hypergeom.pmf(np.arange(n + 1)[:, None], size, np.arange(size + 1)[None], n)
        for size, n in zip(sizes, trials, strict=True)
    ]
    true = sum(np.indices([size + 1 for size in sizes])) / total
    covered = np.zeros(true.shape)
    for outcome in itertools.product(*(range(n + 1) for n in trials)):
        parts = [stratum(*numbers) for numbers in zip(sizes, trials, outcome, strict=True)]
        interval = stratified_interval(parts)
        chance = chances[0][outcome[0]]
        for axis in range(1, width):
            chance = chance[..., None] * chances[axis][outcome[axis]]
        covered += chance * ((interval.low <= true + 1e-12) & (true - 1e-12 <= interval.high))
    return covered


@pytest.mark.parametrize(
    ("sizes", "trials", "least", "mean"),
    [
        ((20,), (5,), 0.9621, 0.9916),
        ((100,), (10,), 0.9345, 0.9717),
        ((100,), (50,), 0.9551, 0.9751),
        ((100,), (90,), 0.9826, 0.9927),
        ((1000,), (30,), 0.924, 0.9574),
        ((20, 60), (6, 10), 0.9271, 0.9689),
        ((15, 40), (14, 8), 0.9539, 0.9784),
        ((12, 12), (12, 5), 0.9722, 0.993),
    ],
)
def test_exact_coverage_of_small_populations(sizes, trials, least, mean):
    """The least and the mean coverage over all populations of these sizes, as computed when this was written."""
    covered = exact_coverage(sizes, trials)
    assert covered.min() == pytest.approx(least, abs=5e-4)
    assert covered.mean() == pytest.approx(mean, abs=5e-4)


# Coverage, simulated: the configurations of the docstring, in fewer draws


UNEQUAL = (50, 200, 800, 3000, 10_000, 40_000, 100_000, 500_000)


@pytest.mark.parametrize(
    ("sizes", "trials"), [(UNEQUAL, allocate(UNEQUAL, 400)), (UNEQUAL, [20] * 8)], ids=["proportional", "equal"]
)
@pytest.mark.parametrize("proportion", [0.0, 1e-4, 1e-3, 0.05, 0.5])
def test_interval_covers_at_rare_and_common_effects(sizes, trials, proportion):
    """Not below 0.94, up to the draws' own error at the false-alarm rate."""
    random, draws = np.random.default_rng(5), 120
    effects = [round(proportion * size) for size in sizes]
    true = sum(effects) / sum(sizes)
    hits = 0
    for _ in range(draws):
        outcome = [random.hypergeometric(k, n - k, m) for k, n, m in zip(effects, sizes, trials, strict=True)]
        parts = [stratum(*numbers) for numbers in zip(sizes, trials, map(int, outcome), strict=True)]
        interval = stratified_interval(parts)
        hits += interval.low - 1e-12 <= true <= interval.high + 1e-12
    assert hits >= scipy_stats.binom.ppf(FALSE_ALARM, draws, 0.94)


# Devices


def test_devices_by_hand():
    # t_37(0.975) x 0.03 / sqrt(38) = 0.00986, t_36 x 0.03 / sqrt(37) = 0.01000254
    assert devices_for(0.01, standard_deviation=0.03) == 38
    assert devices_for(0.5, standard_deviation=0.0) == 2
    # Many: t is z = 1.959964, so that n = (1.959964 / 0.001)^2.
    assert devices_for(0.001, standard_deviation=1.0) == pytest.approx(1959.964**2, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_devices_are_the_fewest(ratio, level):
    n = devices_for(ratio, standard_deviation=1.0, level=level)
    halves = [scipy_stats.t.ppf(0.5 + level / 2, m - 1) / math.sqrt(m) for m in range(2, n + 1)]
    assert halves[-1] <= ratio and all(half > ratio for half in halves[:-1])


def test_enough_is_the_interval_and_the_minimum():
    values = [0.7 + 0.01 * (-1) ** i for i in range(20)]
    half = scipy_stats.t.ppf(0.975, 19) * np.std(values, ddof=1) / math.sqrt(20)
    assert MIN_DEVICES == 20
    assert enough(values, half_width=half * (1 + 1e-9)) and not enough(values, half_width=half * (1 - 1e-9))
    assert not enough(values[:19], half_width=1.0) and enough(values[:5], half_width=1.0, minimum=5)
    assert not enough([], half_width=1.0)


@pytest.mark.parametrize(("minimum", "rate"), [(5, 0.926), (20, 0.945)])
def test_stopping_covers_as_the_docstring_says(minimum, rate):
    """Normal values and a width that needs 25; the docstring's figures come from 20,000 runs."""
    random, runs, hits = np.random.default_rng(11), 120, 0
    half = 0.1 * 1.959964 / 5
    for _ in range(runs):
        values = random.normal(0.7, 0.1, size=200)
        stop = next(n for n in range(minimum, 201) if enough(values[:n], half_width=half, minimum=minimum))
        own = scipy_stats.t.ppf(0.975, stop - 1) * values[:stop].std(ddof=1) / math.sqrt(stop)
        hits += abs(values[:stop].mean() - 0.7) <= own
    low, high = scipy_stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], runs, rate)
    assert low <= hits <= high


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_size(0), "population must be at least 1, got 0"),
        (lambda: sample_size(10, margin=1.0), "margin must be in (0, 1), got 1.0"),
        (lambda: sample_size(10, level=95), "level must be in (0, 1), got 95; give it as a share"),
        (lambda: sample_size(10, proportion=0.0), "proportion must be in (0, 1), got 0.0"),
        (lambda: sample_size(10, margin=math.nan), "margin must be in (0, 1), got nan"),
        (lambda: allocate([], 3), "at least one stratum, got none"),
        (lambda: allocate([3, 0], 3), "population must be at least 1, got 0"),
        (lambda: allocate([3, 4], 1), "total must be in [2, 7] for 2 strata with at least 1 each, got 1"),
        (lambda: allocate([3, 4], 8), "total must be in [2, 7]"),
        (lambda: allocate([3, 4], 3, minimum=-1), "minimum must be at least 0, got -1"),
        (lambda: stratum(10, 0, 0), "stratum conv1: trials must be in [1, population], got 0 of 10"),
        (lambda: stratum(10, 11, 0), "got 11 of 10"),
        (lambda: stratum(10, 5, 6), "successes must be in [0, trials], got 6 of 5"),
        (lambda: stratified_interval([]), "at least one stratum, got none"),
        (lambda: stratified_interval([stratum(10, 5, 1)], level=0.0), "level must be in (0, 1), got 0.0"),
        (lambda: devices_for(0.0, standard_deviation=1.0), "half_width must be finite and above 0, got 0.0"),
        (lambda: devices_for(0.1, standard_deviation=math.inf), "standard_deviation must be finite"),
        (lambda: devices_for(1e-9, standard_deviation=1.0), "half_width 1e-09 needs more than"),
        (lambda: enough([1.0] * 9, half_width=0.1, minimum=4), "minimum must be at least 5, got 4"),
        (lambda: enough([1.0] * 9, half_width=0.1, level=1.0), "level must be in (0, 1), got 1.0"),
        (lambda: enough([math.nan] * 20, half_width=0.1), "finite, got nan"),
    ],
)
def test_mistakes_get_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
