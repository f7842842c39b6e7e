"""The operations of a summarised network: what each does to values, to intervals and to errors.

Every operation moves an error of at most e at its input to at most `bound(e)` at its output, elementwise:
a linear one to |W| e, a K-Lipschitz activation function to K e, a maximum to the maximum of e (|max a - max b| <=
max |a - b|), a sum to the sum of the errors of its terms (triangle inequality), a concatenation or a slice to the
errors of the parts that it keeps. `spread` is a linear function that is nowhere below `bound`: the two differ for a
maximum alone, which is at most the sum over its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


class Box(NamedTuple):
    """An interval for each value: float64 [B, ...] each, low <= high."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """Return the largest magnitude, [B, ...]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def widened(self, error: Tensor) -> Box:
        """Return the box of values that may be off by ``error`` [B, ...]."""
        return Box(self.low - error, self.high + error)


class Op:
    """One operation on float64 tensors [B, ...]; this default is right for what is increasing and homogeneous.

    Attributes:
        constants: What it does beside its type, its shapes and the model's state, in words: slopes, limits, windows.
    """

    constants: str = ""

    def run(self, *values: Tensor) -> Tensor:
        """Return the output for values [B, ...]."""
        raise NotImplementedError

    def box(self, *boxes: Box) -> Box:
        """Return an interval that holds every output for inputs in the intervals."""
        return Box(self.run(*(box.low for box in boxes)), self.run(*(box.high for box in boxes)))

    def bound(self, *errors: Tensor) -> Tensor:
        """Bound the absolute error of the output from those of the inputs, [B, ...]."""
        return self.run(*errors)

    def spread(self, *errors: Tensor) -> Tensor:
        """Bound it by a linear function with weights >= 0."""
        return self.bound(*errors)


@dataclass(frozen=True)
class Window:
    """Stride, padding, dilation and groups of a convolution."""

    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """A Linear or a Conv2d, with the BatchNorm that alone reads it folded in.

    Attributes:
        weight: float64 [out, in] or [out, in / groups, kh, kw], folded.
        bias: float64 [out].
        window: Of a convolution; None for a Linear.
        stored: The weight as it is stored, before folding; None where a function bounds it after it is read.
        scale: float64 [out], the factor of the BatchNorm; ones without.
    """

    weight: Tensor
    bias: Tensor
    window: Window | None
    stored: Tensor | None
    scale: Tensor
    constants: str = ""

    def apply(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer with another weight of its shape."""
        if self.window is None:
            return F.linear(values, weight, bias)
        w = self.window
        return F.conv2d(values, weight, bias, w.stride, w.padding, w.dilation, w.groups)

    def run(self, *values: Tensor) -> Tensor:
        """Return W x + b."""
        return self.apply(values[0], self.weight, self.bias)

    def box(self, *boxes: Box) -> Box:
        """Return W m + b -+ |W| r for the middle m and the radius r: the same as from W+ and W-."""
        (low, high) = boxes[0]
        middle = self.apply((low + high) / 2, self.weight, self.bias)
        radius = self.bound((high - low) / 2)
        return Box(middle - radius, middle + radius)

    def bound(self, *errors: Tensor) -> Tensor:
        """Return |W| e."""
        return self.apply(errors[0], self.weight.abs())

    def scaled(self, factor: Tensor, shift: Tensor) -> Affine:
        """Fold a factor and a shift of each output, [out] each, into the layer."""
        shape = (-1, *[1] * (self.weight.dim() - 1))
        weight, bias = self.weight * factor.view(shape), self.bias * factor + shift
        return replace(self, weight=weight, bias=bias, scale=self.scale * factor)

    @property
    def fan_in(self) -> int:
        """Return how many values one output reads: the receptive field of a convolution."""
        return self.weight[0].numel()

    @property
    def largest(self) -> float:
        """Return w_m, the largest weight in absolute value; a convolution repeats its own at every position."""
        return float(self.weight.abs().amax())


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """factor x + shift, of each channel or of everything: what a number does.

    Attributes:
        factor: float64, broadcasts over [B, ...].
        shift: float64, the same.
    """

    factor: Tensor
    shift: Tensor
    constants: str = ""

    def run(self, *values: Tensor) -> Tensor:
        """Return factor x + shift."""
        return values[0] * self.factor + self.shift

    def box(self, *boxes: Box) -> Box:
        """Return the two ends in order."""
        ends = self.run(boxes[0].low), self.run(boxes[0].high)
        return Box(torch.minimum(*ends), torch.maximum(*ends))

    def bound(self, *errors: Tensor) -> Tensor:
        """Return |factor| e."""
        return errors[0] * self.factor.abs()


class Norm(Scale):
    """A BatchNorm in evaluation."""


@dataclass(frozen=True, eq=False)
class Activation(Op):
    """An increasing activation function with Lipschitz constant K.

    Attributes:
        function: On tensors of any shape.
        lipschitz: K.
        kind: Name of the function.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float
    kind: str
    constants: str = ""

    def run(self, *values: Tensor) -> Tensor:
        """Return the function."""
        return self.function(values[0])

    def bound(self, *errors: Tensor) -> Tensor:
        """Return K e."""
        return errors[0] * self.lipschitz

    def bound_in(self, box: Box, error: Tensor) -> Tensor:
        """Bound the error for inputs of which the right ones lie in the box: K e, or what the box leaves of it.

        For x in [a, b] and |t| <= e, f(x + t) - f(x) is at most f(b + e) - f(a) and at least f(a - e) - f(b).
        """
        up = self.function(box.high + error) - self.function(box.low)
        down = self.function(box.high) - self.function(box.low - error)
        return torch.minimum(self.bound(error), torch.maximum(up, down))


@dataclass(frozen=True, eq=False)
class MaxPool(Op):
    """The maximum of windows of a map."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def run(self, *values: Tensor) -> Tensor:
        """Return the maxima."""
        return F.max_pool2d(values[0], self.size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def spread(self, *errors: Tensor) -> Tensor:
        """Return the sums of the windows."""
        (error,) = errors
        rows, columns = self.run(error.detach()[:1]).shape[2:]
        pad = []
        for axis, outputs in ((1, columns), (0, rows)):
            reach = (outputs - 1) * self.stride[axis] + (self.size[axis] - 1) * self.dilation[axis] + 1
            after = max(0, reach - error.shape[2 + axis] - self.padding[axis])
            pad += [self.padding[axis], after]
        ones = error.new_ones(error.shape[1], 1, *self.size)
        padded = F.pad(error, pad)
        sums = F.conv2d(padded, ones, None, self.stride, 0, self.dilation, error.shape[1])
        return sums[:, :, :rows, :columns]

    @property
    def overlap(self) -> int:
        """Return in how many windows a value can be."""
        return math.prod(
            min(k, -(-((k - 1) * d + 1) // s)) for k, s, d in zip(self.size, self.stride, self.dilation, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Average(Op):
    """An average pooling: a linear function with weights >= 0 that sum to at most 1.

    Attributes:
        function: On [B, C, H, W].
        overlap: In how many windows a value can be, at most.
    """

    function: Callable[[Tensor], Tensor]
    overlap: int
    constants: str = ""

    def run(self, *values: Tensor) -> Tensor:
        """Return the averages."""
        return self.function(values[0])


@dataclass(frozen=True, eq=False)
class Move(Op):
    """What moves values, leaves some out or adds zeros: reshape, slice, zero padding, dropout in evaluation."""

    function: Callable[[Tensor], Tensor]
    constants: str = ""

    def run(self, *values: Tensor) -> Tensor:
        """Return the moved values."""
        return self.function(values[0])


class Add(Op):
    """The sum of tensors of one shape."""

    def run(self, *values: Tensor) -> Tensor:
        """Return the sum."""
        return sum(values[1:], start=values[0])


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """Tensors put one after the other along a dimension from 1 on."""

    dim: int

    def run(self, *values: Tensor) -> Tensor:
        """Return the concatenation."""
        return torch.cat(values, dim=self.dim)


@dataclass(frozen=True, eq=False)
class Constant(Op):
    """A value that no input changes, float64 [1, ...]."""

    value: Any

    def run(self, *values: Tensor) -> Tensor:
        """Return the value."""
        constant: Tensor = self.value
        return constant
