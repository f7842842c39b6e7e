"""Cell-based search spaces: genotypes, operations, the discrete network and the supernet."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "PRIMITIVES": "ops",
    "Genotype": "genotype",
    "Space": "space",
    "Supernet": "supernet",
    "build_network": "network",
    "copy_path": "supernet",
    "load_space": "space",
    "space_names": "space",
}

__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"ftnas.space.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ftnas.space' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
