"""Soft errors of features: in the arithmetic that makes them, and in the buffer that holds them."""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site, Uniform
from ftnas.faults.bitflip import bit_rows, flip_fixed_, sample_flips
from ftnas.faults.memory import add_at_, hit_positions, storage
from ftnas.faults.sampling import bernoulli_sites, persisting, random_integers
from ftnas.quantize import Grid
from ftnas.settings import Rate


@FAULTS.register("mibb")
class MiBB(Fault):
    """MAC-i.i.d. bit-bias (FTT-NAS eq. 8): soft errors in the look-up tables of an FPGA's adders.

    A feature value is hit with probability p = 1 - (1 - M_p p_m)^(M_l) and becomes
    clamp(f + (-1)^beta * 2^(alpha - l)), alpha uniform in {0, ..., bits - 1}, beta uniform in {0, 1}.

    Attributes:
        mac_error_rate: p_m, the probability that one multiply-accumulate goes wrong.
    """

    mac_error_rate: Rate

    name: ClassVar[str] = "mibb"
    target: ClassVar[Literal["weight", "feature"]] = "feature"
    rate_name: ClassVar[str] = "mac_error_rate"

    @model_validator(mode="after")
    def _persisting(self) -> MiBB:
        persisting(self.mac_error_rate, self.persistence)
        return self

    def probability(self, macs: int) -> float:
        """Return the probability that a value made of ``macs`` multiply-accumulates is hit."""
        rate = persisting(self.mac_error_rate, self.persistence)
        return 1.0 if rate >= 1.0 else -math.expm1(macs * math.log1p(-rate))

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the faults of a feature tensor; code c means alpha = c // 2 and beta = c % 2."""
        if site.bits is None:
            raise ValueError("mibb needs fixed-point features: give a quantization")
        rate = self.probability(site.macs)
        sites = bernoulli_sites(site.num_values, rate, generator=generator)
        codes = random_integers(2 * site.bits, len(sites), generator=generator)
        return Plan(sites, codes, site.num_values, rate, site.shape)

    def uniform(self, site: Site) -> Uniform | None:
        """Return the rate of a value, and the number of codes."""
        return None if site.bits is None else Uniform(site.num_values, self.probability(site.macs), 2 * site.bits)

    def num_bits(self, site: Site) -> int:
        """Return the number of bits that can be hit."""
        return site.word_bits

    def num_codes(self, site: Site) -> int:
        """Return the number of pairs of alpha and beta."""
        return 2 * site.word_bits

    def bits_hit(self, plan: Plan) -> Tensor:
        """Return alpha of each entry, int64 [K]."""
        return plan.codes >> 1

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Add the biases in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("mibb needs fixed-point features: give a quantization")
        at = hit_positions(plan, values)
        before = storage(values).index_select(0, at)
        biases = _biases(grid.bits, values.dtype, values.device).index_select(0, plan.codes)
        after = torch.addcdiv(biases, before, grid.lsb).clamp_(grid.lo, grid.hi)  # the word: the step is a power of two
        back = torch.addcmul(before, after, grid.lsb, value=-1)
        return add_at_(values, at, back, None if plan.at is not None or plan.whole else plan.valid, alpha=-1)


@cache
def _biases(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what each code of `MiBB` adds to a word, and nothing for the one after them, [2 * bits + 1]."""
    with torch.inference_mode(False):
        code = torch.arange(2 * bits, device=device)
        return torch.cat([(1 - 2 * (code & 1)) << (code >> 1), code.new_zeros(1)]).to(dtype)


@FAULTS.register("feature_bit_flip")
class FeatureBitFlip(Fault):
    """Independent bit flips in the feature buffer (FTT-NAS eq. 6 and Table 3): soft errors in SRAM.

    It acts on the buffer value: the output of the activation function where that alone consumes the feature point, else
    the feature point itself. Each bit of the two's-complement word flips with probability M_p r.

    Attributes:
        bit_error_rate: r, per bit.
    """

    bit_error_rate: Rate

    name: ClassVar[str] = "feature_bit_flip"
    target: ClassVar[Literal["weight", "feature"]] = "feature"
    stage: ClassVar[Literal["point", "buffer"]] = "buffer"
    rate_name: ClassVar[str] = "bit_error_rate"

    @model_validator(mode="after")
    def _persisting(self) -> FeatureBitFlip:
        persisting(self.bit_error_rate, self.persistence)
        return self

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the flips; unit u is bit u // N of value u % N, and codes are 0."""
        if site.bits is None:
            raise ValueError("feature_bit_flip needs fixed-point features: give a quantization")
        return sample_flips(site, site.bits, persisting(self.bit_error_rate, self.persistence), generator)

    def num_bits(self, site: Site) -> int:
        """Return the number of bits that can be hit."""
        return site.word_bits

    def bits_hit(self, plan: Plan) -> Tensor:
        """Return the bit that each entry flips, int64 [K]."""
        return bit_rows(plan)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Flip the bits in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("feature_bit_flip needs fixed-point features: give a quantization")
        return flip_fixed_(values, plan, grid)
