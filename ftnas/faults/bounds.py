"""Bounded ranges: the largest magnitude of a layer's weights and features, which becomes its representation range.

In dynamic fixed point a fault is as large as the range, and a few outliers set the range. A bound b of a layer clips to
[-b, b] what is about to be stored, and the format's step is then that of b, whatever the values are:

    weight:  parameter -> bound -> quantize -> fault -> saturation -> layer
    feature: layer (and its BatchNorm) -> bound -> quantize -> faults -> activation -> buffer faults

Bounds act where formats act, inside `ftnas.inject`. They belong to the layer's state (``weight_bound``,
``feature_bound``), so that a trained model brings those that it was trained with.

Features may be bounded by a saturating function instead of being clipped; all have slope 1 at 0 and the range (-b, b):

| function | | gradient |
|---|---|---|
| ``clip`` | x clipped to [-b, b] | 1 within, 0 beyond |
| ``tanh`` | b tanh(x / b) | 1 - tanh(x / b)^2 |
| ``arctan`` | (2 b / pi) arctan(pi x / 2 b) | 1 / (1 + (pi x / 2 b)^2) |
| ``softsign`` | x / (1 + abs(x) / b) | 1 / (1 + abs(x) / b)^2 |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ftnas.faults.saturation import FUNCTIONS, Saturation, power_of_two, standard_deviation
from ftnas.faults.select import find_layers, select_layers
from ftnas.quantize import SMALLEST_RANGE
from ftnas.saturated import after_memory
from ftnas.settings import Positive, Settings
from ftnas.undisturbed import undisturbed

WEIGHT, FEATURE = "weight_bound", "feature_bound"
RULE = "feature_function"
"""Name in a layer's state of how its features are bounded, where they are not clipped: text as uint8 [length]."""


class Rule(NamedTuple):
    """How the features of a layer are kept within their bound."""

    function: str = "clip"
    zeroes_nan: bool = False

    def __str__(self) -> str:
        """Say it in messages, and in the layer's state."""
        return f"{self.function} nan={'zero' if self.zeroes_nan else 'keep'}"


CLIP = Rule()


class FeatureBound(Settings):
    """Bounds of features.

    Attributes:
        value: The bound: one for all layers, or by layer (selectors as in ``layers``, which is then left out). One that
            is no power of two clips at its value; the representation range is the next power of two.
        learned: Whether training moves each bound, starting from ``value``, by the gradient at clipped values; it is
            then a parameter like others, with their weight decay.
        function: ``clip``, or a saturating one, ``tanh``, ``arctan`` or ``softsign``; see the head of this file.
        nan: What a NaN, which flipped bits of weights may lead to, is read as: ``keep`` lets it through, ``zero``
            reads it as 0 and counts it (`ftnas.faults.record.InjectionRecord.features_zeroed`).
        layers: Type names, name patterns or depths; None for every Conv2d and Linear. Convolutions alone when left
            out: the answers of a classifier are not to be clipped.
    """

    value: Positive | dict[str, Positive]
    learned: bool = False
    function: Literal["clip", "tanh", "arctan", "softsign"] = "clip"
    nan: Literal["zero", "keep"] = "keep"
    layers: tuple[str, ...] | None = ("conv2d",)

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_selection(self) -> FeatureBound:
        _check_selection(self.value, self.layers not in (None, ("conv2d",)))
        return self


class WeightBound(Settings):
    """Bounds of weights.

    Attributes:
        value: As of `FeatureBound`.
        std_multiple: In place of ``value``: the power of two nearest to this many standard deviations of the layer's
            weight at the time, so of its first weights in a training.
        learned: As of `FeatureBound`.
        outside: What gradients do to a weight beyond the bound: it ``stay`` s there, as clipping has it, or may
            ``return``: a gradient whose step leads back passes.
        layers: Type names, name patterns or depths; None for every Conv2d and Linear, but with ``std_multiple`` for the
            convolutions alone: a classifier may start next to zero, and would have to stay there.
    """

    value: Positive | dict[str, Positive] | None = None
    std_multiple: Positive | None = None
    learned: bool = False
    outside: Literal["stay", "return"] = "stay"
    layers: tuple[str, ...] | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> WeightBound:
        if (self.value is None) == (self.std_multiple is None):
            raise ValueError("a weight bound is given by value or by std_multiple, one of the two")
        _check_selection(self.value, self.layers is not None)
        return self


class Limits(Settings):
    """What keeps weights and features of a model within bounds.

    Attributes:
        saturation: Function of the weights that are read, see `ftnas.saturate`.
        weight_bound: Range of the weights that are stored.
        feature_bound: Range of the features.
    """

    saturation: Saturation | None = None
    weight_bound: WeightBound | None = None
    feature_bound: FeatureBound | None = None

    @property
    def limits(self) -> Limits:
        """Return these settings alone."""
        return Limits(saturation=self.saturation, weight_bound=self.weight_bound, feature_bound=self.feature_bound)

    def apply(self, model: nn.Module) -> None:
        """Bound and saturate a model in place; raises as `bound` and `ftnas.saturate` do."""
        if self.weight_bound is not None or self.feature_bound is not None:
            bound(model, weights=self.weight_bound, features=self.feature_bound)
        if self.saturation is not None:
            self.saturation.apply(model)


def bound(model: nn.Module, *, weights: WeightBound | None = None, features: FeatureBound | None = None) -> nn.Module:
    """Give layers of a model bounded ranges, in place; see the head of this file.

    Returns:
        The model.

    Raises:
        ValueError: One line: neither is given, layers that match nothing, or a layer that has such a bound already.
    """
    if weights is None and features is None:
        raise ValueError("give weights=WeightBound(...), features=FeatureBound(...), or both")
    layers = find_layers(model)
    for kind, settings in ((WEIGHT, weights), (FEATURE, features)):
        if settings is None:
            continue
        for name, value in _values(settings, layers).items():
            _set(layers[name], kind, value, name, learned=settings.learned)
            if isinstance(settings, FeatureBound):
                _set_rule(layers[name], Rule(settings.function, settings.nan == "zero"))
            elif settings.outside == "return":
                layers[name]._weights_return = True  # type: ignore[assignment]
    return model


def stored_bound(module: nn.Module, kind: str) -> Tensor | None:
    """Return what a layer's state has as its bound, a buffer or a parameter that learns; None without."""
    found = module._buffers.get(kind)
    return module._parameters.get(kind) if found is None else found


def bound_of(module: nn.Module, kind: str) -> Tensor | None:
    """Return the bound of a layer: a scalar tensor > 0, learned or not; None without."""
    found = stored_bound(module, kind)
    return found.abs().clamp_min(SMALLEST_RANGE) if isinstance(found, nn.Parameter) else found


def rule_of(module: nn.Module) -> Rule:
    """Return how the features of a bounded layer are kept within their bound."""
    return module.__dict__.get("_feature_rule", CLIP)


def clipped(values: Tensor, limit: Tensor | None) -> Tensor:
    """Return values of any shape clipped to [-limit, limit]; NaN stays. What is clipped moves a learned limit."""
    return values if limit is None else torch.clamp(values, -limit.to(values.dtype), limit.to(values.dtype))


def weights_return(module: nn.Module) -> bool:
    """Tell whether gradients may lead weights of a layer back from beyond their bound."""
    return bool(module.__dict__.get("_weights_return", False))


class _Returning(torch.autograd.Function):
    """Clipping whose gradient passes within the limit, and beyond it where descent leads back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(values, limit)
        return torch.clamp(values, -limit, limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (gradient,), (values, limit) = gradients, ctx.saved_tensors
        beyond = values.abs() > limit
        passed = torch.where(beyond & (gradient * values <= 0), 0.0, gradient)
        moved = (gradient * values.sign() * beyond).sum() if ctx.needs_input_grad[1] else None
        return passed, moved


def clipped_weight(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight of a layer, of any shape, within its bound, and the bound."""
    limit = bound_of(module, WEIGHT)
    if limit is None or not weights_return(module):
        return clipped(weight, limit), limit
    return _Returning.apply(weight, limit.to(weight.dtype)), limit


def within_bound(layer: nn.Module, values: Tensor, limit: Tensor, count_nan: Callable[[Tensor], None]) -> Tensor:
    """Return features of any shape within their layer's bound; those with NaN that are read as 0 are counted."""
    rule = rule_of(layer)
    if rule.zeroes_nan:
        count_nan(values)
    return saturated(values, limit, rule)


def saturated(values: Tensor, limit: Tensor, rule: Rule) -> Tensor:
    """Return features of any shape within [-limit, limit], by a rule; same dtype. A learned limit has a gradient."""
    if rule.zeroes_nan:
        values = torch.nan_to_num(values, nan=0.0, posinf=math.inf, neginf=-math.inf)
    if rule.function == "clip":
        return clipped(values, limit)
    if values.dtype == torch.float16:  # the root of its largest number is only 256
        return saturated(values.float(), limit, rule).to(values.dtype)
    scale = limit.to(values.dtype) * (2.0 / math.pi if rule.function == "arctan" else 1.0)
    # infinities are replaced before f, or softsign and the gradient of a learned limit would be NaN
    largest = torch.finfo(values.dtype).max ** 0.5
    return FUNCTIONS[rule.function](values.clamp(-largest, largest) / scale) * scale


def take_bounds(model: nn.Module, state: Mapping[str, Any], limits: Limits, *, where: str) -> None:
    """Take the bounds that the weights of a file were trained with, in place of those of the settings.

    A bound that learns goes on from the file's; a multiple of a deviation is that of the weights as they were first.

    Args:
        model: Bounded, in place.
        state: The file's; one without bounds leaves the model's.
        limits: The settings that the model was bounded by.
        where: Prefix of messages: the file.

    Raises:
        ValueError: One line: a layer with a bound in the file and none here, another function, or a value in the
            settings that does not learn and is not the file's.
    """
    layers = find_layers(model)
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if kind not in (WEIGHT, FEATURE, RULE) or not isinstance(value, Tensor) or name not in layers:
            continue
        layer, own = layers[name], layers[name].state_dict().get(kind)
        if kind == RULE or (kind == FEATURE and own is not None and key[: -len(kind)] + RULE not in state):
            theirs = bytes(value.tolist()).decode(errors="replace") if kind == RULE else str(CLIP)
            if own is None or theirs != str(rule_of(layer)):
                here = "are not bounded" if bound_of(layer, FEATURE) is None else f"by {rule_of(layer)}"
                raise ValueError(
                    f"{where}: features of layer {name!r} were bounded by {theirs}, and here {here}; give the same "
                    "feature_bound"
                )
            if kind == RULE:
                continue
        if own is None:
            raise ValueError(
                f"{where}: layer {name!r} was trained with a {kind} of {float(value):g}, and here it has none; give "
                f"the same {kind}"
            )
        settings = limits.weight_bound if kind == WEIGHT else limits.feature_bound
        fixed = settings is not None and settings.value is not None and not settings.learned
        if fixed and float(value) != float(own):
            raise ValueError(
                f"{where}: layer {name!r} was trained with a {kind} of {float(value):g}, and here it is "
                f"{float(own):g}; give that value, or learned: true to go on from the file's"
            )
        with torch.no_grad():
            getattr(layer, kind).copy_(value)


def _check_selection(value: Any, layers_given: bool) -> None:
    if isinstance(value, dict) and (layers_given or not value):
        raise ValueError("bounds by layer say themselves which layers are bounded; remove layers, or give one value")


def _values(settings: WeightBound | FeatureBound, layers: dict[str, nn.Module]) -> dict[str, float]:
    if isinstance(settings.value, dict):
        found: dict[str, float] = {}
        by: dict[str, str] = {}
        for key, value in settings.value.items():
            for name in select_layers(layers, key):
                if name in by:
                    raise ValueError(f"layer {name!r} has two bounds, by {by[name]!r} and by {key!r}; give it one")
                found[name], by[name] = value, key
        return found
    if settings.value is not None:
        return dict.fromkeys(sorted(select_layers(layers, settings.layers)), settings.value)
    assert isinstance(settings, WeightBound) and settings.std_multiple is not None
    names = sorted(select_layers(layers, settings.layers or ("conv2d",)))
    multiple = settings.std_multiple
    return {name: power_of_two(multiple * standard_deviation(_stored(layers[name]))) for name in names}


def _stored(module: nn.Module) -> Tensor:
    """Return the weight as the memory gets it: after the model's own parametrizations, before ours."""
    later = after_memory(module)
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight  # type: ignore[return-value]
    chain: Any = module.parametrizations.weight  # type: ignore[union-attr]
    entries = list(chain)
    before = entries if later is None else entries[: entries.index(later)]
    if not before:
        return cast(Tensor, chain.original)
    names = ["original"] if chain.is_tensor else [f"original{number}" for number in range(chain.ntensors)]
    with undisturbed(module), torch.no_grad():
        chain.eval()  # spectral_norm goes a step on in training
        weight = before[0](*(getattr(chain, name) for name in names))
        for parametrization in before[1:]:
            weight = parametrization(weight)
    return cast(Tensor, weight)


def _device(module: nn.Module) -> torch.device:
    return next(itertools.chain(module.parameters(), module.buffers())).device


def _set(module: nn.Module, kind: str, value: float, name: str, *, learned: bool) -> None:
    if hasattr(module, kind):
        raise ValueError(f"layer {name!r} has a {kind} already; build the model anew to give it another one")
    tensor = torch.tensor(max(value, SMALLEST_RANGE), dtype=torch.float32, device=_device(module))
    if learned:
        module.register_parameter(kind, nn.Parameter(tensor))
    else:
        module.register_buffer(kind, tensor)


def _set_rule(module: nn.Module, rule: Rule) -> None:
    if rule != CLIP:
        module._feature_rule = rule  # type: ignore[assignment]
        text = torch.tensor(list(str(rule).encode()), dtype=torch.uint8, device=_device(module))
        module.register_buffer(RULE, text)
