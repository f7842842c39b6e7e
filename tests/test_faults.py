"""The contract that every fault model, in every variant, is held to."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from faulty import (
    CASES,
    SHAPE,
    VARIATIONS,
    assert_binomial,
    codes_per_site,
    float_word,
    gen,
    keeps_grid,
    on_grid,
    padded,
    same,
    site_of,
)

from ftnas.faults import FAULTS, Fault, MiBB, Plan, create_fault


@pytest.fixture(params=CASES)
def fault(request) -> Fault:
    return CASES[request.param]


# The contract


def test_every_registered_model_is_held_to_the_contract():
    whole_modules = {"node_down"}  # hits no tensor of a layer: see test_node_down.py
    assert {case.name for case in CASES.values()} == set(FAULTS) - whole_modules
    assert all(FAULTS.get(case.name) is type(case) for case in CASES.values())


def test_the_generator_alone_decides_the_plan(fault):
    state = torch.get_rng_state()
    one, again, other = (fault.sample(site_of(fault), generator=gen(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.sites, again.sites) and torch.equal(one.codes, again.codes)
    varies = isinstance(fault, VARIATIONS)
    assert not torch.equal(*(plan.codes if varies else plan.sites for plan in (one, other)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plan_says_what_it_holds(fault):
    plan = fault.sample(site_of(fault), generator=gen())
    number = math.prod(SHAPE)
    assert plan.shape == SHAPE and plan.population * plan.span % number == 0 and plan.num_at_risk == plan.population
    assert plan.sites.dtype == torch.int64 and plan.codes.dtype in (torch.int64, torch.float32) and len(plan.sites)
    assert len(plan.codes) in (len(plan.sites), len(plan.sites) * plan.span)
    assert len(set(plan.sites.tolist())) == len(plan.sites) == int(plan.hits())
    assert 0 <= int(plan.sites.min()) and int(plan.sites.max()) < plan.population
    firsts = [site * plan.span % number for site in plan.sites.tolist()]
    assert plan.values_hit().tolist() == [first + inside for first in firsts for inside in range(plan.span)]
    bits = fault.num_bits(site_of(fault))
    if bits is not None:
        hit = fault.bits_hit(plan)
        assert len(hit) == len(plan.sites) and 0 <= int(hit.min()) and int(hit.max()) < bits


def test_the_realised_rate_is_the_plans_rate(fault):
    plan = fault.sample(site_of(fault, (40, 16, 20, 20)), generator=gen(1))
    assert_binomial(int(plan.hits()), plan.population, plan.rate)


def test_apply_is_pure_and_equals_apply_in_place(fault):
    values, grid = on_grid(fault)
    before = values.clone()
    plan = fault.sample(site_of(fault), generator=gen())
    faulty = fault.apply(values, plan, grid=grid)
    assert same(values, before) and not same(faulty, before)
    assert same(faulty, fault.apply(values, plan, grid=grid))
    assert fault.apply_(values, plan, grid) is values
    assert same(values, faulty)


def test_only_hit_values_change_and_stay_representable(fault):
    values, grid = on_grid(fault, (3, 8, 9, 7))
    plan = fault.sample(site_of(fault, (3, 8, 9, 7)), generator=gen())
    faulty = fault.apply(values, plan, grid=grid)
    changed = set((faulty != values).reshape(-1).nonzero().squeeze(1).tolist())
    assert changed and changed <= set(plan.values_hit().tolist())
    if not keeps_grid(fault):
        return
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
    plan = fault.sample(site_of(fault), generator=gen())
    arranged = arrange(values)
    assert torch.equal(arranged, values) and arranged.stride() != values.stride() or arranged.storage_offset()
    assert same(fault.apply(arranged, plan, grid=grid), fault.apply(values, plan, grid=grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_type_does_not_matter(fault, dtype):
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(fault), generator=gen())
    faulty = fault.apply(values.to(dtype), plan, grid=grid)
    assert faulty.dtype == dtype
    expected = fault.apply(values, plan, grid=grid)
    if keeps_grid(fault):
        assert torch.equal(faulty.float(), expected)
    elif not float_word(fault):  # the words of those are of one type, see test_bit_flips.py
        assert torch.allclose(faulty.float(), expected, rtol=4 * torch.finfo(dtype).eps + 1e-7, atol=0.0)


def test_padding_is_inert(fault):
    values, grid = on_grid(fault)
    plan = fault.sample(site_of(fault), generator=gen())
    # padding is added, as nothing, to the first value in memory: hit that one too
    at_first = dataclasses.replace(plan, sites=torch.tensor([0]), codes=plan.codes[: codes_per_site(plan)])
    for real in (plan, at_first):
        expected = fault.apply(values, real, grid=grid)
        assert same(fault.apply(values, padded(real), grid=grid), expected)
        last = values.contiguous(memory_format=torch.channels_last)
        assert same(fault.apply(last, padded(real), grid=grid), expected)
        assert int(padded(real).hits()) == int(real.hits())
        assert set(padded(real).values_hit().tolist()) == {*real.values_hit().tolist(), values.numel()}


def test_a_plan_fits_every_tensor_of_its_shape_and_no_other(fault):
    plan = fault.sample(site_of(fault), generator=gen())
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
    plan = fault.sample(site_of(fault, SHAPE[1:]), generator=gen(3))
    assert len(plan.sites)
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
    plan = fault.sample(site_of(fault), generator=gen())
    file = io.BytesIO()
    torch.save(dataclasses.asdict(plan), file)
    file.seek(0)
    loaded = Plan(**torch.load(file, weights_only=True))
    values, grid = on_grid(fault)
    assert same(fault.apply(values, loaded, grid=grid), fault.apply(values, plan, grid=grid))


def test_rates_zero_one_and_between(fault):
    values, grid = on_grid(fault)
    none = fault.with_rate(0.0).sample(site_of(fault), generator=gen())
    assert len(none.sites) == 0 and none.rate == 0.0
    assert torch.equal(fault.apply(values, none, grid=grid), values)
    every = fault.with_rate(1.0 / fault.persistence).sample(site_of(fault), generator=gen())
    assert sorted(every.sites.tolist()) == list(range(every.population))
    other = fault.with_rate(0.01)
    assert type(other) is type(fault) and getattr(other, fault.rate_name) == pytest.approx(0.01, rel=1e-12)
    with pytest.raises(ValueError, match="equal to 1|exceed 1|equal to 10"):
        fault.with_rate(11.0)


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
    plan = fault.sample(site_of(fault), generator=gen())
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
        ({"name": "bit_adsaf", "sa0_rate": 0.7, "sa1_rate": 0.7}, "must not exceed 1"),
        ({"name": "weight_bit_flip", "bit_error_rate": 0.1, "dtype": "fp8"}, "dtype must be fp32, fp16, bf16, qM.N"),
        ({"name": "weight_bit_flip", "bit_error_rate": 0.1, "dtype": "q20.5"}, "M . N <= 23"),
        ({"name": "weight_bit_flip", "bit_error_rate": 0.1, "dtype": "q0.0"}, "1 <= M . N"),
        ({"name": "feature_bit_flip", "bit_error_rate": 0.4, "persistence": 3}, "persistence times the rate"),
        ({"name": "neuron_crash", "rate": 0.1, "unit": "layer"}, "unit"),
        ({"name": "neuron_byzantine", "rate": 0.1}, "capacity: required"),
        ({"name": "neuron_byzantine", "rate": 0.1, "capacity": 0}, "greater than 0, got 0"),
        ({"name": "log_normal_variation", "sigma": -0.1}, "greater than or equal to 0, got -0.1"),
        ({"name": "log_normal_variation", "sigma": 0.1, "persistence": 2}, "has no error rate that persistence"),
        ({"name": "mibb", "mac_error_rate": 0.1, "persistence": 0.5}, "persistence: .* greater than or equal to 1"),
        ({"name": "mibb", "mac_error_rate": 0.1, "where": {"channels": []}}, "channels is empty"),
        ({"name": "mibb", "mac_error_rate": 0.1, "where": {"chanels": [1]}}, "did you mean 'channels'?"),
        ({"name": "mibb", "mac_error_rate": 0.1, "where": {"bits": [-1]}}, "greater than or equal to 0, got -1"),
    ],
)
def test_a_mistake_in_config_data_is_one_line(data, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        create_fault(data)
    assert "\n" not in str(error.value)


def test_a_users_own_class_works_by_import_name():
    fault = create_fault({"name": "ftnas.faults.feature:MiBB", "mac_error_rate": 0.25})
    assert fault == MiBB(mac_error_rate=0.25) and isinstance(fault, Fault)
