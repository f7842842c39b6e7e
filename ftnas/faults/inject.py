"""`inject`: faults and fixed point in any ``nn.Module``, for as long as a ``with`` block lasts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ftnas.faults.base import Fault, Plan, Site, positions, storage
from ftnas.faults.record import InjectionRecord, Tally
from ftnas.faults.select import LAYER_TYPES, Layers, find_layers, macs_per_output, select_layers
from ftnas.faults.trace import Call, FeaturePoints, find_feature_points
from ftnas.quantize import FixedPoint, Grid, Quantization, round_to_grid, straight_through
from ftnas.rng import Label, generator

Errors = Literal["soft", "hard"]
DrawOn = Literal["cpu", "device"]


def inject(
    model: nn.Module,
    *faults: Fault,
    quantization: Quantization | FixedPoint | None = None,
    seed: int = 0,
    layers: Layers = None,
    errors: Errors | None = None,
    mask_gradients: bool = False,
    draw_on: DrawOn = "cpu",
) -> Injection:
    """Put faults and fixed point into a model, inside a ``with`` block.

    Every Conv2d and Linear weight and every feature point (the output of a Conv2d or Linear, after the BatchNorm that
    alone consumes it) is quantized; the faults act on those of the selected layers. On leaving the block, by an
    exception too, the model is what it was, bit for bit.

    Args:
        model: Any module with Conv2d or Linear layers. Call the model itself inside the block, not its parts.
        *faults: Fault models, applied in this order. None: quantization alone.
        quantization: Formats of weights and features; one FixedPoint serves both; None quantizes nothing.
        seed: The device, or the stream of draws; the same seed gives the same faults on every machine.
        layers: Which layers are faulted: a type name (``conv2d``, ``linear``), a name pattern (``layer1.*``), a
            predicate of (name, module), or a sequence of those; None takes every Conv2d and Linear.
        errors: ``hard`` draws one plan and keeps it (a defect map, the same for every sample of a batch); ``soft``
            draws anew at each forward. None: hard for weights, soft for features.
        mask_gradients: Stop gradients at faulty positions; by default they flow.
        draw_on: ``cpu`` gives the same plans on every kind of device; ``device`` never waits for the device, for
            training.

    Returns:
        The context manager; ``with inject(...) as injection`` gives what was hit as ``injection.record``.

    Raises:
        ValueError: No layer is selected, a fault needs a quantization that is missing, or (on entering) the model
            has an injection already.
    """
    return Injection(
        model,
        faults,
        quantization=Quantization.of(quantization),
        seed=seed,
        layers=layers,
        errors=errors,
        mask_gradients=mask_gradients,
        draw_on=draw_on,
    )


class Injection:
    """A model under faults; made by `inject`.

    Attributes:
        draw: Number of the next draw of soft faults. It grows by one with each faulty forward; a training loop sets
            it to its step, so that a resumed run meets the same faults.
        finding: Whether the feature points are being looked for, by a forward without faults or fixed point.
    """

    def __init__(
        self,
        model: nn.Module,
        faults: Sequence[Fault],
        *,
        quantization: Quantization | None,
        seed: int,
        layers: Layers,
        errors: Errors | None,
        mask_gradients: bool,
        draw_on: DrawOn,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
        _check(faults, quantization, errors, draw_on)
        self.draw = 0
        self._model = model
        self._layers = find_layers(model)
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize or to fault")
        self._selected = select_layers(self._layers, layers)
        self._quantization = _with_encoding(quantization, faults)
        self._weights = _Drawing(faults, "weight", seed=seed, hard=errors != "soft", draw_on=draw_on)
        self._features = _Drawing(faults, "feature", seed=seed, hard=errors == "hard", draw_on=draw_on)
        self._mask_gradients = mask_gradients
        self._faults = tuple(faults)
        self._tally = Tally(faults)
        self.finding = self._paused = self._running = self._ran = False
        self._current = 0
        self._points: dict[bool, FeaturePoints] = {}
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []
        self._orders: dict[str, list[str]] = {}

    @property
    def record(self) -> InjectionRecord:
        """What was hit so far: layers, sites, hits and realised rates of each fault model."""
        return self._tally.record()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the body without faults; quantization stays."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __enter__(self) -> Injection:
        if self._handles:
            raise ValueError("this injection is entered already; make another one with inject(...)")
        if any(_stored_weight(module) for module in self._layers.values()):
            raise ValueError("the model has an injection already; give all faults to one inject(model, ...)")
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
        self._tally.check()

    def _attach(self) -> None:
        root = self._model
        self._handles.append(root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        if self._quantization is not None or self._features.faults:
            for name, module in root.named_modules():
                if isinstance(module, (*LAYER_TYPES, _BatchNorm)):
                    self._handles.append(module.register_forward_hook(self._feature_hook(name, module)))
        if self._quantization is not None or self._weights.faults:
            for name, module in self._layers.items():
                stored = _StoredWeight(self, name, macs_per_output(module))
                self._orders[name] = list(module._parameters)
                parametrize.register_parametrization(module, "weight", stored, unsafe=True)
        # last, so that a root that is a layer itself is still running when its feature point is met
        self._handles.append(root.register_forward_hook(self._end, always_call=True))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, module in self._layers.items():
            if not _stored_weight(module):
                continue
            chain = cast(parametrize.ParametrizationList, module.parametrizations.weight)  # type: ignore[union-attr]
            if len(chain) > 1:  # the model's own come first, and stay
                del chain[-1]
                continue
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            for parameter in self._orders.pop(name):  # the weight came back as the last one
                module._parameters[parameter] = module._parameters.pop(parameter)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.finding:
            return
        if module.training not in self._points and (self._quantization is not None or self._features.faults):
            self.finding = True
            try:
                self._points[module.training] = find_feature_points(module, args, kwargs)
            finally:
                self.finding = False
        self._counts = {}
        self._running = self._ran = True
        self._current = self.draw
        if not self._paused:
            self.draw += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.finding:
            self._running = False

    def _feature_hook(self, name: str, module: nn.Module) -> Callable[..., Any]:
        is_layer = isinstance(module, LAYER_TYPES)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if self.finding:
                return None
            if not self._running:
                raise RuntimeError(f"{name!r} was called by itself: inside inject(model, ...) call the model")
            index = self._counts.get(name, 0)
            self._counts[name] = index + 1
            owner = self._points[self._model.training].owner((name, index), is_layer)
            return None if owner is None else self._feature(owner, output)

        return hook

    def _feature(self, call: Call, feature: Tensor) -> Tensor:
        """Quantize and fault the feature point of a layer call: [batch, ...], any float dtype."""
        layer, index = call
        drawing = self._features if layer in self._selected and not self._paused else None
        site = Site(layer, tuple(feature.shape), macs_per_output(self._layers[layer]), self._bits("features"))
        return self._store(feature, site, self._format("features"), drawing, index)

    def weight(self, layer: str, weight: Tensor, macs: int) -> Tensor:
        """Return what the hardware reads for a stored weight; called by the weight's parametrization."""
        drawing = self._weights if layer in self._selected and not self._paused else None
        site = Site(layer, tuple(weight.shape), macs, self._bits("weights"))
        return self._store(weight, site, self._format("weights"), drawing, 0)

    def weight_key(self, layer: str) -> tuple[bool, int]:
        """Return what, beside its values, decides what is read for a weight now."""
        faulty = bool(self._weights.faults) and layer in self._selected and not self._paused
        return faulty, self._current if faulty and not self._weights.hard else 0

    def _store(self, x: Tensor, site: Site, form: FixedPoint | None, drawing: _Drawing | None, index: int) -> Tensor:
        if form is None and drawing is None:
            return x

        def transform(values: Tensor, need_mask: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
            grid: Grid | None = None
            inside = blocked = None
            if form is not None:
                grid = form.grid(values)
                out, inside = round_to_grid(values, grid, need_inside=need_mask)
            else:
                out = values.clone()
            for number, plan, fresh in drawing.plans(site, self._current, index, out.device) if drawing else ():
                if fresh is not None:
                    self._tally.add(number, site.layer, fresh)
                self._faults[number].apply_(out, plan, grid)
                if need_mask and self._mask_gradients:
                    blocked = _mark(out, plan, blocked)
            return out, inside, blocked

        return straight_through(x, transform)

    def _format(self, kind: Literal["weights", "features"]) -> FixedPoint | None:
        return None if self._quantization is None else getattr(self._quantization, kind)

    def _bits(self, kind: Literal["weights", "features"]) -> int | None:
        form = self._format(kind)
        return None if form is None else form.bits


class _Drawing:
    """Draws the plans of one kind of tensor, keyed by seed, fault, draw, layer and call.

    Kept are hard plans, and the last one of each weight, which may be read more than once in a forward.
    """

    def __init__(self, faults: Sequence[Fault], target: str, *, seed: int, hard: bool, draw_on: DrawOn) -> None:
        self.faults = [(index, fault) for index, fault in enumerate(faults) if fault.target == target]
        self.hard = hard
        self._target = target
        self._seed = seed
        self._on_device = draw_on == "device"
        self._kept: dict[tuple[int, str, int], tuple[Label, Plan]] = {}

    def plans(self, site: Site, draw: int, index: int, device: torch.device) -> Iterator[tuple[int, Plan, Plan | None]]:
        """Yield each fault's number, its plan for the tensor, and the plan to count (None: counted before)."""
        when: Label = "device" if self.hard else draw
        batch = site.shape[0] if self.hard and self._target == "feature" else None
        one = site if batch is None else Site(site.layer, site.shape[1:], site.macs, site.bits)
        for number, fault in self.faults:
            key = (number, site.layer, index)
            kept, plan = self._kept.get(key, (None, None))
            fresh = None
            if plan is None or kept != when:
                stream = generator(
                    self._seed, fault.name, number, when, site.layer, index,
                    device=device if self._on_device else "cpu",
                )  # fmt: skip
                plan = fresh = fault.sample(one, generator=stream)
                plan = plan.to(device)
                if self.hard or self._target == "weight":
                    self._kept[key] = (when, plan)
            if plan.shape != one.shape:
                raise ValueError(f"{site.layer!r}: a defect map fits one shape, {plan.shape}, got {one.shape}")
            yield number, plan if batch is None else plan.repeated(batch), fresh


class _StoredWeight(nn.Module):
    """The parametrization of one weight; without gradients it keeps what it computed until the weight changes."""

    def __init__(self, injection: Injection, layer: str, macs: int) -> None:
        super().__init__()
        self._injection = injection
        self._layer = layer
        self._macs = macs
        self._kept: dict[bool, tuple[Any, Tensor]] = {}

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized and faulty weight; same shape and dtype."""
        if self._injection.finding:
            return weight
        if (torch.is_grad_enabled() and weight.requires_grad) or not isinstance(weight, nn.Parameter):
            self._kept.clear()  # what a parametrization of the model's own made tells nothing by its address
            return self._injection.weight(self._layer, weight, self._macs)
        faulty, draw = self._injection.weight_key(self._layer)
        key = (weight.data_ptr(), weight._version, draw)
        if faulty not in self._kept or self._kept[faulty][0] != key:
            self._kept[faulty] = (key, self._injection.weight(self._layer, weight, self._macs))
        return self._kept[faulty][1]


def _stored_weight(module: nn.Module) -> bool:
    """Tell whether an injection reads this layer's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return any(isinstance(p, _StoredWeight) for p in module.parametrizations.weight)  # type: ignore[union-attr]


def _mark(values: Tensor, plan: Plan, blocked: Tensor | None) -> Tensor:
    """Mark the values that a plan hits in a bool mask of the same shape."""
    hit = plan.values_hit()
    marks = torch.zeros_like(values, dtype=torch.uint8)
    # padding shares a position with a value that may be hit: add, so that neither hides the other
    storage(marks).index_add_(0, positions(hit, marks), (hit < values.numel()).to(torch.uint8))
    return marks > 0 if blocked is None else blocked | (marks > 0)


def _check(faults: Sequence[Fault], quantization: Quantization | None, errors: Errors | None, draw_on: DrawOn) -> None:
    for fault in faults:
        if not isinstance(fault, Fault):
            raise ValueError(f"inject takes fault models such as MiBB(mac_error_rate=1e-4), got {fault!r}")
        if fault.needs_quantization and quantization is None:
            raise ValueError(f"{fault.name} needs fixed point: give quantization=FixedPoint(bits=8), got None")
    if errors not in (None, "soft", "hard"):
        raise ValueError(f"errors must be 'soft', 'hard' or None, got {errors!r}")
    if draw_on not in ("cpu", "device"):
        raise ValueError(f"draw_on must be 'cpu' or 'device', got {draw_on!r}")


def _with_encoding(quantization: Quantization | None, faults: Sequence[Fault]) -> Quantization | None:
    """Give the weights the encoding of the faulty hardware, where a fault model has one."""
    encodings = {fault.encoding for fault in faults if fault.encoding is not None}
    if quantization is None or not encodings:
        return quantization
    if len(encodings) > 1:
        raise ValueError(f"these faults need different encodings of the weights: {', '.join(sorted(encodings))}")
    weights = quantization.weights.model_copy(update={"encoding": encodings.pop()})
    return quantization.model_copy(update={"weights": weights})
