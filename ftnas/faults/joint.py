"""The clean and the faulty forward of a step as one forward, on pairs of rows.

A GPU waits for Python, which asks for every operation of a search twice: once for the clean forward, once for the
faulty one. Where faults hit features alone, both read the same weights: each image is then given twice, the even rows
of a batch are computed without faults and the odd ones under them, and every layer is asked for once. In memory such a
map [2 B, C, H, W] is [B, 2 C, H, W] too, the channels of both halves side by side: so BatchNorms normalise each half by
its own statistics, and features are rounded by a step of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftnas.faults.ahead import Ahead
from ftnas.faults.bounds import FEATURE, WEIGHT, bound_of
from ftnas.faults.drawing import Drawings
from ftnas.faults.hits import Hits
from ftnas.faults.place import feature_site
from ftnas.faults.stored import SharedWeights
from ftnas.faults.trace import Call
from ftnas.quantize import FixedPoint, Grid

HALVES = 2


def paired(images: Tensor) -> Tensor:
    """Return images [B, ...] each twice, [2 B, ...]: the even rows for the clean half, the odd ones for the faulty."""
    return images.repeat_interleave(HALVES, dim=0)


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to the clean and to the faulty half of [2 B, ...], [B, ...] each."""
    return rows[0::HALVES], rows[1::HALVES]


class Joint:
    """Runs forwards on pairs of rows, in an injection.

    Args:
        model: The model.
        layers: Its layers, by name.
        drawings: Where plans come from.
        ahead: Draws for feature points, where nothing can be read.
        form: Of the features.
        hits: Applies them.
        besides: What else the injection does, by name.

    Attributes:
        on: Whether forwards run so now.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        drawings: Drawings,
        ahead: Ahead,
        form: FixedPoint | None,
        hits: Hits,
        besides: Mapping[str, object],
    ) -> None:
        self._model, self._layers, self._form, self._besides = model, layers, form, besides
        self._drawings, self._drawing = drawings, drawings.features
        self._ahead, self._hits = ahead, hits
        self.on = False
        self._draw = 0
        self._waiting: Sequence[str] = ()
        self._undo: list[Callable[[], None]] = []

    def obstacle(self) -> str | None:
        """Return why clean and faulty forward cannot be one, in a few words; None where they can."""
        if self._drawings.weights or self._drawings.buffers or not self._drawing:
            return "faults must hit feature points alone"
        if self._form is None or self._form.range is not None:
            return "features must be of dynamic fixed point"
        beside = next((name for name, given in self._besides.items() if given), None)
        if beside is not None:
            return f"it does not know {beside}"
        if any(bound_of(module, kind) is not None for module in self._layers.values() for kind in (FEATURE, WEIGHT)):
            return "it does not know bounds"
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and (type(module) is not nn.BatchNorm2d or module.track_running_stats):
                return f"{name!r} must be a BatchNorm2d that normalises by its batch alone"
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run forwards on pairs of rows in the body.

        Raises:
            ValueError: One line: the `obstacle`.
        """
        if not self._undo:
            obstacle = self.obstacle()
            if obstacle is not None:
                raise ValueError(f"clean and faulty forward cannot be one: {obstacle}")
            for module in self._model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.__dict__["forward"] = partial(self._normalise, module)
                    self._undo.append(partial(module.__dict__.pop, "forward"))
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def detach(self) -> None:
        """Take away from the model what `running` has put there."""
        while self._undo:
            self._undo.pop()()

    def begin(self, layers: Sequence[str], draw: int | None, shared: SharedWeights | None) -> None:
        """Begin a forward: on pairs of rows, or after one without faults that has shown its features.

        Args:
            layers: What it will run, as far as that is known.
            draw: Number of the draw; None without faults.
            shared: What it shares with others; None where that is nothing.

        Raises:
            ValueError: Faults are paused, and half of the rows would be faulty.
        """
        if self.on:
            if draw is None:
                raise ValueError("a forward on pairs of rows has a faulty half; run it outside of paused()")
            self._waiting, self._draw = layers, draw
        elif shared is not None:
            self._ahead.begin(draw, shared)

    def feature(self, call: Call, feature: Tensor) -> Tensor:
        """Round both halves of a feature point [2 B, ...], each to its own grid, and fault the second one."""
        layer, index = call
        assert self._form is not None
        pairs = feature.reshape(feature.shape[0] // HALVES, HALVES, -1)
        values, lsb = self._form.each_at_once(pairs)
        if self._drawing.hits(layer):
            self._hit(layer, index, feature, values.detach(), self._form.grid_of(lsb[1]))
        return values.view(feature.shape)

    def _hit(self, layer: str, index: int, feature: Tensor, values: Tensor, grid: Grid) -> None:
        """Fault the second half of values [B, 2, N] in place."""
        if self._waiting:
            self._ahead.expect(self._waiting, len(values), self._draw)
            self._waiting = ()
        site = self._ahead.meet(layer, index, feature, self._draw)
        if site is not None:  # places were drawn as those of the whole
            self._hits.apply(self._drawing, values, site, grid, (self._draw, index))
            return
        faulty = values[:, 1].clone(memory_format=torch.contiguous_format).view(-1, *feature.shape[1:])
        site = feature_site(layer, self._layers[layer], faulty, self._form)
        self._hits.apply(self._drawing, faulty, site, grid, (self._draw, index))
        values[:, 1] = faulty.view(len(values), -1)

    def _normalise(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if not self.on:
            return nn.BatchNorm2d.forward(norm, x)
        rows, channels, height, width = x.shape
        pairs = x.reshape(rows // HALVES, HALVES * channels, height, width)
        scale, shift = (None if one is None else one.repeat(HALVES) for one in (norm.weight, norm.bias))
        return F.batch_norm(pairs, None, None, scale, shift, training=True, eps=norm.eps).view(x.shape)
