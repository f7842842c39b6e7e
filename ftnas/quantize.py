"""Dynamic fixed point: one power-of-two step per tensor, found from the tensor or given.

With ``m = max(max|x|, 1e-5)`` and ``s = ceil(log2(m))`` the fraction length is ``l = (bits - 1) - s`` and the step
``LSB = 2^-l`` (minimal overflow, FTT-NAS section 5.1). A value x
becomes ``clamp(round_half_even(x / LSB), lo, hi) * LSB``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ftnas import devices, rounding
from ftnas.rounding import SMALLEST_RANGE, Limits
from ftnas.settings import Settings

_LARGEST = 2.0**127
"""Values from here on have a range that float32 cannot hold."""
BF16_BITS = 8
"""Words that bfloat16 holds exactly."""


class Bounded(Settings):
    """A range that is given: values beyond the grid, which ends at the next power of two, are clipped to its limits."""

    bound: Annotated[float, Field(ge=SMALLEST_RANGE, le=2.0**64)]


class Frozen(Settings):
    """A fraction length that was found once, the same for all tensors of a kind, as a Qm.n format has it."""

    fraction_length: int = Field(ge=-64, le=64)


@dataclass(frozen=True)
class Grid:
    """The representable values of one quantized tensor: the integers lo..hi times ``lsb``.

    Attributes:
        lsb: float32 scalar tensor, an exact power of two, on the tensor's device; for many tensors that lie end to
            end, that of each value, [N].
        bits: Word width with the sign.
        lo: Smallest integer.
        hi: Largest integer.
        largest: Largest magnitude of the values, where it is known, like ``lsb``.
    """

    lsb: Tensor
    bits: int
    lo: int
    hi: int
    largest: Tensor | None = None

    @property
    def bound(self) -> Tensor:
        """Largest representable magnitude of the positive side, R_w of FTT-NAS eq. 3; a scalar tensor."""
        return self.lsb * self.hi

    def at(self, places: Tensor) -> Grid:
        """Return the grid of the values at some places, int64 [K], of the memory."""
        if self.lsb.dim() == 0:
            return self
        largest = None if self.largest is None else self.largest.index_select(0, places)
        return replace(self, lsb=self.lsb.index_select(0, places), largest=largest)


class Rounded(NamedTuple):
    """A tensor that was rounded to its grid.

    Attributes:
        values: On the grid, float32 or float64, the shape of the tensor.
        inside: Where no value was clamped, bool of the same shape; None where none was, or when not asked for.
        grid: The grid.
    """

    values: Tensor
    inside: Tensor | None
    grid: Grid


class FixedPoint(Settings):
    """A fixed-point format for one kind of tensor.

    Attributes:
        bits: Word width with the sign, 2 to 24 (all integers are exact in float32).
        encoding: ``twos_complement`` holds [-2^(bits-1), 2^(bits-1) - 1]; ``sign_magnitude`` holds
            [-(2^(bits-1) - 1), 2^(bits-1) - 1], as two RRAM crossbars do.
        range: None finds the range anew from every tensor (the paper's way); `Bounded` and `Frozen` fix it.
    """

    bits: int = Field(default=8, ge=2, le=24)
    encoding: Literal["twos_complement", "sign_magnitude"] = "twos_complement"
    range: Bounded | Frozen | None = None

    def grid(self, x: Tensor) -> Grid:
        """Return the grid for a tensor of any shape, without waiting for the device.

        A tensor with a NaN or an infinity gets a NaN step, so that it stays visible after quantization.
        """
        return self.grid_of(self._lsb(x))

    def round(
        self,
        x: Tensor,
        *,
        need_inside: bool,
        in_place: bool = False,
        limit: Tensor | None = None,
        narrow: bool = False,
    ) -> Rounded:
        """Round a float tensor of any shape to its own grid, in as few passes over it as there can be.

        On a CPU the extremes of the tensor tell whether any value is clamped at all. Where none is, which with a free
        range is the rule, no value is clamped and no mask made. Elsewhere nothing waits for the device.

        Args:
            x: Any float dtype.
            need_inside: Whether the mask of unclamped values is asked for.
            in_place: Write to ``x`` itself where its dtype is float32 or float64.
            limit: A scalar tensor whose grid is taken in place of the tensor's own: a bound of its values.
            narrow: Values may come as bfloat16 where ``x`` is that and holds every word.
        """
        x = x.detach() if x.requires_grad else x
        if limit is None and rounding.is_fused(x):
            given = None if self.range is None else self._lsb(x)
            narrow = narrow and self.bits <= BF16_BITS
            values, inside, step = rounding.by_kernels(x, given, self._limits, need_inside=need_inside, narrow=narrow)
            return Rounded(values, inside, self.grid_of(step))
        values = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if limit is not None:
            grid = self.grid(limit)
            return self._in_passes(values, grid, need_inside)
        out = values if in_place or values is not x else None
        limits = _extremes(x)
        if limits is None:
            grid = self.grid(x)
            if self.range is None and values.dtype == torch.float32:
                return Rounded(*rounding.at_once(values, grid.lsb, self._limits), grid)
            return self._in_passes(values, grid, need_inside, out)
        low, high = limits
        lsb = self._given_lsb() or _lsb_for(max(-low, high), self.bits)
        grid = self.grid_of(torch.scalar_tensor(lsb, dtype=torch.float32, device=x.device))
        if grid.lo <= round(low / lsb) and round(high / lsb) <= grid.hi:
            return Rounded(rounding.to_multiples(values, lsb, self.bits, out=out), None, grid)
        return self._in_passes(values, grid, need_inside, out)

    def at_once(self, x: Tensor) -> Rounded | None:
        """Return what `quantize` gives where that is one operation, which has its own gradient; None elsewhere.

        A GPU waits for Python: float32 tensors of any shape with a free range are rounded there without more of it.
        """
        alone = self.range is None and x.dtype == torch.float32 and not rounding.is_fused(x) and x.numel() > 0
        if not alone or devices.is_readable(x.device):
            return None
        largest = torch.linalg.vector_norm(x.detach(), math.inf)
        lsb = rounding.step_of(largest, self.bits)
        return Rounded(*rounding.at_once(x, lsb, self._limits), self.grid_of(lsb))

    def each_at_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round each of the C parts of float32 [B, C, N] to its own grid of a free range, by one operation.

        Returns:
            The values, with the gradient that `quantize` gives them, and the steps [C].
        """
        lsb = self.step(torch.linalg.vector_norm(x.detach(), math.inf, dim=(0, 2)))
        return rounding.each_at_once(x, lsb, self._limits), lsb

    def _in_passes(self, x: Tensor, grid: Grid, need_inside: bool, out: Tensor | None = None) -> Rounded:
        return Rounded(*rounding.in_passes(x, grid.lsb, self._limits, need_inside=need_inside, out=out), grid)

    def grid_of(self, lsb: Tensor) -> Grid:
        """Return the grid of a step, as `Grid` has it."""
        bits, lo, hi = self._limits
        return Grid(lsb=lsb, bits=bits, lo=lo, hi=hi)

    @property
    def _limits(self) -> Limits:
        return _limits(self.bits, self.encoding)

    def _given_lsb(self) -> float | None:
        if isinstance(self.range, Frozen):
            return 2.0**-self.range.fraction_length
        return None if self.range is None else _lsb_for(self.range.bound, self.bits)

    def _lsb(self, x: Tensor) -> Tensor:
        given = _lsb_for(SMALLEST_RANGE, self.bits) if x.numel() == 0 else None
        given = self._given_lsb() or given
        if given is not None:
            return torch.full((), given, dtype=torch.float32, device=x.device)
        largest = torch.linalg.vector_norm(x.detach(), math.inf)
        return self.step(largest if x.dtype == torch.float64 else largest.float())

    def step(self, largest: Tensor) -> Tensor:
        """Return the step of a free range for magnitudes, float32 or float64 of any shape; float32."""
        if largest.dtype == torch.float64:
            return rounding.power_step(largest, rounding.scale_of(self.bits, torch.float64)).float()
        return rounding.step_of(largest, self.bits)

    def fraction_length(self, x: Tensor) -> int:
        """Return l with LSB = 2^-l for a tensor of any shape (reads the value back from the device)."""
        _, exponent = torch.frexp(self._lsb(x))
        return 1 - int(exponent)

    def encode(self, x: Tensor) -> Tensor:
        """Return the integers of a finite float tensor, int32, same shape."""
        values, _, grid = self.round(x, need_inside=False)
        return (values / grid.lsb).to(torch.int32)

    def decode(self, integers: Tensor, fraction_length: int) -> Tensor:
        """Return the float32 values of integers with the given fraction length."""
        return integers.float() * 2.0**-fraction_length

    def quantize(self, x: Tensor) -> Tensor:
        """Round a float tensor of any shape to the grid; same shape and dtype.

        The gradient is 1 where the rounded integer lies in [lo, hi] before clamping, else 0 (straight-through).
        """
        return straight_through(x, lambda values, need: (*self.round(values, need_inside=need)[:2], None))


class FloatFormat(Settings):
    """A floating-point format that a memory holds values in: IEEE-754 single or half, or bfloat16."""

    dtype: Literal["fp32", "fp16", "bf16"]

    @property
    def bits(self) -> int:
        """Word width."""
        return 32 if self.dtype == "fp32" else 16

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as a torch dtype."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.dtype]

    def rounded(self, x: Tensor) -> Tensor:
        """Return a fresh tensor of the values that the memory holds, in the dtype of x; any shape."""
        return x.clone() if x.dtype == self.torch_dtype else x.to(self.torch_dtype).to(x.dtype)


class Quantization(Settings):
    """The formats of weights and of features."""

    weights: FixedPoint = FixedPoint()
    features: FixedPoint = FixedPoint()

    @field_validator("features")
    @classmethod
    def _signed_sums(cls, value: FixedPoint) -> FixedPoint:
        if value.encoding != "twos_complement":
            raise ValueError("features are held in two's complement; sign_magnitude is for weights")
        return value

    @classmethod
    def of(cls, value: Quantization | FixedPoint | None) -> Quantization | None:
        """Return a Quantization; one FixedPoint given alone serves weights and, in two's complement, features."""
        if isinstance(value, FixedPoint):
            return cls(weights=value, features=value.model_copy(update={"encoding": "twos_complement"}))
        if value is None or isinstance(value, Quantization):
            return value
        raise ValueError(f"quantization must be a FixedPoint(bits=8), a Quantization or None, got {value!r}")


@cache
def _limits(bits: int, encoding: str) -> Limits:
    hi = 2 ** (bits - 1) - 1
    return Limits(bits, -hi - 1 if encoding == "twos_complement" else -hi, hi)


def _lsb_for(largest: float, bits: int) -> float:
    """Return the step for a largest magnitude, an exact power of two."""
    fraction, exponent = math.frexp(max(largest, SMALLEST_RANGE))
    return 2.0 ** (exponent - (fraction == 0.5) + 1 - bits)


def _extremes(x: Tensor) -> tuple[float, float] | None:
    """Return the smallest and the largest value where reading them waits for nothing; None if not, or not finite."""
    if not devices.is_readable(x.device) or x.numel() == 0:
        return None
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    return (low, high) if -_LARGEST < low and high < _LARGEST else None


def straight_through(x: Tensor, transform: Any) -> Tensor:
    """Apply ``transform`` to the values of x; its gradient is the identity, where not masked.

    Args:
        x: Float tensor of any shape.
        transform: Function of (values, need_mask) that returns a fresh tensor, or ``values`` themselves if it wrote to
            them, a bool mask of the same shape where gradients pass (or None: everywhere), and a bool mask where none
            passes (or None).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return transform(x.detach(), False)[0].to(x.dtype)
    return _StraightThrough.apply(x, transform)


def let_pass(gradient: Tensor, inside: Tensor) -> Tensor:
    """Return a gradient where a bool mask of its shape lets it pass, and zeros elsewhere.

    On a GPU what is not finite there becomes NaN, in place of a zero.
    """
    if devices.is_readable(gradient.device):
        return torch.where(inside, gradient, 0.0)
    # a product, by a kernel that moves whole vectors: for where, a GPU looks up its one zero value by value
    return torch.ops.aten.native_dropout_backward(gradient, inside, 1.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transform: Any) -> Tensor:
        given = x.detach()
        values, inside, blocked = transform(given, True)
        ctx.save_for_backward(inside, blocked)
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if last else torch.contiguous_format
        if values is given:
            ctx.mark_dirty(x)
            return x
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        inside, blocked = ctx.saved_tensors
        if inside is not None:
            gradient = let_pass(gradient, inside)
        if blocked is not None:
            gradient = torch.where(blocked, 0.0, gradient)
        # a part of a concatenation's gradient is no dense tensor, and the kernels for such ones are slower
        return gradient.contiguous(memory_format=ctx.format), None
