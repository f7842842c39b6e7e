"""The clean and the faulty forward of a step as one forward, on pairs of rows.

A GPU waits for Python, which asks for every operation of a search twice: once for the clean forward, once for the
faulty one. Here each image is given twice, the even rows of a batch are computed without faults and the odd ones under
them, and every layer is asked for once. In memory such a map [2 B, C, H, W] is [B, 2 C, H, W] too, the channels of both
halves side by side: so BatchNorms normalise each half by its own statistics, features are rounded by a step of each,
and layers whose weights are hit are convolutions of twice as many groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftnas.dataflow import Call
from ftnas.faults.ahead import Ahead
from ftnas.faults.bounds import FEATURE, WEIGHT, bound_of
from ftnas.faults.drawing import Drawings
from ftnas.faults.hits import Hits
from ftnas.faults.place import feature_site
from ftnas.faults.stored import Ready, SharedWeights
from ftnas.faults.together import is_usual
from ftnas.quantize import FixedPoint, Grid

HALVES = 2


def paired(images: Tensor) -> Tensor:
    """Return images [B, ...], each twice in a row, [2 B, ...]: one for the clean half, one for the faulty."""
    return images.repeat_interleave(HALVES, dim=0)


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to the clean and to the faulty half of [2 B, ...], [B, ...] each."""
    return rows[0::HALVES], rows[1::HALVES]


class Host(Protocol):
    """The injection, as far as it is of use here."""

    finding: bool
    drawings: Drawings

    @property
    def entered(self) -> bool:
        """Whether the model is within the block."""

    @property
    def together(self) -> Ready:
        """What is read for weights in the forward that runs, where that is known already."""

    def paused(self) -> AbstractContextManager[None]:
        """Run the body without faults."""


class Joint:
    """Runs forwards on pairs of rows, in an injection.

    Args:
        host: The injection.
        model: Its model.
        layers: The layers of that, by name.
        ahead: Draws for feature points, where nothing can be read.
        form: Of the features.
        hits: Applies faults.
        besides: What else the injection does, by name.

    Attributes:
        on: Whether forwards run so now.
    """

    def __init__(
        self,
        host: Host,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        ahead: Ahead,
        form: FixedPoint | None,
        hits: Hits,
        besides: Mapping[str, object],
    ) -> None:
        self._host, self._model, self._layers, self._form, self._besides = host, model, layers, form, besides
        self._ahead, self._hits = ahead, hits
        self.on = self._reads = False
        self._draw = self._rows = 0
        self._waiting: Sequence[str] = ()
        self._undo: list[Callable[[], None]] = []

    def obstacle(self) -> str | None:
        """Return why clean and faulty forward cannot be one, in a few words; None where they can."""
        if self._undo:  # they are already
            return None
        weights, features, buffers = self._host.drawings
        if buffers or not (weights or features):
            return "faults must hit weights or feature points"
        if self._form is None or self._form.range is not None:
            return "features must be of dynamic fixed point"
        beside = next((name for name, given in self._besides.items() if given), None)
        beside = "replayed plans" if weights.given is not None else beside
        if beside is not None:
            return f"it does not know {beside}"
        for name, layer in self._layers.items():
            if any(bound_of(layer, kind) is not None for kind in (FEATURE, WEIGHT)):
                return "it does not know bounds"
            if weights.hits(name) and not (is_usual(layer) and getattr(layer, "padding_mode", "zeros") == "zeros"):
                return f"{name!r} must be a Conv2d, padded with zeros, or a Linear as PyTorch has them"
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and not _is_by_batch(module):
                return f"{name!r} must be a BatchNorm2d that normalises by its batch alone"
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run forwards on pairs of rows in the body, all within ``weights_shared()``.

        Raises:
            ValueError: One line: the `obstacle`; or the model is not within the block of its injection.
        """
        if not self._host.entered:
            raise ValueError("forwards on pairs of rows run within the block of the injection alone")
        if not self._undo:
            obstacle = self.obstacle()
            if obstacle is not None:
                raise ValueError(f"clean and faulty forward cannot be one: {obstacle}")
            for name, module in self._model.named_modules():
                if isinstance(module, nn.BatchNorm2d):
                    self._replace(module, partial(self._normalise, name, module))
            for name, layer in self._layers.items():
                if not self._host.drawings.weights.hits(name):
                    continue
                if isinstance(layer, nn.Conv2d):
                    self._replace(layer, partial(self._convolve, name, layer))
                elif isinstance(layer, nn.Linear):
                    self._replace(layer, partial(self._map, name, layer))
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before

    def detach(self) -> None:
        """Take away from the model what `running` has put there."""
        while self._undo:
            self._undo.pop()()

    def begin(
        self, layers: Sequence[str], draw: int | None, shared: SharedWeights | None, given: Sequence[object]
    ) -> None:
        """Begin a forward: on pairs of rows, or after one without faults that has shown its features.

        Args:
            layers: What it will run, as far as that is known.
            draw: Number of the draw; None without faults.
            shared: What it shares with others; None where that is nothing.
            given: Its arguments.

        Raises:
            ValueError: Faults are paused, though half of the rows would be faulty; the weights are not shared; or there
                are no pairs of rows.
        """
        if not self.on:
            if shared is not None:
                self._ahead.begin(draw, shared)
            return
        if draw is None:
            raise ValueError("a forward on pairs of rows has a faulty half; run it outside of paused()")
        if shared is None:
            raise ValueError("a forward on pairs of rows reads its weights once; run it within weights_shared()")
        rows = next((len(one) for one in given if isinstance(one, Tensor) and one.dim()), 0)
        if rows == 0 or rows % HALVES:
            raise ValueError(f"a forward on pairs of rows takes each image twice, as paired(images), got {rows} rows")
        self._waiting, self._draw, self._rows = layers, draw, rows

    def check_reading(self, layer: str) -> None:
        """Refuse that what a weight is, which faults can hit, is asked for by anything but its layer's forward."""
        if self.on and not self._reads and self._host.drawings.weights.hits(layer):
            raise ValueError(
                f"the weight of {layer!r} is read outside of its layer, where a forward on pairs of rows has two of it"
            )

    def feature(self, call: Call, feature: Tensor) -> Tensor:
        """Round both halves of a feature point [2 B, ...], each to its own grid, and fault the second one."""
        layer, index = call
        assert self._form is not None
        self._check(feature, layer)
        pairs = feature.reshape(len(feature) // HALVES, HALVES, -1)
        values, lsb = self._form.each_at_once(pairs)
        if self._host.drawings.features.hits(layer):
            self._hit(layer, index, feature, values.detach(), self._form.grid_of(lsb[1]))
        return values.view(feature.shape)

    def _hit(self, layer: str, index: int, feature: Tensor, values: Tensor, grid: Grid) -> None:
        """Fault the second half of values [B, 2, N] in place."""
        if self._waiting:
            self._ahead.expect(self._waiting, len(values), self._draw)
            self._waiting = ()
        drawing = self._host.drawings.features
        site = self._ahead.meet(layer, index, feature, self._draw)
        if site is not None:
            for placed, _, _ in drawing.plans(site, self._draw, index, values.device):
                placed.fault.apply_(values, self._ahead.paired[placed.number, layer, index], grid)
            return
        faulty = values[:, 1].clone(memory_format=torch.contiguous_format).view(-1, *feature.shape[1:])
        site = feature_site(layer, self._layers[layer], faulty, self._form)
        self._hits.apply(drawing, faulty, site, grid, (self._draw, index))
        values[:, 1] = faulty.view(len(values), -1)

    def _replace(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        module.__dict__["forward"] = forward
        self._undo.append(partial(module.__dict__.pop, "forward"))

    @property
    def _is_off(self) -> bool:
        return not self.on or self._host.finding

    def _check(self, x: Tensor, layer: str) -> None:
        """Refuse a tensor whose rows are not those of the forward, or that is not float32."""
        if x.shape[0] != self._rows:
            raise ValueError(
                f"a forward on pairs of rows needs them everywhere: {layer!r} has {x.shape[0]} rows of {self._rows}"
            )
        if x.dtype != torch.float32:
            raise ValueError(f"a forward on pairs of rows computes in float32: {layer!r} has {x.dtype}")

    # as in PyTorch's own layers, what a forward is given is called input

    def _normalise(self, name: str, norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
        if self._is_off:
            return nn.BatchNorm2d.forward(norm, input)
        self._check(input, name)
        scale, shift, pairs = _twice(norm.weight), _twice(norm.bias), _side_by_side(input)
        return F.batch_norm(pairs, None, None, scale, shift, training=True, eps=norm.eps).view(input.shape)

    def _convolve(self, name: str, conv: nn.Conv2d, input: Tensor) -> Tensor:
        if self._is_off:
            return nn.Conv2d.forward(conv, input)
        self._check(input, name)
        weight, bias = self._both(name, conv), _twice(conv.bias)
        groups = HALVES * conv.groups
        out = F.conv2d(_side_by_side(input), weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        return out.reshape(len(input), -1, *out.shape[2:])

    def _map(self, name: str, linear: nn.Linear, input: Tensor) -> Tensor:
        if self._is_off:
            return nn.Linear.forward(linear, input)
        self._check(input, name)
        weight = self._both(name, linear).view(HALVES, linear.out_features, linear.in_features)
        pairs = input.reshape(len(input) // HALVES, HALVES, -1, linear.in_features)
        out = torch.einsum("bhnd,hkd->bhnk", pairs, weight).reshape(*input.shape[:-1], linear.out_features)
        return out if linear.bias is None else out + linear.bias

    def _both(self, name: str, layer: nn.Conv2d | nn.Linear) -> Tensor:
        """Return what is read for a weight without faults and with them, one after the other."""
        ready = self._host.together.ready.get(name)
        if ready is not None:
            return ready
        self._reads = True
        try:
            with self._host.paused():
                clean = layer.weight
            return torch.cat([clean, layer.weight])
        finally:
            self._reads = False


def _is_by_batch(norm: _BatchNorm) -> bool:
    """Tell whether a BatchNorm is a BatchNorm2d, as PyTorch has it, that has no statistics but those of its batch."""
    alone = norm.running_mean is None and norm.running_var is None and not norm.track_running_stats
    return alone and type(norm) is nn.BatchNorm2d and "forward" not in norm.__dict__


def _side_by_side(x: Tensor) -> Tensor:
    """Return maps [2 B, C, H, W] with the channels of both halves side by side, [B, 2 C, H, W]."""
    rows, channels, height, width = x.shape
    return x.reshape(rows // HALVES, HALVES * channels, height, width)


def _twice(one: Tensor | None) -> Tensor | None:
    return None if one is None else one.repeat(HALVES)
