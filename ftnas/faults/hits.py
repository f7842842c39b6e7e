"""What one tensor meets: the plans of its faults, applied in place and counted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ftnas.faults.base import Plan, Site
from ftnas.faults.changes import Watch
from ftnas.faults.drawing import Drawing
from ftnas.faults.memory import restrict_range, values_at
from ftnas.faults.record import Tally
from ftnas.faults.variation import ReciprocalNormalVariation
from ftnas.quantize import Grid


class Hits:
    """Applies plans and counts what they hit.

    Args:
        tally: Counts.
        bounds: Largest magnitude of the features of some layers.
        watch: Keeps every change; None keeps none.

    Attributes:
        reads_nan_as_zero: Layers whose weights are read so, after they were stored.
    """

    def __init__(self, tally: Tally, bounds: Mapping[str, float], watch: Watch | None) -> None:
        self._tally, self._bounds, self._watch = tally, bounds, watch
        self.reads_nan_as_zero: frozenset[str] = frozenset()

    def apply(
        self, drawing: Drawing, out: Tensor, site: Site, grid: Grid | None, draw_and_call: tuple[int, int]
    ) -> list[Plan]:
        """Apply the faults of one kind to a tensor in place; return their plans.

        Args:
            drawing: Where plans come from.
            out: The tensor, as it is stored.
            site: What it is.
            grid: On which its values lie; None for floating point.
            draw_and_call: Number of the draw, and the how-manieth call of the layer in the forward.
        """
        draw, call = draw_and_call
        plans, grid = [], drawing.measured(out, grid)
        for placed, plan, fresh in drawing.plans(site, draw, call, out.device):
            fault = placed.fault
            before = self._watch.values(out, plan) if self._watch is not None else None
            old = values_at(out, plan) if fresh is not None and fault.target == "weight" and grid is None else None
            if len(plan.sites):  # at low rates most tensors of a small batch meet no fault
                fault.apply_(out, plan, grid)
            if fault.target == "feature" and site.layer in self._bounds:
                restrict_range(out, self._bounds[site.layer], out=out)
            plans.append(plan)
            if self._watch is not None and before is not None:
                self._watch.add(fault, site, call, plan, (before, self._watch.values(out, plan)))
            if fresh is not None:
                self._tally.add(placed.number, site.layer, fresh)
                if old is not None:
                    zeroed = site.layer in self.reads_nan_as_zero
                    self._tally.count_odd(placed.number, plan, old, values_at(out, plan), zeroed=zeroed)
                if isinstance(fault, ReciprocalNormalVariation):
                    self._tally.count(placed.number, "floored", fault.floored(fresh))
        return plans
