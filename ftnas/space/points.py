"""The feature points that a network of cells declares: read from its modules, since the path of a supernet changes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ftnas.dataflow import Trace, trace_feature_points
from ftnas.space.ops import OWN

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh)
_TRIED_ON = (2, 8, 8)
"""Samples and size of the map that a user's own primitive is traced on, as `check_primitive` tries it."""


def feature_points(root: nn.Module) -> dict[str, str]:
    """Return, for each Conv2d or Linear whose output goes to one BatchNorm alone, both modules' names.

    Read from the order inside every plain ``nn.Sequential``, so that it needs no forward, and for a user's own
    primitives from the data flow of one. The convolutions of a factorised reduction are not in it: their outputs are
    concatenated before the BatchNorm.
    """
    found = {
        layer: norm
        for children in _sequences(root)
        for (layer, conv), (norm, bn) in zip(children, children[1:], strict=False)
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
    }
    for prefix, trace in _traces(root):
        for (layer, index), (point, calls) in trace.points.items():
            if layer != point and index == calls:
                found[_joined(prefix, layer)] = _joined(prefix, point)
    return found


def activated_points(root: nn.Module) -> frozenset[str]:
    """Return the names of the layers whose feature point goes to an activation function alone.

    Read as `feature_points` are: the first half of a separable convolution. What leaves the module of an edge is read
    by any number of others, each with an activation function of its own or none, so that the feature point itself is
    what is stored.
    """
    found = set()
    for children in _sequences(root):
        for index, (name, conv) in enumerate(children):
            rest = [module for _, module in children[index + 1 :]]
            if rest and isinstance(rest[0], nn.BatchNorm2d):
                rest = rest[1:]
            if isinstance(conv, nn.Conv2d) and rest and isinstance(rest[0], _ACTIVATIONS):
                found.add(name)
    for prefix, trace in _traces(root):
        found |= {_joined(prefix, layer) for layer, _ in trace.activated}
    return frozenset(found)


def _sequences(root: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield the children of every plain ``nn.Sequential`` outside of own primitives, each with its full name."""
    own = [f"{_joined(prefix, '')}" for prefix, module in root.named_modules() if hasattr(module, OWN)]
    for prefix, module in root.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            if not any(f"{prefix}.".startswith(inside) for inside in own):
                yield [(f"{prefix}.{name}", child) for name, child in module.named_children()]


def _traces(root: nn.Module) -> Iterator[tuple[str, Trace]]:
    """Yield what one forward of each module of a user's own primitive shows."""
    for prefix, module in root.named_modules():
        channels = getattr(module, OWN, None)
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        if channels is None or like is None:
            continue
        samples, *size = _TRIED_ON
        image = torch.zeros(samples, channels, *size, dtype=like.dtype, device=like.device)
        yield prefix, trace_feature_points(module, (image,), {})


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
