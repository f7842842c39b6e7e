"""The weights of a whole training step at once: rounded, drawn for and hit by few operations, whatever the layers.

A GPU waits for Python where each of a hundred small weights is rounded and hit by thirty operations of its own. Here
the weights that a forward will read are laid end to end, and each operation is asked for once. The values are those of
the weights one by one, bit for bit; the faults have the same distribution, from one stream for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ftnas.faults.stored import SharedWeights, StoredWeight
from ftnas.quantize import FixedPoint, FloatFormat, Grid, Rounded

TOGETHER = ""
"""In place of the name of a layer, in the stream of faults of all layers."""


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

    def spread(self, one_each: Tensor) -> Tensor:
        """Return [N] values, for each weight its own of those in [number of weights]."""
        return torch.cat([one.expand(size) for one, size in zip(one_each.unbind(), self.sizes, strict=True)])

    def split_plan(self, plan: Plan) -> dict[str, Plan]:
        """Return the plan of each layer from that of the row, by name; waits for the device."""
        plan = plan.compact()
        part, value = plan.sites // plan.num_values, plan.sites % plan.num_values
        found, first = {}, 0
        for name, weight, size in zip(self.names, self.weights, self.sizes, strict=True):
            chosen = (first <= value) & (value < first + size)
            # what lies at each place of the memory: the row-major number of the value
            numbers = torch.empty_like(weight, dtype=torch.int64)
            numbers.copy_(torch.arange(size, device=weight.device).view(weight.shape))
            sites, order = (part * size + storage(numbers)[(value - first).clamp(0, size - 1)])[chosen].sort()
            population = plan.population // plan.num_values * size
            found[name] = Plan(sites, plan.codes[chosen][order], population, plan.rate, tuple(weight.shape))
            first += size
        return found


class Together:
    """Reads the weights of a training step together, where that is worth it and gives the same.

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
        self._numbers: tuple[Tensor, ...] = ()
        self._of: tuple[tuple[str, ...], Tensor] | None = None
        self.ready: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Forget the weights: they may be others when the injection is entered again."""
        self._weights = self._of = None

    def begin(self, names: Sequence[str], draw: int | None, shared: SharedWeights) -> None:
        """Make ``ready`` what the layers of a forward that begins will read.

        Args:
            names: The layers that will run.
            draw: Number of the draw; None without faults.
            shared: What the forwards of the step share.
        """
        if self._form is None:
            return
        with torch._C.DisableTorchFunction():  # our own arithmetic is no business of any function mode
            self._begin(names, draw, shared, self._form)

    def _begin(self, names: Sequence[str], draw: int | None, shared: SharedWeights, form: FixedPoint) -> None:
        if self._weights is None:
            self._weights = self._eligible()
        weights = {name: self._weights[name] for name in dict.fromkeys(names) if name in self._weights}
        if len(weights) < 2:
            return
        row = Row(tuple(weights), tuple(weights.values()), tuple(weight.numel() for weight in weights.values()))
        if shared.row is None or shared.row[0] != row.names:
            shared.row = row.names, self._round(row, form)
        rounded, blocked = shared.row[1], None
        values = rounded.values
        if draw is not None and self._drawing.placed:
            values, blocked = self._hit(row, form, rounded, draw)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in row.weights):
            read = _Read.apply(row, values, rounded.inside, blocked, *row.weights)
        else:
            read = row.split(values)
        self.ready = dict(zip(row.names, cast(Sequence[Tensor], read), strict=True))

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
            self._numbers = torch.arange(len(self._layers), device=next(iter(found.values())).device).unbind()
        return found

    def _round(self, row: Row, form: FixedPoint) -> Rounded:
        """Round each weight to its own grid: values, mask and steps [N]."""
        weights = [weight.detach() for weight in row.weights]
        lsb = row.spread(form.step(_largest(weights)))
        grid = form.grid_of(lsb)
        integers = torch.div(row.join(weights), lsb).round_()
        clamped = integers.clamp(grid.lo, grid.hi)
        return Rounded(clamped * lsb, clamped == integers, grid)

    def _hit(self, row: Row, form: FixedPoint, rounded: Rounded, draw: int) -> tuple[Tensor, Tensor | None]:
        """Return a faulty copy of the values, and where no gradient passes, [N] each."""
        out = rounded.values.clone()
        site = Site(TOGETHER, tuple(out.shape), macs=0, bits=form.bits)
        placed, plan = self._drawing.row(site, draw, out.device, row.split_plan)
        grid = rounded.grid
        if placed.fault.needs_largest:
            grid = Grid(grid.lsb, grid.bits, grid.lo, grid.hi, row.spread(_largest(row.split(rounded.values))))
        placed.fault.apply_(out, plan, grid)
        for name, weight in zip(row.names, row.weights, strict=True):
            key = (placed.number, name, 0)
            if key not in self._drawing.sites:
                self._drawing.sites[key] = weight_site(name, self._layers[name], weight, form)
        self._tally.add_row(placed.number, row.names, row.sizes, plan, self._numbers_of(row), self._layers)
        return out, mark(out, plan.values_hit(), None) if self._mask else None

    def _numbers_of(self, row: Row) -> Tensor:
        """Return the number of the layer of each value, int64 [N]: its place among the model's layers."""
        if self._of is None or self._of[0] != row.names:
            places = dict(zip(self._layers, self._numbers, strict=True))
            self._of = row.names, row.spread(torch.stack([places[name] for name in row.names]))
        return self._of[1]


class _Read(torch.autograd.Function):
    """What a row of weights is read as: the gradient of each is that of what was read, where not masked."""

    @staticmethod
    def forward(
        ctx: Any, row: Row, values: Tensor, inside: Tensor | None, blocked: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.row = row
        ctx.save_for_backward(inside, blocked)
        ctx.set_materialize_grads(False)
        return tuple(row.split(values.detach()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inside, blocked = ctx.saved_tensors
        row: Row = ctx.row
        given = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, row.weights, strict=True)]
        gradient = torch.where(inside, row.join(given), 0.0)
        if blocked is not None:
            gradient = torch.where(blocked, 0.0, gradient)
        parts = row.split(gradient)
        return None, None, None, None, *(None if g is None else part for g, part in zip(gradients, parts, strict=True))


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor, [number of tensors]; NaN where one holds a NaN."""
    return torch.stack(torch._foreach_norm(list(tensors), float("inf")))


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the values of a tensor in the order in which another of its shape lies in memory, [N]."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor.view(-1)
    return storage(tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor))
