"""MiBB and the stuck-at faults against naive loops and their laws; persistence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from faulty import ALARM, CASES, VARIATIONS, assert_binomial, assert_uniform, gen, on_grid, site_of
from scipy import stats
from torch import nn

from ftnas import inject
from ftnas.faults import AdSAF, BitAdSAF, LogNormalVariation, MiBB, Plan
from ftnas.quantize import FixedPoint

# MiBB, eq. 8


@pytest.mark.parametrize("macs", [1, 9, 64, 576, 25088])
@pytest.mark.parametrize("rate", [1e-12, 1e-6, 3e-4, 0.1, 1.0])
def test_mibb_probability_is_that_of_any_of_the_macs_failing(macs, rate):
    survive = 1.0
    for _ in range(macs):
        survive *= 1.0 - rate
    assert MiBB(mac_error_rate=rate).probability(macs) == pytest.approx(1.0 - survive, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_mibb_agrees_with_a_naive_loop(bits):
    fault = MiBB(mac_error_rate=0.02)
    shape = (3, 4, 5, 5)
    plan = fault.sample(site_of(None, shape, macs=20, bits=bits), generator=gen(bits))
    values, grid = on_grid(fault, shape, seed=bits, bits=bits)
    lsb = float(grid.lsb)
    expected = (values / lsb).double().numpy().reshape(-1)
    for position, code in zip(plan.sites.tolist(), plan.codes.tolist(), strict=True):
        alpha, beta = code // 2, code % 2
        assert 0 <= alpha < bits
        biased = expected[position] + (-1) ** beta * 2**alpha
        expected[position] = min(max(biased, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    got = fault.apply(values, plan, grid=grid).double().numpy().reshape(-1) / lsb
    np.testing.assert_array_equal(got, expected)


def test_mibb_clamps_at_both_limits():
    fault = MiBB(mac_error_rate=1.0)
    values = torch.tensor([127.0, -128.0, 127.0, -128.0, 0.0, 100.0]) / 128
    grid = FixedPoint().grid(torch.ones(1))
    codes = torch.tensor([0 * 2 + 0, 0 * 2 + 1, 7 * 2 + 1, 7 * 2 + 0, 7 * 2 + 0, 6 * 2 + 0])
    plan = Plan(torch.arange(6), codes, population=6, rate=1.0, shape=(6,))
    expected = [127, -128, -1, 0, 127, 127]  # +128 LSB from 0 does not fit and saturates
    assert (fault.apply(values, plan, grid=grid) * 128).tolist() == expected


def test_mibb_bits_and_signs_are_uniform_and_independent_of_the_position():
    plan = MiBB(mac_error_rate=1.0).sample(site_of(None, (10, 8, 20, 20)), generator=gen(11))
    table = torch.stack([torch.bincount(part, minlength=16) for part in plan.codes.chunk(4)]).double()
    statistic = float(((table - 500.0) ** 2 / 500.0).sum())
    assert statistic < stats.chi2.isf(ALARM, 4 * 15)


def test_mibb_needs_the_word_width():
    with pytest.raises(ValueError, match="give a quantization"):
        MiBB(mac_error_rate=0.1).sample(site_of(None, bits=None), generator=gen())


# adSAF, eq. 9


def naive_adsaf(fault: AdSAF, integers: np.ndarray, plan: Plan, hi: int) -> np.ndarray:
    bound = hi if fault.stuck_at == "range" else int(np.abs(integers).max())
    flat = integers.reshape(-1)
    if fault.cells == "logical":
        out = flat.copy()
        for unit, code in zip(plan.sites.tolist(), plan.codes.tolist(), strict=True):
            out[unit] = 0 if code == 0 else (-bound if flat[unit] < 0 else bound)
        return out.reshape(integers.shape)
    cells = np.stack([np.maximum(flat, 0), np.maximum(-flat, 0)])
    for unit, code in zip(plan.sites.tolist(), plan.codes.tolist(), strict=True):
        cells[unit // len(flat), unit % len(flat)] = code * bound
    return (cells[0] - cells[1]).reshape(integers.shape)


@pytest.mark.parametrize("stuck_at", ["range", "max"])
@pytest.mark.parametrize("cells", ["logical", "differential"])
@pytest.mark.parametrize("bits", [2, 8])
def test_adsaf_agrees_with_a_naive_loop(cells, stuck_at, bits):
    fault = AdSAF(sa0_rate=0.3, sa1_rate=0.2, cells=cells, stuck_at=stuck_at)
    values, grid = on_grid(fault, (6, 5, 3, 3), seed=2, bits=bits)
    plan = fault.sample(site_of(fault, (6, 5, 3, 3), bits=bits), generator=gen(3))
    integers = (values / grid.lsb).numpy().astype(int)
    got = (fault.apply(values, plan, grid=grid) / grid.lsb).numpy()
    np.testing.assert_array_equal(got, naive_adsaf(fault, integers, plan, grid.hi))


def test_adsaf_by_hand():
    weights = torch.tensor([64.0, -32.0, 0.0, 5.0, -0.0]) / 128  # |w| <= 0.5, so that the range ends at 127/256
    form = FixedPoint(encoding="sign_magnitude")
    grid = form.grid(weights * 127 / 64)
    grid = dataclasses.replace(grid, lsb=torch.tensor(1 / 128))

    def faulty(fault: AdSAF, sites: list[int], codes: list[int], population: int) -> list[float]:
        plan = Plan(torch.tensor(sites), torch.tensor(codes), population, rate=0.5, shape=(5,))
        return (fault.apply(weights, plan, grid=grid) * 128).tolist()

    logical = AdSAF()
    assert faulty(logical, [0, 1, 2, 4], [0, 0, 0, 0], 5) == [0, 0, 0, 5, 0]
    assert faulty(logical, [0, 1, 2, 4], [1, 1, 1, 1], 5) == [127, -127, 127, 5, 127]  # sgn(0) = +1, of -0.0 too
    assert faulty(AdSAF(stuck_at="max"), [0, 1, 2], [1, 1, 1], 5) == [64, -64, 64, 5, 0]
    # units 0-4 are the positive cells, 5-9 the negative ones
    cells = AdSAF(cells="differential")
    assert faulty(cells, [0, 1, 2], [0, 0, 0], 10) == [0, -32, 0, 5, 0]
    assert faulty(cells, [5, 6, 7], [0, 0, 0], 10) == [64, 0, 0, 5, 0]
    assert faulty(cells, [0, 1, 2], [1, 1, 1], 10) == [127, 127 - 32, 127, 5, 0]
    assert faulty(cells, [5, 6, 7], [1, 1, 1], 10) == [64 - 127, -127, -127, 5, 0]
    assert faulty(cells, [0, 2, 5, 7], [0, 1, 1, 1], 10) == [-127, -32, 0, 5, 0]


@pytest.mark.parametrize("cells", ["logical", "differential"])
def test_adsaf_shares_of_both_kinds(cells):
    plan = AdSAF(cells=cells).sample(site_of(None, (200, 200)), generator=gen(4))
    assert plan.population == 40_000 * (2 if cells == "differential" else 1) and plan.rate == pytest.approx(0.08)
    ones = int(plan.codes.sum())
    assert set(plan.codes.tolist()) == {0, 1}
    assert_binomial(ones, plan.population, 0.013)
    assert_binomial(len(plan.codes) - ones, plan.population, 0.067)


def test_adsaf_of_one_kind_only():
    for rates, code in (({"sa0_rate": 0.2, "sa1_rate": 0.0}, 0), ({"sa0_rate": 0.0, "sa1_rate": 0.2}, 1)):
        plan = AdSAF(**rates).sample(site_of(), generator=gen())
        assert set(plan.codes.tolist()) == {code}


def test_adsaf_differential_changes_about_nine_percent_of_the_weights():
    # A weight strictly inside the range keeps its value when its own cell works and the other one is not stuck at 1.
    p0, p1 = 0.067, 0.013
    changing = 1.0 - (1.0 - p0 - p1) * (1.0 - p1)
    assert changing == pytest.approx(0.092, abs=5e-5)
    integers = torch.randint(1, 127, (300, 300), generator=gen(5)) * torch.where(
        torch.rand(300, 300, generator=gen(6)) < 0.5, -1, 1
    )
    form = FixedPoint(encoding="sign_magnitude")
    values, grid = integers / 128, form.grid(torch.ones(1))
    fault = AdSAF(cells="differential")
    faulty = fault.apply(values, fault.sample(site_of(None, (300, 300)), generator=gen(7)), grid=grid)
    assert_binomial(int((faulty != values).sum()), values.numel(), changing)


def test_adsaf_sweep_keeps_the_shares():
    swept = AdSAF(cells="differential", stuck_at="max").with_rate(0.04)
    assert swept.total_rate == pytest.approx(0.04)
    assert swept.sa0_rate / swept.sa1_rate == pytest.approx(0.067 / 0.013)
    assert (swept.cells, swept.stuck_at) == ("differential", "max")
    with pytest.raises(ValueError, match="shares"):
        AdSAF(sa0_rate=0.0, sa1_rate=0.0).with_rate(0.1)


# 1bit-adSAF, eq. 10


@pytest.mark.parametrize("bits", [2, 8, 12])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.5, 0.5), (0.0, 0.4)])
def test_bit_adsaf_rebuilds_the_magnitude_from_its_bits(bits, rates):
    fault = BitAdSAF(sa0_rate=rates[0], sa1_rate=rates[1])
    shape = (6, 5, 3, 3)
    values, grid = on_grid(fault, shape, seed=4, bits=bits)
    values.view(-1)[:20] = 0.0
    plan = fault.sample(site_of(fault, shape, bits=bits), generator=gen(5))
    assert plan.population == (bits - 1) * values.numel()
    integers = (values / grid.lsb).numpy().astype(int).reshape(-1)
    stuck: dict[int, dict[int, int]] = {}
    for unit, code in zip(plan.sites.tolist(), plan.codes.tolist(), strict=True):
        stuck.setdefault(unit % len(integers), {})[unit // len(integers)] = code
    expected = []
    for index, word in enumerate(integers.tolist()):
        held = [(abs(word) >> bit) & 1 for bit in range(bits - 1)]
        for bit, code in stuck.get(index, {}).items():
            held[bit] = code
        expected.append(sum(value << bit for bit, value in enumerate(held)) * (-1 if word < 0 else 1))
    assert bits == 2 or max(len(cells) for cells in stuck.values()) > 1  # several stuck bits in one word
    got = (fault.apply(values, plan, grid=grid) / grid.lsb).numpy().reshape(-1)
    np.testing.assert_array_equal(got, expected)


def test_bit_adsaf_with_every_cell_stuck_gives_zero_or_the_bound():
    values, grid = on_grid(BitAdSAF(), (4, 3, 3, 3))
    for rates, magnitude in (((1.0, 0.0), 0.0), ((0.0, 1.0), float(grid.bound))):
        fault = BitAdSAF(sa0_rate=rates[0], sa1_rate=rates[1])
        plan = fault.sample(site_of(fault, (4, 3, 3, 3)), generator=gen())
        expected = torch.where(values < 0, -magnitude, magnitude)
        assert torch.equal(fault.apply(values, plan, grid=grid), expected)


def test_bit_adsaf_hits_every_bit_alike_and_keeps_the_shares():
    fault = BitAdSAF()
    plan = fault.sample(site_of(fault, (150, 150)), generator=gen(12))
    assert_uniform(torch.bincount(fault.bits_hit(plan), minlength=7))
    assert_binomial(int(plan.codes.sum()), plan.population, 0.013)
    assert_binomial(len(plan.codes) - int(plan.codes.sum()), plan.population, 0.067)
    with pytest.raises(ValueError, match="give a quantization"):
        fault.sample(site_of(fault, bits=None), generator=gen())


# Persistence: it multiplies the rate of a multiply-accumulate, bit or cell, before a probability is formed from it


def test_persistence_multiplies_the_rate_before_the_probability_is_formed():
    assert MiBB(mac_error_rate=1e-4, persistence=50.0).probability(64) == pytest.approx(1.0 - (1.0 - 5e-3) ** 64)
    assert MiBB(mac_error_rate=0.25, persistence=4.0).probability(9) == 1.0


@pytest.mark.parametrize("name", [name for name, fault in CASES.items() if not isinstance(fault, VARIATIONS)])
def test_persistence_is_a_higher_rate_and_never_above_one(name):
    fault = CASES[name].model_copy(update={"persistence": 1.0})
    low = fault.with_rate(0.01)
    lasting = type(fault).model_validate({**low.model_dump(), "persistence": 8.0})
    high, site = fault.with_rate(0.08), site_of(fault)
    one, other = (model.sample(site, generator=gen(3)) for model in (lasting, high))
    assert one.rate == pytest.approx(other.rate, rel=1e-12) and one.rate > low.sample(site, generator=gen(3)).rate
    assert torch.equal(one.sites, other.sites) and torch.equal(one.codes, other.codes)
    with pytest.raises(ValueError, match="persistence times the rate must not exceed 1, got 8 [*] 0.2"):
        lasting.with_rate(0.2)


@pytest.mark.parametrize("gradients", [True, False])
def test_cells_are_stuck_at_the_largest_weight_that_was_written_whatever_fails_before(gradients):
    """R is max|w| of the quantized tensor (eq. 9): variation that comes first has no part in it."""
    layer = nn.Linear(20, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.9, 0.8, 400).view(20, 20))
    varied, stuck = LogNormalVariation(sigma=0.5), AdSAF(sa0_rate=0.0, sa1_rate=0.3, stuck_at="max")
    with inject(layer, varied, stuck, quantization=FixedPoint(bits=8), seed=1) as injection:
        with torch.set_grad_enabled(gradients):
            layer(torch.zeros(1, 20))
            weight = layer.weight.detach().reshape(-1)
        hit = injection.plans().plans[1, "", 0].sites
    largest = float(torch.round(torch.tensor(0.9 * 128)) / 128)
    assert len(hit) > 80 and set(weight[hit].abs().tolist()) == {largest}
    assert weight.abs().max() > largest  # by variation
