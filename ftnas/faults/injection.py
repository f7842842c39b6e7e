"""A model under faults: the hooks of one injection, and what it knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftnas.dataflow import Call
from ftnas.faults.activation import ActivationMode
from ftnas.faults.ahead import Ahead
from ftnas.faults.base import Fault, Site
from ftnas.faults.bounds import FEATURE, WEIGHT, bound_of, clipped_weight, stored_bound, weights_return, within_bound
from ftnas.faults.changes import Change, Watch
from ftnas.faults.drawing import Drawing, Drawings, Key, Placed
from ftnas.faults.hits import Hits
from ftnas.faults.joint import Joint
from ftnas.faults.memory import mark, restrict_range
from ftnas.faults.outage import Outages
from ftnas.faults.place import check_forward, check_output, feature_site, most_bits, occupy, weight_site
from ftnas.faults.plans import PlanSet
from ftnas.faults.record import InjectionRecord, Tally
from ftnas.faults.select import LAYER_TYPES, find_layers, is_ours
from ftnas.faults.stored import SharedWeights, after_memory, check_not_cached, store_weight
from ftnas.faults.together import Together
from ftnas.faults.trace import FeaturePoints, find_feature_points, running_layers
from ftnas.quantize import FixedPoint, FloatFormat, Grid, Rounded, straight_through
from ftnas.rng import integer


class Injection:
    """A model under faults; made by `inject`.

    Attributes:
        draw: Number of the next draw of soft faults. It grows by one with each faulty forward; a training loop sets
            it to its step, so that a resumed run meets the same faults.
        finding: Whether the feature points are being looked for, by a forward without faults or fixed point.
        shared: What the forwards of one training step share of the weights; None outside `weights_shared`.
        drawings: Where plans come from.
        tally: What was hit so far, as it is counted.
        together: The weights of a training step, where they are read together.
        outages: Nodes that may be down.
        joint: Forwards on pairs of rows, clean and faulty at once.
    """

    def __init__(
        self,
        model: nn.Module,
        faults: Sequence[Fault],
        *,
        formats: tuple[FixedPoint | FloatFormat | None, FixedPoint | None],
        drawings: Drawings,
        outages: Outages,
        bounds: Mapping[str, float],
        mask_gradients: bool,
        watch: bool,
    ) -> None:
        self.shared: SharedWeights | None = None
        self._model, self._bounds = model, bounds
        self._layers = find_layers(model)
        self._faults = tuple(faults)
        self._weight_format, self._feature_format = formats
        self._bits = most_bits(*formats)
        self.drawings, self.outages = drawings, outages
        self._weights, self._features, self._buffers = drawings
        rounds = any(placed.fault.needs_quantization for placed in self._buffers.placed)
        self._buffer_format = self._feature_format if rounds else None
        self._mask_gradients, self._watch = mask_gradients, Watch() if watch else None
        self.tally = Tally(faults)
        self._hits = Hits(self.tally, bounds, self._watch)
        self.together = Together(self._layers, self._weight_format, self._weights, self.tally, mask_gradients)
        self._ahead = Ahead(self._features, self.tally, self._layers, self._feature_format)
        besides = {"node_down": outages, "bounds": bounds, "mask_gradients": mask_gradients, "watch": watch}
        self.joint = Joint(self, model, self._layers, self._ahead, self._feature_format, self._hits, besides)
        self._activations = ActivationMode(self._after_activation) if self._buffers else None
        self.finding = self._paused = self._running = self._ran = self._ran_faulty = False
        self.draw = self._current = self._faulty_draw = self._replays = 0
        self._grid: Grid | None = None
        self._points: dict[bool, FeaturePoints] = {}
        self._counts: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def entered(self) -> bool:
        """Whether the model is within the block."""
        return bool(self._undo)

    @property
    def record(self) -> InjectionRecord:
        """What was hit so far: layers, sites, hits and realised rates of each fault model."""
        return self.tally.record()

    def plans(self) -> PlanSet:
        """Return the plans in force: those of the device for hard errors, of the last faulty forward for soft ones."""
        if self.outages:
            raise ValueError("node_down has no plans that could be kept; its draws follow from the seed alone")
        return PlanSet(self._faults, self.drawings.last(self._faulty_draw))

    def sites(self) -> dict[Key, tuple[Site, Placed]]:
        """Return the tensors that faults have met so far: what each is, and what of it the fault model can hit."""
        return self.drawings.sites()

    def replay(self, plans: PlanSet) -> None:
        """Use other plans from the next forward on, in an injection that was made with plans of the same faults."""
        if plans.faults != self._faults or self._weights.given is None:
            raise ValueError("replay takes plans of the fault models that the injection was made with, by plans=")
        plans.check_layers(self._layers)
        for drawing in self.drawings:
            drawing.replay(plans.plans)
        self._replays += 1

    def changes(self) -> list[Change]:
        """Return every change that faults made so far: layer, index, bit, before and after.

        Raises:
            ValueError: The injection was made without ``watch=True``.
        """
        if self._watch is None:
            raise ValueError("changes are kept only when asked for: inject(..., watch=True)")
        return self._watch.changes()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the body without faults; quantization stays."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def weights_shared(self) -> Iterator[None]:
        """Quantize each weight once for all forwards in the body, where weights must not change; faults hit copies.

        For forwards of one training step whose losses are added up before one backward pass, and for candidates.
        """
        self.shared = SharedWeights()
        try:
            yield
        finally:
            self.shared = None

    def replaced(self, given: Tensor, other: Tensor) -> None:
        """Take note that a hook puts another tensor in the place of one."""
        if self._activations is not None:
            self._activations.replace(given, other)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ValueError("the model is inside inject(...) and cannot be copied there; copy it outside of the block")

    def __enter__(self) -> Injection:
        if self._undo:
            raise ValueError("this injection is entered already; make another one with inject(...)")
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._detach()
        if kind is not None:
            return
        if not self._ran:
            warnings.warn("the model never ran inside inject(...): nothing was hit", stacklevel=2)
        if self._ran_faulty:
            self.tally.check()

    def _attach(self) -> None:
        root, undo = self._model, self._undo
        undo.append(occupy(root))
        undo.append(root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True).remove)
        if self._sees_features:
            for name, module in root.named_modules():
                if isinstance(module, (*LAYER_TYPES, _BatchNorm)):
                    undo.append(module.register_forward_hook(partial(self._called, name)).remove)
        if self._weight_format is not None or self._weights or self._any_bound(WEIGHT):
            for name, module in self._layers.items():
                undo.append(store_weight(module, self, name))
                if not self._sees_features:
                    undo.append(module.register_forward_pre_hook(partial(self._check_running, name)).remove)
            later = {name: after_memory(module) for name, module in self._layers.items()}
            zeroed = (name for name, entry in later.items() if entry and entry.zeroes_nan)
            self._hits.reads_nan_as_zero = frozenset(zeroed)
        undo += self.outages.attach(lambda: self._draw_now, self.tally.add, self.replaced)
        if self._activations is not None:
            undo.append(root.register_forward_hook(self._check_met).remove)
        # last, so that a root that is a layer itself is still running when its feature point is met
        undo.append(root.register_forward_hook(self._end, always_call=True).remove)

    def _detach(self) -> None:
        self._stop()
        self.together.forget()
        self.joint.detach()
        while self._undo:
            self._undo.pop()()

    @property
    def _sees_features(self) -> bool:
        return bool(self._features or self._buffers or self._bounds or self._feature_format) or self._any_bound(FEATURE)

    @property
    def _draw_now(self) -> int | None:
        """The number of the draw that a forward meets which runs now; None where it meets none."""
        return self._current if self._running and not self._paused else None

    def _any_bound(self, kind: str) -> bool:
        return any(bound_of(module, kind) is not None for module in self._layers.values())

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.finding:
            return
        self._stop()  # a forward that was interrupted from the keyboard has not ended
        check_not_cached(self._layers.values())
        check_forward()
        if module.training not in self._points and self._sees_features:
            self.finding = True
            try:
                self._points[module.training] = find_feature_points(module, args, kwargs)
            finally:
                self.finding = False
        self._counts, self._current = {}, integer(self.draw)
        self._running = self._ran = True
        if not self._paused:
            self.draw = self._current + 1
            self._faulty_draw, self._ran_faulty = self._current, True
        if self.joint.on or (self.shared is not None and self._watch is None):
            layers = running_layers(module, args, kwargs, self._points.get(module.training))
            if self.shared is not None:
                self.together.begin(layers, self._draw_now, self.shared, both=self.joint.on)
            self.joint.begin(layers, self._draw_now, self.shared, (*args, *kwargs.values()))
        if self._activations is not None:
            self._activations.__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.finding:
            self._stop()

    def _stop(self) -> None:
        if self._running and self._activations is not None:
            self._activations.__exit__(None, None, None)
            self._activations.clear()
        self._running, self.together.ready = False, {}
        self._ahead.end()

    def _check_met(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.finding and self._activations is not None:
            self._activations.check(module)

    def _check_running(self, name: str, module: nn.Module, inputs: Any) -> None:
        if not self._running:
            raise RuntimeError(
                f"{name!r} was called by itself: inside inject(model, ...) call the model (and recompute "
                "nothing in the backward pass, as torch.utils.checkpoint does)"
            )

    def _called(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self.finding:
            return None
        self._check_running(name, module, inputs)
        check_output(name, output, self._bits)
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        owner = self._points[self._model.training].owner((name, index), isinstance(module, LAYER_TYPES))
        if owner is None:
            return None
        with torch._C.DisableTorchFunction():  # our own arithmetic is no business of any function mode
            return self._feature(owner, output, module)

    def _feature(self, call: Call, feature: Tensor, module: nn.Module) -> Tensor:
        """Quantize and fault the feature point of a layer call: [batch, ...], any float dtype, given by a module."""
        if self.joint.on:
            return self.joint.feature(call, feature)
        layer, index = call
        bound, limit = self._bounds.get(layer), bound_of(self._layers[layer], FEATURE)
        met = not self._paused and self._features.hits(layer)
        if self._paused and self.shared is not None and self._watch is None:
            self._ahead.note(layer, index, feature, self.shared)
        plain = bound is None and limit is None and self._activations is None and not (met and self._mask_gradients)
        rounded = self._feature_format.at_once(feature) if plain and self._feature_format else None
        if rounded is not None:
            if met:  # the gradient of rounding does not read the values, which are hit in place
                site = feature_site(layer, self._layers[layer], feature, self._feature_format)
                self._hits.apply(self._features, rounded.values.detach(), site, rounded.grid, (self._current, index))
            return rounded.values
        ours = is_ours(module, feature)
        if bound is not None:
            feature, ours = restrict_range(feature, bound), False
        if limit is not None:
            feature, ours = within_bound(self._layers[layer], feature, limit, self.tally.count_feature_nan), False
        site = feature_site(layer, self._layers[layer], feature, self._feature_format)
        if self._activations is None or not self._points[self._model.training].activated(call):
            return self._store(feature, site, self._feature_format, (self._features, self._buffers), index, ours, limit)
        stored = self._store(feature, site, self._feature_format, (self._features,), index, ours, limit)
        if self._buffer_format is not None or self._buffers.hits(layer):
            self._activations.expect(stored, call, self._grid)
        return stored

    def _after_activation(self, call: Call, output: Tensor, grid: Grid | None) -> Tensor:
        """Fault what an activation function writes to the feature buffer, on its input's grid or on one of its own."""
        layer, index = call
        site = feature_site(layer, self._layers[layer], output, self._feature_format)
        if grid is not None and not (torch.is_grad_enabled() and output.requires_grad):
            if not self._paused and self._buffers.hits(layer):
                self._hits.apply(self._buffers, output, site, grid, (self._current, index))
            return output
        return self._store(output, site, grid or self._buffer_format, (self._buffers,), index)

    def weight(self, layer: str, weight: Tensor) -> Tensor:
        """Return what the hardware reads for a weight that learns; called by the weight's parametrization."""
        weight, limit = clipped_weight(self._layers[layer], weight)
        site = weight_site(layer, self._layers[layer], weight, self._weight_format)
        kept = self.shared.rounded if self.shared is not None and torch.is_grad_enabled() else None
        return self._store(weight, site, self._weight_format, (self._weights,), 0, limit=limit, kept=kept)

    def stored(self, layer: str, weight: Tensor) -> tuple[Tensor, Grid | None]:
        """Return what the hardware holds for a weight without faults, and its grid."""
        form = self._weight_format
        weight, limit = clipped_weight(self._layers[layer], weight)
        if isinstance(form, FixedPoint):
            values, _, grid = form.round(weight, need_inside=False, limit=limit)
            return values, grid
        return weight if form is None else form.rounded(weight), None

    def faulty(self, layer: str, stored: Tensor, grid: Grid | None) -> Tensor:
        """Return a faulty copy of what the hardware holds for a weight."""
        out = stored.clone()
        site = weight_site(layer, self._layers[layer], out, self._weight_format)
        self._hits.apply(self._weights, out, site, grid, (self._current, 0))
        return out

    def check_reading(self, layer: str) -> None:
        """Refuse that a weight is read outside of its layer in a forward on pairs of rows, where it is two."""
        self.joint.check_reading(layer)

    def weight_bound(self, layer: str) -> Tensor | None:
        """Return the bound of a layer's weight as it is stored; None without."""
        return stored_bound(self._layers[layer], WEIGHT)

    def weight_state(self, layer: str) -> Any:
        """Return what, beside its values, decides what is read for a weight now; None without faults."""
        if self._paused or not self._weights.hits(layer):
            return None
        return 0 if self._weights.hard else self._current, self._replays

    def _store(
        self,
        x: Tensor,
        site: Site,
        form: FixedPoint | FloatFormat | Grid | None,
        drawings: Sequence[Drawing],
        index: int,
        ours: bool = False,
        limit: Tensor | None = None,
        kept: dict[str, Rounded] | None = None,
    ) -> Tensor:
        """Return what is read back for a tensor that was stored: rounded to its format, and faulty.

        A grid in place of a format is where the tensor lies already. A tensor that is ``ours`` is written to. The range
        of a dynamic format is ``limit``, or that of the values without one. What is ``kept`` need not be rounded again.
        """
        # what a bound has clipped lies at the end of the range, and the bound has decided on its gradient
        bounded = limit is not None and (limit.requires_grad or weights_return(self._layers[site.layer]))
        active = [drawing for drawing in drawings if not self._paused and drawing.hits(site.layer)]
        self._grid = form if isinstance(form, Grid) else None
        if self._grid is form and not active:
            return x

        def transform(values: Tensor, need_mask: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
            inside = blocked = None
            if isinstance(form, FixedPoint):
                rounded = None if kept is None else kept.get(site.layer)
                if rounded is None:
                    need = need_mask and not bounded
                    rounded = form.round(values, need_inside=need, in_place=ours, limit=limit, narrow=not active)
                    if kept is not None and not active:
                        kept[site.layer] = rounded
                    out = rounded.values
                else:
                    out = rounded.values.clone()
                inside, self._grid = rounded.inside, rounded.grid
            elif isinstance(form, FloatFormat):
                out = form.rounded(values)
            else:
                out = values if ours else values.clone()
            for drawing in active:
                for plan in self._hits.apply(drawing, out, site, self._grid, (self._current, index)):
                    if need_mask and self._mask_gradients:
                        blocked = mark(out, plan.values_hit(), blocked)
            return out, inside, blocked

        return straight_through(x, transform)
