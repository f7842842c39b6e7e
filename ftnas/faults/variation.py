"""Resistance variation of multi-bit RRAM cells: every weight is off by a random factor."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site
from ftnas.faults.memory import hit_positions, set_at_, storage
from ftnas.quantize import Grid

FLOOR = 0.01
"""Smallest |1 + sigma z| of `ReciprocalNormalVariation`, so that no weight grows by more than a factor of 100."""


class _Variation(Fault):
    """What both laws of variation share: each weight is multiplied by a function of its own z ~ N(0, 1).

    Attributes:
        sigma: Standard deviation, of the logarithm or of the resistance, relative.
    """

    sigma: Annotated[float, Field(ge=0.0, le=10.0)]

    target: ClassVar[Literal["weight", "feature"]] = "weight"
    rate_name: ClassVar[str] = "sigma"
    needs_quantization: ClassVar[bool] = False
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = "sign_magnitude"

    @model_validator(mode="after")
    def _no_rate(self) -> Self:
        if self.persistence != 1.0:
            raise ValueError(f"variation has no error rate that persistence could multiply, got {self.persistence:g}")
        return self

    def num_codes(self, site: Site) -> int:
        """Return 0: every weight varies, by a real number."""
        return 0

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw z for every weight, float32 [N]; with sigma 0 nothing varies and the plan is empty."""
        count = site.num_values if self.sigma else 0
        sites = torch.arange(count, device=generator.device)
        noise = torch.randn(count, generator=generator, device=generator.device, dtype=torch.float32)
        return Plan(sites, noise, site.num_values, 1.0 if self.sigma else 0.0, site.shape)

    def factor(self, noise: Tensor) -> Tensor:
        """Return what a weight is multiplied by, from z of any shape."""
        raise NotImplementedError

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Multiply the weights in place; see `Fault.apply_`."""
        factor = self.factor(plan.codes)
        if len(plan.sites) == values.numel() and plan.at_risk is None and values.is_contiguous():
            storage(values).mul_(factor.to(values.dtype))
            return values
        at = hit_positions(plan, values)
        return set_at_(values, at, storage(values)[at] * factor.to(values.dtype), plan.valid)


@FAULTS.register("log_normal_variation")
class LogNormalVariation(_Variation):
    """w' = w * exp(sigma * z), z ~ N(0, 1) (FTT-NAS Table 3)."""

    name: ClassVar[str] = "log_normal_variation"

    def factor(self, noise: Tensor) -> Tensor:
        """Return exp(sigma * z)."""
        return (self.sigma * noise).exp()


@FAULTS.register("reciprocal_normal_variation")
class ReciprocalNormalVariation(_Variation):
    """w' = w / (1 + sigma * z): the resistance varies normally, and the weight is its conductance (FTT-NAS Table 3).

    |1 + sigma * z| is floored at `FLOOR`; `floored` counts how often.
    """

    name: ClassVar[str] = "reciprocal_normal_variation"

    def factor(self, noise: Tensor) -> Tensor:
        """Return 1 / (1 + sigma * z), the denominator kept away from 0 on its side of it."""
        resistance = 1.0 + self.sigma * noise
        return torch.where(resistance < 0, -1.0, 1.0) / resistance.abs().clamp_min(FLOOR)

    def floored(self, plan: Plan) -> Tensor:
        """Return how many cells of a plan are floored: an int64 scalar tensor, on the plan's device."""
        low = (1.0 + self.sigma * plan.codes).abs() < FLOOR
        return (low & plan.valid).sum()
