"""Faults of features: what leaves a convolution or linear layer."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site, add_at_, positions, storage
from ftnas.faults.sampling import bernoulli_sites, random_integers
from ftnas.quantize import Grid
from ftnas.settings import Rate


@FAULTS.register("mibb")
class MiBB(Fault):
    """MAC-i.i.d. bit-bias (FTT-NAS eq. 8): soft errors in the look-up tables of an FPGA's adders.

    A feature value is hit with probability p = 1 - (1 - p_m)^(M_l) and becomes
    clamp(f + (-1)^beta * 2^(alpha - l)), alpha uniform in {0, ..., bits - 1}, beta uniform in {0, 1}.

    Attributes:
        mac_error_rate: p_m, the probability that one multiply-accumulate goes wrong.
    """

    mac_error_rate: Rate

    name: ClassVar[str] = "mibb"
    target: ClassVar[Literal["weight", "feature"]] = "feature"
    rate_name: ClassVar[str] = "mac_error_rate"

    def probability(self, macs: int) -> float:
        """Return the probability that a value made of ``macs`` multiply-accumulates is hit."""
        if self.mac_error_rate >= 1.0:
            return 1.0
        return -math.expm1(macs * math.log1p(-self.mac_error_rate))

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the faults of a feature tensor; code c means alpha = c // 2 and beta = c % 2."""
        if site.bits is None:
            raise ValueError("mibb needs fixed-point features: give a quantization")
        population = math.prod(site.shape)
        rate = self.probability(site.macs)
        sites = bernoulli_sites(population, rate, generator=generator)
        codes = random_integers(2 * site.bits, len(sites), generator=generator)
        return Plan(sites, codes, population, rate, site.shape)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Add the biases in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("mibb needs fixed-point features: give a quantization")
        at = positions(plan.sites, values)
        before = storage(values)[at]
        sign = 1 - 2 * (plan.codes & 1)
        bias = (sign << (plan.codes >> 1)).to(values.dtype) * grid.lsb
        after = (before + bias).clamp(grid.lo * grid.lsb, grid.hi * grid.lsb)
        return add_at_(values, at, after - before, plan.sites < plan.population)

    def with_rate(self, rate: float) -> MiBB:
        """Return the model at another per-MAC rate."""
        return MiBB(mac_error_rate=rate)
