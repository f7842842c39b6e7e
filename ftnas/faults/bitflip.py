"""Bit flips of weights, and how bits of stored words are flipped: fixed point, IEEE-754, bfloat16."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site
from ftnas.faults.memory import add_at_, hit_positions, storage
from ftnas.faults.sampling import bernoulli_sites, persisting
from ftnas.quantize import FixedPoint, FloatFormat, Frozen, Grid
from ftnas.settings import Rate

_FLOATS = ("fp32", "fp16", "bf16")
_FIXED = re.compile(r"q(\d+)\.(\d+)")
_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


@FAULTS.register("weight_bit_flip")
class WeightBitFlip(Fault):
    """Independent bit flips in the memory that holds the weights (FTT-NAS eq. 6, iBF).

    Each bit of each word flips with probability M_p r. Without a ``dtype`` the word is that of the quantization in
    force (two's complement of its width), and without a quantization that of the tensor's own float type. A ``dtype``
    is how the memory holds all weights, whatever quantization was asked for: ``fp32``, ``fp16`` or ``bf16`` words (all
    bits; a flip may give NaN or an infinity, which stays so and is counted), or ``qM.N``: 1 sign bit, M integer and N
    fraction bits, two's complement.

    Attributes:
        bit_error_rate: r, per bit.
        dtype: Format of the words.
    """

    in_rows: ClassVar[bool] = True

    bit_error_rate: Rate
    dtype: str | None = None

    name: ClassVar[str] = "weight_bit_flip"
    target: ClassVar[Literal["weight", "feature"]] = "weight"
    rate_name: ClassVar[str] = "bit_error_rate"
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = "twos_complement"
    needs_quantization: ClassVar[bool] = False

    @model_validator(mode="after")
    def _known(self) -> WeightBitFlip:
        persisting(self.bit_error_rate, self.persistence)
        if self.dtype is None or self.dtype in _FLOATS:
            return self
        match = _FIXED.fullmatch(self.dtype)
        if match is None or not 1 <= int(match[1]) + int(match[2]) <= 23:
            raise ValueError(
                f"dtype must be fp32, fp16, bf16, qM.N with 1 <= M + N <= 23 (q2.5), or null, got {self.dtype!r}"
            )
        return self

    def weight_format(self, given: FixedPoint | None) -> FixedPoint | FloatFormat | None:
        """Return the format of ``dtype``; without one, the format that was asked for, in two's complement."""
        if self.dtype is None:
            return super().weight_format(given)
        match = _FIXED.fullmatch(self.dtype)
        if match is None:
            return FloatFormat.model_validate({"dtype": self.dtype})
        integer, fraction = int(match[1]), int(match[2])
        return FixedPoint(bits=1 + integer + fraction, range=Frozen(fraction_length=fraction))

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the flips; unit u is bit u // N of weight u % N, and codes are 0."""
        return sample_flips(site, site.word_bits, persisting(self.bit_error_rate, self.persistence), generator)

    def num_bits(self, site: Site) -> int:
        """Return the number of bits that can be hit."""
        return site.word_bits

    def bits_hit(self, plan: Plan) -> Tensor:
        """Return the bit that each entry flips, int64 [K]."""
        return bit_rows(plan)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Flip the bits in place; see `Fault.apply_`."""
        if grid is not None:
            return flip_fixed_(values, plan, grid)
        word = FloatFormat.model_validate({"dtype": self.dtype}).torch_dtype if self.dtype else values.dtype
        return flip_float_(values, plan, word)


def sample_flips(site: Site, bits: int, rate: float, generator: torch.Generator) -> Plan:
    """Draw independent flips of all ``bits`` of a tensor's words; unit u is bit u // N of value u % N."""
    population = bits * site.num_values
    sites = bernoulli_sites(population, rate, generator=generator)
    return Plan(sites, torch.zeros_like(sites), population, rate, site.shape)


def bit_rows(plan: Plan) -> Tensor:
    """Return u // N of each entry of a plan whose units are the bits of N values, int64 [K]."""
    return plan.sites // max(1, plan.num_values)


def flip_fixed_(values: Tensor, plan: Plan, grid: Grid) -> Tensor:
    """Flip bits of two's-complement words in place; values are n * LSB with n in [-2^(bits-1), 2^(bits-1) - 1].

    Flipping bit b of n adds 2^b where it is 0 and takes it where it is 1, and the other way round for the sign bit. So
    several flips of one word simply add up, exactly in float32 for words of up to 24 bits.
    """
    bit, at = bit_rows(plan), hit_positions(plan, values)
    lsb = grid.at(at).lsb
    word = (storage(values)[at].float() / lsb).round().to(torch.int64)
    step = torch.where((word >> bit) & 1 == 1, -1, 1) << bit
    step = torch.where(bit == grid.bits - 1, -step, step)
    return add_at_(values, at, step.to(torch.float32) * lsb, plan.valid)


def flip_float_(values: Tensor, plan: Plan, word: torch.dtype) -> Tensor:
    """Flip bits of the floating-point words of type ``word`` that hold the values, in place.

    Flipping bit b of an integer adds or takes 2^b modulo 2^width, so that flips of one word add up in its integer view.
    """
    dtype = values.dtype
    # the word of a bfloat16 is the upper half of that of the float32 of the same value
    shift = 16 if (word, dtype) == (torch.bfloat16, torch.float32) else 0
    held = values if word == dtype or shift else values.to(word)
    integers = storage(held).view(_WORDS[8 * held.element_size()])
    bit, at = bit_rows(plan) + shift, hit_positions(plan, held)
    bit = torch.where(plan.valid, bit, 0)
    before = integers[at].to(torch.int64)
    step = torch.where((before >> bit) & 1 == 1, -1, 1) << bit
    integers.index_add_(0, at, torch.where(plan.valid, step, 0).to(integers.dtype))
    return values if held is values else values.copy_(held)
