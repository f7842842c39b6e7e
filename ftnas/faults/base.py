"""The contract of a fault model: sampling a plan from a generator is apart from applying it to a tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ftnas import devices
from ftnas.quantize import FixedPoint, FloatFormat, Grid
from ftnas.registry import Registry, check_class, import_path
from ftnas.settings import Settings, parse

Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Site:
    """What a fault model needs to know of a tensor that it may hit.

    Attributes:
        layer: Name of the convolution or linear layer in the model.
        shape: Shape of the weight, or of the feature tensor.
        macs: Multiply-accumulates behind one output value, M_l: in_channels / groups * k_h * k_w, or in_features.
        bits: Word width of the tensor's fixed point; None when it is not quantized.
        float_bits: Width of the floating-point word that holds a value where there is no fixed point.
        channels: Output channels of the layer.
        channel_stride: Row-major distance of a channel's values to the next channel's; value v is in channel
            (v // channel_stride) % channels.
        map_shape: Rows and columns of a feature map or of a kernel, (1, 1) for a Linear; v is at v % (rows * columns).
        batched: Whether the first axis of a feature tensor is that of the samples.
    """

    layer: str
    shape: tuple[int, ...]
    macs: int
    bits: int | None
    float_bits: int = 32
    channels: int = 1
    channel_stride: int = 1
    map_shape: tuple[int, int] = (1, 1)
    batched: bool = True

    @property
    def map_size(self) -> int:
        """Values of one channel's map."""
        return self.map_shape[0] * self.map_shape[1]

    @property
    def word_bits(self) -> int:
        """Width of the word that holds a value."""
        return self.float_bits if self.bits is None else self.bits

    @property
    def num_values(self) -> int:
        """Number of values in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """One draw of a fault model for one tensor.

    Attributes:
        sites: int64 [K], which of the units are hit; a unit is ``span`` consecutive values (row-major) of the tensor's
            N, and unit u begins at value (u * span) % N. Entries equal to ``population`` are padding.
        codes: What happens there, int64 [K] or float32 [K * span]; the fault model defines its meaning.
        population: Number of units (values, cells, bits or channels; the fault model defines which).
        rate: Probability with which each unit at risk was hit.
        shape: Shape of the tensor that the plan is for.
        span: Values of one unit, 1 but for whole channels.
        at_risk: Number of units that could be hit: the population less what a target leaves out; None: all.
        at: The row-major value of each entry, int64 [K], where it is known already; any for padding, whose code then
            does nothing.
    """

    sites: Tensor
    codes: Tensor
    population: int
    rate: float
    shape: tuple[int, ...]
    span: int = 1
    at_risk: int | None = None
    at: Tensor | None = None

    @property
    def num_at_risk(self) -> int:
        """Number of units that could be hit."""
        return self.population if self.at_risk is None else self.at_risk

    @property
    def num_values(self) -> int:
        """Number of values in the tensor that the plan is for."""
        return math.prod(self.shape)

    @cached_property
    def valid(self) -> Tensor:
        """Which entries are hits and not padding: bool [K]."""
        return self.sites < self.population

    @cached_property
    def whole(self) -> bool:
        """Whether it is known, without waiting for a device, that no entry is padding."""
        if not devices.is_readable(self.sites.device):
            return False
        return len(self.sites) == 0 or int(self.sites.amax()) < self.population

    def hits(self) -> Tensor:
        """Return the number of units hit: an int64 scalar tensor, on the plan's device."""
        return self.valid.sum()

    def to(self, device: torch.device) -> Plan:
        """Return the plan on another device."""
        if self.sites.device == device:
            return self
        return replace(self, sites=self.sites.to(device), codes=self.codes.to(device), at=None)

    def taken(self, keep: Tensor) -> Plan:
        """Return the plan with some of its entries alone, those where ``keep``, bool [K] (waits for the device)."""
        per_site = len(self.codes) // max(1, len(self.sites))  # one code, or one for each value of the span
        codes = self.codes.reshape(-1, max(1, per_site))[keep].reshape(-1)
        return replace(self, sites=self.sites[keep], codes=codes, at=None)

    def compact(self) -> Plan:
        """Return the plan without padding (waits for the device)."""
        return replace(self, at=None) if bool(self.valid.all()) else self.taken(self.valid)

    def values_hit(self) -> Tensor:
        """Return the row-major index of each value that is hit, int64 [K * span]; N for padding."""
        if self.whole and self.span == 1 and self.population == self.num_values:
            return self.sites
        first = torch.where(self.valid, self.sites * self.span % max(1, self.num_values), self.num_values)
        if self.span == 1:
            return first
        # the span of a padding entry would run past N: all of it is padding
        inside = torch.arange(self.span, device=first.device)
        return (first.unsqueeze(1) + inside).clamp_max(self.num_values).reshape(-1)

    def repeated(self, batch: int) -> Plan:
        """Return the plan of a batch in which every sample meets the same faults: a defect map."""
        units = self.num_values // self.span
        row, unit = self.sites // units * (batch * units), self.sites % units
        first = torch.arange(batch, device=self.sites.device).unsqueeze(1) * units
        population = batch * self.population
        sites = torch.where(self.sites == self.population, population, row + first + unit).reshape(-1)
        at_risk = None if self.at_risk is None else batch * self.at_risk
        codes = self.codes.repeat(batch)
        return replace(
            self, sites=sites, codes=codes, population=population, shape=(batch, *self.shape), at_risk=at_risk
        )


class Uniform(NamedTuple):
    """How a tensor is hit where its units are alike: each independently at one rate, by codes that are equally likely.

    Attributes:
        population: Number of units, which are its values.
        rate: Probability of a hit.
        num_codes: Codes are 0 .. num_codes - 1; the one after them must do nothing.
    """

    population: int
    rate: float
    num_codes: int


class Where(Settings):
    """Part of a model: the layers, and of these the channels, positions and bits, that faults can hit.

    What is left out (None) is not restricted. A fault at any other place does not happen; those that remain are the
    same as without the restriction, so that two targets can be compared under common faults.

    Attributes:
        layers: Type names, name patterns or depths of layers, as `inject` takes them.
        channels: Output channels of the layer.
        positions: Pairs (row, column): of the feature map, or of the kernel.
        bits: Bits of the word, 0 for the least significant one.
    """

    layers: tuple[str, ...] | None = None
    channels: tuple[Index, ...] | None = None
    positions: tuple[tuple[Index, Index], ...] | None = None
    bits: tuple[Index, ...] | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something(self) -> Where:
        for name in type(self).model_fields:
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty, so that nothing could be hit; null does not restrict them")
        return self


class Fault(Settings, ABC):
    """A fault model: a frozen value that draws plans and applies them.

    Attributes:
        persistence: M_p(t) >= 1, by which errors that nobody corrects have multiplied the rate after a time t (FTT-NAS
            section 3.2); it multiplies the rate before any probability is formed from it.
        where: What of the model it can hit; None: all that `inject` selects.
        name: Name in configs and records.
        target: The tensors that it acts on; ``module``: the outputs of whole modules.
        stage: For features: ``point`` before the activation function, ``buffer`` on what is stored after it.
        rate_name: The quantity that a sweep varies.
        encoding: Encoding that the fault's hardware gives weights, when it differs from the quantizer's own.
        in_rows: For weights in fixed point: whether tensors laid end to end can be drawn for and hit as one. Then
            unit u of N values is of value u % N, one value is as good as another, and the sites of a plan ascend.
    """

    persistence: Annotated[float, Field(ge=1.0)] = 1.0
    where: Where | None = None

    name: ClassVar[str]
    target: ClassVar[Literal["weight", "feature", "module"]]
    stage: ClassVar[Literal["point", "buffer"]] = "point"
    rate_name: ClassVar[str]
    encoding: ClassVar[Literal["twos_complement", "sign_magnitude"] | None] = None
    needs_quantization: ClassVar[bool] = True
    in_rows: ClassVar[bool] = False

    @property
    def needs_largest(self) -> bool:
        """Whether `apply_` needs the largest magnitude of a tensor."""
        return False

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

    def with_rate(self, rate: float) -> Self:
        """Return the same model at another overall rate, as a sweep needs it.

        Raises:
            ValueError: The rate is out of its range.
        """
        return parse(type(self), {**self.model_dump(), self.rate_name: rate}, where=self.name)

    def num_bits(self, site: Site) -> int | None:
        """Return how many bits of a word, from the lowest on, can be hit; None for a model that hits whole values."""
        return None

    def num_codes(self, site: Site) -> int:
        """Return how many different things can happen to a unit, codes 0, 1, ...; 0 where they cannot be counted."""
        return 1

    def uniform(self, site: Site) -> Uniform | None:
        """Return how a feature is hit if that is uniform, so that many can be drawn for at once; None if not."""
        return None

    def bits_hit(self, plan: Plan) -> Tensor:
        """Return which bit of the word each entry of a plan hits, int64 [K]; only for a model with `num_bits`."""
        raise NotImplementedError

    def weight_format(self, given: FixedPoint | None) -> FixedPoint | FloatFormat | None:
        """Return how the fault's hardware holds weights, from the format that was asked for."""
        if given is None or self.encoding is None or given.encoding == self.encoding:
            return given
        return given.model_copy(update={"encoding": self.encoding})

    def apply(self, values: Tensor, plan: Plan, *, grid: Grid | None = None) -> Tensor:
        """Return a faulty copy of ``values``; see `apply_`.

        Raises:
            ValueError: The plan is for a tensor of another shape.
        """
        if tuple(values.shape) != plan.shape:
            raise ValueError(f"a plan fits one shape: it is for {plan.shape}, the tensor has {tuple(values.shape)}")
        return self.apply_(values.clone(), plan, grid)


FAULTS: Registry[type[Fault]] = Registry("fault model")


def fault_class(name: str, *, allow_import: bool = True) -> type[Fault]:
    """Return the fault model of a registered name, or of ``package.module:Name`` from the user's own config.

    Raises:
        ValueError: There is no such model, or what is imported is none, or lacks something.
    """
    cls = FAULTS.get(name, allow_import=allow_import)
    check_class(cls, Fault, where=f"fault model {name!r}", needs=("name", "target", "rate_name"))
    return cls


def create_fault(data: Mapping[str, Any], *, where: str = "fault", allow_import: bool = True) -> Fault:
    """Build a fault model from config data such as ``{"name": "mibb", "mac_error_rate": 1e-4}``.

    ``allow_import`` accepts names to import, ``package.module:Name``; only for the user's own config.

    Raises:
        ValueError: Unknown model, unknown key, or a value out of its range.
    """
    if not isinstance(data, Mapping) or "name" not in data:
        raise ValueError(f"{where}: expected keys and values with a name, got {data!r}; there is: {', '.join(FAULTS)}")
    fault = fault_class(str(data["name"]), allow_import=allow_import)
    return parse(fault, {key: value for key, value in data.items() if key != "name"}, where=where)


def config_data(fault: Fault) -> dict[str, Any]:
    """Return what `create_fault` makes the same fault model of; a user's own class is named ``package.module:Name``.

    The short name of such a class would be known only where its module has been imported already.
    """
    cls = type(fault)
    own = None if cls.__module__.startswith("ftnas.") else import_path(cls)
    return {"name": own or fault.name, **fault.model_dump()}
