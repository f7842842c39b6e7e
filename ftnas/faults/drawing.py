"""Which plan a tensor meets: drawn by seed, kept for a device, or replayed from a set of plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ftnas.faults.base import Fault, Plan, Site, Where
from ftnas.faults.where import restrict
from ftnas.quantize import Grid
from ftnas.rng import Label, generator, seed_for

DrawOn = Literal["cpu", "device"]
Key = tuple[int, str, int]
"""Number of the fault model in the injection, name of the layer, and the how-manieth call of it in a forward."""


@dataclass(frozen=True)
class Placed:
    """A fault model, and what of a model it can hit.

    Attributes:
        number: Its place in the injection.
        fault: The model.
        layers: Names of the layers.
        never: For some layers, parts of them that are protected.
    """

    number: int
    fault: Fault
    layers: frozenset[str]
    never: Mapping[str, Sequence[Where]]


class Drawing:
    """The plans of one kind of tensor, keyed by seed, fault, draw, layer and call.

    Kept are hard plans, and the last one of each weight, which may be read more than once in a forward.

    Attributes:
        placed: The fault models.
        hard: Whether one draw is for always.
        given: Plans in place of draws.
        sites: The tensors met so far.
        ready: Plans that were drawn ahead for the forward that runs.
        used: Those of them that were met.
    """

    def __init__(
        self,
        placed: Sequence[Placed],
        *,
        seed: int,
        hard: bool,
        draw_on: DrawOn,
        given: Mapping[Key, Plan] | None = None,
    ) -> None:
        self.placed = list(placed)
        self._check_given(given or {})
        self.hard = hard
        self.given = given
        self._last: dict[Key, tuple[int, Plan]] = {}
        self.sites: dict[Key, Site] = {}
        self.ready: dict[Key, Plan] = {}
        self.used: set[Key] = set()
        self._seed = seed
        self._on_device = draw_on == "device"
        self._kept: dict[Key, tuple[Label, Plan]] = {}
        self._streams: dict[Key, torch.Generator] = {}
        self._layers = frozenset().union(*(p.layers for p in placed))
        self._seeded = False
        self._seeds: dict[int, Tensor] = {}
        self._row: tuple[int, Callable[[], dict[Key, Plan]]] | None = None

    def __bool__(self) -> bool:
        return bool(self.placed)

    def hits(self, layer: str) -> bool:
        """Tell whether a fault model can hit this layer."""
        if self.given is not None:
            return any(name == layer for _, name, _ in self.given)
        return layer in self._layers

    def replay(self, given: Mapping[Key, Plan]) -> None:
        """Use these plans from now on, in place of others that were given."""
        self._check_given(given)
        self.given = given
        self._kept.clear()
        self._last.clear()

    def last(self, draw: int) -> dict[Key, Plan]:
        """Return the plans in force: those of the device, or those of one draw."""
        lasting = self.hard or self.given is not None
        found = {key: plan for key, (when, plan) in self._last.items() if lasting or when == draw}
        return found | (self._row[1]() if self._row is not None and self._row[0] == draw else {})

    def plans(
        self, site: Site, draw: int, index: int, device: torch.device
    ) -> Iterator[tuple[Placed, Plan, Plan | None]]:
        """Yield each fault model, its plan for the tensor, and the plan to count (None: counted before)."""
        for placed in self.placed:
            if site.layer not in placed.layers:
                continue
            key = (placed.number, site.layer, index)
            self.sites[key] = site
            ready = self.ready.get(key)
            if ready is not None and (ready.shape, ready.sites.device) == (site.shape, device):
                self.used.add(key)
                self._last[key] = (draw, ready)
                yield placed, ready, None
                continue
            given = self.given is not None
            found = self._given(placed, key, site) if given else self._drawn(placed, key, site, draw, device)
            if found is None:
                continue
            plan, fresh = found
            if fresh is not None:
                self._last[key] = (draw, fresh)
            yield placed, plan.to(device), fresh

    def measured(self, values: Tensor, grid: Grid | None) -> Grid | None:
        """Return the grid with the largest magnitude of the values where a fault needs it that others come before."""
        if grid is None or len(self.placed) < 2 or not any(placed.fault.needs_largest for placed in self.placed):
            return grid
        return replace(grid, largest=values.abs().amax())

    @property
    def draws_rows(self) -> bool:
        """Whether `row` can draw for weights that are laid end to end."""
        if not self.placed:
            return True
        return self.placed[0].fault.in_rows and len(self.placed) == 1 and self.draws_freely(self.placed[0])

    def draws_freely(self, placed: Placed) -> bool:
        """Tell whether a fault model draws on the device, anew for each draw, and can hit all of its layers."""
        whole = placed.fault.where is None and not any(placed.never.values())
        return whole and self._on_device and not self.hard and self.given is None

    def row(self, site: Site, draw: int, device: torch.device) -> tuple[Placed, Plan]:
        """Draw one plan for weights laid end to end."""
        (placed,) = self.placed
        stream = self._stream(placed, (placed.number, site.layer, 0), draw, device)
        return placed, placed.fault.sample(site, generator=stream)

    def keep_row(self, draw: int, split: Callable[[], Mapping[str, Plan]]) -> None:
        """Take note of the plans in force, which ``split`` gives by layer where they are asked for."""
        (placed,) = self.placed
        self._row = draw, lambda: {(placed.number, layer, 0): own for layer, own in split().items()}

    def seed_of(self, placed: Placed, draw: int, device: torch.device) -> Tensor:
        """Return the seed of a draw of a fault model on a device, int64; the same tensor for all draws."""
        seed = self._seeds.get(placed.number)
        if seed is None or seed.device != device:
            with torch.inference_mode(False):
                self._seeds[placed.number] = seed = torch.zeros((), dtype=torch.int64, device=device)
        if not self._seeded:
            seed.fill_(seed_for(self._seed, placed.fault.name, placed.number, draw))
        return seed

    def streams(self) -> list[torch.Generator]:
        """Return the generators that plans were drawn from so far."""
        return list(self._streams.values())

    def seed(self, draw: int) -> None:
        """Bring the generators of all plans drawn so far to the beginning of a draw."""
        names = {placed.number: placed.fault.name for placed in self.placed}
        for (number, layer, call), stream in self._streams.items():
            stream.manual_seed(seed_for(self._seed, names[number], number, draw, layer, call))
        for number, seed in self._seeds.items():
            seed.fill_(seed_for(self._seed, names[number], number, draw))

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw in the body from the generators as they are, since a graph that is captured cannot seed them."""
        self._seeded = True
        try:
            yield
        finally:
            self._seeded = False

    def _drawn(self, placed: Placed, key: Key, site: Site, draw: int, device: torch.device) -> tuple[Plan, Plan | None]:
        fault = placed.fault
        when: Label = "device" if self.hard else draw
        one = self.hard and fault.target == "feature" and site.batched  # a defect map is the same for every sample
        sampled = replace(site, shape=site.shape[1:]) if one else site
        kept, plan = self._kept.get(key, (None, None))
        fresh = None
        if plan is None or kept != when:
            stream = self._stream(placed, key, when, device if self._on_device else torch.device("cpu"))
            plan = fault.sample(sampled, generator=stream)
            plan = fresh = restrict(plan, sampled, fault, only=fault.where, never=placed.never.get(site.layer, ()))
            plan = plan.to(device)
            if self.hard or fault.target == "weight":
                self._kept[key] = (when, plan)
        if plan.shape != sampled.shape:
            raise ValueError(f"{site.layer!r}: a defect map fits one shape, {plan.shape}, got {sampled.shape}")
        return (plan.repeated(site.shape[0]) if one else plan), fresh

    def _stream(self, placed: Placed, key: Key, when: Label, device: torch.device) -> torch.Generator:
        """Return the generator of a draw at its beginning; the same object for all draws of a key."""
        labels = (placed.fault.name, placed.number, when, key[1], key[2])
        stream = self._streams.get(key)
        if stream is None or stream.device != device:
            self._streams[key] = stream = generator(self._seed, *labels, device=device)
        elif not self._seeded:
            stream.manual_seed(seed_for(self._seed, *labels))
        return stream

    def _check_given(self, given: Mapping[Key, Plan]) -> None:
        """Refuse plans that hit a layer which the fault model's own ``where`` leaves out: they would not be used.

        Raises:
            ValueError: One line.
        """
        reach = {placed.number: placed for placed in self.placed}
        for (number, layer, _), plan in given.items():
            if number in reach and layer not in reach[number].layers and plan.hits():
                name = reach[number].fault.name
                raise ValueError(
                    f"the plans hit layer {layer!r}, which where.layers of their {name} leaves out; "
                    "remove where, or that plan"
                )

    def _given(self, placed: Placed, key: Key, site: Site) -> tuple[Plan, Plan | None] | None:
        assert self.given is not None
        plan = self.given.get(key)
        if plan is None:
            return None
        fresh = plan if key not in self._last else None
        if fresh is not None:
            _check_words(plan, placed.fault, site)
        if plan.shape == site.shape:
            return plan, fresh
        if site.batched and plan.shape == site.shape[1:] and placed.fault.target == "feature":
            return plan.repeated(site.shape[0]), fresh
        raise ValueError(f"{site.layer!r}: the plan is for the shape {plan.shape}, the tensor has {site.shape}")


class Drawings(NamedTuple):
    """The plans of all tensors of a model, by what they are for."""

    weights: Drawing
    features: Drawing
    buffers: Drawing

    @property
    def lasting(self) -> bool:
        """Whether the plans are those of one device, counted once whatever the number of forwards."""
        return any(drawing.hard or drawing.given is not None for drawing in self)

    def last(self, draw: int) -> dict[Key, Plan]:
        """Return the plans in force, on the CPU and without padding, by number of the fault model; see `Drawing`."""
        found: dict[Key, Plan] = {}
        for drawing in self:
            found |= {key: plan.to(torch.device("cpu")).compact() for key, plan in drawing.last(draw).items()}
        return dict(sorted(found.items(), key=lambda item: item[0][0]))

    def sites(self) -> dict[Key, tuple[Site, Placed]]:
        """Return the tensors that faults have met so far: what each is, and what of it the fault model can hit."""
        found: dict[Key, tuple[Site, Placed]] = {}
        for drawing in self:
            placed = {entry.number: entry for entry in drawing.placed}
            found |= {key: (site, placed[key[0]]) for key, site in drawing.sites.items()}
        return found


def _check_words(plan: Plan, fault: Fault, site: Site) -> None:
    """Refuse a plan of bits for words of another width than the tensor has."""
    bits = fault.num_bits(site)
    if bits is None or len(plan.sites) == 0:
        return
    units = plan.population * plan.span
    if units not in (plan.num_values, bits * plan.num_values) or int(fault.bits_hit(plan).max()) >= bits:
        raise ValueError(
            f"{site.layer!r}: the plan of {fault.name} is for words of another width than the {site.word_bits} bits "
            "here; replay it under the quantization that it was drawn for"
        )
