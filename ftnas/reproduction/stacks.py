"""Stacks of five layers of one primitive (FTT-NAS section 5.5), as factories for model configs.

The paper gives neither channels nor strides. Here: a stem as in the spaces, five layers, the second and the fourth at
stride 2 with twice the channels, 20 at first; global average pooling; Linear.
"""

from __future__ import annotations

from torch import nn

from ftnas.space.ops import make_primitive, make_stem

CHANNELS = 20
STRIDES = (1, 2, 1, 2, 1)


def stack(primitive: str, *, num_classes: int, in_channels: int, channels: int = CHANNELS) -> nn.Sequential:
    """Build a stack that maps float images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        primitive: One of the registered primitives that may change the number of channels.
        num_classes: Number of classes.
        in_channels: Of the images.
        channels: Of the first layer.
    """
    layers: list[nn.Module] = [make_stem(in_channels=in_channels, out_channels=channels, affine=True)]
    for stride in STRIDES:
        wider = channels * stride
        layers.append(make_primitive(primitive, in_channels=channels, out_channels=wider, stride=stride))
        channels = wider
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def sep_conv_3x3(*, num_classes: int, in_channels: int) -> nn.Module:
    """Build the stack of SepConv 3x3."""
    return stack("sep_conv_3x3", num_classes=num_classes, in_channels=in_channels)


def sep_conv_5x5(*, num_classes: int, in_channels: int) -> nn.Module:
    """Build the stack of SepConv 5x5."""
    return stack("sep_conv_5x5", num_classes=num_classes, in_channels=in_channels)


def dil_conv_3x3(*, num_classes: int, in_channels: int) -> nn.Module:
    """Build the stack of DilConv 3x3."""
    return stack("dil_conv_3x3", num_classes=num_classes, in_channels=in_channels)


def dil_conv_5x5(*, num_classes: int, in_channels: int) -> nn.Module:
    """Build the stack of DilConv 5x5."""
    return stack("dil_conv_5x5", num_classes=num_classes, in_channels=in_channels)
