"""Stuck-at faults of the RRAM cells that hold weights."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site
from ftnas.faults.bitflip import bit_rows
from ftnas.faults.memory import add_at_, hit_positions, storage
from ftnas.faults.sampling import bernoulli, bernoulli_sites, persisting
from ftnas.quantize import Grid
from ftnas.settings import Rate, parse


class _StuckAt(Fault):
    """What stuck-at faults of both kinds of cell share.

    Attributes:
        sa0_rate: Probability of SAF0 per unit.
        sa1_rate: Probability of SAF1 per unit.
    """

    sa0_rate: Rate = 0.067
    sa1_rate: Rate = 0.013

    target: ClassVar[Literal["weight", "feature"]] = "weight"
    rate_name: ClassVar[str] = "total_rate"
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = "sign_magnitude"
    in_rows: ClassVar[bool] = True

    @model_validator(mode="after")
    def _total(self) -> Self:
        if self.total_rate > 1.0 + 1e-9:
            raise ValueError(f"sa0_rate + sa1_rate must not exceed 1, got {self.total_rate:g}")
        persisting(min(1.0, self.total_rate), self.persistence)
        return self

    @property
    def total_rate(self) -> float:
        """Probability that a unit is stuck at all, before it is multiplied by the persistence."""
        return self.sa0_rate + self.sa1_rate

    def with_rate(self, rate: float) -> Self:
        """Return the model at another total rate, with the same shares of SAF0 and SAF1."""
        if not self.total_rate and rate:
            raise ValueError(f"{self.name}: a sweep keeps the shares of SAF0 and SAF1; both are 0 here")
        scale = rate / self.total_rate if self.total_rate else 0.0
        rates = {"sa0_rate": self.sa0_rate * scale, "sa1_rate": self.sa1_rate * scale}
        return parse(type(self), {**self.model_dump(), **rates}, where=self.name)

    def num_codes(self, site: Site) -> int:
        """Return 2: a unit is stuck at 0 or at 1."""
        return 2

    def draw(self, site: Site, units_per_value: int, generator: torch.Generator) -> Plan:
        """Draw stuck units, ``units_per_value`` for each value; code 0 is SAF0, code 1 is SAF1."""
        population = site.num_values * units_per_value
        rate = persisting(min(1.0, self.total_rate), self.persistence)
        sites = bernoulli_sites(population, rate, generator=generator)
        share = self.sa1_rate / self.total_rate if self.total_rate else 0.0
        codes = bernoulli(share, len(sites), generator=generator).to(torch.int64)
        return Plan(sites, codes, population, rate, site.shape)


@FAULTS.register("adsaf")
class AdSAF(_StuckAt):
    """Arbitrary-distributed stuck-at faults in multi-bit RRAM cells (FTT-NAS eq. 9).

    With ``cells="logical"`` each weight becomes 0 with probability ``sa0_rate`` (SAF0) and sgn(w) * R with
    probability ``sa1_rate`` (SAF1, sgn(0) = +1). With ``cells="differential"`` a weight is w = g+ - g-, and each of the
    two cells is stuck at 0 or at R with those probabilities per cell (as in the authors' released code).

    Attributes:
        cells: What one draw decides over: a weight, or one of its two cells.
        stuck_at: ``range`` takes the bound of the representation for R (eq. 3); ``max`` the largest magnitude of the
            quantized tensor (the released code, and so the published figures: milder by up to a factor of two).
    """

    cells: Literal["logical", "differential"] = "logical"
    stuck_at: Literal["range", "max"] = "range"

    name: ClassVar[str] = "adsaf"

    @property
    def needs_largest(self) -> bool:
        """Whether a cell is stuck at the largest magnitude."""
        return self.stuck_at == "max"

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the stuck units of a weight tensor; code 0 is SAF0, code 1 is SAF1.

        With differential cells units 0 .. N-1 are the positive cells of the N weights and N .. 2N-1 the negative ones.
        """
        return self.draw(site, 2 if self.cells == "differential" else 1, generator)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Set the stuck weights in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("adsaf needs fixed-point weights: give a quantization")
        at = hit_positions(plan, values)
        own = grid.at(at)
        largest = values.abs().amax() if self.stuck_at == "max" and own.largest is None else own.largest
        bound = own.bound if largest is None or self.stuck_at == "range" else largest
        stuck = plan.codes.to(values.dtype) * bound.to(values.dtype)
        before = storage(values).index_select(0, at)
        valid = None if plan.whole else plan.valid
        if self.cells == "logical":
            return add_at_(values, at, torch.where(before < 0, -stuck, stuck) - before, valid)
        negative = plan.sites >= values.numel()
        cell = torch.where(negative, -before, before).clamp_min(0.0)
        change = torch.where(negative, cell - stuck, stuck - cell)
        return add_at_(values, at, change, valid)


@FAULTS.register("bit_adsaf")
class BitAdSAF(_StuckAt):
    """Stuck-at faults in single-bit RRAM cells, 1bit-adSAF (FTT-NAS eq. 10).

    Each of the bits - 1 magnitude bits of a weight is stuck with probability p0 + p1: at 1 with probability
    p1 / (p0 + p1), else at 0. The sign stays, + for w = 0.
    """

    name: ClassVar[str] = "bit_adsaf"

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the stuck cells; unit u is bit u // N of the magnitude of weight u % N, code 1 means stuck at 1."""
        if site.bits is None:
            raise ValueError("bit_adsaf needs fixed-point weights: give a quantization")
        return self.draw(site, site.bits - 1, generator)

    def num_bits(self, site: Site) -> int:
        """Return the number of bits that can be hit."""
        return site.word_bits - 1

    def bits_hit(self, plan: Plan) -> Tensor:
        """Return the bit of the magnitude that each entry is stuck in, int64 [K]."""
        return bit_rows(plan)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Set the stuck bits in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("bit_adsaf needs fixed-point weights: give a quantization")
        bit, at = bit_rows(plan), hit_positions(plan, values)
        lsb = grid.at(at).lsb
        before = storage(values)[at]
        magnitude = (before.float().abs() / lsb).round().to(torch.int64)
        step = (plan.codes - ((magnitude >> bit) & 1)) << bit  # several stuck bits of one weight add up
        step = torch.where(before < 0, -step, step)
        return add_at_(values, at, step.to(torch.float32) * lsb, plan.valid)
