"""How values are rounded to the integers lo..hi times a power of two: in passes, by one operation, by fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-5


class Limits(NamedTuple):
    """The integers of a format: ``bits`` is the width of its words with the sign, ``lo`` and ``hi`` are the limits."""

    bits: int
    lo: int
    hi: int


def in_passes(
    x: Tensor, lsb: Tensor, limits: Limits, *, need_inside: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return a float32 (or float64) tensor on a grid, and the mask of unclamped values if needed.

    Args:
        x: float32 or float64, any shape.
        lsb: The step: a scalar, or one of each value.
        limits: The integers.
        need_inside: Whether the mask is asked for.
        out: Where to write, ``x`` itself or a fresh tensor; None makes one.
    """
    integers = torch.div(x, lsb, out=out).round_()
    if not need_inside:
        return integers.clamp_(limits.lo, limits.hi).mul_(lsb), None
    clamped = integers.clamp(limits.lo, limits.hi)
    inside = clamped == integers
    return torch.mul(clamped, lsb, out=integers), inside


def to_multiples(x: Tensor, lsb: float, bits: int, *, out: Tensor | None) -> Tensor:
    """Round values that no word of ``bits`` clamps to multiples of ``lsb``, a power of two, half to even.

    Between 2^23 lsb and 2^24 lsb neighbouring float32 numbers are lsb apart: adding 1.5 * 2^23 lsb rounds to the
    multiple, and taking it away again is exact. Two passes for three; the zero that it gives is never negative.
    """
    if x.dtype != torch.float32 or bits > 22 or not 2.0**-100 < lsb < 2.0**100:
        return torch.mul(x, 1.0 / lsb, out=out).round_().mul_(lsb)
    shift = 1.5 * 2.0**23 * lsb
    return torch.add(x, shift, out=out).sub_(shift)


def at_once(x: Tensor, lsb: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Return a float32 tensor on the grid of its own range, and the mask of unclamped values, by one operation.

    It is PyTorch's fake quantization, which rounds half to even too and gives no negative zero. Values far beyond the
    grid would overflow its integers, so the step must be that of the tensor; a NaN step gives NaN everywhere.
    """
    zero, enabled = _fake_quantization(x.device)
    return torch._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, lsb, zero, enabled, limits.lo, limits.hi)


def each_at_once(x: Tensor, lsb: Tensor, limits: Limits) -> Tensor:
    """Return float32 [B, C, N] with each of the C parts on the grid of its own range, as `at_once` does with one.

    Args:
        x: The values.
        lsb: The step of each part, [C].
        limits: The integers.
    """
    # zero points of float32: for integers PyTorch would wait for the device, to see whether they are in range
    return torch.fake_quantize_per_channel_affine(x, lsb, _zeros(len(lsb), x.device), 1, limits.lo, limits.hi)


@cache
def _zeros(number: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(number, device=device)


@cache
def _fake_quantization(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return zero point and switch of PyTorch's fake quantization on a device."""
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int64, device=device)


@contextmanager
def fused() -> Iterator[None]:
    """Round tensors in the body by kernels that torch.compile fuses; the values are the same, bit for bit.

    For GPUs, where rounding is several kernels otherwise. The first use compiles for some seconds.
    """
    before = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(before)


_fused: ContextVar[bool] = ContextVar("fused", default=False)


def is_fused(x: Tensor) -> bool:
    """Tell whether a tensor is rounded by `by_kernels`."""
    return _fused.get() and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 1


def by_kernels(
    x: Tensor, given: Tensor | None, limits: Limits, *, need_inside: bool, narrow: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return values, mask of unclamped ones if needed, and step, by kernels for the range, the step and the values.

    Args:
        x: float32 or bfloat16, any shape, more than one value.
        given: The step; None finds that of the tensor's own range.
        limits: The integers.
        need_inside: Whether the mask is asked for.
        narrow: Leave bfloat16 values as such; they are float32 otherwise.
    """
    if not torch.ops.aten.is_non_overlapping_and_dense(x):
        x = x.contiguous()
    # one shape for all kernels, whatever the memory format
    flat = _same_memory(x, (x.numel(),), (1,))
    narrow = narrow and x.dtype == torch.bfloat16  # each value of a switch is compiled anew
    constants, lsb = _limits(limits, x.device), given
    if lsb is None:
        # Outside of what is compiled: for a reduction within it, the size that is met first decides on the kernel for
        # all, and one found for few values takes a single block of a GPU for millions.
        largest = torch.linalg.vector_norm(flat, math.inf)
        lsb = _compiled(_step)(largest, constants)
    values, inside = _compiled(_round_flat)(flat, lsb, constants, need_inside, narrow)
    shaped = None if inside is None else _same_memory(inside, x.size(), x.stride())
    return _same_memory(values, x.size(), x.stride()), shaped, lsb


def _same_memory(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return a tensor of another shape over the memory of x that is no view.

    Views are compiled by what they view, and autograd lets nothing change one in place that a function of ours gave.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), tuple(size), tuple(stride))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@cache
def _limits(limits: Limits, device: torch.device) -> Tensor:
    """Return smallest and largest integer, and what `power_step` takes.

    As numbers each would be compiled anew, and torch 2.11 compiles no numbers where function modes are off.
    """
    numbers = [limits.lo, limits.hi, scale_of(limits.bits, torch.float32), SMALLEST_RANGE]
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _step(largest: Tensor, limits: Tensor) -> Tensor:
    """Return the step for a largest magnitude; a kernel of its own, where one for all values would find it for each."""
    return power_step(largest.float(), limits[2], limits[3])


def _round_flat(
    x: Tensor, lsb: Tensor, limits: Tensor, need_inside: bool, narrow: bool
) -> tuple[Tensor, Tensor | None]:
    """Return values, and mask of unclamped ones if needed, of a float tensor [N]."""
    wide = x.float()
    integers = torch.round(wide * lsb.reciprocal())
    clamped = torch.minimum(torch.maximum(integers, limits[0]), limits[1])
    values = clamped * lsb
    return values.to(x.dtype) if narrow else values, clamped == integers if need_inside else None


def step_of(largest: Tensor, bits: int) -> Tensor:
    """Return what `power_step` does for float32 magnitudes of any shape, looked up: two operations for four."""
    powers, steps = _powers(bits, largest.device)
    return torch.take(steps, torch.searchsorted(powers, largest))


@cache
def _powers(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the powers of two from the smallest range on, and the largest number; the step up to each; NaN beyond.

    They are made of their exponents' bits on the device: nothing is copied there, which would wait.
    """
    least = math.frexp(SMALLEST_RANGE)[1]
    with torch.inference_mode(False):
        exponents = torch.arange(least, 129, dtype=torch.int32, device=device)
        powers = ((exponents[:-1] + 127) << 23).view(torch.float32)
        steps = ((exponents + (128 - bits)) << 23).view(torch.float32)
        beyond = [torch.full((1,), value, device=device) for value in (torch.finfo(torch.float32).max, math.nan)]
        return torch.cat([powers, beyond[0]]), torch.cat([steps, beyond[1]])


def scale_of(bits: int, dtype: torch.dtype) -> float:
    """Return what `power_step` takes for words of some bits and magnitudes of a dtype."""
    return below_one(dtype) * 2.0 ** (1 - bits)


def power_step(largest: Tensor, scale: Tensor | float, smallest: Tensor | float = SMALLEST_RANGE) -> Tensor:
    """Return the smallest power of two that is not below a magnitude, scaled, without waiting for the device.

    Args:
        largest: The magnitude, a float32 or float64 scalar; NaN or an infinity gives NaN.
        scale: 2^(1 - bits), by which it is scaled, times `below_one`.
        smallest: What is taken for a magnitude below it.
    """
    # m times (1 - half an epsilon) is the number next below m, of which 2^(e-1) <= x < 2^e finds the power for powers
    # of two as well; a rounded log2 would be off by one there. mantissa * 2^e is exact, and so is the quotient 2^e.
    scaled = largest.clamp_min(smallest) * scale
    mantissa, _ = torch.frexp(scaled)
    return scaled / mantissa


def below_one(dtype: torch.dtype) -> float:
    """Return the largest number below 1."""
    return 1.0 - torch.finfo(dtype).eps / 2
