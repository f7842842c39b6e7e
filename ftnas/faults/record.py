"""What an injection hit: counted without waiting for the device, read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftnas import devices
from ftnas.faults.base import Fault, Plan
from ftnas.faults.memory import count_distinct

SURELY_HIT = 20.0
"""Expected hits above which none at all means a broken injection (its probability is under e^-20 = 2e-9)."""


@dataclass(frozen=True)
class LayerHits:
    """Units at risk, units hit, and the number of hits that the rates let expect, over all plans of one layer."""

    sites: int
    hits: int
    expected: float

    @property
    def rate(self) -> float:
        """Realised rate: hits per unit at risk; 0 when nothing was at risk."""
        return self.hits / self.sites if self.sites else 0.0


@dataclass(frozen=True)
class FaultRecord(LayerHits):
    """The same over all layers, for one fault model.

    Attributes:
        fault: Its name.
        layers: By name of the layer.
        nonfinite: Weights that the fault turned from finite into NaN or an infinity.
        nan: Weights that it turned into NaN.
        nan_zeroed: Those of these that the layer reads as 0, see `ftnas.saturate`.
        floored: Cells whose variation was cut off, see `ReciprocalNormalVariation`.
    """

    fault: str
    layers: dict[str, LayerHits]
    nonfinite: int = 0
    nan: int = 0
    nan_zeroed: int = 0
    floored: int = 0


@dataclass(frozen=True)
class InjectionRecord(LayerHits):
    """The same over all fault models of one injection.

    Attributes:
        faults: Each of them.
        features_zeroed: Features that were NaN, whatever made them so, and were read as 0, see `FeatureBound`.
    """

    faults: tuple[FaultRecord, ...]
    features_zeroed: int = 0

    @property
    def nonfinite(self) -> int:
        """Values that faults turned into NaN or an infinity."""
        return sum(fault.nonfinite for fault in self.faults)

    @property
    def nan(self) -> int:
        """Weights that faults turned into NaN."""
        return sum(fault.nan for fault in self.faults)

    @property
    def nan_zeroed(self) -> int:
        """Those of them that a saturation with ``nan="zero"`` reads as 0."""
        return sum(fault.nan_zeroed for fault in self.faults)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in which at least one unit was hit."""
        return tuple(dict.fromkeys(name for f in self.faults for name, layer in f.layers.items() if layer.hits))


class Tally:
    """Adds up plans as they are drawn; on a device in place, so that a graph of a step adds whenever it is replayed.

    What it adds to is made outside of inference mode, since forwards in that mode and others may follow each other.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = list(faults)
        self._sums: list[dict[str, tuple[int, float, Tensor | int]]] = [{} for _ in self._faults]
        self._odd: list[dict[str, Tensor]] = [{} for _ in self._faults]
        self._rows: list[tuple[list[str], Tensor] | None] = [None for _ in self._faults]
        self._features_zeroed: Tensor | int = 0

    @torch.inference_mode(False)
    def add(self, fault: int, layer: str, plan: Plan) -> None:
        """Count one plan of one layer, for the fault model of that index.

        On a CPU plans hold no padding; elsewhere the count stays on the device.
        """
        readable = devices.is_readable(plan.sites.device)
        sums = self._sums[fault]
        sites, expected, hits = sums.get(layer, (0, 0.0, 0))
        hits += len(plan.sites) if readable else plan.hits()
        sums[layer] = (sites + plan.num_at_risk, expected + plan.num_at_risk * plan.rate, hits)

    @torch.inference_mode(False)
    def add_row(
        self,
        fault: int,
        layers: Sequence[str],
        sizes: Sequence[int],
        plan: Plan,
        spans: Tensor,
        places: tuple[Tensor, Tensor],
        known: Iterable[str],
    ) -> None:
        """Count one plan of weights laid end to end, at some layers; the counts stay on the device.

        Args:
            fault: Index of the fault model.
            layers: Where it is counted.
            sizes: Values of each.
            plan: For N values, unit u of value u % N; ascending.
            spans: Where the values of each layer of the row begin and end, int64 [2, number of layers].
            places: The places of these layers, and of ``layers``, among those ``known``; int64.
            known: All layers that there may be, the same in every call.
        """
        units = plan.population // plan.num_values
        firsts = torch.arange(0, plan.population, plan.num_values, device=spans.device)
        # a search for where the hits of a layer begin and end: adding up one by one, all would wait for few counts
        begin, end = torch.searchsorted(plan.sites, firsts.view(units, 1, 1) + spans).unbind(1)
        hits = torch.zeros_like(self._row(fault, known, spans.device)).index_add_(0, places[0], (end - begin).sum(0))
        what = [(layer, units * size, plan.rate) for layer, size in zip(layers, sizes, strict=True)]
        self.add_each(fault, what, hits.index_select(0, places[1]), places[1], known)

    @torch.inference_mode(False)
    def add_each(
        self,
        fault: int,
        what: Sequence[tuple[str, int, float]],
        hits: Tensor,
        places: Tensor,
        known: Iterable[str],
    ) -> None:
        """Count plans of some tensors; the counts stay on the device.

        Args:
            fault: Index of the fault model.
            what: Layer, number of units and rate of each.
            hits: Number of hits of each, int64 [T].
            places: The place of each layer among those ``known``, int64 [T].
            known: All layers that there may be, the same in every call.
        """
        sums = self._sums[fault]
        self._row(fault, known, hits.device).index_add_(0, places, hits)
        for layer, units, rate in what:
            sites, expected, hits_before = sums.get(layer, (0, 0.0, 0))
            sums[layer] = (sites + units, expected + units * rate, hits_before)

    def _row(self, fault: int, known: Iterable[str], device: torch.device) -> Tensor:
        """Return the hits of a fault model by layer, int64 [number of layers], on a device."""
        row = self._rows[fault]
        if row is None:
            names = list(known)
            row = self._rows[fault] = names, torch.zeros(len(names), dtype=torch.int64, device=device)
        return row[1]

    @torch.inference_mode(False)
    def count(self, fault: int, what: str, number: Tensor) -> None:
        """Add a scalar tensor to a fault model's ``nonfinite``, ``nan`` and the like; it stays on the device."""
        odd = self._odd[fault]
        if what in odd:
            odd[what] += number
        else:
            odd[what] = number.clone()

    def count_odd(self, fault: int, plan: Plan, old: Tensor, new: Tensor, *, zeroed: bool) -> None:
        """Count the weights that a plan turned into NaN or an infinity, once each; a word may be hit in several bits.

        Args:
            fault: Index of the fault model.
            plan: Where it hit.
            old: The values there before, as `values_at` gives them.
            new: The same after.
            zeroed: Whether the layer reads NaN as 0.
        """
        at = plan.values_hit()
        hit = at < plan.num_values
        nan = count_distinct(at, new.isnan() & ~old.isnan() & hit)
        self.count(fault, "nonfinite", count_distinct(at, ~new.isfinite() & old.isfinite() & hit))
        self.count(fault, "nan", nan)
        if zeroed:
            self.count(fault, "nan_zeroed", nan)

    @torch.inference_mode(False)
    def count_feature_nan(self, feature: Tensor) -> None:
        """Count the NaN of features of any shape; the count stays on the device."""
        self._features_zeroed += feature.detach().isnan().sum()

    def at_risk(self) -> list[dict[str, tuple[int, float]]]:
        """Return the sums that are not on a device, by fault model and layer: units at risk, expected hits."""
        return [{layer: (sites, expected) for layer, (sites, expected, _) in sums.items()} for sums in self._sums]

    def again(self, before: list[dict[str, tuple[int, float]]], after: list[dict[str, tuple[int, float]]]) -> None:
        """Add once more what has come to `at_risk` between two times."""
        for sums, old, new in zip(self._sums, before, after, strict=True):
            for layer, (sites, expected) in new.items():
                sites_before, expected_before = old.get(layer, (0, 0.0))
                found = sums[layer]
                sums[layer] = (found[0] + sites - sites_before, found[1] + expected - expected_before, found[2])

    def record(self) -> InjectionRecord:
        """Return the sums so far; reads them back from the device."""
        faults = []
        for fault, sums, odd, row in zip(self._faults, self._sums, self._odd, self._rows, strict=True):
            more = {} if row is None else dict(zip(row[0], row[1].tolist(), strict=True))
            layers = {
                name: LayerHits(sites, int(hits) + more.get(name, 0), exp) for name, (sites, exp, hits) in sums.items()
            }
            counts = {what: int(number) for what, number in odd.items()}
            faults.append(FaultRecord(*_total(list(layers.values())), fault=fault.name, layers=layers, **counts))
        return InjectionRecord(*_total(faults), faults=tuple(faults), features_zeroed=int(self._features_zeroed))

    def check(self) -> None:
        """Raise a RuntimeError when a fault model hit nothing although hits were certain, or could hit nothing."""
        for fault in self.record().faults:
            if not fault.layers:
                raise RuntimeError(f"{fault.fault} could hit nothing: none of the layers that it was put on has run")
            if fault.sites == 0:
                raise RuntimeError(
                    f"{fault.fault} could hit nothing: what is targeted is protected, or holds no values"
                )
            if fault.hits == 0 and fault.expected > SURELY_HIT:
                raise RuntimeError(
                    f"{fault.fault} hit none of {fault.sites} sites where {fault.expected:.0f} hits were expected"
                )


def _total(parts: Sequence[LayerHits]) -> tuple[int, int, float]:
    return sum(p.sites for p in parts), sum(p.hits for p in parts), sum(p.expected for p in parts)
