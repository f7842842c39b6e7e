"""Matching the dimensions of hyperconnections (ResiliNet, section 2.2; He et al. 2016, options A and B)."""

from __future__ import annotations

from math import prod
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

Matching = Literal["projection", "zero_padding"]


class Match(nn.Module):
    """Values of one shape to another: the same when the shapes agree.

    ``projection`` is a 1x1 convolution (linear for vectors) without bias, ``zero_padding`` appends zeros; smaller
    maps are reached by a stride.

    Args:
        source: Shape of a sample that is sent.
        target: Shape of a sample that is expected.
        matching: ``projection`` or ``zero_padding``.

    Raises:
        ValueError: The shapes cannot be matched this way.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], *, matching: Matching) -> None:
        super().__init__()
        self.stride = 1
        self.padding = 0
        self.flat = len(target) == 1 and len(source) != 1
        self.project: nn.Module | None = None
        if source == target:
            return
        if len(target) == 3 and len(source) == 3:
            self.stride = _stride(source, target)
            have = source[0]
        elif len(target) == 1:
            have = prod(source)
        else:
            raise ValueError(f"hyperconnection from shape {source} to {target}: only maps fit maps; move the skip")
        if matching == "zero_padding":
            self.padding = target[0] - have
            if self.padding < 0:
                raise ValueError(f"zero padding cannot shrink {source} to {target}; take matching: projection")
        elif len(target) == 3:
            self.project = nn.Conv2d(have, target[0], 1, stride=self.stride, bias=False)
        else:
            self.project = nn.Linear(have, target[0], bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return float [B, *target] of float [B, *source]."""
        values = values.flatten(1) if self.flat else values
        if self.project is not None:
            projected: Tensor = self.project(values)
            return projected
        if self.stride > 1:
            values = values[:, :, :: self.stride, :: self.stride]
        if self.padding:
            values = functional.pad(values, (0, 0) * (values.dim() - 2) + (0, self.padding))
        return values


def _stride(source: tuple[int, ...], target: tuple[int, ...]) -> int:
    """Return the stride that turns maps of one height and width into the other's."""
    stride = max(1, -(-source[1] // target[1]))
    reached = tuple(-(-size // stride) for size in source[1:])
    if reached != tuple(target[1:]):
        raise ValueError(f"no stride turns maps {source[1:]} into {target[1:]}; move the skip")
    return stride
