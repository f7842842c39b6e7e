"""The faulty hardware of a run: number formats, fault model, and which layers it hits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, field_validator
from torch import nn

from ftnas.faults.base import Fault, create_fault
from ftnas.faults.inject import DrawOn, Errors, Injection, inject
from ftnas.quantize import Quantization
from ftnas.settings import Settings


def _to_fault(value: Any) -> Fault:
    return value if isinstance(value, Fault) else create_fault(value)


def _to_data(fault: Fault) -> dict[str, Any]:
    return {"name": fault.name, **fault.model_dump()}


AnyFault = Annotated[Fault, BeforeValidator(_to_fault), PlainSerializer(_to_data)]
"""A fault model in settings: ``{name: mibb, mac_error_rate: 1.0e-4}``."""


class Hardware(Settings):
    """What a network is trained for or evaluated on.

    Attributes:
        fault: Fault model; None for hardware without faults.
        quantization: Number formats of weights and features; both 8-bit dynamic fixed point by default.
        layers: Which layers are faulted: type names or name patterns; None for every Conv2d and Linear. The paper's
            experiments fault convolutions only.
    """

    fault: AnyFault | None = None
    quantization: Quantization = Quantization()
    layers: tuple[str, ...] | None = ("conv2d",)

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def with_fault(self, fault: Fault | None) -> Hardware:
        """Return the same hardware under another fault model."""
        return self.model_copy(update={"fault": fault})

    def with_rate(self, rate: float) -> Hardware:
        """Return the same hardware at another rate of its fault model."""
        if self.fault is None:
            raise ValueError(f"hardware without a fault model has no rate to set to {rate:g}")
        return self.with_fault(self.fault.with_rate(rate))

    def inject(
        self,
        model: nn.Module,
        *,
        seed: int,
        errors: Errors | None = None,
        mask_gradients: bool = False,
        draw_on: DrawOn = "cpu",
    ) -> Injection:
        """Put this hardware under a model; see `ftnas.inject`."""
        return inject(
            model,
            *([] if self.fault is None else [self.fault]),
            quantization=self.quantization,
            seed=seed,
            layers=self.layers,
            errors=errors,
            mask_gradients=mask_gradients,
            draw_on=draw_on,
        )

    def label(self) -> str:
        """Return a short name for tables, e.g. ``mibb 0.0003``, or ``clean``."""
        if self.fault is None:
            return "clean"
        return f"{self.fault.name} {getattr(self.fault, self.fault.rate_name):.3g}"
