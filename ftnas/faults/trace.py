"""Where a model's feature points are, for an injection: declared by the model, or traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftnas.dataflow import Call, Trace, trace_feature_points
from ftnas.faults.select import find_layers
from ftnas.settings import did_you_mean


class FeaturePoints:
    """Tells, at each call of a layer or a BatchNorm, whether its output is a feature point, and whose."""

    def __init__(self, trace: Trace) -> None:
        self._points = trace.points
        self._activated = trace.activated
        self._owners = {point: layer for layer, point in self._points.items()}

    @property
    def layers(self) -> Sequence[str]:
        """The layers that run in every forward, as far as that is known."""
        return tuple(dict.fromkeys(layer for layer, _ in self._points))

    def activated(self, layer: Call) -> bool:
        """Tell whether an activation function alone consumes the feature point of a layer call."""
        return layer in self._activated

    def owner(self, call: Call, is_layer: bool) -> Call | None:
        """Return the layer call whose feature point this call's output is, or None.

        Raises:
            RuntimeError: A layer that did not run in the traced forward.
        """
        if is_layer and call not in self._points:
            raise RuntimeError(
                f"layer {call[0]!r} runs now (call {call[1]}) but did not in the forward that was traced; a model "
                "whose path changes must declare feature_points() -> {layer name: name of its BatchNorm}"
            )
        return self._owners.get(call)


class DeclaredPoints(FeaturePoints):
    """Feature points that the model itself declares, by names; the calls of both correspond in order."""

    def __init__(self, norms: Mapping[str, str], activated: Iterable[str]) -> None:
        self._norms = dict(norms)
        self._layers = {norm: layer for layer, norm in norms.items()}
        self._names = frozenset(activated)

    @property
    def layers(self) -> Sequence[str]:
        """None that is known: a model with paths declares ``running_layers(...)`` for the arguments of a forward."""
        return ()

    def activated(self, layer: Call) -> bool:
        """Tell whether an activation function alone consumes the feature point of a layer call."""
        return layer[0] in self._names

    def owner(self, call: Call, is_layer: bool) -> Call | None:
        """Return the layer call whose feature point this call's output is, or None."""
        name, index = call
        if is_layer:
            return None if name in self._norms else call
        return (self._layers[name], index) if name in self._layers else None


def find_feature_points(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FeaturePoints:
    """Return what the model declares by ``feature_points()``, else what a traced forward shows.

    Raises:
        ValueError: A name is declared that the model does not have, or a BatchNorm twice.
    """
    declare = getattr(model, "feature_points", None)
    if not callable(declare):
        return FeaturePoints(trace_feature_points(model, args, kwargs))
    activated = getattr(model, "activated_points", None)
    norms, names = dict(declare()), tuple(activated() if callable(activated) else ())
    layers = find_layers(model)
    known = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for given, have, method, what in (
        (norms, layers, "feature_points", "Conv2d or Linear"),
        (norms.values(), known, "feature_points", "BatchNorm"),
        (names, layers, "activated_points", "Conv2d or Linear"),
    ):
        wrong = next((name for name in given if name not in have), None)
        if wrong is not None:
            raise ValueError(f"{method}() declares {wrong!r}, which is no {what}; {did_you_mean(wrong, have)}")
    twice, count = Counter(norms.values()).most_common(1)[0] if norms else ("", 0)
    if count > 1:
        raise ValueError(f"feature_points() declares BatchNorm {twice!r} for {count} layers; give each layer its own")
    return DeclaredPoints(norms, names)


def running_layers(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], points: FeaturePoints | None
) -> Sequence[str]:
    """Return the names of the layers that a forward will run, as far as that is known.

    A model whose path changes may declare it: ``running_layers``, called with the arguments of the forward.

    Args:
        model: Any.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        points: What was traced; None without.
    """
    declared = getattr(model, "running_layers", None)
    if callable(declared):
        return tuple(declared(*args, **kwargs))
    return () if points is None else points.layers
