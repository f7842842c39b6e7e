"""Where a model's feature points are: the data flow of one forward, observed.

A feature point is the output of a Conv2d or Linear, taken after the BatchNorm that alone consumes it, if there is one.
What is stored for the next layers, the buffer value, is the output of the activation function that alone consumes the
feature point, if there is one, else the feature point itself. What consumes a tensor is read off the functions that
really run, so that the order of definition does not matter.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ftnas.faults.select import LAYER_TYPES, find_layers
from ftnas.hooks import version
from ftnas.settings import did_you_mean

Call = tuple[str, int]
"""A module's name, and the how-manieth call of it in a forward, from 0."""


_ACTIVATIONS = frozenset(
    "relu relu6 hardtanh leakyrelu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid tanh "
    "hardswish softplus softsign softshrink hardshrink tanhshrink threshold".split()
)
ACTIVATION = "an activation function"
_CASTS = frozenset(("to", "type", "float", "half", "bfloat16", "contiguous"))
_MOST_PARTS = 100_000
"""Of what a model returns: so many objects are looked into."""


def _read(name: str, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what a torch function reads the values of: shape and dtype alone tell nothing of a fault."""
    if name.endswith("_like"):
        return []
    if name.startswith("new_"):
        return tree_leaves((args[1:], kwargs))
    return tree_leaves(args[:1] if name in ("type_as", "expand_as", "view_as", "reshape_as") else (args, kwargs))


def is_activation(func: Callable[..., Any]) -> bool:
    """Tell whether a torch function is an activation function, in place or not."""
    return getattr(func, "__name__", "").replace("_", "") in _ACTIVATIONS  # relu_, log_sigmoid, _threshold


@dataclass
class _Output:
    """The output of a layer or a BatchNorm while the trace runs: who made it, and who has consumed it."""

    call: Call
    tensor: Tensor  # kept, so that its id stays its own
    consumers: list[Call | str | None] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """What one forward shows: the feature point of each layer call, and the layer calls that an activation follows."""

    points: dict[Call, Call]
    activated: frozenset[Call]


class _Watch(TorchFunctionMode):
    """Notes what consumes each watched tensor: a BatchNorm call, an activation function, or anything else (None)."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, _Output] = {}
        self.made: dict[Call, _Output] = {}
        self.batch_norm: Call | None = None
        self.normalised: Tensor | None = None  # by the BatchNorm that runs, and whether it goes on from there
        self.more = False

    def add(self, call: Call, tensor: Tensor) -> None:
        """Watch the output of a call."""
        self.outputs[id(tensor)] = self.made[call] = _Output(call, tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        read = _read(name, args, kwargs)
        watched = [out for leaf in read if (out := self.outputs.get(id(leaf))) is not None]
        if name not in _CASTS and self.normalised is not None:
            self.more = self.more or any(leaf is self.normalised for leaf in read)
        result = func(*args, **kwargs)
        is_norm = self.batch_norm is not None and name == "batch_norm"
        if is_norm:
            self.normalised = result
        if watched and (name == "__setitem__" or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))):
            consumer = self.batch_norm if is_norm else ACTIVATION if is_activation(func) else None
            for output in watched:
                output.consumers.append(consumer)
                if consumer == ACTIVATION and result is output.tensor:
                    del self.outputs[id(result)]  # in place: from here on the same tensor is what came out of it
        return result

    def observing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook of the user's own that, where it changes nothing, reads without being seen."""

        def observed(*args: Any, **kwargs: Any) -> Any:
            more, watched = self.more, list(self.outputs)
            before = [(out, len(out.consumers), version(out.tensor)) for out in self.made.values()]
            result = hook(*args, **kwargs)
            if result is None and list(self.outputs) == watched:
                self.more = more
                for out, number, unchanged in before:
                    if version(out.tensor) == unchanged:
                        del out.consumers[number:]
            return result

        return observed


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


def trace_feature_points(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Run one forward and return the feature point of every Conv2d and Linear call in it.

    The forward runs without gradients, on copies of the arguments cut to two samples (on all of them when the model
    refuses that), with buffers (BatchNorm statistics) and global random states put back afterwards.

    Args:
        model: Any module.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.

    Returns:
        For each call of a layer, the call whose output is its feature point: that of the BatchNorm that alone
        consumes it, else its own; and the layer calls whose feature point an activation function alone consumes.
    """
    try:
        return _trace(model, *_copied((args, dict(kwargs)), 2))
    except Exception:
        return _trace(model, *_copied((args, dict(kwargs)), None))


def _copied(arguments: Any, samples: int | None) -> Any:
    return tree_map(lambda leaf: leaf[:samples].clone() if isinstance(leaf, Tensor) and leaf.dim() else leaf, arguments)


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    watch = _Watch()
    counts: dict[str, int] = {}
    layers: list[Call] = []
    more: dict[Call, str] = {}
    handles = []

    def called(name: str) -> Call:
        counts[name] = counts.get(name, 0) + 1
        return name, counts[name] - 1

    def before_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            watch.batch_norm = called(name)

        return hook

    def after_norm(module: nn.Module, inputs: Any, output: Any) -> None:
        if watch.batch_norm is not None:
            watch.add(watch.batch_norm, output)
            if watch.more:
                more[watch.batch_norm] = type(module).__name__
        watch.batch_norm, watch.normalised, watch.more = None, None, False

    def after_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}) gives a {type(output).__name__} and not one tensor, so "
                    "that it has no feature that could be read; let it return the tensor alone"
                )
            layers.append(called(name))
            watch.add(layers[-1], output)

        return hook

    hooks = _hooks(model)
    replaced = [(where, key, hook) for where in hooks for key, hook in where.items()]
    for where, key, hook in replaced:
        where[key] = watch.observing(hook)
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
        for where, key, hook in replaced:
            if key in where:
                where[key] = hook
    for leaf in _leaves(result):
        if (returned := watch.outputs.get(id(leaf))) is not None:
            returned.consumers.append(None)
    points = {}
    for call in layers:
        only = _only(watch.made[call])
        points[call] = only if isinstance(only, tuple) else call
    for (name, _), kind in more.items():
        if any(point[0] == name for point in points.values()):
            warnings.warn(
                f"BatchNorm {name!r} ({kind}) does more than normalise: the feature point behind it is all that comes "
                "out of it; use nn.BatchNorm2d and an activation function of its own for faults between the two",
                stacklevel=2,
            )
    activated = frozenset(call for call, point in points.items() if _only(watch.made[point]) == ACTIVATION)
    return Trace(points, activated)


def _hooks(model: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """Return where the hooks around forwards are kept, each module's and those of all modules."""
    known = torch.nn.modules.module
    found = [known._global_forward_pre_hooks, known._global_forward_hooks]
    for module in model.modules():
        found += [module._forward_pre_hooks, module._forward_hooks]
    return found


def _leaves(result: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model returns, also from within objects that torch does not know as containers."""
    seen: set[int] = set()
    waiting = [result]
    while waiting and len(seen) < _MOST_PARTS:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif id(item) not in seen and not isinstance(item, (nn.Module, ModuleType, str)) and not callable(item):
            seen.add(id(item))
            if isinstance(item, Mapping):
                waiting.extend(item.values())
            else:
                waiting.extend(item if isinstance(item, (list, tuple)) else getattr(item, "__dict__", {}).values())


def _only(output: _Output) -> Call | str | None:
    """Return the consumer of an output that has one alone."""
    return output.consumers[0] if len(output.consumers) == 1 else None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back after the body, bit for bit, what a forward may move.

    That are parameters, buffers and attributes of the modules, what modules and hooks there are, and the global random
    states of torch, NumPy and Python. Where a model makes something in its first forward, the next one is the first.
    """
    buffers = [(buffer, -1) for buffer in model.buffers()]  # BatchNorm moves its own without counting
    counted = [*buffers, *((parameter, version(parameter)) for parameter in model.parameters())]
    tensors = [(tensor, before, tensor.detach().clone()) for tensor, before in counted]
    attributes = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    attributes += [(table, dict(table)) for _, own in attributes for table in own.values() if isinstance(table, dict)]
    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for table, saved in attributes:
            if [(key, id(value)) for key, value in table.items()] != [(key, id(value)) for key, value in saved.items()]:
                table.clear()
                table.update(saved)
        with torch.no_grad():
            for tensor, before, values in tensors:
                if before < 0 or version(tensor) != before:
                    tensor.copy_(values)
