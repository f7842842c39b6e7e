"""The faults of all features of a forward, drawn at once.

A GPU waits for Python where each of a hundred features draws by operations of its own. A training step, or the score of
a candidate, begins with a forward without faults, which shows what tensors the next one will meet: these are laid end
to end and drawn for, each operation asked for once. The numbers are hashes of the draw, the tensor and a count
(SplitMix64, Steele et al. 2014), so that what hits a tensor does not depend on what else is drawn for: candidates that
share a layer meet the same faults there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftnas import devices
from ftnas.faults.base import Fault, Plan, Site, Uniform
from ftnas.faults.drawing import Drawing, Key, Placed
from ftnas.faults.place import feature_site
from ftnas.faults.record import Tally
from ftnas.faults.sampling import walk_length
from ftnas.faults.stored import SharedWeights
from ftnas.quantize import FixedPoint
from ftnas.rng import seed_for

MOST = 1 << 23
"""Most entries that are drawn at once, of some 100 bytes each while they are; a tensor of more draws for itself."""
_LARGEST = 1 << 29
"""Largest population: the walks of `MOST` entries, added up, must be integers that float64 holds."""
_GOLDEN, _FIRST, _SECOND = (word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class _Tensor:
    """What is drawn for one tensor, and the same on its device.

    Attributes:
        key: Fault model, layer and call.
        site: The tensor.
        uniform: How it is hit.
        length: Entries of its plan.
        integers: Its number in the hash, ``length``, the place of its layer, the values of a sample, and twice the
            population; int64 [5].
        reals: 1 / log(1 - rate), the population, and the number of codes; float64 [3].
    """

    key: Key
    site: Site
    uniform: Uniform
    length: int
    integers: Tensor
    reals: Tensor


@dataclass(frozen=True)
class _Drawn:
    """What was drawn at once; hits of each tensor, and the places of their layers, int64 [number of tensors]."""

    placed: Placed
    tensors: Sequence[_Tensor]
    hits: Tensor
    places: Tensor


class Ahead:
    """Draws for the features of a forward before it runs, where another has just shown them and nothing can be read.

    That is for soft faults drawn on a device, of models that hit a whole tensor uniformly; all others draw when a
    tensor is met.

    Args:
        drawing: Of the faults of feature points.
        tally: Counts them.
        layers: Of the model, by name.
        form: Of the features.

    Attributes:
        paired: In a forward on pairs of rows, the plans that were drawn as those of [B, 2, N].
    """

    def __init__(self, drawing: Drawing, tally: Tally, layers: dict[str, nn.Module], form: FixedPoint | None) -> None:
        self._drawing, self._tally, self._layers, self._form = drawing, tally, layers, form
        self._places = {name: place for place, name in enumerate(layers)}
        self._placed = [p for p in drawing.placed if drawing.draws_freely(p) and _holds(type(p.fault))]
        self._known: dict[Any, list[_Tensor]] = {}
        self._halves: dict[Any, tuple[list[_Tensor], bool]] = {}
        self._expected: dict[tuple[str, int], list[_Tensor]] = {}
        self._drawn: list[_Drawn] = []
        self.paired: dict[Key, Plan] = {}

    def note(self, layer: str, index: int, feature: Tensor, shared: SharedWeights) -> None:
        """Take note of a feature that a forward without faults has made."""
        if not self._placed or devices.is_readable(feature.device):
            return
        key = layer, index, feature.shape, feature.device, feature.dtype
        if key not in self._known:
            self._known[key] = list(self._tensors(layer, index, feature))
        shared.met += self._known[key]

    def begin(self, draw: int | None, shared: SharedWeights) -> None:
        """Draw for what was met, into ``Drawing.ready``; without a draw, forget it."""
        if draw is None:
            shared.met = []
            return
        for placed in self._placed:
            mine = [tensor for tensor in shared.met if tensor.key[0] == placed.number]
            for group in _groups(mine):
                self._draw(placed, group, draw)

    def expect(self, layers: Iterable[str], rows: int, draw: int) -> None:
        """Draw for the first calls of layers in a forward on pairs of rows, as far as an earlier one has shown them.

        Args:
            layers: What will run.
            rows: Number of pairs.
            draw: Number of the draw.
        """
        known = [tensor for layer in dict.fromkeys(layers) for tensor in self._expected.get((layer, rows), ())]
        for placed in self._placed:
            for group in _groups(tensor for tensor in known if tensor.key[0] == placed.number):
                self._draw(placed, group, draw, halves=True)

    def meet(self, layer: str, index: int, feature: Tensor, draw: int) -> Site | None:
        """Draw for the second half of a feature [2 B, ...] of pairs of rows, where that is not done yet.

        Returns:
            That half as a tensor of its own, for whose plans `paired` has those of the whole; None where faults draw
            for themselves too.
        """
        if not self._placed or devices.is_readable(feature.device):
            return None
        key = layer, index, feature.shape, feature.device, feature.dtype
        if key not in self._halves:
            tensors = list(self._tensors(layer, index, feature[1::2]))
            alone = len(tensors) == sum(layer in placed.layers for placed in self._drawing.placed)
            self._halves[key] = tensors, alone
            if index == 0 and alone:
                self._expected[layer, len(feature) // 2] = tensors
        tensors, alone = self._halves[key]
        for tensor in tensors:
            ready = self._drawing.ready.get(tensor.key)
            if ready is None or ready.shape != tensor.site.shape:
                placed = next(placed for placed in self._placed if placed.number == tensor.key[0])
                self._draw(placed, [tensor], draw, halves=alone)
        return tensors[0].site if alone and tensors else None

    def end(self) -> None:
        """Count what has hit in the forward that ends; tensors that it did not come to are not hit."""
        drawing, drawn = self._drawing, self._drawn
        used = {key: drawing.ready[key].shape for key in drawing.used}
        drawing.ready, drawing.used, self._drawn, self.paired = {}, set(), [], {}
        for entry in drawn:
            numbers = [number for number, each in enumerate(entry.tensors) if used.get(each.key) == each.site.shape]
            hits, places = entry.hits, entry.places
            if 0 < len(numbers) < len(entry.tensors):
                hits, places = (torch.stack([every[number] for number in numbers]) for every in (hits, places))
            if numbers:
                tensors = [entry.tensors[number] for number in numbers]
                what = [(tensor.key[1], tensor.uniform.population, tensor.uniform.rate) for tensor in tensors]
                self._tally.add_each(entry.placed.number, what, hits, places, self._layers)

    def _tensors(self, layer: str, index: int, feature: Tensor) -> Iterator[_Tensor]:
        """Give what is drawn for a feature, by fault model."""
        site = feature_site(layer, self._layers[layer], feature, self._form)
        for placed in self._placed:
            if layer not in placed.layers:
                continue
            uniform = placed.fault.uniform(site)
            if uniform is None or not 0.0 < uniform.rate <= 1.0 or not 0 < uniform.population < _LARGEST:
                continue
            length = walk_length(uniform.population, uniform.rate)
            inverse = 0.0 if uniform.rate == 1.0 else 1.0 / math.log1p(-uniform.rate)
            if length > MOST or math.isinf(inverse):
                continue
            key = (placed.number, layer, index)
            own = seed_for(0, "ahead", placed.fault.name, *key)
            sample = site.num_values // max(1, site.shape[0])
            integers = (own, length, self._places[layer], sample, 2 * uniform.population)
            reals = (inverse, uniform.population, uniform.num_codes)
            kept = [_filled(integers, torch.int64, feature.device), _filled(reals, torch.float64, feature.device)]
            yield _Tensor(key, site, uniform, length, *kept)

    def _draw(self, placed: Placed, tensors: Sequence[_Tensor], draw: int, *, halves: bool = False) -> None:
        """Draw the plans of some tensors: `Drawing.ready` of each, and of ``halves`` what is `paired`."""
        lengths = [tensor.length for tensor in tensors]
        integers = torch.stack([tensor.integers for tensor in tensors])
        reals = torch.stack([tensor.reals for tensor in tensors])
        seed = self._drawing.seed_of(placed, draw, integers.device)
        sites, codes, at, hits = walks(integers[:, 0] ^ seed, integers[:, 1], reals, sum(lengths))
        parts = (of_all.split(lengths) for of_all in (sites, codes, at))
        for tensor, its_sites, its_codes, its_at in zip(tensors, *parts, strict=True):
            population, rate, _ = tensor.uniform
            plan = Plan(its_sites, its_codes, population, rate, tensor.site.shape, at=its_at)
            self._drawing.ready[tensor.key] = plan
        if halves:
            self._pair(tensors, lengths, integers, sites, at)
        self._drawn.append(_Drawn(placed, tensors, hits, integers[:, 2]))

    def _pair(
        self, tensors: Sequence[_Tensor], lengths: Sequence[int], integers: Tensor, sites: Tensor, at: Tensor
    ) -> None:
        """Make the plans of second halves, [B, N], into those of pairs of rows, [B, 2, N]: `paired` of each."""
        repeats, total = integers[:, 1], sum(lengths)
        sample, both = (column.repeat_interleave(repeats, output_size=total) for column in integers[:, 3:].unbind(1))
        sites, at = (place + (place.div(sample, rounding_mode="floor") + 1) * sample for place in (sites, at))
        parts = torch.minimum(sites, both).split(lengths), at.split(lengths)  # padding comes after the last value
        for tensor, its_sites, its_at in zip(tensors, *parts, strict=True):
            plan, rows = self._drawing.ready[tensor.key], tensor.site.shape[0]
            shape = (rows, 2, plan.num_values // max(1, rows))
            self.paired[tensor.key] = Plan(its_sites, plan.codes, 2 * plan.population, plan.rate, shape, at=its_at)


def walks(starts: Tensor, lengths: Tensor, reals: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw which units of some tensors are hit, each independently at one rate of its tensor, and by which codes.

    As in `bernoulli_sites` the gaps between hits are drawn: floor(E / -log(1 - rate)) units are passed over before each
    hit, E a standard exponential.

    Args:
        starts: Where the sequence of each tensor starts, int64 [T].
        lengths: Its number of entries, int64 [T]; more than its hits but for a chance under 1e-12.
        reals: As in `_Tensor`, float64 [T, 3].
        total: The sum of ``lengths``, K.

    Returns:
        Units that are hit, ascending, then the population; their codes, where padding the one after the last; the units
        once more, 0 where padding: int64 [K]; and the number of hits of each tensor, int64 [T].
    """
    ends = lengths.cumsum(0)
    firsts = ends - lengths
    number = torch.arange(total, device=starts.device)
    owner = torch.searchsorted(ends, number, right=True)
    number -= firsts.index_select(0, owner)
    state = number.mul_(2).mul_(_GOLDEN).add_(starts.index_select(0, owner))
    inverse, population, codes = reals.index_select(0, owner).unbind(1)
    # minus a number in [0, 1) of 53 bits, of which log1p makes minus an exponential
    passed = unit_(mix_(state.clone())).neg_().log1p_().mul_(inverse).floor_()
    gaps = torch.minimum(passed, population).add_(1.0)
    reached = gaps.cumsum(0)
    before = reached.index_select(0, firsts).sub_(gaps.index_select(0, firsts)).add_(1.0)
    sites = torch.minimum(reached.sub_(before.index_select(0, owner)), population)
    valid = sites < population
    code = unit_(mix_(state.add_(_GOLDEN))).mul_(codes).floor_()
    code = torch.where(valid, code, codes).to(torch.int64)
    sites = sites.to(torch.int64)
    hits = valid.cumsum(0).index_select(0, ends - 1)
    hits[1:] -= hits[:-1].clone()
    return sites, code, sites * valid, hits


def mix_(words: Tensor) -> Tensor:
    """Hash words in place, int64 of any shape: the output function of SplitMix64 (products wrap around)."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def unit_(words: Tensor) -> Tensor:
    """Return the upper 53 bits of words as numbers in [0, 1), float64."""
    return _shifted(words, 11).to(torch.float64).mul_(2.0**-53)


def _shifted(words: Tensor, shift: int) -> Tensor:
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # without the sign, which is shifted in


def _holds(fault: type[Fault]) -> bool:
    """Tell whether what a class says by ``uniform`` is about its way to draw and apply, and not about a parent's."""
    owners = [next(owner for owner in fault.__mro__ if name in vars(owner)) for name in ("uniform", "sample", "apply_")]
    return all(issubclass(owners[0], owner) for owner in owners)


def _filled(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device; filled and not copied, so that nothing waits for it."""
    with torch.inference_mode(False):
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def _groups(tensors: Iterable[_Tensor]) -> Iterator[list[_Tensor]]:
    """Give tensors in groups of at most `MOST` entries."""
    group: list[_Tensor] = []
    entries = 0
    for tensor in tensors:
        if entries + tensor.length > MOST:
            yield group
            group, entries = [], 0
        group.append(tensor)
        entries += tensor.length
    if group:
        yield group
