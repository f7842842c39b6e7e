"""Exact i.i.d. Bernoulli drawing: every statistical test has a false-alarm rate of 1e-6 or less, and a fixed seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from faulty import never_waits
from scipy import stats

from ftnas.faults import sampling
from ftnas.faults.sampling import bernoulli, bernoulli_sites, random_integers

ALARM = 1e-6


@pytest.fixture(params=["sparse", "dense", "sparse, drawn in short pieces"])
def branch(request, monkeypatch):
    """Force each way of drawing, for every rate."""
    monkeypatch.setattr(sampling, "DENSE_ABOVE", 0.0 if request.param == "dense" else 1.0)
    if "short" in request.param:
        walk = sampling._walk
        monkeypatch.setattr(sampling, "_walk", lambda last, length, *rest: walk(last, min(length, 2), *rest))
    return request.param


def draw(population, rate, *, times, seed):
    generator = torch.Generator().manual_seed(seed)
    return [bernoulli_sites(population, rate, generator=generator) for _ in range(times)]


def assert_binomial(hits: int, trials: int, probability: float) -> None:
    low, high = stats.binom.interval(1.0 - ALARM, trials, probability)
    assert low <= hits <= high, f"{hits} hits of {trials}, expected {trials * probability:.1f} in [{low}, {high}]"


def assert_multinomial(observed: list[int], expected: list[float]) -> None:
    assert min(expected) > 5
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert statistic < stats.chi2.isf(ALARM, len(expected) - 1), statistic


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.9])
def test_sites_are_distinct_ascending_and_in_range(branch, rate):
    for sites in draw(5000, rate, times=5, seed=1):
        assert sites.dtype == torch.int64 and sites.dim() == 1
        assert bool((sites.diff() > 0).all())
        assert not len(sites) or (int(sites[0]) >= 0 and int(sites[-1]) < 5000)


@pytest.mark.parametrize("rate", [0.0, 1e-300, 1e-20, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("population", [0, 1, 2, 1000])
def test_edges(rate, population):
    (sites,) = draw(population, rate, times=1, seed=0)
    if rate == 1.0:
        assert sites.tolist() == list(range(population))
    elif rate < 1e-10 or population == 0:
        assert sites.tolist() == []
    else:
        assert set(sites.tolist()) <= set(range(population))


@pytest.mark.parametrize("rate", [0.1, 0.35, 0.8])
def test_the_joint_law_of_a_small_population_is_the_exact_one(branch, rate):
    # all 2^3 outcomes of three sites: this is independence, uniformity and the rate in one
    times = 6000
    counts = dict.fromkeys(itertools.product([0, 1], repeat=3), 0)
    for sites in draw(3, rate, times=times, seed=2):
        hit = set(sites.tolist())
        counts[tuple(int(site in hit) for site in range(3))] += 1
    expected = [times * rate ** sum(o) * (1 - rate) ** (3 - sum(o)) for o in counts]
    assert_multinomial(list(counts.values()), expected)


@pytest.mark.parametrize(("rate", "population"), [(1e-5, 3_000_000), (2e-3, 200_000), (0.149, 20_000), (0.3, 20_000)])
def test_number_of_hits_is_binomial(rate, population):
    draws = draw(population, rate, times=10, seed=3)
    assert_binomial(sum(map(len, draws)), 10 * population, rate)


def test_variance_of_the_number_of_hits_is_binomial(branch):
    times, population, rate = 1500, 100, 0.08
    counts = torch.tensor([len(sites) for sites in draw(population, rate, times=times, seed=4)], dtype=torch.float64)
    expected = [times * stats.binom.pmf(k, population, rate) for k in range(3, 15)]
    observed = [int((counts == k).sum()) for k in range(3, 15)]
    rest = times - sum(expected)
    assert_multinomial([*observed, times - sum(observed)], [*expected, rest])


def test_positions_are_uniform_and_neighbours_independent(branch):
    times, population, rate = 1500, 400, 0.05
    hits = torch.zeros(times, population, dtype=torch.bool)
    for row, sites in zip(hits, draw(population, rate, times=times, seed=5), strict=True):
        row[sites] = True
    per_site = hits.sum(0).double()
    statistic = float(((per_site - times * rate) ** 2 / (times * rate * (1 - rate))).sum())
    assert stats.chi2.ppf(ALARM / 2, population) < statistic < stats.chi2.isf(ALARM / 2, population)
    for distance in (1, 2, 7):  # disjoint pairs, so that their number is binomial
        pairs = hits[:, : population // (2 * distance) * 2 * distance].reshape(times, -1, 2, distance)
        both = pairs[:, :, 0] & pairs[:, :, 1]
        assert_binomial(int(both.sum()), both.numel(), rate**2)


def test_gaps_are_geometric(branch):
    rate, longest = 0.07, 40
    generator = torch.Generator().manual_seed(6)
    population = 20_000 if "short" in branch else 300_000
    sites = torch.cat([torch.tensor([-1]), bernoulli_sites(population, rate, generator=generator)])
    gaps = sites.diff() - 1
    observed = torch.bincount(gaps.clamp(max=longest), minlength=longest + 1).tolist()
    expected = [len(gaps) * rate * (1 - rate) ** k for k in range(longest)] + [len(gaps) * (1 - rate) ** longest]
    assert_multinomial(observed, expected)


def test_the_generator_decides_alone():
    state = torch.get_rng_state()
    one, same, other = (draw(10_000, 0.01, times=1, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_integers_are_uniform_and_events_have_their_rate():
    generator = torch.Generator().manual_seed(9)
    integers = random_integers(16, 80_000, generator=generator)
    assert_multinomial(torch.bincount(integers, minlength=16).tolist(), [5000.0] * 16)
    assert_binomial(int(bernoulli(0.163, 50_000, generator=generator).sum()), 50_000, 0.163)
    assert not bool(bernoulli(0.0, 1000, generator=generator).any())
    assert bool(bernoulli(1.0, 1000, generator=generator).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_on_a_gpu_nothing_is_read_back_and_padding_is_the_population(rate):
    generator = torch.Generator("cuda").manual_seed(10)
    with never_waits():
        sites = bernoulli_sites(100_000, rate, generator=generator)
    sites = sites.cpu()
    real = sites[sites < 100_000]
    assert bool((real.diff() > 0).all()) and bool((sites[len(real) :] == 100_000).all())
    assert_binomial(len(real), 100_000, rate)
