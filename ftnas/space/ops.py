"""The primitives of a cell and the blocks around cells (FTT-NAS section 4.2, and the authors' released code)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftnas import rng
from ftnas.registry import Registry

NONE = "none"
SKIP = "skip"


class Primitive(Protocol):
    """Makes the module of one edge.

    The module maps float [B, in_channels, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]. ``affine``
    says whether its BatchNorms have affine parameters (they have in a discrete network, not in a supernet). It must
    not change its input in place, since other edges read the same tensor.
    """

    def __call__(self, *, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
        """Return a new module."""


OWN = "_channels_of_an_own_primitive"
"""Attribute of the module of a primitive that is not of this file: the channels of its input."""

PRIMITIVES: Registry[Primitive] = Registry("primitive")


def make_primitive(
    name: str, *, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True
) -> nn.Module:
    """Build the module of a primitive, registered or ``package.module:Name`` from the user's own space file.

    Raises:
        ValueError: No such primitive, or what was imported does not make a module.
    """
    factory = PRIMITIVES.get(name, allow_import=True)
    module = factory(in_channels=in_channels, out_channels=out_channels, stride=stride, affine=affine)
    if not isinstance(module, nn.Module):
        raise ValueError(f"primitive {name!r}: must make a torch.nn.Module, got {type(module).__name__}")
    if getattr(factory, "__module__", "") != __name__:
        setattr(module, OWN, in_channels)
    return module


def check_primitive(name: str) -> None:
    """Import a user's primitive and try it at both strides on a small map.

    Raises:
        ValueError: It cannot be imported or called, or gives another shape than a primitive must.
    """
    for stride in (1, 2):
        with rng.isolated(0, "check-primitive"), torch.no_grad():
            try:
                module = make_primitive(name, in_channels=8, out_channels=8, stride=stride, affine=False)
                shape = tuple(module(torch.zeros(2, 8, 8, 8)).shape)
            except (TypeError, RuntimeError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"primitive {name!r}: fails at stride {stride}: {reason}") from None
        expected = (2, 8, 8 // stride, 8 // stride)
        if shape != expected:
            raise ValueError(
                f"primitive {name!r}: at stride {stride} the shape {(2, 8, 8, 8)} must become {expected}, got {shape}"
            )


def module_label(name: str) -> str:
    """Return the part of a module name that stands for a primitive; dots would split it."""
    return re.sub(r"\W+", "_", name)


class Zero(nn.Module):
    """The primitive ``none``: zeros of the output shape. Cells skip it instead of adding its zeros."""

    def __init__(self, *, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to zeros [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return zeros_like_output(x, channels=self.out_channels, stride=self.stride)


def zeros_like_output(x: Tensor, *, channels: int, stride: int) -> Tensor:
    """Return zeros [B, channels, ceil(H / stride), ceil(W / stride)] of the dtype and device of x [B, C, H, W]."""
    batch, _, height, width = x.shape
    return x.new_zeros(batch, channels, -(-height // stride), -(-width // stride))


class FactorizedReduction(nn.Module):
    """Halve a map without dropping pixels: ReLU, two strided 1x1 convolutions, concatenated, BN.

    The second convolution is offset by one pixel and makes the second half of the channels. An odd map is padded
    with a zero row and column at the end, for the second convolution only.
    """

    def __init__(self, *, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.relu = nn.ReLU()
        self.conv_even = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)
        self.conv_odd = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, ceil(H / 2), ceil(W / 2)]."""
        x = self.relu(x)
        pad_height, pad_width = x.shape[2] % 2, x.shape[3] % 2
        shifted = F.pad(x, (0, pad_width, 0, pad_height)) if pad_height or pad_width else x
        return self.bn(torch.cat([self.conv_even(x), self.conv_odd(shifted[:, :, 1:, 1:])], dim=1))


def relu_conv_bn(
    *, in_channels: int, out_channels: int, kernel: int, stride: int = 1, affine: bool = True
) -> nn.Sequential:
    """Return ReLU, convolution without bias, BN."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


def _separable(
    *, in_channels: int, out_channels: int, kernel: int, stride: int, affine: bool, dilation: int = 1
) -> list[nn.Module]:
    return [
        nn.ReLU(),
        nn.Conv2d(
            in_channels,
            in_channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=in_channels,
            bias=False,
        ),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    ]


def make_preprocess(name: str, *, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    """Build the block that maps a cell's input to the cell's channels and map size.

    ``relu_conv_bn_1x1`` is a factorised reduction at stride 2; ``relu_conv_bn_3x3`` a strided convolution.
    """
    if name == "relu_conv_bn_1x1" and stride == 2:
        return FactorizedReduction(in_channels=in_channels, out_channels=out_channels, affine=affine)
    kernel = 1 if name == "relu_conv_bn_1x1" else 3
    return relu_conv_bn(in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=stride, affine=affine)


def make_stem(*, in_channels: int, out_channels: int, affine: bool) -> nn.Sequential:
    """Return the stem: convolution 3x3, BN."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


def dropout(x: Tensor, rate: float, *, generator: torch.Generator | None, copies: int = 1) -> Tensor:
    """Drop values with probability ``rate`` and scale the others by 1 / (1 - rate).

    Args:
        x: Float [copies * B, ...].
        rate: In [0, 1).
        generator: Where the draws come from, on any device.
        copies: Rows that follow each other and lose the same values.

    Raises:
        ValueError: No generator was given.
    """
    if generator is None:
        raise ValueError(f"dropout {rate} draws from an explicit generator, got none; pass dropout_generator=")
    shape = (x.shape[0] // copies, *x.shape[1:])
    drawn = torch.rand(shape, generator=generator, device=generator.device).to(x.device)
    factors = (drawn >= rate).to(x.dtype) / (1.0 - rate)
    return x * (factors if copies == 1 else factors.repeat_interleave(copies, dim=0))


def _need_same(name: str, in_channels: int, out_channels: int) -> None:
    if in_channels != out_channels:
        raise ValueError(f"{name} cannot change the number of channels, got {in_channels} and {out_channels}")


@PRIMITIVES.register(NONE)
def _none(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return Zero(out_channels=out_channels, stride=stride)


@PRIMITIVES.register(SKIP)
def _skip(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    if stride == 2:
        return FactorizedReduction(in_channels=in_channels, out_channels=out_channels, affine=affine)
    _need_same(SKIP, in_channels, out_channels)
    return nn.Identity()


_WIDE = 8
"""Channels from which on a CPU pools channels-last maps quicker, the conversion and the way back included."""


def _pooled_wide(pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Pool float [B, C, H, W] with the channels innermost where that is quicker; the same values and gradients."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.shape[1] < _WIDE:
        return pool(x)
    return pool(x.contiguous(memory_format=torch.channels_last)).contiguous()


class MaxPool3x3(nn.MaxPool2d):
    """Max pooling over 3x3; values and gradients are those of torch's own, which is slow on a CPU."""

    def __init__(self, stride: int) -> None:
        super().__init__(3, stride=stride, padding=1)
        self._step = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pool float [B, C, H, W]."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or not x.is_contiguous():
            return _pooled_wide(super().forward, x)
        # without gradients, the largest of each row's three, then of three rows; with them, ties have to be kept
        x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
        for dim in (-1, -2):
            one, two, three = x.unfold(dim, 3, self._step).unbind(-1)
            x = torch.maximum(one, two).maximum(three)
        return x


class AvgPool3x3(nn.AvgPool2d):
    """Average pooling over those of 3x3 values that lie in the map; values and gradients are those of torch's own."""

    def __init__(self, stride: int) -> None:
        super().__init__(3, stride=stride, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pool float [B, C, H, W]."""
        return _pooled_wide(super().forward, x)


@PRIMITIVES.register("avg_pool_3x3")
def _avg_pool(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    _need_same("avg_pool_3x3", in_channels, out_channels)
    return AvgPool3x3(stride)


@PRIMITIVES.register("max_pool_3x3")
def _max_pool(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    _need_same("max_pool_3x3", in_channels, out_channels)
    return MaxPool3x3(stride)


@PRIMITIVES.register("conv_1x1")
def _conv_1x1(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride)


def _register_kernels(kernel: int) -> None:
    """Add the primitives that differ in their kernel size only."""

    @PRIMITIVES.register(f"relu_conv_bn_{kernel}x{kernel}")
    def _relu_conv_bn(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
        return relu_conv_bn(
            in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=stride, affine=affine
        )

    @PRIMITIVES.register(f"sep_conv_{kernel}x{kernel}")
    def _sep_conv(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
        first = _separable(
            in_channels=in_channels, out_channels=in_channels, kernel=kernel, stride=stride, affine=affine
        )
        second = _separable(in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=1, affine=affine)
        return nn.Sequential(*first, *second)

    @PRIMITIVES.register(f"dil_conv_{kernel}x{kernel}")
    def _dil_conv(*, in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
        return nn.Sequential(
            *_separable(
                in_channels=in_channels,
                out_channels=out_channels,
                kernel=kernel,
                stride=stride,
                affine=affine,
                dilation=2,
            )
        )


for _kernel in (3, 5):
    _register_kernels(_kernel)
