"""ftnas finds, trains and certifies convolutional networks that keep working on faulty hardware.

Nothing heavy is imported before it is used: ``import ftnas`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "inject": "ftnas.faults.inject",
    "Injection": "ftnas.faults.injection",
    "FixedPoint": "ftnas.quantize",
    "Quantization": "ftnas.quantize",
    "Genotype": "ftnas.space.genotype",
    "Space": "ftnas.space.genotype",
    "Supernet": "ftnas.space.supernet",
    "bound": "ftnas.faults.bounds",
    "WeightBound": "ftnas.faults.bounds",
    "FeatureBound": "ftnas.faults.bounds",
    "saturate": "ftnas.faults.saturation",
    "unsaturate": "ftnas.faults.saturation",
    "build_network": "ftnas.space.network",
}
_MODULES = ("baselines", "faults", "quantize")

__all__ = ["__version__", *_HOMES, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"ftnas.{name}")
    raise AttributeError(f"module 'ftnas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
