"""Where a model's feature points are: the data flow of one forward, observed.

A feature point is the output of a Conv2d or Linear, taken after the BatchNorm that alone consumes it, if there is one.
What consumes a tensor is read off the functions that really run, so that the order of definition does not matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ftnas.faults.select import LAYER_TYPES

Call = tuple[str, int]
"""A module's name, and the how-manieth call of it in a forward, from 0."""


@dataclass
class _Output:
    """A layer's output while the trace runs: who made it, and who has consumed it."""

    call: Call
    tensor: Tensor  # kept, so that its id stays its own
    consumers: list[Call | None] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Notes, for each watched tensor, the BatchNorm call (or None for anything else) that consumes it."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, _Output] = {}
        self.batch_norm: Call | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watched = [out for leaf in tree_leaves((args, kwargs)) if (out := self.outputs.get(id(leaf))) is not None]
        result = func(*args, **kwargs)
        if watched and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for output in watched:
                is_norm = self.batch_norm is not None and getattr(func, "__name__", "") == "batch_norm"
                output.consumers.append(self.batch_norm if is_norm else None)
        return result


class FeaturePoints:
    """Tells, at each call of a layer or a BatchNorm, whether its output is a feature point, and whose."""

    def __init__(self, points: Mapping[Call, Call]) -> None:
        self._points = dict(points)
        self._owners = {point: layer for layer, point in self._points.items()}

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

    def __init__(self, norms: Mapping[str, str]) -> None:
        self._norms = dict(norms)
        self._layers = {norm: layer for layer, norm in norms.items()}

    def owner(self, call: Call, is_layer: bool) -> Call | None:
        """Return the layer call whose feature point this call's output is, or None."""
        name, index = call
        if is_layer:
            return None if name in self._norms else call
        return (self._layers[name], index) if name in self._layers else None


def find_feature_points(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FeaturePoints:
    """Return what the model declares by ``feature_points()``, else what a traced forward shows (kept per model)."""
    declare = getattr(model, "feature_points", None)
    if callable(declare):
        return DeclaredPoints(declare())
    key = (tuple(id(module) for module in model.modules()), model.training)
    kept = _TRACES.setdefault(model, {})
    if key not in kept:
        kept[key] = FeaturePoints(trace_feature_points(model, args, kwargs))
    return kept[key]


_TRACES: weakref.WeakKeyDictionary[nn.Module, dict[Any, FeaturePoints]] = weakref.WeakKeyDictionary()


def trace_feature_points(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Call, Call]:
    """Run one forward and return the feature point of every Conv2d and Linear call in it.

    The forward runs without gradients, on copies of the arguments cut to two samples (on all of them when the model
    refuses that), with buffers (BatchNorm statistics) and global random states put back afterwards.

    Args:
        model: Any module.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.

    Returns:
        For each call of a layer, the call whose output is its feature point: that of the BatchNorm that alone
        consumes it, else its own.
    """
    try:
        return _trace(model, *_copied((args, dict(kwargs)), 2))
    except Exception:
        return _trace(model, *_copied((args, dict(kwargs)), None))


def _copied(arguments: Any, samples: int | None) -> Any:
    return tree_map(lambda leaf: leaf[:samples].clone() if isinstance(leaf, Tensor) and leaf.dim() else leaf, arguments)


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Call, Call]:
    watch = _Watch()
    counts: dict[str, int] = {}
    handles = []

    def before_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            watch.batch_norm = (name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1

        return hook

    def after_norm(module: nn.Module, inputs: Any, output: Any) -> None:
        watch.batch_norm = None

    def after_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            call = (name, counts.get(name, 0))
            counts[name] = call[1] + 1
            watch.outputs[id(output)] = _Output(call, output)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(before_norm(name)))
            handles.append(module.register_forward_hook(after_norm))
        elif isinstance(module, LAYER_TYPES):
            handles.append(module.register_forward_hook(after_layer(name)))
    try:
        with undisturbed(model), torch.no_grad(), watch:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(result):
        if (returned := watch.outputs.get(id(leaf))) is not None:
            returned.consumers.append(None)
    points = {}
    for output in watch.outputs.values():
        only = output.consumers[0] if len(output.consumers) == 1 else None
        points[output.call] = only if only is not None else output.call
    return points


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers and the global random states back after the body, bit for bit."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer.copy_(saved)  # also where the forward put another tensor there
