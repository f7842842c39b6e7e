"""The faulty hardware of a run: number formats, fault models, and which layers they hit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, field_validator, model_validator
from torch import nn

from ftnas.faults.base import Fault, Where, config_data, create_fault
from ftnas.faults.defects import KIND as DEFECT_MAP
from ftnas.faults.defects import DefectMap
from ftnas.faults.drawing import DrawOn
from ftnas.faults.inject import Errors, inject
from ftnas.faults.injection import Injection
from ftnas.faults.place import weight_format
from ftnas.faults.plans import PlanSet, kind_of
from ftnas.quantize import FixedPoint, FloatFormat, Quantization
from ftnas.settings import Settings


def _to_fault(value: Any) -> Fault:
    return value if isinstance(value, Fault) else create_fault(value)


AnyFault = Annotated[Fault, BeforeValidator(_to_fault), PlainSerializer(config_data)]
"""A fault model in settings: ``{name: mibb, mac_error_rate: 1.0e-4}``."""


class Hardware(Settings):
    """What a network is trained for or evaluated on.

    Attributes:
        fault: Fault model, whose rate sweeps vary; None for hardware without faults.
        also: Further fault models in the same injection, at their own rates, each perhaps with a ``where`` of its own.
        defects: File of a known device, a defect map or plans, in place of fault models.
        quantization: Number formats of weights and features; both 8-bit dynamic fixed point by default.
        layers: Which layers are faulted: type names, name patterns or depths; None for every Conv2d and Linear. The
            paper's experiments fault convolutions only. ``defects`` name their layers themselves.
        protect: What is never hit: layers as above, or ``{layers: ..., channels: ..., bits: ...}``.
    """

    fault: AnyFault | None = None
    also: tuple[AnyFault, ...] = ()
    defects: str | None = None
    quantization: Quantization = Quantization()
    layers: tuple[str, ...] | None = ("conv2d",)
    protect: tuple[str | Where, ...] = ()

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Hardware:
        if self.also and self.fault is None:
            raise ValueError("also adds to a fault model, and there is none; give the first one as fault")
        if self.defects is not None and (self.fault is not None or self.protect):
            raise ValueError("defects say themselves what is hit; remove fault, also and protect, or defects")
        return self

    @property
    def faulty(self) -> bool:
        """Whether there are faults at all."""
        return self.fault is not None or self.defects is not None

    def without_faults(self) -> Hardware:
        """Return the formats that were asked for, without fault models and what they bring along."""
        return self.model_copy(update={"fault": None, "also": (), "defects": None, "protect": ()})

    def at_rest(self) -> Hardware:
        """Return the same hardware on which nothing fails: words that a fault model brings along stay.

        Raises:
            ValueError: One line: the file of ``defects`` cannot be read.
        """
        resting = tuple(fault.with_rate(0.0) for fault in self._models())
        layers = self.layers if self.defects is None else None  # a device's words are those of every layer
        update = {"fault": resting[0] if resting else None, "also": resting[1:], "layers": layers}
        return self.without_faults().model_copy(update=update)

    def formats(self) -> tuple[FixedPoint | FloatFormat, FixedPoint]:
        """Return how weights and features are held: as asked, unless a fault model's hardware has words of its own.

        Raises:
            ValueError: Two fault models whose hardware differs, or the file of ``defects`` cannot be read.
        """
        form = weight_format(self.quantization.weights, self._models())
        assert form is not None
        return form, self.quantization.features

    def _models(self) -> list[Fault]:
        """Return the fault models: those that were given, or those of the known device."""
        if self.defects is not None:
            return list(load_device(self.defects).faults)
        return [] if self.fault is None else [self.fault, *self.also]

    def with_fault(self, fault: Fault, *also: Fault) -> Hardware:
        """Return the same hardware under other fault models."""
        return self.model_copy(update={"fault": fault, "also": also, "defects": None})

    def with_rate(self, rate: float) -> Hardware:
        """Return the same hardware at another rate of its fault model."""
        if self.fault is None:
            raise ValueError(f"hardware without a fault model has no rate to set to {rate:g}")
        return self.model_copy(update={"fault": self.fault.with_rate(rate)})

    def inject(
        self,
        model: nn.Module,
        *,
        seed: int,
        errors: Errors | None = None,
        mask_gradients: bool = False,
        draw_on: DrawOn = "cpu",
        bounds: Mapping[str, float] | None = None,
    ) -> Injection:
        """Put this hardware under a model; see `ftnas.inject`. A known device knows neither ``seed`` nor ``errors``."""
        if self.defects is not None:
            plans = load_device(self.defects)
            return inject(
                model, plans=plans, quantization=self.quantization, mask_gradients=mask_gradients, bounds=bounds
            )
        return inject(
            model,
            *self._models(),
            quantization=self.quantization,
            seed=seed,
            layers=self.layers,
            protect=self.protect,
            errors=errors,
            mask_gradients=mask_gradients,
            draw_on=draw_on,
            bounds=bounds,
        )

    def label(self) -> str:
        """Return a short name for tables, e.g. ``mibb 0.0003``, or ``clean``."""
        if self.defects is not None:
            return device_label(self.defects)
        if self.fault is None:
            return "clean"
        return " + ".join(f"{fault.name} {getattr(fault, fault.rate_name):.3g}" for fault in (self.fault, *self.also))


def check_alpha(alpha_l: float, hardware: Hardware, name: str) -> None:
    """Refuse a weight of the faulty loss without faults, which would have no effect."""
    if alpha_l > 0.0 and not hardware.faulty:
        raise ValueError(f"{name}={alpha_l:g} weighs the faulty loss, and there is no fault model; set it to 0")


def device_label(path: str | Path) -> str:
    """Return what tables call a known device, e.g. ``device chip`` for ``chip.npz``."""
    return f"device {Path(path).stem}"


def load_device(path: str | Path) -> PlanSet:
    """Read a known device from a file of `DefectMap` or of `PlanSet`.

    Raises:
        ValueError: One line: no such file, or neither of the two.
    """
    return DefectMap.load(path).plans() if kind_of(path) == DEFECT_MAP else PlanSet.load(path)
