"""Neurons that fail and resistance that varies: against naive loops, and their laws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from faulty import ALARM, CASES, assert_binomial, assert_uniform, gen, on_grid, site_of
from injected import create, images
from scipy import stats
from torch import nn

from ftnas import inject
from ftnas.faults import (
    LogNormalVariation,
    NeuronByzantine,
    NeuronCrash,
    Plan,
    ReciprocalNormalVariation,
    WeightBitFlip,
)
from ftnas.faults.variation import FLOOR
from ftnas.quantize import FixedPoint

SHAPE = (3, 4, 5, 6)
VARIED = [LogNormalVariation(sigma=0.5), ReciprocalNormalVariation(sigma=0.5)]

# Neurons


def naive(fault, values: torch.Tensor, plan: Plan) -> np.ndarray:
    """Silence or overwrite neuron by neuron; a neuron is a value, or a row-major run of a channel's values."""
    out = values.numpy().copy().reshape(-1)
    span = values.shape[2] * values.shape[3] if fault.unit == "channel" else 1
    for number, unit in enumerate(plan.sites.tolist()):
        for inside in range(span):
            lie = 0.0
            if isinstance(fault, NeuronByzantine):
                lie = np.float32(fault.capacity) * plan.codes.numpy()[number * span + inside]
            out[unit * span + inside] = lie
    return out.reshape(values.shape)


@pytest.mark.parametrize("unit", ["position", "channel"])
@pytest.mark.parametrize("fault", [NeuronCrash(rate=0.4), NeuronByzantine(rate=0.4, capacity=2.5)])
def test_neurons_fail_one_by_one(fault, unit):
    fault = fault.model_copy(update={"unit": unit})
    values = torch.randn(SHAPE, generator=gen(1))
    plan = fault.sample(site_of(fault, SHAPE), generator=gen(2))
    assert len(plan.sites) and plan.population == (12 if unit == "channel" else 360)
    np.testing.assert_array_equal(fault.apply(values, plan).numpy(), naive(fault, values, plan))
    # a NaN or an infinity that was there before is gone, too
    values[:] = math.nan
    after = fault.apply(values, plan).reshape(-1)
    assert set(after.isfinite().nonzero().squeeze(1).tolist()) == set(plan.values_hit().tolist())


def test_a_channel_is_a_whole_map_of_one_sample():
    fault = NeuronCrash(rate=0.5, unit="channel")
    plan = Plan(torch.tensor([1, 6]), torch.tensor([0, 0]), 12, 0.5, SHAPE, span=30)
    after = fault.apply(torch.ones(SHAPE), plan)
    dead = [(n, c) for n in range(3) for c in range(4) if not after[n, c].any()]
    assert dead == [(0, 1), (1, 2)] and float(after.sum()) == 10 * 30


@pytest.mark.parametrize("unit", ["position", "channel"])
@pytest.mark.parametrize("name", ["crash", "byzantine"])
def test_neurons_fail_with_their_rate_and_all_alike(name, unit):
    fault = CASES[name].model_copy(update={"unit": unit}).with_rate(0.2)
    shape = (400, 10, 3, 3) if unit == "channel" else (40, 10, 10, 10)
    plan = fault.sample(site_of(fault, shape), generator=gen(4))
    units = 4000 if unit == "channel" else 40_000
    assert plan.population == units and plan.rate == 0.2
    assert_binomial(len(plan.sites), units, 0.2)
    assert_uniform(torch.bincount(plan.values_hit()[:: plan.span] // (shape[2] * shape[3]) % 10, minlength=10))


@pytest.mark.parametrize("unit", ["position", "channel"])
def test_lies_are_uniform_within_the_capacity(unit):
    fault = NeuronByzantine(rate=0.5, capacity=7.0, unit=unit)
    plan = fault.sample(site_of(fault, (10, 8, 10, 10)), generator=gen(5))
    after = fault.apply(torch.full((10, 8, 10, 10), 100.0), plan).reshape(-1)
    lies = after[plan.values_hit()].double().numpy()
    assert len(lies) == len(plan.sites) * plan.span > 3000 and np.abs(lies).max() <= 7.0
    assert stats.kstest(lies, stats.uniform(-7.0, 14.0).cdf).pvalue > ALARM
    lag = np.corrcoef(lies[:-1], lies[1:])[0, 1]  # within a channel, too, each value is drawn on its own
    assert abs(lag) < stats.norm.isf(ALARM / 2) / math.sqrt(len(lies) - 1)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_neuron_and_every_neuron(rate):
    values = torch.randn(SHAPE, generator=gen())
    for unit in ("position", "channel"):
        crash = NeuronCrash(rate=rate, unit=unit)
        plan = crash.sample(site_of(crash, SHAPE), generator=gen())
        assert torch.equal(crash.apply(values, plan), values * (1.0 - rate))


def test_a_dead_channel_of_a_device_is_dead_in_every_sample():
    model, fault = create("plain"), NeuronCrash(rate=0.5, unit="channel")
    with torch.no_grad(), inject(model, fault, layers="3", errors="hard", seed=1) as injection:
        out = model(images())
    dead = injection.plans().plans[0, "3", 0].sites.tolist()
    assert 0 < len(dead) < 2 and injection.record.sites == 2
    assert [c for c in range(2) if not out[:, c].any()] == dead


# Variation
@pytest.mark.parametrize("fault", VARIED, ids=lambda fault: fault.name)
def test_weights_that_vary_are_held_as_on_all_rram(fault):
    model = nn.Linear(4, 1, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.5, 0.25, 0.1]]))
    tiny = fault.model_copy(update={"sigma": 0.0})
    with inject(model, tiny, quantization=FixedPoint(bits=8)), torch.no_grad():
        assert float(model(torch.eye(4)).min()) == -127 / 128  # two crossbars hold no -128
    with pytest.raises(ValueError, match="need weights in different formats: .*variation, weight_bit_flip"):
        inject(model, fault, WeightBitFlip(bit_error_rate=0.1), quantization=FixedPoint(bits=8))


@pytest.mark.parametrize("fault", VARIED, ids=lambda fault: fault.name)
def test_variation_is_the_formula_with_the_z_of_the_plan(fault):
    values, _ = on_grid(fault, SHAPE)
    plan = fault.sample(site_of(fault, SHAPE), generator=gen(3))
    expected = []
    for w, z in zip(values.double().reshape(-1).tolist(), plan.codes.double().tolist(), strict=True):
        if isinstance(fault, LogNormalVariation):
            expected.append(w * math.exp(0.5 * z))
        else:
            resistance = 1.0 + 0.5 * z
            expected.append(w / math.copysign(max(abs(resistance), FLOOR), resistance))
    got = fault.apply(values, plan).double().reshape(-1).numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-5)  # 1 + sigma z loses digits where it is small


def test_the_floor_keeps_the_side_and_is_counted():
    fault = ReciprocalNormalVariation(sigma=1.0)
    z = torch.tensor([-1.0, -1.005, -0.995, -1.5, 0.0, -0.98, 1.0])
    plan = Plan(torch.arange(7), z, 7, 1.0, (7,))
    after = fault.apply(torch.full((7,), 2.0), plan)
    assert after.tolist() == pytest.approx([200.0, -200.0, 200.0, -4.0, 2.0, 100.0, 1.0], rel=1e-4)
    assert int(fault.floored(plan)) == 3
    padded = dataclasses.replace(plan, sites=torch.tensor([0, 1, 2, 3, 4, 7, 7]), codes=torch.full((7,), -1.0))
    assert int(fault.floored(padded)) == 5  # padding is no cell
    assert int(LogNormalVariation(sigma=1.0).apply(torch.zeros(7), plan).count_nonzero()) == 0


@pytest.mark.parametrize("fault", VARIED, ids=lambda fault: fault.name)
def test_z_is_standard_normal_and_independent_from_weight_to_weight(fault):
    plan = fault.sample(site_of(fault, (200, 150)), generator=gen(6))
    z = plan.codes.double().numpy()
    assert len(z) == 30_000 and stats.kstest(z, stats.norm.cdf).pvalue > ALARM
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < stats.norm.isf(ALARM / 2) / math.sqrt(len(z) - 1)


def test_floored_cells_have_the_probability_of_a_small_resistance():
    fault = ReciprocalNormalVariation(sigma=0.5)
    plan = fault.sample(site_of(fault, (400, 500)), generator=gen(7))
    probability = stats.norm.cdf((-1 + FLOOR) / 0.5) - stats.norm.cdf((-1 - FLOOR) / 0.5)
    assert_binomial(int(fault.floored(plan)), 200_000, float(probability))


@pytest.mark.parametrize("fault", VARIED, ids=lambda fault: fault.name)
def test_without_spread_nothing_varies(fault):
    values = torch.randn(SHAPE, generator=gen())
    plan = fault.with_rate(0.0).sample(site_of(fault, SHAPE), generator=gen())
    assert len(plan.sites) == 0 and plan.rate == 0.0 and torch.equal(fault.apply(values, plan), values)
    model = nn.Linear(4, 4)
    with torch.no_grad(), inject(model, fault.with_rate(0.0)) as injection:
        model(torch.zeros(1, 4))
    assert (injection.record.hits, injection.record.expected) == (0, 0.0)
