"""Bounded ranges: the largest magnitude of a layer's weights and features, which becomes its representation range.

In dynamic fixed point a fault is as large as the range, and a few outliers set the range. A bound b of a layer clips to
[-b, b] what is about to be stored, and the format's step is then that of b, whatever the values are:

    weight:  parameter -> bound -> quantize -> fault -> saturation -> layer
    feature: layer (and its BatchNorm) -> bound -> quantize -> faults -> activation -> buffer faults

Bounds act where formats act, inside `ftnas.inject`. They belong to the layer's state (``weight_bound``,
``feature_bound``), so that a trained model brings those that it was trained with.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ftnas.faults.saturation import Saturation, power_of_two, standard_deviation
from ftnas.faults.select import find_layers, select_layers
from ftnas.quantize import SMALLEST_RANGE
from ftnas.settings import Positive, Settings

WEIGHT, FEATURE = "weight_bound", "feature_bound"


class FeatureBound(Settings):
    """Bounds of features.

    Attributes:
        value: The bound: one for all layers, or by layer (selectors as in ``layers``, which is then left out). One that
            is no power of two clips at its value; the representation range is the next power of two.
        learned: Whether training moves each bound, starting from ``value``, by the gradient at clipped values; it is
            then a parameter like others, with their weight decay.
        layers: Type names, name patterns or depths; None for every Conv2d and Linear. Convolutions alone when left
            out: the answers of a classifier are not to be clipped.
    """

    value: Positive | dict[str, Positive]
    learned: bool = False
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
        layers: Type names, name patterns or depths; None for every Conv2d and Linear.
    """

    value: Positive | dict[str, Positive] | None = None
    std_multiple: Positive | None = None
    learned: bool = False
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
    return model


def bound_of(module: nn.Module, kind: str) -> Tensor | None:
    """Return the bound of a layer: a scalar tensor > 0, learned or not; None without."""
    found = module._buffers.get(kind)
    if found is not None:
        return found
    learned = module._parameters.get(kind)
    return None if learned is None else learned.abs().clamp_min(SMALLEST_RANGE)


def clipped(values: Tensor, limit: Tensor | None) -> Tensor:
    """Return values of any shape clipped to [-limit, limit]; NaN stays. What is clipped moves a learned limit."""
    return values if limit is None else torch.clamp(values, -limit.to(values.dtype), limit.to(values.dtype))


def _check_selection(value: Any, layers_given: bool) -> None:
    if isinstance(value, dict) and (layers_given or not value):
        raise ValueError("bounds by layer say themselves which layers are bounded; remove layers, or give one value")


def _values(settings: WeightBound | FeatureBound, layers: dict[str, nn.Module]) -> dict[str, float]:
    if isinstance(settings.value, dict):
        return {name: value for key, value in settings.value.items() for name in select_layers(layers, key)}
    names = sorted(select_layers(layers, settings.layers))
    if settings.value is not None:
        return dict.fromkeys(names, settings.value)
    assert isinstance(settings, WeightBound) and settings.std_multiple is not None
    multiple = settings.std_multiple
    return {name: power_of_two(multiple * standard_deviation(_stored(layers[name]))) for name in names}


def _stored(module: nn.Module) -> Tensor:
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations.weight.original  # type: ignore[union-attr,return-value]
    return module.weight  # type: ignore[return-value]


def _set(module: nn.Module, kind: str, value: float, name: str, *, learned: bool) -> None:
    if hasattr(module, kind):
        raise ValueError(f"layer {name!r} has a {kind} already; build the model anew to give it another one")
    tensor = torch.tensor(max(value, SMALLEST_RANGE), dtype=torch.float32, device=_stored(module).device)
    if learned:
        module.register_parameter(kind, nn.Parameter(tensor))
    else:
        module.register_buffer(kind, tensor)
