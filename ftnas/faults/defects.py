"""Defect maps: which cells of a device are stuck, as a chip test finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ftnas.faults.base import Plan
from ftnas.faults.plans import PlanSet, faults_of, listed, read_archive, write_archive
from ftnas.faults.stuck import AdSAF, BitAdSAF

SCHEMA = 1
KIND = "ftnas defect map"
WORKS, STUCK_AT_0, STUCK_AT_1 = 0, 1, 2


@dataclass(frozen=True)
class DefectMap:
    """The stuck cells of one device.

    A file of it is a NumPy ``.npz`` archive without pickled objects: ``header`` holds JSON in UTF-8 (schema, the fault
    model, the names of the layers) and layer number i has its cells in ``i.cells``.

    Attributes:
        fault: What a cell is, and what being stuck means: `AdSAF` (``cells`` and ``stuck_at`` count, its rates do not)
            or `BitAdSAF`. Its ``where`` is left out: the cells say what is hit.
        cells: Layer -> int8 of 0 (works), 1 (stuck at 0) and 2 (stuck at 1, or at R). Its shape is that of the weight
            for logical cells, [2, weight] for differential ones (positive cells first), and [bits - 1, weight] for
            `BitAdSAF` (least significant bit first).
    """

    fault: AdSAF | BitAdSAF
    cells: Mapping[str, Tensor]

    @classmethod
    def of(cls, plans: PlanSet) -> DefectMap:
        """Return the map that plans of one stuck-at fault model make.

        Raises:
            ValueError: The plans are of another model, or of several.
        """
        if len(plans.faults) != 1 or not isinstance(plans.faults[0], (AdSAF, BitAdSAF)):
            names = ", ".join(fault.name for fault in plans.faults) or "none"
            raise ValueError(f"a defect map holds the stuck cells of one model, adsaf or bit_adsaf, got {names}")
        cells = {}
        for (_, layer, _), plan in plans.plans.items():
            flat = torch.zeros(plan.population, dtype=torch.int8)
            flat[plan.sites] = (plan.codes + 1).to(torch.int8)
            rows = plan.population // max(1, plan.num_values)
            alone = isinstance(plans.faults[0], AdSAF) and plans.faults[0].cells == "logical"
            cells[layer] = flat.reshape(plan.shape if alone else (rows, *plan.shape))
        return cls(plans.faults[0], cells)

    def __post_init__(self) -> None:
        cells = {layer: _tensor(layer, array) for layer, array in self.cells.items()}
        object.__setattr__(self, "cells", cells)
        object.__setattr__(self, "fault", self.fault.model_copy(update={"where": None}))

    def plans(self) -> PlanSet:
        """Return the plans that put this device under a model: ``inject(model, plans=defects.plans(), ...)``.

        Raises:
            ValueError: Cells other than 0, 1 and 2, or of a shape that the fault model does not have.
        """
        found = {}
        for layer, cells in self.cells.items():
            if not bool(((cells == WORKS) | (cells == STUCK_AT_0) | (cells == STUCK_AT_1)).all()):
                raise ValueError(f"defect map, {layer!r}: cells are 0, 1 or 2, got {cells.min():g}..{cells.max():g}")
            logical = isinstance(self.fault, AdSAF) and self.fault.cells == "logical"
            if not logical and (cells.dim() < 2 or (isinstance(self.fault, AdSAF) and len(cells) != 2)):
                first = "2" if isinstance(self.fault, AdSAF) else "bits - 1"
                raise ValueError(
                    f"defect map, {layer!r}: expected cells of shape [{first}, weight], got {list(cells.shape)}"
                )
            flat = cells.reshape(-1).to(torch.int64)
            sites = flat.nonzero().squeeze(1)
            shape = tuple(cells.shape if logical else cells.shape[1:])
            rate = len(sites) / max(1, len(flat))
            found[0, layer, 0] = Plan(sites, flat[sites] - 1, len(flat), rate, shape)
        return PlanSet((self.fault,), found)

    def save(self, path: str | Path) -> None:
        """Write the map to a file, in one step.

        Raises:
            ValueError: As `plans` does.
        """
        self.plans()
        fault = {"name": self.fault.name, **self.fault.model_dump(mode="json")}
        header = {"kind": KIND, "schema": SCHEMA, "faults": [fault], "layers": list(self.cells)}
        arrays = {f"{i}.cells": cells.to(torch.int8).cpu().numpy() for i, cells in enumerate(self.cells.values())}
        write_archive(path, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> DefectMap:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ValueError: One line: no such file, not such a file, or not whole.
        """
        header, arrays = read_archive(path, KIND, SCHEMA)
        faults, layers = faults_of(header, path), listed(header, "layers", path)
        if len(faults) != 1 or not isinstance(faults[0], (AdSAF, BitAdSAF)):
            raise ValueError(f"{path}: a defect map is of adsaf or bit_adsaf, got {[fault.name for fault in faults]}")
        if not all(isinstance(layer, str) for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"{path}: the names of the layers must be distinct strings")
        missing = [layer for i, layer in enumerate(layers) if f"{i}.cells" not in arrays]
        if missing:
            raise ValueError(f"{path}: the cells of {missing[0]!r} are missing; the file is not whole")
        cells = {layer: arrays[f"{i}.cells"] for i, layer in enumerate(layers)}
        for layer, array in cells.items():
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{path}: the cells of {layer!r} must be integers, got {array.dtype}")
            if array.size and not (WORKS <= int(array.min()) and int(array.max()) <= STUCK_AT_1):
                raise ValueError(f"{path}: the cells of {layer!r} are 0, 1 or 2, got {array.min()}..{array.max()}")
        return cls(faults[0], {layer: torch.from_numpy(array.astype(np.int8)) for layer, array in cells.items()})


def _tensor(layer: str, cells: Tensor | ArrayLike) -> Tensor:
    """Return cells as a tensor; of an array a copy, since torch takes neither flipped views nor swapped bytes."""
    if isinstance(cells, Tensor):
        return cells
    array = np.asarray(cells)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"defect map, {layer!r}: cells are 0, 1 or 2, got an array of {array.dtype}; give numbers")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
