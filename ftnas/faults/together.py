"""The weights of a whole forward at once: rounded, drawn for and hit by few operations, whatever the layers.

A GPU waits for Python where each of a hundred small weights is rounded and hit by thirty operations of its own. Here
they are laid end to end, and each operation is asked for once. The values are those of the weights one by one, bit for
bit; the faults have the same distribution, from one stream for all layers. A training step takes the weights that it
will read. Scoring takes all that the model has, once for all candidates: a draw then says for every layer what hits
it, so that candidates that share a layer meet the same faults there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ftnas import devices
from ftnas.faults.base import Plan, Site
from ftnas.faults.bounds import WEIGHT, bound_of
from ftnas.faults.drawing import Drawing
from ftnas.faults.memory import mark, storage
from ftnas.faults.place import weight_site
from ftnas.faults.record import Tally
from ftnas.faults.select import LAYER_TYPES
from ftnas.faults.stored import SharedWeights, StoredWeight
from ftnas.quantize import FixedPoint, FloatFormat, Rounded, let_pass

TOGETHER = ""
"""In place of the name of a layer, in the stream of faults of all layers."""
VECTOR = 16
"""Bytes that a GPU reads at once: for a kernel that begins between two of them cuDNN has none but slow convolutions."""


@dataclass(frozen=True)
class Row:
    """Weights laid end to end, each in the order of its memory.

    Attributes:
        names: Their layers.
        weights: float32, dense.
        sizes: Their numbers of values; N in all.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the shapes of the weights as one, [N]."""
        return torch.cat([_flat(tensor, weight) for tensor, weight in zip(tensors, self.weights, strict=True)])

    def split(self, values: Tensor) -> list[Tensor]:
        """Return views of [N] values in the shapes and memory formats of the weights."""
        parts = zip(values.split(self.sizes), self.weights, strict=True)
        return [part.as_strided(weight.shape, weight.stride()) for part, weight in parts]

    def read(self, values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return [N] values of some of the layers, in the shapes and memory formats of their weights.

        They are views of the values where each begins at a multiple of `VECTOR` bytes, else of a copy in which it does.
        """
        first, lanes = int(values.storage_offset()), VECTOR // values.element_size()
        begins = [first + self.places[name][0] for name in names]
        found = self._views(values, names, begins)
        if not any(begin % lanes for begin in begins):
            return found
        rooms = [-(-part.numel() // lanes) * lanes for part in found.values()]
        copies = self._views(values.new_empty(sum(rooms)), names, itertools.accumulate(rooms, initial=0))
        torch._foreach_copy_(list(copies.values()), list(found.values()))
        return copies

    def read_both(self, first: Tensor, second: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return two times [N] values of some layers, as weights of twice the output channels: first, then second.

        All weights are contiguous. Each result begins at a multiple of `VECTOR` bytes.
        """
        lanes = VECTOR // first.element_size()
        sizes = [self.places[name][1].numel() for name in names]
        rooms = [-(-2 * size // lanes) * lanes for size in sizes]
        memory = first.new_empty(sum(rooms))
        begins = list(itertools.accumulate(rooms, initial=0))
        seconds = [begin + size for begin, size in zip(begins, sizes, strict=False)]
        starts = [int(first.storage_offset()) + self.places[name][0] for name in names]
        parts = [self._views(memory, names, at) for at in (begins, seconds)]
        given = [self._views(values, names, starts) for values in (first, second)]
        torch._foreach_copy_([*parts[0].values(), *parts[1].values()], [*given[0].values(), *given[1].values()])
        pairs = zip(parts[0].items(), begins, sizes, strict=False)
        return {name: memory[at : at + 2 * size].view(-1, *part.shape[1:]) for (name, part), at, size in pairs}

    def _views(self, values: Tensor, names: Sequence[str], begins: Iterable[int]) -> dict[str, Tensor]:
        weights = [self.places[name][1] for name in names]
        pairs = zip(weights, begins, strict=False)
        views = [values.as_strided(weight.shape, weight.stride(), begin) for weight, begin in pairs]
        return dict(zip(names, views, strict=True))

    @cached_property
    def places(self) -> dict[str, tuple[int, Tensor]]:
        """Where each layer's values begin, and its weight."""
        starts = itertools.accumulate(self.sizes, initial=0)
        return {name: (start, w) for name, start, w in zip(self.names, starts, self.weights, strict=False)}

    def spread(self, one_each: Tensor) -> Tensor:
        """Return [N] values, for each weight its own of those in [number of weights]."""
        return torch.cat([one.expand(size) for one, size in zip(one_each.unbind(), self.sizes, strict=True)])

    def split_plan(self, names: Sequence[str], plan: Plan) -> dict[str, Plan]:
        """Return the plans of some layers from that of the row, by name; waits for the device."""
        plan = plan.compact()
        part, value = plan.sites // plan.num_values, plan.sites % plan.num_values
        found = {}
        for name in names:
            first, weight = self.places[name]
            size = weight.numel()
            chosen = (first <= value) & (value < first + size)
            # what lies at each place of the memory: the row-major number of the value
            numbers = torch.empty_like(weight, dtype=torch.int64)
            numbers.copy_(torch.arange(size, device=weight.device).view(weight.shape))
            sites, order = (part * size + storage(numbers)[(value - first).clamp(0, size - 1)])[chosen].sort()
            population = plan.population // plan.num_values * size
            found[name] = Plan(sites, plan.codes[chosen][order], population, plan.rate, tuple(weight.shape))
        return found


class Together:
    """Reads the weights of a forward together, where that is worth it and gives the same.

    That is where values cannot be read without waiting, for weights of dynamic fixed point without bounds, under at
    most one kind of soft faults, drawn on the device, that takes every value of a layer alike. All others are read one
    by one.

    Args:
        layers: Of the model, by name.
        form: Of the weights.
        drawing: Of the faults of weights.
        tally: Counts them.
        mask_gradients: Whether no gradient passes where a fault is.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        form: FixedPoint | FloatFormat | None,
        drawing: Drawing,
        tally: Tally,
        mask_gradients: bool,
    ) -> None:
        self._layers, self._drawing, self._tally, self._mask = layers, drawing, tally, mask_gradients
        self._form = form if isinstance(form, FixedPoint) and form.range is None and drawing.draws_rows else None
        self._weights: dict[str, nn.Parameter] | None = None
        self._whole: Row | None = None
        self._numbers: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}
        self._spans: tuple[Any, Tensor, Tensor] | None = None  # stays when weights are forgotten: a graph may read it
        self.ready: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Forget the weights: they may be others when the injection is entered again."""
        self._weights = self._whole = None

    def begin(self, names: Sequence[str], draw: int | None, shared: SharedWeights, *, both: bool = False) -> None:
        """Make ``ready`` what the layers of a forward that begins will read.

        Args:
            names: The layers that will run.
            draw: Number of the draw; None without faults.
            shared: What the forwards of the step share.
            both: Whether layers that faults can hit read their weights twice, along the output channels: without
                faults, then with them.
        """
        if self._form is None:
            return
        with torch._C.DisableTorchFunction():  # our own arithmetic is no business of any function mode
            self._begin(names, draw, shared, self._form, both)

    def _begin(
        self, names: Sequence[str], draw: int | None, shared: SharedWeights, form: FixedPoint, both: bool
    ) -> None:
        if self._weights is None:
            self._weights = self._eligible()
        running = [name for name in dict.fromkeys(names) if name in self._weights]
        if len(running) < 2:
            return
        both = both and bool(self._drawing.placed)
        if both and not all(self._weights[name].is_contiguous() for name in running):
            raise ValueError("a forward on pairs of rows reads contiguous weights alone; leave channels_last out")
        learns = torch.is_grad_enabled()
        row = _row({name: self._weights[name] for name in running}) if learns else self._all(self._weights)
        key = row.names, torch.is_inference_mode_enabled()
        if shared.row is None or shared.row[0] != key:
            shared.row, shared.hit = (key, self._round(row, form)), None
        rounded, blocked = shared.row[1], None
        values = rounded.values
        if draw is not None and self._drawing.placed:
            if learns or shared.hit is None or shared.hit[0] != draw:
                shared.hit, shared.counted = (draw, *self._hit(row, form, rounded, draw)), set()
            _, values, plan = shared.hit
            self._drawing.keep_row(draw, lambda: row.split_plan(running, plan))
            fresh = [name for name in running if name not in shared.counted]
            if fresh:
                self._count(row, fresh, plan, form)
            shared.counted.update(fresh)
            blocked = mark(values, plan.values_hit(), None) if self._mask and learns else None
        learns = learns and any(weight.requires_grad for weight in row.weights)
        if both and learns:
            pairs = _ReadBoth.apply(row, rounded.values, values, rounded.inside, *row.weights)
            self.ready = dict(zip(row.names, cast(Sequence[Tensor], pairs), strict=True))
        elif both:
            self.ready = row.read_both(rounded.values, values, running)
        elif learns:
            values = values.to(self._dtype(row, values.device))
            read = cast(Sequence[Tensor], _Read.apply(row, values, rounded.inside, blocked, *row.weights))
            self.ready = dict(zip(row.names, read, strict=True))
        else:
            self.ready = row.read(values, running)

    def _dtype(self, row: Row, device: torch.device) -> torch.dtype:
        """Return how layers will read their weights: under autocast in its dtype, made at once and not for each."""
        narrow = _is_autocast(device) and all(is_usual(self._layers[name]) for name in row.names)
        return torch.get_autocast_dtype(device.type) if narrow else torch.float32

    def _all(self, weights: dict[str, nn.Parameter]) -> Row:
        if self._whole is None:
            self._whole = _row(weights)
        return self._whole

    def _eligible(self) -> dict[str, nn.Parameter]:
        """Return the weights that are read together, by layer: where nothing but this injection comes before them."""
        hit = self._drawing.placed[0].layers if self._drawing.placed else self._layers.keys()
        found: dict[str, nn.Parameter] = {}
        for name, module in self._layers.items():
            chain: Any = module.parametrizations["weight"]  # type: ignore[index]
            weight = getattr(chain, "original", None)  # weight_norm has two
            if (
                name in hit
                and len(chain) == 1
                and isinstance(chain[0], StoredWeight)
                and isinstance(weight, nn.Parameter)
                and weight.dtype == torch.float32
                and weight.numel() > 0
                and not devices.is_readable(weight.device)
                and torch.ops.aten.is_non_overlapping_and_dense(weight)
                and bound_of(module, WEIGHT) is None
                and weight.device == next(iter(found.values()), weight).device
            ):
                found[name] = weight
        if found:
            device = next(iter(found.values())).device
            if not self._numbers or next(iter(self._numbers.values())).device != device:
                numbers = torch.arange(len(self._layers), device=device)
                self._numbers = dict(zip(self._layers, numbers.unbind(), strict=True))
                self._sizes = {}
            for name in found.keys() - self._sizes.keys():  # filled, not copied: nothing waits for the device
                self._sizes[name] = torch.full((), found[name].numel(), device=device)
        return found

    def _round(self, row: Row, form: FixedPoint) -> Rounded:
        """Round each weight to its own grid: values, mask and steps [N]."""
        weights = [weight.detach() for weight in row.weights]
        lsb = row.spread(form.step(_largest(weights)))
        grid = form.grid_of(lsb)
        integers = torch.div(row.join(weights), lsb).round_()
        clamped = integers.clamp(grid.lo, grid.hi)
        values = clamped * lsb
        if any(placed.fault.needs_largest for placed in self._drawing.placed):
            grid = replace(grid, largest=row.spread(_largest(row.split(values))))
        return Rounded(values, clamped == integers, grid)

    def _hit(self, row: Row, form: FixedPoint, rounded: Rounded, draw: int) -> tuple[Tensor, Plan]:
        """Return a faulty copy of the values [N], and its plan."""
        out = rounded.values.clone()
        placed, plan = self._drawing.row(Site(TOGETHER, tuple(out.shape), macs=0, bits=form.bits), draw, out.device)
        placed.fault.apply_(out, plan, rounded.grid)
        return out, plan

    def _count(self, row: Row, names: Sequence[str], plan: Plan, form: FixedPoint) -> None:
        """Count what hits some layers of a row, of its plan."""
        (placed,) = self._drawing.placed
        for name in names:
            key = (placed.number, name, 0)
            if key not in self._drawing.sites:
                self._drawing.sites[key] = weight_site(name, self._layers[name], row.places[name][1], form)
        sizes = [row.places[name][1].numel() for name in names]
        spans, of_row = self._spans_of(row)
        places = of_row if len(names) == len(row.names) else self._places(names)
        self._tally.add_row(placed.number, names, sizes, plan, spans, (of_row, places), self._layers)

    def _spans_of(self, row: Row) -> tuple[Tensor, Tensor]:
        """Return where each layer's values begin and end, and its place among the model's layers, as `Tally` has it."""
        key = row.names, row.sizes, row.weights[0].device
        if self._spans is None or self._spans[0] != key:
            sizes = torch.stack([self._sizes[name] for name in row.names])
            ends = sizes.cumsum(0)
            self._spans = key, torch.stack([ends - sizes, ends]), self._places(row.names)
        return self._spans[1:]

    def _places(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self._numbers[name] for name in names])


def _row(weights: dict[str, nn.Parameter]) -> Row:
    return Row(tuple(weights), tuple(weights.values()), tuple(weight.numel() for weight in weights.values()))


class _Read(torch.autograd.Function):
    """What a row of weights is read as: the gradient of each is that of what was read, in float32, where not masked."""

    @staticmethod
    def forward(
        ctx: Any, row: Row, values: Tensor, inside: Tensor | None, blocked: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.row, ctx.dtype = row, values.dtype
        ctx.save_for_backward(inside, blocked)
        ctx.set_materialize_grads(False)
        return tuple(row.read(values.detach(), row.names).values())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inside, blocked = ctx.saved_tensors
        row: Row = ctx.row
        pairs = zip(gradients, row.weights, strict=True)
        given = [torch.zeros_like(w, dtype=ctx.dtype) if g is None else g for g, w in pairs]
        gradient = let_pass(row.join(given).float(), inside)
        if blocked is not None:
            gradient = torch.where(blocked, 0.0, gradient)
        parts = row.split(gradient)
        return None, None, None, None, *(None if g is None else part for g, part in zip(gradients, parts, strict=True))


class _ReadBoth(torch.autograd.Function):
    """As `_Read`, of weights that are read without faults and with them: their gradients are added up."""

    @staticmethod
    def forward(
        ctx: Any, row: Row, clean: Tensor, faulty: Tensor, inside: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.row = row
        ctx.save_for_backward(inside)
        ctx.set_materialize_grads(False)
        return tuple(row.read_both(clean.detach(), faulty.detach(), row.names).values())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        row: Row = ctx.row
        pairs = zip(gradients, row.weights, strict=True)
        given = [w.new_zeros(2 * w.shape[0], *w.shape[1:]) if g is None else g for g, w in pairs]
        firsts, seconds = zip(*(g.chunk(2) for g in given), strict=True)
        parts = row.split(let_pass(row.join(torch._foreach_add(firsts, seconds)), inside))
        return None, None, None, None, *(None if g is None else part for g, part in zip(gradients, parts, strict=True))


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor, [number of tensors]; NaN where one holds a NaN."""
    return torch.stack(torch._foreach_norm(list(tensors), float("inf")))


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the values of a tensor in the order in which another of its shape lies in memory, [N]."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor.view(-1)
    laid = tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return storage(laid)


def _is_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_usual(layer: nn.Module) -> bool:
    """Tell whether a layer does with its weight what PyTorch's own do, which autocast knows."""
    kind = type(layer)
    own = any(kind.forward is of_torch.forward for of_torch in LAYER_TYPES)
    own = own and getattr(kind, "_conv_forward", nn.Conv2d._conv_forward) is nn.Conv2d._conv_forward
    return own and not {"forward", "_conv_forward"} & layer.__dict__.keys()
