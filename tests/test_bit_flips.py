"""Bit flips of weights and features: against integer XOR, and the law of eq. 6."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from faulty import ALARM, assert_binomial, assert_uniform, form_of, gen, on_grid, same, site_of
from injected import images
from scipy import stats
from torch import nn

from ftnas import FixedPoint, inject
from ftnas.faults import FeatureBitFlip, Plan, WeightBitFlip
from ftnas.quantize import FloatFormat

SHAPE = (6, 5, 3, 3)


def flips_of(plan: Plan) -> dict[int, int]:
    """Return, for each value that is hit, the mask of its flipped bits."""
    masks: dict[int, int] = {}
    for unit in plan.sites.tolist():
        masks[unit % plan.num_values] = masks.get(unit % plan.num_values, 0) ^ (1 << (unit // plan.num_values))
    return masks


def plan_of(flips: list[tuple[int, int]], shape: tuple[int, ...], bits: int) -> Plan:
    """Return the plan that flips the given (value, bit) pairs."""
    count = math.prod(shape)
    sites = torch.tensor([bit * count + value for value, bit in flips], dtype=torch.int64)
    return Plan(sites, torch.zeros_like(sites), bits * count, 0.5, tuple(shape))


# Fixed point


@pytest.mark.parametrize("fault", [WeightBitFlip(bit_error_rate=0.2), FeatureBitFlip(bit_error_rate=0.2)])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 24])
def test_fixed_point_words_are_flipped_by_xor(fault, bits):
    values, grid = on_grid(fault, SHAPE, seed=bits, bits=bits)
    plan = fault.sample(site_of(fault, SHAPE, bits=bits), generator=gen(bits))
    masks = flips_of(plan)
    assert max(mask.bit_count() for mask in masks.values()) > 1  # several flips in one word
    assert any(mask >> (bits - 1) for mask in masks.values())  # and the sign
    words = (values.double() / grid.lsb.double()).long().reshape(-1).tolist()
    for index, mask in masks.items():
        word = (words[index] % 2**bits) ^ mask
        words[index] = word - 2**bits if word >> (bits - 1) else word
    got = fault.apply(values, plan, grid=grid).double() / grid.lsb.double()
    assert got.reshape(-1).tolist() == words


def test_fixed_point_flips_by_hand():
    fault = WeightBitFlip(bit_error_rate=0.5)
    grid = FixedPoint().grid(torch.ones(1))  # LSB 1/128
    values = torch.tensor([0.0, 5.0, -1.0, -128.0, 127.0, 64.0]) / 128
    flips = [(0, 7), (1, 0), (1, 1), (2, 7), (3, 7), (4, 6), *((5, bit) for bit in range(8))]
    after = fault.apply(values, plan_of(flips, (6,), 8), grid=grid) * 128
    assert after.tolist() == [-128, 6, 127, 0, 63, -65]  # all bits of 64 flipped: ~64


@pytest.mark.parametrize(
    ("dtype", "integer", "fraction"), [("q2.5", 2, 5), ("q0.7", 0, 7), ("q4.0", 4, 0), ("q8.15", 8, 15)]
)
def test_a_given_fixed_point_format_holds_the_weights_whatever_was_asked_for(dtype, integer, fraction):
    form = WeightBitFlip(bit_error_rate=0.1, dtype=dtype).weight_format(None)
    assert (form.bits, form.encoding, form.range.fraction_length) == (
        1 + integer + fraction,
        "twos_complement",
        fraction,
    )
    assert form == form_of(WeightBitFlip(bit_error_rate=0.1, dtype=dtype))
    limit = 2.0**integer
    assert form.quantize(torch.tensor([9e9, -9e9])).tolist() == [limit - 2.0**-fraction, -limit]


# Floating point

WORDS = {"fp32": (">f", ">I"), "fp16": (">e", ">H"), "bf16": (">f", ">I")}


def flipped(value: float, mask: int, dtype: str) -> float:
    """Flip bits of one word with struct; a bfloat16 is the upper half of a float32."""
    as_float, as_integer = WORDS[dtype]
    word = struct.unpack(as_integer, struct.pack(as_float, value))[0] ^ (mask << 16 if dtype == "bf16" else mask)
    return struct.unpack(as_float, struct.pack(as_integer, word))[0]


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_floating_point_words_are_flipped_by_xor(dtype, rate):
    fault = WeightBitFlip(bit_error_rate=rate, dtype=dtype)
    values, grid = on_grid(fault, SHAPE, seed=1)
    assert grid is None
    plan = fault.sample(site_of(fault, SHAPE), generator=gen(2))
    assert plan.population == (32 if dtype == "fp32" else 16) * values.numel()
    expected = values.reshape(-1).tolist()
    masks = flips_of(plan)
    assert max(mask.bit_count() for mask in masks.values()) > 1
    for index, mask in masks.items():
        expected[index] = flipped(expected[index], mask, dtype)
    got = fault.apply(values, plan).reshape(-1)
    assert same(got, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize(
    ("dtype", "word"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_words_of_a_tensor_are_flipped_in_its_own_type_and_in_float32_alike(dtype, word):
    fault = WeightBitFlip(bit_error_rate=0.1, dtype=dtype)
    values, _ = on_grid(fault, SHAPE)
    plan = fault.sample(site_of(fault, SHAPE), generator=gen())
    own = fault.apply(values.to(word), plan)
    assert own.dtype == word and same(own.float(), fault.apply(values, plan))
    plain = WeightBitFlip(bit_error_rate=0.1)  # without a format: the tensor's own type
    assert same(plain.apply(values.to(word), plan), own)
    integers = values.to(word).view({2: torch.int16, 4: torch.int32}[own.element_size()]).numpy().reshape(-1)
    for index, mask in flips_of(plan).items():
        integers[index] ^= np.array([mask]).astype(integers.dtype)[0]
    assert same(torch.from_numpy(integers).view(word).view(SHAPE), own)


def test_double_precision_words():
    values = torch.randn(50, dtype=torch.float64, generator=gen())
    flips = [(value, bit) for value in range(50) for bit in (0, 51, 62, 63) if (value + bit) % 3]
    expected = values.numpy().copy().view(np.uint64)
    for value, bit in flips:
        expected[value] ^= np.uint64(1 << bit)
    got = WeightBitFlip(bit_error_rate=0.5).apply(values, plan_of(flips, (50,), 64))
    assert same(got, torch.from_numpy(expected.view(np.float64)))


@pytest.mark.parametrize(
    ("dtype", "exponent", "mantissa"), [("fp32", 8, 23), ("fp16", 5, 10), ("bf16", 8, 7)]
)  # fmt: skip
def test_special_values_of_floats(dtype, exponent, mantissa):
    fault, bits = WeightBitFlip(bit_error_rate=0.5, dtype=dtype), 1 + exponent + mantissa
    top = bits - 2  # of the exponent; 1.0 has all exponent bits but this one
    values = torch.tensor([1.0, 1.5, -1.0, 0.0, -0.0, 2.0])
    flips = [(0, top), (1, top), (2, top), (3, bits - 1), (4, 0), (5, bits - 1)]
    after = fault.apply(values, plan_of(flips, (6,), bits))
    smallest = 2.0 ** (2 - 2 ** (exponent - 1) - mantissa)  # a denormal
    assert after[0] == math.inf and after[1].isnan() and after[2] == -math.inf
    assert after[3] == 0.0 and math.copysign(1.0, after[3]) == -1.0
    assert after[4] == -smallest and after[5] == -2.0
    # and back: a flip is its own inverse, for NaN and infinities too
    own = values.to(FloatFormat(dtype=dtype).torch_dtype)
    for _ in range(2):
        own = fault.apply(own, plan_of(flips, (6,), bits))
    assert same(own.float(), values)


def test_formats_round_as_the_memory_does():
    x = torch.tensor([1.0 + 2.0**-11, 70000.0, 1e-8])
    assert FloatFormat(dtype="fp16").rounded(x).tolist() == [1.0, math.inf, 0.0]
    assert FloatFormat(dtype="bf16").rounded(x[:2]).tolist() == [1.0, 70144.0]
    assert torch.equal(FloatFormat(dtype="fp32").rounded(x), x)


# The law of eq. 6


@pytest.mark.parametrize("fault", [WeightBitFlip(bit_error_rate=0.03), FeatureBitFlip(bit_error_rate=0.03)])
def test_bits_are_hit_alike_and_words_with_the_probability_of_any_of_their_bits(fault):
    shape = (50, 10, 8, 8)
    plan = fault.sample(site_of(fault, shape), generator=gen(3))
    words = math.prod(shape)
    assert_binomial(len(plan.sites), 8 * words, 0.03)
    assert_uniform(torch.bincount(fault.bits_hit(plan), minlength=8))
    per_word = torch.bincount(plan.values_hit(), minlength=words)
    assert_binomial(int((per_word > 0).sum()), words, 1.0 - (1.0 - 0.03) ** 8)
    expected = stats.binom.pmf(range(4), 8, 0.03) * words  # of 0, 1, 2 and more flips in a word
    expected[3] = words - expected[:3].sum()
    seen = torch.bincount(per_word.clamp_max(3), minlength=4).double().numpy()
    assert ((seen - expected) ** 2 / expected).sum() < stats.chi2.isf(ALARM, 3)


def test_a_rate_of_one_flips_every_bit():
    fault = WeightBitFlip(bit_error_rate=1.0)
    values, grid = on_grid(fault, SHAPE)
    plan = fault.sample(site_of(fault, SHAPE), generator=gen())
    assert torch.equal(fault.apply(values, plan, grid=grid), -values - grid.lsb)  # ~n = -n - 1


# Which words a model's weights have


@pytest.mark.parametrize(
    ("dtype", "quantization", "bits"),
    [
        (None, None, 32), (None, FixedPoint(bits=5), 5), ("fp16", None, 16), ("bf16", FixedPoint(bits=5), 16),
        ("q3.6", None, 10), ("fp32", FixedPoint(bits=8), 32),
    ],
)  # fmt: skip
def test_the_words_of_a_models_weights(dtype, quantization, bits):
    model = nn.Conv2d(3, 4, 3).eval()
    with (
        torch.no_grad(),
        inject(model, WeightBitFlip(bit_error_rate=0.01, dtype=dtype), quantization=quantization) as i,
    ):
        model(images())
        held = model.weight
    assert i.record.sites == bits * 108
    if dtype in ("fp16", "bf16"):
        finite = held[held.isfinite()]
        assert torch.equal(FloatFormat(dtype=dtype).rounded(finite), finite)
    with torch.no_grad(), inject(model.half(), WeightBitFlip(bit_error_rate=0.01)) as injection:
        model(images().half())
    assert injection.record.sites == 16 * 108


def test_values_that_become_nan_or_infinite_are_counted_once_each():
    model = nn.Linear(40, 25, bias=False).eval()
    with torch.no_grad():
        model.weight.fill_(1.0)
    fault = WeightBitFlip(bit_error_rate=0.3, dtype="fp32")
    with torch.no_grad(), inject(model, fault, seed=3) as injection:
        model(torch.zeros(2, 40))
        bad = ~model.weight.isfinite()
        flips = torch.bincount(injection.plans().plans[0, "", 0].values_hit(), minlength=1000).view(25, 40)
    assert int(bad.sum()) > 0 and int(flips[bad].max()) > 1
    assert injection.record.nonfinite == injection.record.faults[0].nonfinite == int(bad.sum())
