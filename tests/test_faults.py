"""The contract of every fault model, then each model against a naive loop and its law."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ftnas.faults import FAULTS, AdSAF, Fault, MiBB, Plan, Site, create_fault
from ftnas.faults.base import Fault as Base
from ftnas.quantize import FixedPoint

ALARM = 1e-6
SHAPE = (4, 6, 5, 3)

# One line per variant; every registered model must have one, and the contract below then holds it.
CASES = {
    "mibb": MiBB(mac_error_rate=0.002),
    "adsaf": AdSAF(),
    "adsaf differential": AdSAF(cells="differential", stuck_at="max"),
}


@pytest.fixture(params=CASES)
def fault(request) -> Fault:
    return CASES[request.param]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def site_of(shape=SHAPE, macs=36, bits=8) -> Site:
    return Site(layer="layer", shape=tuple(shape), macs=macs, bits=bits)


def form_of(fault: Fault, bits: int = 8) -> FixedPoint:
    return FixedPoint(bits=bits, encoding=fault.encoding or "twos_complement")


def on_grid(fault: Fault, shape=SHAPE, seed=0, bits=8):
    form = form_of(fault, bits)
    x = torch.randn(shape, generator=gen(seed))
    return form.quantize(x), form.grid(x)


def assert_binomial(hits: int, trials: int, probability: float) -> None:
    low, high = stats.binom.interval(1.0 - ALARM, trials, probability)
    assert low <= hits <= high, f"{hits} of {trials}, expected {trials * probability:.1f} in [{low}, {high}]"


# The contract


def test_every_registered_model_is_held_to_the_contract():
    assert {case.name for case in CASES.values()} == set(FAULTS)
    assert all(FAULTS.get(case.name) is type(case) for case in CASES.values())


def test_the_generator_alone_decides_the_plan(fault):
    state = torch.get_rng_state()
    one, same, other = (fault.sample(site_of(), generator=gen(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.sites, same.sites) and torch.equal(one.codes, same.codes)
    assert not torch.equal(one.sites, other.sites)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plan_says_what_it_holds(fault):
    plan = fault.sample(site_of(), generator=gen())
    assert plan.shape == SHAPE and plan.population % math.prod(SHAPE) == 0
    assert plan.sites.dtype == plan.codes.dtype == torch.int64 and len(plan.sites) == len(plan.codes) > 0
    assert len(set(plan.sites.tolist())) == len(plan.sites) == int(plan.hits())
    assert 0 <= int(plan.sites.min()) and int(plan.sites.max()) < plan.population
    assert set(plan.values_hit().tolist()) == {site % math.prod(SHAPE) for site in plan.sites.tolist()}


def test_the_realised_rate_is_the_plans_rate(fault):
    plan = fault.sample(site_of((40, 16, 20, 20)), generator=gen(1))
    assert_binomial(int(plan.hits()), plan.population, plan.rate)


def test_apply_is_pure_and_equals_apply_in_place(fault):
    values, grid = on_grid(fault)
    before = values.clone()
    plan = fault.sample(site_of(), generator=gen())
    faulty = fault.apply(values, plan, grid=grid)
    assert torch.equal(values, before) and not torch.equal(faulty, before)
    assert torch.equal(faulty, fault.apply(values, plan, grid=grid))
    assert fault.apply_(values, plan, grid) is values
    assert torch.equal(values, faulty)


def test_only_hit_values_change_and_stay_representable(fault):
    values, grid = on_grid(fault, (3, 8, 9, 7))
    plan = fault.sample(site_of((3, 8, 9, 7)), generator=gen())
    faulty = fault.apply(values, plan, grid=grid)
    changed = set((faulty != values).reshape(-1).nonzero().squeeze(1).tolist())
    assert changed and changed <= set(plan.values_hit().tolist())
    integers = faulty / grid.lsb
    assert torch.equal(integers, integers.round())
    assert grid.lo <= int(integers.min()) and int(integers.max()) <= grid.hi


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],  # with gaps in memory
        lambda x: torch.cat([x, x])[len(x) :],  # with an offset
    ],
)
def test_memory_format_does_not_matter(fault, arrange):
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(), generator=gen())
    arranged = arrange(values)
    assert torch.equal(arranged, values) and arranged.stride() != values.stride() or arranged.storage_offset()
    assert torch.equal(fault.apply(arranged, plan, grid=grid), fault.apply(values, plan, grid=grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_type_does_not_matter(fault, dtype):
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(), generator=gen())
    faulty = fault.apply(values.to(dtype), plan, grid=grid)
    assert faulty.dtype == dtype
    assert torch.equal(faulty.float(), fault.apply(values, plan, grid=grid))


def padded(plan: Plan, *, extra: int = 7) -> Plan:
    """What a draw on a GPU looks like: a fixed length, filled up with entries equal to the population."""
    sites = torch.cat([plan.sites, torch.full((extra,), plan.population)])
    codes = torch.cat([plan.codes, plan.codes.max().repeat(extra)])
    return dataclasses.replace(plan, sites=sites, codes=codes)


def test_padding_is_inert(fault):
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(), generator=gen())
    # padding is added, as nothing, to the first value in memory: hit that one too
    at_first = dataclasses.replace(plan, sites=torch.tensor([0]), codes=plan.codes[:1])
    for real in (plan, at_first):
        expected = fault.apply(values, real, grid=grid)
        assert torch.equal(fault.apply(values, padded(real), grid=grid), expected)
        last = values.contiguous(memory_format=torch.channels_last)
        assert torch.equal(fault.apply(last, padded(real), grid=grid), expected)
        assert int(padded(real).hits()) == int(real.hits())
        assert set(padded(real).values_hit().tolist()) == {*real.values_hit().tolist(), values.numel()}


def test_a_plan_fits_every_tensor_of_its_shape_and_no_other(fault):
    plan = fault.sample(site_of(), generator=gen())
    for seed in (3, 4):
        values, grid = on_grid(fault, seed=seed)
        changed = (fault.apply(values, plan, grid=grid) != values).reshape(-1).nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(plan.values_hit().tolist())
    values, grid = on_grid(fault, (4, 6, 5, 4))
    with pytest.raises(ValueError, match="a plan fits one shape"):
        fault.apply(values, plan, grid=grid)


@pytest.mark.parametrize("pad", [False, True])
def test_a_repeated_plan_gives_every_sample_the_same_faults(fault, pad):
    if fault.target != "feature":
        pytest.skip("a defect map over samples is for features")
    batch = 3
    plan = fault.sample(site_of(SHAPE[1:]), generator=gen())
    many = (padded(plan) if pad else plan).repeated(batch)
    assert many.shape == (batch, *SHAPE[1:]) and int(many.hits()) == batch * int(plan.hits())
    values, grid = on_grid(fault, many.shape)
    expected = torch.stack([fault.apply(sample, plan, grid=grid) for sample in values])
    assert torch.equal(fault.apply(values, many, grid=grid), expected)


def test_units_beyond_the_values_repeat_by_unit():
    # two units per value (cells), three values, two samples
    plan = Plan(torch.tensor([1, 5]), torch.tensor([0, 1]), population=6, rate=0.5, shape=(3,))
    many = plan.repeated(2)
    assert many.sites.tolist() == [1, 8, 4, 11] and many.codes.tolist() == [0, 1, 0, 1]
    assert (many.population, many.shape) == (12, (2, 3))
    assert many.values_hit().tolist() == [1, 2, 4, 5]


def test_a_saved_plan_gives_the_same_result(fault):
    plan = fault.sample(site_of(), generator=gen())
    file = io.BytesIO()
    torch.save(dataclasses.asdict(plan), file)
    file.seek(0)
    loaded = Plan(**torch.load(file, weights_only=True))
    values, grid = on_grid(fault)
    assert torch.equal(fault.apply(values, loaded, grid=grid), fault.apply(values, plan, grid=grid))


def test_rates_zero_one_and_between(fault):
    values, grid = on_grid(fault)
    none = fault.with_rate(0.0).sample(site_of(), generator=gen())
    assert len(none.sites) == 0 and none.rate == 0.0
    assert torch.equal(fault.apply(values, none, grid=grid), values)
    every = fault.with_rate(1.0).sample(site_of(), generator=gen())
    assert sorted(every.sites.tolist()) == list(range(every.population))
    other = fault.with_rate(0.01)
    assert type(other) is type(fault) and getattr(other, fault.rate_name) == pytest.approx(0.01, rel=1e-12)
    with pytest.raises(ValueError, match="equal to 1|exceed 1"):
        fault.with_rate(1.5)


def test_config_data_builds_the_same_model(fault):
    assert create_fault({"name": fault.name, **fault.model_dump()}) == fault
    with pytest.raises(ValueError, match="unknown key"):
        create_fault({"name": fault.name, **fault.model_dump(), "strength": 1})
    with pytest.raises(ValueError, match="frozen"):
        setattr(fault, next(iter(type(fault).model_fields)), 0.5)


def test_fixed_point_is_asked_for(fault):
    if not fault.needs_quantization:
        pytest.skip("works on floats")
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(), generator=gen())
    with pytest.raises(ValueError, match="give a quantization"):
        fault.apply(values, plan)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "mib"}, "unknown fault model 'mib'; did you mean 'mibb'?"),
        ({"mac_error_rate": 1e-4}, "expected keys and values with a name"),
        ("mibb", "expected keys and values with a name"),
        ({"name": "mibb"}, "mac_error_rate: required"),
        ({"name": "mibb", "mac_error_rate": 2}, "fault.mac_error_rate: .* less than or equal to 1, got 2"),
        ({"name": "mibb", "mac_eror_rate": 0.1, "mac_error_rate": 0.1}, "did you mean 'mac_error_rate'?"),
        ({"name": "adsaf", "sa0_rate": 0.7, "sa1_rate": 0.7}, "must not exceed 1"),
        ({"name": "adsaf", "cells": "triple"}, "cells"),
    ],
)
def test_a_mistake_in_config_data_is_one_line(data, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        create_fault(data)
    assert "\n" not in str(error.value)


def test_a_users_own_class_works_by_import_name():
    fault = create_fault({"name": "ftnas.faults.feature:MiBB", "mac_error_rate": 0.25})
    assert fault == MiBB(mac_error_rate=0.25) and isinstance(fault, Base)


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
    plan = fault.sample(site_of(shape, macs=20, bits=bits), generator=gen(bits))
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
    plan = MiBB(mac_error_rate=1.0).sample(site_of((10, 8, 20, 20)), generator=gen(11))
    table = torch.stack([torch.bincount(part, minlength=16) for part in plan.codes.chunk(4)]).double()
    statistic = float(((table - 500.0) ** 2 / 500.0).sum())
    assert statistic < stats.chi2.isf(ALARM, 4 * 15)


def test_mibb_needs_the_word_width():
    with pytest.raises(ValueError, match="give a quantization"):
        MiBB(mac_error_rate=0.1).sample(site_of(bits=None), generator=gen())


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
    plan = fault.sample(site_of((6, 5, 3, 3), bits=bits), generator=gen(3))
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
    plan = AdSAF(cells=cells).sample(site_of((200, 200)), generator=gen(4))
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
    faulty = fault.apply(values, fault.sample(site_of((300, 300)), generator=gen(7)), grid=grid)
    assert_binomial(int((faulty != values).sum()), values.numel(), changing)


def test_adsaf_sweep_keeps_the_shares():
    swept = AdSAF(cells="differential", stuck_at="max").with_rate(0.04)
    assert swept.total_rate == pytest.approx(0.04)
    assert swept.sa0_rate / swept.sa1_rate == pytest.approx(0.067 / 0.013)
    assert (swept.cells, swept.stuck_at) == ("differential", "max")
    with pytest.raises(ValueError, match="shares"):
        AdSAF(sa0_rate=0.0, sa1_rate=0.0).with_rate(0.1)
