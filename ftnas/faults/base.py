"""The contract of a fault model: sampling a plan from a generator is apart from applying it to a tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ftnas.quantize import Grid
from ftnas.registry import Registry
from ftnas.settings import Settings, parse


@dataclass(frozen=True)
class Site:
    """What a fault model needs to know of a tensor that it may hit.

    Attributes:
        layer: Name of the convolution or linear layer in the model.
        shape: Shape of the weight, or of the feature tensor.
        macs: Multiply-accumulates behind one output value, M_l: in_channels / groups * k_h * k_w, or in_features.
        bits: Word width of the tensor's fixed point; None when it is not quantized.
    """

    layer: str
    shape: tuple[int, ...]
    macs: int
    bits: int | None


@dataclass(frozen=True)
class Plan:
    """One draw of a fault model for one tensor.

    Attributes:
        sites: int64 [K], which of the units are hit; unit u belongs to value u % N of the tensor's N values, in
            row-major order. Entries equal to ``population`` are padding.
        codes: int64 [K], what happens there; the fault model defines its meaning.
        population: Number of units at risk (values, cells or bits; the fault model defines which).
        rate: Probability with which each unit was hit.
        shape: Shape of the tensor that the plan is for.
    """

    sites: Tensor
    codes: Tensor
    population: int
    rate: float
    shape: tuple[int, ...]

    def hits(self) -> Tensor:
        """Return the number of units hit: an int64 scalar tensor, on the plan's device."""
        return (self.sites < self.population).sum()

    def to(self, device: torch.device) -> Plan:
        """Return the plan on another device."""
        if self.sites.device == device:
            return self
        return Plan(self.sites.to(device), self.codes.to(device), self.population, self.rate, self.shape)

    def values_hit(self) -> Tensor:
        """Return the row-major index of the value behind each site, int64 [K]; N for padding."""
        values = math.prod(self.shape)
        return torch.where(self.sites < self.population, self.sites % values, values)

    def repeated(self, batch: int) -> Plan:
        """Return the plan of a batch in which every sample meets the same faults: a defect map."""
        values = math.prod(self.shape)
        unit, value = self.sites // values * (batch * values), self.sites % values
        first = torch.arange(batch, device=self.sites.device).unsqueeze(1) * values
        population = batch * self.population
        sites = torch.where(self.sites == self.population, population, unit + first + value).reshape(-1)
        return Plan(sites, self.codes.repeat(batch), population, self.rate, (batch, *self.shape))


class Fault(Settings, ABC):
    """A fault model: a frozen value that draws plans and applies them.

    Attributes:
        name: Name in configs and records.
        target: The tensors that it acts on.
        rate_name: The quantity that a sweep varies.
        encoding: Encoding that the fault's hardware gives weights, when it differs from the quantizer's own.
    """

    name: ClassVar[str]
    target: ClassVar[Literal["weight", "feature"]]
    rate_name: ClassVar[str]
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = None
    needs_quantization: ClassVar[bool] = True

    @abstractmethod
    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw the faults of one tensor; the plan lies on the generator's device."""

    @abstractmethod
    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Apply a plan in place to a tensor of the plan's shape, and return it.

        Args:
            values: Float tensor on the grid, dense, of any memory format.
            plan: What happens where, on the same device.
            grid: The quantizer's grid; None when the tensor is not quantized.
        """

    @abstractmethod
    def with_rate(self, rate: float) -> Self:
        """Return the same model at another overall rate, as a sweep needs it."""

    def apply(self, values: Tensor, plan: Plan, *, grid: Grid | None = None) -> Tensor:
        """Return a faulty copy of ``values``; see `apply_`.

        Raises:
            ValueError: The plan is for a tensor of another shape.
        """
        if tuple(values.shape) != plan.shape:
            raise ValueError(f"a plan fits one shape: it is for {plan.shape}, the tensor has {tuple(values.shape)}")
        return self.apply_(values.clone(), plan, grid)


FAULTS: Registry[type[Fault]] = Registry("fault model")


def create_fault(data: Mapping[str, Any], *, where: str = "fault") -> Fault:
    """Build a fault model from config data such as ``{"name": "mibb", "mac_error_rate": 1e-4}``.

    Raises:
        ValueError: Unknown model, unknown key, or a value out of its range.
    """
    if not isinstance(data, Mapping) or "name" not in data:
        raise ValueError(f"{where}: expected keys and values with a name, got {data!r}; there is: {', '.join(FAULTS)}")
    fault = FAULTS.get(str(data["name"]), allow_import=True)
    return parse(fault, {key: value for key, value in data.items() if key != "name"}, where=where)


def storage(values: Tensor) -> Tensor:
    """Return the one-dimensional view over the memory of a dense tensor of any memory format."""
    if values.is_contiguous():
        return values.view(-1)
    return values.as_strided((values.numel(),), (1,))


def positions(sites: Tensor, values: Tensor) -> Tensor:
    """Translate row-major sites of a tensor into positions in `storage`, so that a plan fits any memory format.

    Padding (sites equal to the number of values) becomes position 0; `deltas` are zero there.
    """
    valid = sites < values.numel()
    rest = torch.where(valid, sites, 0)
    if values.is_contiguous():
        return rest
    offset = torch.zeros_like(rest)
    for size, stride in zip(reversed(values.shape), reversed(values.stride()), strict=True):
        offset += (rest % size) * stride
        rest = rest // size
    return offset


def add_at_(values: Tensor, at: Tensor, deltas: Tensor, valid: Tensor) -> Tensor:
    """Add ``deltas`` in place at positions of the storage, nothing where not ``valid``."""
    storage(values).index_add_(0, at, torch.where(valid, deltas, 0.0).to(values.dtype))
    return values
