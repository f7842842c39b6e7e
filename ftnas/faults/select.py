"""Which layers of a model are meant: by type, by name pattern, by predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ftnas.dataflow import LAYER_TYPES
from ftnas.settings import did_you_mean

TYPE_NAMES: dict[str, type[nn.Module]] = {"conv2d": nn.Conv2d, "linear": nn.Linear}
_NAME = "name:"

KNOWN = "faults know Conv2d and Linear layers alone"
_UNKNOWN = (
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
)
"""Layers of torch with matrices of weights that are neither quantized nor hit."""

Predicate = Callable[[str, nn.Module], bool]
Layers = str | Predicate | Sequence[str | Predicate] | None


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every Conv2d and Linear of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}


def unknown_layers(model: nn.Module) -> list[str]:
    """Return the layers with matrices of weights that no injection reaches, as ``name (type)``."""
    return [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _UNKNOWN) and not isinstance(module, LAYER_TYPES)
    ]


def select_layers(candidates: Mapping[str, nn.Module], layers: Layers) -> frozenset[str]:
    """Return the names of the selected layers.

    Args:
        candidates: Layers by name.
        layers: A type name (``conv2d``, ``linear``), a name pattern (``stage1.*``), a depth (``depth:0-4`` or
            ``depth:7``: places in the order of definition, from 0), a whole name (``name:linear``, for a layer that is
            called like a type), a predicate of (name, module), or a sequence of those (any may match); None selects
            all.

    Raises:
        ValueError: A selector that matches nothing, or that is none.
    """
    if layers is None:
        return frozenset(candidates)
    selectors = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    chosen: set[str] = set()
    for selector in selectors:
        if not isinstance(selector, str) and not callable(selector):
            raise ValueError(f"layers must be names of types or layers, predicates, or None for all, got {selector!r}")
        depths = _depths(selector)
        matched = {
            name
            for depth, (name, module) in enumerate(candidates.items())
            if (depth in depths if depths is not None else _matches(selector, name, module))
        }
        if not matched:
            if depths is not None:
                raise ValueError(f"layers={selector!r} matches no layer; there are depths 0..{len(candidates) - 1}")
            types = [key for key, kind in TYPE_NAMES.items() if any(isinstance(m, kind) for m in candidates.values())]
            if str(selector).lower() in TYPE_NAMES:
                hint = f"the model has none of that type; there is: {', '.join(types) or 'nothing'}"
            else:
                hint = did_you_mean(str(selector), [*map(exactly, candidates), *types]) + f" ({KNOWN})"
            raise ValueError(f"layers={selector!r} matches no layer; {hint}")
        chosen |= matched
    if not chosen:
        raise ValueError(f"layers={layers!r} selects no layer; None selects all")
    return frozenset(chosen)


def exactly(name: str) -> str:
    """Return the selector of one layer by its name, also where that looks like a type, a pattern or a depth."""
    looks = name.lower() in TYPE_NAMES or any(letter in name for letter in "*?[") or name.startswith(("depth:", _NAME))
    return _NAME + name if looks else name


def _depths(selector: str | Predicate) -> range | None:
    """Return the depths that a ``depth:A-B`` names, None for any other selector."""
    if not isinstance(selector, str) or not selector.startswith("depth:"):
        return None
    match = re.fullmatch(r"depth:(\d+)(?:-(\d+))?", selector)
    if match is None:
        raise ValueError(f"a depth is written depth:3 or depth:0-4, got {selector!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _matches(selector: str | Predicate, name: str, module: nn.Module) -> bool:
    if not isinstance(selector, str):
        return bool(selector(name, module))
    if selector.startswith(_NAME):
        return name == selector.removeprefix(_NAME)
    kind = TYPE_NAMES.get(selector.lower())
    return isinstance(module, kind) if kind is not None else fnmatchcase(name, selector)


def is_ours(module: nn.Module, output: Tensor) -> bool:
    """Tell whether the output of a layer or a BatchNorm may be written to in a forward hook, the only one.

    It may where torch's own forward made it: that gives a fresh tensor, of which no gradient needs the values.
    """
    kind: Any = type(module)
    own = any(kind.forward is known.forward for known in (*LAYER_TYPES, nn.BatchNorm2d))
    if isinstance(module, nn.Conv2d):
        own = own and kind._conv_forward is nn.Conv2d._conv_forward
    changed = "forward" in module.__dict__ or "_conv_forward" in module.__dict__
    hooked = len(module._forward_hooks) > 1 or bool(torch.nn.modules.module._global_forward_hooks)
    return own and not (changed or hooked or output._is_view() or output.is_leaf and output.requires_grad)


def macs_per_output(layer: nn.Module) -> int:
    """Return the multiply-accumulates behind one output value of a Conv2d or Linear, M_l."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features
    raise TypeError(f"not a Conv2d or Linear: {type(layer).__name__}")
