"""Upper bounds on the expected error of crashes: by absolute values (b2) and by norms (b1).

Both follow the error from the cut to the outputs through a `Summary`, over its joins too: the error of a sum is at most
the sum of the errors of its terms, that of a concatenation is made of the errors of its parts. What bypasses the cut
has no error. They hold for every network that can be summarised, trained or not (El Mhamdi et al., *Fatal Brain
Damage*, Propositions 1 and 2).
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ftnas.bounds.cut import Cut
from ftnas.bounds.ops import Activation, Add, Affine, Concat, Constant, Op
from ftnas.bounds.summary import Node, Summary, summarize

T = TypeVar("T")
Order = Literal[1, 2, "inf"]


@torch.no_grad()
def absolute(cut: Cut, inputs: Tensor, *, p: float) -> Tensor:
    """Bound E|Delta| of each output: bound b2, float64 [B, M].

    A maximum takes the sum of its window's errors on: the expected largest error can be above the largest expected one.

    Args:
        cut: Of a network that `summarize` takes.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].

    Raises:
        ValueError: One line: p is no probability, or a layer is none of those that can be bounded.
    """
    _check(p)
    summary, start, values = _start(cut, inputs)
    errors = summary.spread({start: p * values.double().abs()}, batch=len(inputs))
    return _reached(cut, errors[-1])


@torch.no_grad()
def norm(cut: Cut, inputs: Tensor, *, p: float, order: Order) -> Tensor:
    """Bound E of the norm of Delta over the outputs: bound b1, float64 [B].

    The expected norm of the error at the cut is exact for the orders 1 and inf, and at most sqrt(p) |x| for 2.

    Args:
        cut: Of a network that `summarize` takes.
        inputs: float [B, ...].
        p: Crash probability of a unit, in [0, 1].
        order: 1, 2 or ``inf``.

    Raises:
        ValueError: One line: p is no probability, an unknown order, or a layer that cannot be bounded.
    """
    _check(p)
    if order not in (1, 2, "inf"):
        raise ValueError(f"order must be 1, 2 or 'inf', got {order!r}")
    summary, start, values = _start(cut, inputs)
    x = values.double().abs()
    if order == 1:
        size = p * x.flatten(1).sum(dim=1)
    elif order == 2:
        size = math.sqrt(p) * x.flatten(1).square().sum(dim=1).sqrt()
    else:
        flat = x.flatten(2) if cut.unit == "channel" and x.dim() > 2 else x.flatten(1)
        largest = flat.amax(dim=2) if flat.dim() == 3 else flat
        largest = largest.sort(dim=1, descending=True).values
        rank = torch.arange(largest.shape[1], dtype=torch.float64, device=x.device)
        size = (p * (1.0 - p) ** rank * largest).sum(dim=1)
    gains: list[float | None] = []
    for number, node in enumerate(summary.nodes):
        inside = [gain for gain in (gains[i] for i in node.inputs) if gain is not None]
        gains.append(1.0 if number == start else _join(summary, node, inside, order) if inside else None)
    return size * _reached(cut, gains[-1])


def _start(cut: Cut, inputs: Tensor) -> tuple[Summary, int, Tensor]:
    """Return the network, the node of the cut and its values."""
    summary = summarize(cut.model, inputs.shape[1:], fold=False)
    start, values = summary.output_of(cut.layer), cut.values(inputs)
    if summary.nodes[start].shape != tuple(values.shape[1:]):
        raise ValueError(f"layer {cut.layer!r} gives something else than its last operation; cut at another layer")
    return summary, start, values


def _reached(cut: Cut, value: T | None) -> T:
    if value is None:
        raise ValueError(f"no output depends on layer {cut.layer!r}, so that there is nothing to bound")
    return value


def _join(summary: Summary, node: Node, gains: list[float], order: Order) -> float:
    """Return the gain of a node from those of what it reads."""
    if isinstance(node.op, Concat):
        return max(gains) if order == "inf" else sum(gains) if order == 1 else math.hypot(*gains)
    if isinstance(node.op, Add):
        return sum(gains)
    assert node.op is not None and not isinstance(node.op, Constant)
    return gains[0] * gain(node.op, summary.nodes[node.inputs[0]].shape, order=order)


def gain(op: Op, shape: tuple[int, ...], *, order: Order) -> float:
    """Return an upper bound of how much an operation of one input stretches the norm of an error.

    The largest sums of rows and of columns of the matrix of `Op.spread` are found by running it forward and backward on
    ones; the 2-norm of a convolution or a pooling is at most their geometric mean, that of a Linear is its own.

    Args:
        op: The operation.
        shape: Of a sample of its input.
        order: 1, 2 or ``inf``.
    """
    if isinstance(op, Activation):
        return op.lipschitz
    if order == 2 and isinstance(op, Affine) and op.window is None:
        return float(torch.linalg.matrix_norm(op.weight, 2))
    device = op.weight.device if isinstance(op, Affine) else None
    with torch.enable_grad():
        ones = torch.ones(1, *shape, dtype=torch.float64, device=device, requires_grad=True)
        rows = op.bound(ones).amax()
        (columns,) = torch.autograd.grad(op.spread(ones).sum(), ones)
    most_rows, most_columns = float(rows.detach()), float(columns.amax())
    return most_rows if order == "inf" else most_columns if order == 1 else math.sqrt(most_rows * most_columns)


def _check(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
