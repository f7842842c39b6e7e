"""Upper bounds on the expected error of chains of layers: by absolute values (b2) and by norms (b1).

The error d after a layer is bounded from the error before it: |W d| <= |W| |d| for a linear layer, K |d| for a
K-Lipschitz activation function. Both bounds hold for every network of the layers below, trained or not (El Mhamdi et
al., *Fatal Brain Damage*, Propositions 1 and 2; convolutions and pooling are linear layers or maxima of values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftnas.bounds.cut import INPUT, Cut

Order = Literal[1, 2, "inf"]

LIPSCHITZ: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Hardtanh: 1.0, nn.Tanh: 1.0, nn.Softsign: 1.0, nn.ELU: 1.0, nn.Softplus: 1.0,
    nn.Sigmoid: 0.25, nn.Identity: 1.0, nn.Dropout: 1.0, nn.Dropout2d: 1.0, nn.Flatten: 1.0,
}  # fmt: skip
"""Activation functions and what moves values only, with their constants K."""


@torch.no_grad()
def absolute(cut: Cut, inputs: Tensor, *, p: float) -> Tensor:
    """Bound E|Delta| of each output: bound b2, float64 [B, M].

    Args:
        cut: Of an ``nn.Sequential``, nested ones included.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].

    Raises:
        ValueError: One line: p is no probability, or a layer is none of those that can be bounded.
    """
    _check(p)
    error = p * cut.values(inputs).double().abs()
    for name, module in _after(cut):
        error = _through(name, module, error)
    return error


@torch.no_grad()
def norm(cut: Cut, inputs: Tensor, *, p: float, order: Order) -> Tensor:
    """Bound E of the norm of Delta over the outputs: bound b1, float64 [B].

    The expected norm of the error at the cut is exact for the orders 1 and inf, and at most sqrt(p) |x| for 2.

    Args:
        cut: Of an ``nn.Sequential``, nested ones included.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].
        order: 1, 2 or ``inf``.

    Raises:
        ValueError: One line: p is no probability, an unknown order, or a layer that cannot be bounded.
    """
    _check(p)
    if order not in (1, 2, "inf"):
        raise ValueError(f"order must be 1, 2 or 'inf', got {order!r}")
    x = cut.values(inputs).double().abs()
    flat = x.flatten(2) if cut.unit == "channel" and x.dim() > 2 else x.flatten(1)
    if order == 1:
        start = p * x.flatten(1).sum(dim=1)
    elif order == 2:
        start = math.sqrt(p) * x.flatten(1).square().sum(dim=1).sqrt()
    else:
        largest = flat.amax(dim=2) if flat.dim() == 3 else flat
        largest = largest.sort(dim=1, descending=True).values
        rank = torch.arange(largest.shape[1], dtype=torch.float64, device=x.device)
        start = (p * (1.0 - p) ** rank * largest).sum(dim=1)
    return start * math.prod(_gain(name, module, order) for name, module in _after(cut))


def _after(cut: Cut) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a chain that come after the cut."""
    chain = list(_flat("", cut.model))
    names = [name for name, _ in chain]
    if cut.layer == INPUT:
        yield from chain
        return
    if cut.layer not in names:
        raise ValueError(f"layer {cut.layer!r} is not one of a chain: {', '.join(names)}; cut at one of them")
    yield from chain[names.index(cut.layer) + 1 :]


def _flat(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is nn.Sequential:
        for key, child in module.named_children():
            yield from _flat(f"{name}.{key}" if name else key, child)
    else:
        yield name, module


def _through(name: str, module: nn.Module, error: Tensor) -> Tensor:
    """Bound the absolute error after a layer from the one before it, float64 [B, ...]."""
    if isinstance(module, nn.Linear):
        return F.linear(error, module.weight.double().abs())
    if isinstance(module, nn.Conv2d):
        _check_conv(name, module)
        weight = module.weight.double().abs()
        return F.conv2d(error, weight, None, module.stride, module.padding, module.dilation, module.groups)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return error * _scales(name, module).view(1, -1, *[1] * (error.dim() - 2))
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)):
        moved: Tensor = module(error)  # of a maximum too: |max a - max b| <= max |a - b|
        return moved
    return error * _lipschitz(name, module)


def _gain(name: str, module: nn.Module, order: Order) -> float:
    """Return an upper bound of a layer's operator norm."""
    if isinstance(module, nn.Linear):
        weight = module.weight.double()
        if order == 2:
            return float(torch.linalg.matrix_norm(weight, 2))
        return float(weight.abs().sum(dim=1 if order == "inf" else 0).amax())
    if isinstance(module, nn.Conv2d):
        _check_conv(name, module)
        weight = module.weight.double().abs()
        rows = float(weight.flatten(1).sum(dim=1).amax())
        by_group = weight.unflatten(0, (module.groups, -1)).flatten(3)
        columns = float(by_group.sum(dim=(1, 3)).amax())
        return _pick(order, rows=rows, columns=columns)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return float(_scales(name, module).amax())
    if isinstance(module, nn.MaxPool2d):
        return _pick(order, rows=1.0, columns=_overlap(module))
    if isinstance(module, nn.AvgPool2d):
        size = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * 2
        return _pick(order, rows=1.0, columns=_overlap(module) / math.prod(size))
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return 1.0  # an average: at most 1 in every norm
    return _lipschitz(name, module)


def _pick(order: Order, *, rows: float, columns: float) -> float:
    """Return the norm of that order from the largest sums of rows and columns: 2 is at most their geometric mean."""
    return rows if order == "inf" else columns if order == 1 else math.sqrt(rows * columns)


def _overlap(pool: nn.MaxPool2d | nn.AvgPool2d) -> float:
    """Return in how many windows a value can be."""
    pair = [
        v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride, getattr(pool, "dilation", 1))
    ]
    (size, stride, dilation) = pair
    return math.prod(min(k, -(-((k - 1) * d + 1) // s)) for k, s, d in zip(size, stride, dilation, strict=True))


def _scales(name: str, module: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    if module.running_var is None:
        raise ValueError(f"layer {name!r} normalises by the batch, so that samples see each other; no bound")
    scale = (module.running_var.double() + module.eps).rsqrt()
    return (scale if module.weight is None else scale * module.weight.double()).abs()


def _check_conv(name: str, module: nn.Conv2d) -> None:
    if module.padding_mode != "zeros":
        raise ValueError(f"layer {name!r} pads by {module.padding_mode!r}; only zeros are bounded")


def _lipschitz(name: str, module: nn.Module) -> float:
    constant = LIPSCHITZ.get(type(module))
    if constant is None:
        known = ", ".join(sorted(kind.__name__ for kind in LIPSCHITZ))
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__}, which is not bounded; chains of Linear, Conv2d, BatchNorm, "
            f"pooling and {known} are"
        )
    return max(constant, abs(module.alpha)) if isinstance(module, nn.ELU) else constant


def _check(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
