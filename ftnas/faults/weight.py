"""Faults of weights: what the memory or the crossbar holds."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site, add_at_, positions, storage
from ftnas.faults.sampling import bernoulli, bernoulli_sites
from ftnas.quantize import Grid
from ftnas.settings import Rate


@FAULTS.register("adsaf")
class AdSAF(Fault):
    """Arbitrary-distributed stuck-at faults in multi-bit RRAM cells (FTT-NAS eq. 9).

    With ``cells="logical"`` each weight becomes 0 with probability ``sa0_rate`` (SAF0) and sgn(w) * R with
    probability ``sa1_rate`` (SAF1, sgn(0) = +1). With ``cells="differential"`` a weight is w = g+ - g-, and each of the
    two cells is stuck at 0 or at R with those probabilities per cell (as in the authors' released code).

    Attributes:
        sa0_rate: Probability of SAF0 per weight, or per cell.
        sa1_rate: Probability of SAF1 per weight, or per cell.
        cells: What one draw decides over.
        stuck_at: ``range`` takes the bound of the representation for R (eq. 3); ``max`` the largest magnitude of the
            quantized tensor (the released code, and so the published figures: milder by up to a factor of two).
    """

    sa0_rate: Rate = 0.067
    sa1_rate: Rate = 0.013
    cells: Literal["logical", "differential"] = "logical"
    stuck_at: Literal["range", "max"] = "range"

    name: ClassVar[str] = "adsaf"
    target: ClassVar[Literal["weight", "feature"]] = "weight"
    rate_name: ClassVar[str] = "total_rate"
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = "sign_magnitude"

    @model_validator(mode="after")
    def _total(self) -> AdSAF:
        if self.total_rate > 1.0 + 1e-9:
            raise ValueError(f"sa0_rate + sa1_rate must not exceed 1, got {self.total_rate:g}")
        return self

    @property
    def total_rate(self) -> float:
        """Probability that a weight (or a cell) is stuck at all."""
        return self.sa0_rate + self.sa1_rate

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the stuck units of a weight tensor; code 0 is SAF0, code 1 is SAF1.

        With differential cells units 0 .. N-1 are the positive cells of the N weights and N .. 2N-1 the negative ones.
        """
        population = math.prod(site.shape) * (2 if self.cells == "differential" else 1)
        sites = bernoulli_sites(population, self.total_rate, generator=generator)
        share = self.sa1_rate / self.total_rate if self.total_rate else 0.0
        codes = bernoulli(share, len(sites), generator=generator).to(torch.int64)
        return Plan(sites, codes, population, self.total_rate, site.shape)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Set the stuck weights in place; see `Fault.apply_`."""
        if grid is None:
            raise ValueError("adsaf needs fixed-point weights: give a quantization")
        bound = (grid.bound if self.stuck_at == "range" else values.abs().amax()).to(values.dtype)
        stuck = plan.codes.to(values.dtype) * bound
        valid = plan.sites < plan.population
        if self.cells == "logical":
            at = positions(plan.sites, values)
            before = storage(values)[at]
            return add_at_(values, at, torch.where(before < 0, -stuck, stuck) - before, valid)
        negative = plan.sites >= values.numel()
        at = positions(torch.where(valid, plan.sites - negative * values.numel(), 0), values)
        before = storage(values)[at]
        cell = torch.where(negative, -before, before).clamp_min(0.0)
        change = torch.where(negative, cell - stuck, stuck - cell)
        return add_at_(values, at, change, valid)

    def with_rate(self, rate: float) -> AdSAF:
        """Return the model at another total rate, with the same shares of SAF0 and SAF1."""
        scale = rate / self.total_rate if self.total_rate else 0.0
        if not self.total_rate and rate:
            raise ValueError("adsaf: a sweep keeps the shares of SAF0 and SAF1; both are 0 here")
        rates = {"sa0_rate": self.sa0_rate * scale, "sa1_rate": self.sa1_rate * scale}
        return AdSAF(**(self.model_dump() | rates))
