"""Plans as things to keep: saved without pickle, inspected, replayed on another model of the same shapes."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ftnas.faults.base import Fault, Plan, Site, create_fault
from ftnas.faults.drawing import Key
from ftnas.settings import Rate, Settings, did_you_mean, parse
from ftnas.storage import atomic_write

SCHEMA = 1
KIND = "ftnas plans"
_HEADER = "header"
_UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, RuntimeError, MemoryError, OverflowError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
"""What NumPy and zipfile raise for a file that is not whole, or not an archive."""


class _Entry(Settings):
    """What the header of a file says of one plan."""

    fault: int = Field(ge=0)
    layer: str
    call: int = Field(ge=0)
    population: int = Field(ge=0)
    rate: Rate
    shape: tuple[int, ...]
    span: int = Field(ge=1)
    at_risk: int | None


@dataclass(frozen=True)
class PlanSet:
    """The plans of one device, or of one forward.

    A file of it is a NumPy ``.npz`` archive without pickled objects: ``header`` holds JSON in UTF-8 (schema, fault
    models, and for each plan its fault, layer, call, population, rate, shape, span and at_risk), and plan number i has
    its two arrays in ``i.sites`` and ``i.codes``, whose meaning `Plan` and the fault model's ``sample`` define.

    Attributes:
        faults: The fault models.
        plans: (number of the fault model, layer, call of the layer) -> plan, on the CPU.
    """

    faults: tuple[Fault, ...]
    plans: Mapping[Key, Plan]

    def save(self, path: str | Path) -> None:
        """Write the plans to a file, in one step."""
        entries = [
            {
                "fault": number, "layer": layer, "call": call, "population": plan.population, "rate": plan.rate,
                "shape": list(plan.shape), "span": plan.span, "at_risk": plan.at_risk,
            }
            for (number, layer, call), plan in self.plans.items()
        ]  # fmt: skip
        faults = [{"name": fault.name, **fault.model_dump(mode="json")} for fault in self.faults]
        arrays = {}
        for index, plan in enumerate(self.plans.values()):
            arrays[f"{index}.sites"] = plan.sites.numpy()
            arrays[f"{index}.codes"] = plan.codes.numpy()
        write_archive(path, {"kind": KIND, "schema": SCHEMA, "faults": faults, "plans": entries}, arrays)

    @classmethod
    def load(cls, path: str | Path) -> PlanSet:
        """Read what `save` wrote; nothing in the file is executed or imported.

        Raises:
            ValueError: One line: no such file, not such a file, truncated, or plans that cannot be.
        """
        header, arrays = read_archive(path, KIND, SCHEMA)
        faults = faults_of(header, path)
        plans: dict[Key, Plan] = {}
        for index, data in enumerate(listed(header, "plans", path)):
            entry = parse(_Entry, data, where=f"{path}: plan {index}")
            if entry.fault >= len(faults):
                raise ValueError(f"{path}: plan {index} belongs to fault {entry.fault} of {len(faults)}")
            try:
                sites, codes = (torch.from_numpy(arrays[f"{index}.{name}"].copy()) for name in ("sites", "codes"))
            except KeyError as error:
                raise ValueError(f"{path}: {error} is missing; the file is not whole") from None
            except TypeError:
                raise ValueError(f"{path}: plan {index} ({entry.layer}): sites and codes must be numbers") from None
            plan = Plan(sites, codes, entry.population, entry.rate, entry.shape, entry.span, entry.at_risk)
            _check_plan(plan, faults[entry.fault], f"{path}: plan {index} ({entry.layer})")
            key = (entry.fault, entry.layer, entry.call)
            if key in plans:
                raise ValueError(f"{path}: plan {index} is the second one of fault {entry.fault} for {entry.layer!r}")
            plans[key] = plan
        return cls(faults, plans)

    def hits(self) -> int:
        """Return the number of units hit in all plans."""
        return sum(int(plan.hits()) for plan in self.plans.values())

    def layers(self) -> tuple[str, ...]:
        """Return the layers that have a plan, each once."""
        return tuple(dict.fromkeys(layer for _, layer, _ in self.plans))

    def check_layers(self, known: Iterable[str]) -> None:
        """Refuse plans for layers that a model does not have.

        Raises:
            ValueError: The first such layer, and the nearest that the model has.
        """
        names = set(known)
        for layer in self.layers():
            if layer not in names:
                raise ValueError(f"the plans hit a layer {layer!r} that the model lacks; {did_you_mean(layer, names)}")


def _check_plan(plan: Plan, fault: Fault, where: str) -> None:
    """Refuse a plan from a file that the fault model cannot have drawn."""
    sites, codes = plan.sites, plan.codes
    kinds = fault.num_codes(Site("", plan.shape, 1, bits=24))  # no more than for the widest words
    expected = torch.int64 if kinds else torch.float32
    if sites.dtype != torch.int64 or codes.dtype != expected:
        raise ValueError(f"{where}: sites must be int64 and codes {expected}, got {sites.dtype} and {codes.dtype}")
    length = len(sites) if kinds else len(sites) * plan.span
    if sites.dim() != 1 or codes.dim() != 1 or len(codes) != length:
        raise ValueError(f"{where}: {len(sites)} sites and {len(codes)} codes do not belong together")
    if min(plan.shape, default=1) < 0 or plan.population * plan.span % max(1, plan.num_values):
        raise ValueError(f"{where}: a population of {plan.population} does not fit the shape {list(plan.shape)}")
    if not 0 <= plan.num_at_risk <= plan.population:
        raise ValueError(f"{where}: at_risk must lie in 0..{plan.population}, got {plan.num_at_risk}")
    if not len(sites):
        return
    if int(sites.min()) < 0 or int(sites.max()) >= plan.population or len(sites.unique()) < len(sites):
        raise ValueError(f"{where}: sites must be distinct and lie in 0..{plan.population - 1}")
    if kinds and (int(codes.min()) < 0 or int(codes.max()) >= kinds):
        raise ValueError(f"{where}: codes must lie in 0..{kinds - 1}, got {int(codes.min())}..{int(codes.max())}")
    if not bool(codes.isfinite().all()):
        raise ValueError(f"{where}: codes must be finite")


def listed(header: Mapping[str, Any], key: str, path: str | Path) -> list[Any]:
    """Return a list that a file's header must have."""
    found = header.get(key)
    if not isinstance(found, list):
        raise ValueError(f"{path}: the header must hold a list of {key}, got {found!r:.40}")
    return found


def faults_of(header: Mapping[str, Any], path: str | Path) -> tuple[Fault, ...]:
    """Return the fault models that a file's header names; names to import are refused."""
    found = listed(header, "faults", path)
    try:
        return tuple(create_fault(data, where="fault", allow_import=False) for data in found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_archive(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a header and arrays to an ``.npz`` file, in one step."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, **{_HEADER: text, **arrays})
    atomic_write(Path(path), buffer.getvalue())


def kind_of(path: str | Path) -> str | None:
    """Return what kind of file of `write_archive` this is; None where it is none."""
    try:
        header, _ = _read(Path(path))
    except _UNREADABLE:
        return None
    return header.get("kind") if isinstance(header, dict) else None


def _read(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    # from memory: of a file that is no archive NumPy would leave the handle open
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return json.loads(arrays.pop(_HEADER).tobytes()), arrays


def read_archive(path: str | Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a file of `write_archive`, of the given kind and schema; nothing in it is executed.

    Raises:
        ValueError: One line: no such file, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        header, arrays = _read(path)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as a file of {kind} ({type(error).__name__})") from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise ValueError(f"{path}: not a file of {kind}")
    if header.get("schema") != schema:
        raise ValueError(f"{path}: this release reads schema {schema} of {kind}, got {header.get('schema')!r}")
    return header, arrays
