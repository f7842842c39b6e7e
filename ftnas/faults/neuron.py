"""Dead and lying neurons (El Mhamdi and Guerraoui, When Neurons Fail): faults of what a neuron transmits."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ftnas.faults.base import FAULTS, Fault, Plan, Site
from ftnas.faults.memory import positions, set_at_
from ftnas.faults.sampling import bernoulli_sites, persisting
from ftnas.quantize import Grid
from ftnas.settings import Rate


class _NeuronFault(Fault):
    """What crash and Byzantine failures share; both act on the output of the activation function (or of the layer).

    Attributes:
        rate: Probability that a neuron fails.
        unit: What a neuron of a Conv2d is: one ``position`` of one channel, or a whole ``channel``. A Linear has one
            neuron for each output.
    """

    rate: Rate
    unit: Literal["position", "channel"] = "position"

    target: ClassVar[Literal["weight", "feature"]] = "feature"
    stage: ClassVar[Literal["point", "buffer"]] = "buffer"
    rate_name: ClassVar[str] = "rate"
    needs_quantization: ClassVar[bool] = False

    @model_validator(mode="after")
    def _persisting(self) -> Self:
        persisting(self.rate, self.persistence)
        return self

    def draw(self, site: Site, generator: torch.Generator) -> Plan:
        """Draw the failing neurons, with codes 0."""
        span = site.map_size if self.unit == "channel" else 1
        rate = persisting(self.rate, self.persistence)
        population = site.num_values // span
        sites = bernoulli_sites(population, rate, generator=generator)
        return Plan(sites, torch.zeros_like(sites), population, rate, site.shape, span=span)


@FAULTS.register("neuron_crash")
class NeuronCrash(_NeuronFault):
    """A neuron stops sending: its output is 0 for those who read it."""

    name: ClassVar[str] = "neuron_crash"

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the crashed neurons; codes are 0."""
        return self.draw(site, generator)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Silence the neurons in place; see `Fault.apply_`."""
        hit = plan.values_hit()
        zero = torch.zeros((), dtype=values.dtype, device=values.device).expand(len(hit))
        return set_at_(values, positions(hit, values), zero, hit < values.numel())


@FAULTS.register("neuron_byzantine")
class NeuronByzantine(_NeuronFault):
    """A neuron sends anything: each value that it sends is uniform in [-capacity, capacity].

    Attributes:
        capacity: C, the largest magnitude that a synapse transmits.
    """

    capacity: Annotated[float, Field(gt=0.0)]

    name: ClassVar[str] = "neuron_byzantine"

    def num_codes(self, site: Site) -> int:
        """Return 0: a lie is a real number."""
        return 0

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the lying neurons; codes are what each value sends as a share of C, float32 [K * span] in [-1, 1]."""
        plan = self.draw(site, generator)
        shares = torch.rand(
            len(plan.sites) * plan.span, generator=generator, device=generator.device, dtype=torch.float32
        )
        return replace(plan, codes=shares.mul_(2.0).sub_(1.0))

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Put the lies in place; see `Fault.apply_`."""
        hit = plan.values_hit()
        return set_at_(values, positions(hit, values), self.capacity * plan.codes, hit < values.numel())
