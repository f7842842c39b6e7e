"""Where a module's feature points are: the data flow of one forward, observed.

A feature point is the output of a Conv2d or Linear, taken after the BatchNorm that alone consumes it, if there is one.
What is stored for the next layers, the buffer value, is the output of the activation function that alone consumes the
feature point, if there is one, else the feature point itself. What consumes a tensor is read off the functions that
really run, so that the order of definition does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ftnas.undisturbed import undisturbed, version

LAYER_TYPES = (nn.Conv2d, nn.Linear)
"""The layers that have weights and features as faults know them."""

Call = tuple[str, int]
"""A module's name, and the how-manieth call of it in a forward, from 0."""

_ACTIVATIONS = frozenset(
    "relu relu6 hardtanh leakyrelu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid tanh "
    "hardswish softplus softsign softshrink hardshrink tanhshrink threshold".split()
)
ACTIVATION = "an activation function"
_CASTS = frozenset(("to", "type", "float", "half", "bfloat16", "contiguous"))
_MOST_PARTS = 100_000
"""Of what a model is given or returns: so many objects are looked into."""


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


def trace_feature_points(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Run one forward and return the feature point of every Conv2d and Linear call in it.

    The forward runs without gradients, on copies of the arguments cut to two samples (on all of them when the model
    refuses that, and with gradients when it refuses that too), and leaves the model `undisturbed`.

    Args:
        model: Any module.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.

    Returns:
        For each call of a layer, the call whose output is its feature point: that of the BatchNorm that alone
        consumes it, else its own; and the layer calls whose feature point an activation function alone consumes.
    """
    ways = [_Way(samples=2), _Way()]
    if torch.is_grad_enabled():
        ways.append(_Way(grad=True))  # for a model that takes gradients itself
    ways.append(_Way(objects=False))  # for one that knows what it is given by identity
    for way in ways:
        try:
            given = _copied((args, dict(kwargs)), way, {})
            return _trace(model, *given, grad=way.grad)
        except Exception:
            if way is ways[-1]:
                raise
    raise AssertionError("the last way returns or raises")


@dataclass(frozen=True)
class _Way:
    """How a forward is traced: on how many samples, whether with gradients, and on copies of objects too."""

    samples: int | None = None
    grad: bool = False
    objects: bool = True


def _copied(item: Any, way: _Way, known: dict[int, Any]) -> Any:
    """Return arguments of a forward that it may change: tensors cut to some samples, where that can be, and objects."""
    return tree_map(partial(_copied_leaf, way=way, known=known), item)


def _copied_leaf(leaf: Any, *, way: _Way, known: dict[int, Any]) -> Any:
    if isinstance(leaf, Tensor):
        cut = way.samples is not None and leaf.dim() and leaf.layout == torch.strided and not leaf.is_nested
        part = leaf[: way.samples] if cut else leaf
        return part.detach().clone().requires_grad_(leaf.requires_grad)
    if id(leaf) in known or len(known) >= _MOST_PARTS:
        return known.get(id(leaf), leaf)
    own = getattr(leaf, "__dict__", None) if way.objects else None
    if not isinstance(own, dict) or isinstance(leaf, (nn.Module, ModuleType)) or callable(leaf):
        return leaf
    try:
        copied = known[id(leaf)] = copy(leaf)
        copied.__dict__.update({name: _copied(value, replace(way, samples=None), known) for name, value in own.items()})
    except Exception:  # an object that forbids it is passed on as it is
        known[id(leaf)] = copied = leaf
    return copied


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, grad: bool) -> Trace:
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
        with undisturbed(model), torch.set_grad_enabled(grad), watch:
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
