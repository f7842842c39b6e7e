"""What rounding to fixed point costs at most, layer by layer (Theorem 5 of *When Neurons Fail*, for our formats).

The theorem bounds what values that are off by at most lambda_l in each layer l do to the output. Here lambda_l follows
from the format: a feature is rounded before the activation function, to a step that depends on the largest value of
its tensor, and the weights are rounded too. With e the error that arrives and W' the rounded weights

    |W' x' - W x| <= |W| e + |W' - W| (|x| + e)          what arrives, and the rounding of weights
    |round(z) - z| <= max(step / 2, z - hi step, lo step - z)      the rounding of z = W' x', at the ends too

and the activation function takes K times the sum of these on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftnas.bounds.ops import Activation, Affine, Box
from ftnas.bounds.ranges import Ranges
from ftnas.bounds.summary import Node, Summary
from ftnas.quantize import FixedPoint, Quantization


@dataclass(frozen=True)
class Rounding:
    """The rounding of one layer's features.

    Attributes:
        name: Of the layer.
        step: LSB of the widest tensor that can come.
        error: The most that rounding can move a value by.
    """

    name: str
    step: float
    error: float


@dataclass(frozen=True)
class Precision:
    """What a format costs at most.

    Attributes:
        features: The part of the features' rounding, float64 [B, M].
        weights: The part of the weights' rounding, float64 [B, M].
        layers: The rounding of each layer.
    """

    features: Tensor
    weights: Tensor
    layers: tuple[Rounding, ...]

    @property
    def error(self) -> Tensor:
        """Return the bound of the absolute error of each output, float64 [B, M]."""
        return self.features + self.weights


@torch.no_grad()
def precision(summary: Summary, ranges: Ranges, quantization: Quantization | FixedPoint) -> Precision:
    """Bound what a fixed-point format does to the outputs, as ``ftnas.inject(..., quantization=...)`` applies it.

    Args:
        summary: The network.
        ranges: Of its values; a free range of the features follows from the largest one that can come, over all B.
        quantization: The formats of weights and features.

    Raises:
        ValueError: A layer has weights that pass through a function after they are read.
    """
    chosen = Quantization.of(quantization)
    assert chosen is not None
    batch = len(ranges.boxes[0].low)
    errors: list[Tensor] = []  # [2 B, ...]: the part of the features, the part of the weights
    found: list[Rounding] = []
    for number, node in enumerate(summary.nodes):
        parts = [errors[i] for i in node.inputs]
        if not parts:
            error = torch.zeros(2 * batch, *node.shape, dtype=torch.float64, device=summary.device)
        elif isinstance(node.op, Activation):
            error = _activated(node.op, ranges.boxes[node.inputs[0]], parts[0])
        else:
            assert node.op is not None
            error = node.op.bound(*parts)
            if isinstance(node.op, Affine):
                source = ranges.boxes[node.inputs[0]]
                error = _weights(node, source, parts[0], error, chosen.weights)
                error, rounding = _features(node.name, ranges.boxes[number], error, chosen.features)
                found.append(rounding)
        errors.append(error)
    features, weights = errors[-1].chunk(2)
    return Precision(features, weights, tuple(found))


def _weights(node: Node, source: Box, arriving: Tensor, error: Tensor, form: FixedPoint) -> Tensor:
    """Add what the rounding of a layer's weights does."""
    op = node.op
    assert isinstance(op, Affine)
    if op.stored is None:
        raise ValueError(f"layer {node.name!r} has saturated weights, whose rounding is not bounded")
    shape = (-1, *[1] * (op.stored.dim() - 1))
    moved = ((form.quantize(op.stored) - op.stored) * op.scale.view(shape)).abs()
    own, others = _halves(op.apply(source.largest + sum(arriving.chunk(2)), moved), weights=True), error
    return own + others


def _features(name: str, box: Box, error: Tensor, form: FixedPoint) -> tuple[Tensor, Rounding]:
    """Add what the rounding of a layer's features does, before the activation function."""
    reached = box.widened(sum(error.chunk(2), start=torch.zeros_like(box.low)))
    grid = form.grid(reached.largest.amax().reshape(1))
    step = float(grid.lsb)
    over = torch.maximum(reached.high - grid.hi * step, grid.lo * step - reached.low)
    own = over.clamp_min(step / 2)
    return error + _halves(own, weights=False), Rounding(name, step, float(own.amax()))


def _halves(own: Tensor, *, weights: bool) -> Tensor:
    """Return an error [B, ...] as one of the two parts, [2 B, ...]."""
    none = torch.zeros_like(own)
    return torch.cat([none, own] if weights else [own, none])


def _activated(op: Activation, box: Box, error: Tensor) -> Tensor:
    """Take an error through an activation function; both parts shrink alike where the box caps their sum."""
    whole = sum(error.chunk(2), start=torch.zeros_like(box.low))
    share = torch.where(whole > 0, op.bound_in(box, whole) / whole.clamp_min(1e-300), 0.0)
    return error * share.repeat(2, *[1] * (share.dim() - 1))
