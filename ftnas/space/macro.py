"""What the discrete network and the supernet share: stem, order of cells, preprocessing, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftnas.space.ops import dropout, make_preprocess, make_stem, zeros_like_output
from ftnas.space.points import activated_points, feature_points
from ftnas.space.space import NUM_INPUTS, CellPlan, Space


class CellBase(nn.Module):
    """The preprocess blocks of a cell, and how nodes add and concatenate.

    Both inputs are preprocessed even where no edge reads one, as in the published parameter and FLOP counts.
    """

    def __init__(self, plan: CellPlan, space: Space, *, affine: bool) -> None:
        super().__init__()
        self.plan = plan
        self.preprocess = nn.ModuleList(
            make_preprocess(
                space.preprocess, in_channels=channels, out_channels=plan.channels, stride=stride, affine=affine
            )
            for channels, stride in zip(plan.in_channels, plan.in_strides, strict=True)
        )

    def edge_stride(self, source: int) -> int:
        """Return the stride of an edge from a node: the cell's where the node is one of its inputs, else 1."""
        return self.plan.stride if source < NUM_INPUTS else 1

    def inputs(self, older: Tensor, newer: Tensor) -> list[Tensor]:
        """Return the values of nodes 0 and 1, [B, channels, H, W] each."""
        return [self.preprocess[0](older), self.preprocess[1](newer)]

    def node(self, outputs: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
        """Return the sum of a node's edges (``none`` ones left out), or zeros where it has no other."""
        if len(outputs) == 2:
            return outputs[0] + outputs[1]
        if outputs:
            return outputs[0]
        return zeros_like_output(states[0], channels=self.plan.channels, stride=self.plan.stride)


def layers_below(root: nn.Module, name: str) -> tuple[str, ...]:
    """Return the names of the Conv2d and Linear layers of a module of a model, itself among them."""
    found = root.get_submodule(name).named_modules(prefix=name)
    return tuple(inner for inner, module in found if isinstance(module, (nn.Conv2d, nn.Linear)))


class CellNetwork(nn.Module):
    """Stem, cells, global average pooling, Linear (FTT-NAS section 4.2, Fig. 5).

    Args:
        space: The space, at the size to build.
        cells: The cells, in order.
        num_classes: Number of classes.
        in_channels: Of the images.
        dropout: Rate before the classifier in training, in [0, 1).
        affine: Whether the stem's BatchNorm has affine parameters.
    """

    def __init__(
        self,
        space: Space,
        cells: Iterable[CellBase],
        *,
        num_classes: int,
        in_channels: int,
        dropout: float,
        affine: bool,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: a rate in [0, 1), got {dropout!r}")
        self.dropout = dropout
        self.stem = make_stem(
            in_channels=in_channels, out_channels=space.stem.multiplier * space.channels, affine=affine
        )
        self.cells = nn.ModuleList(cells)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(space.out_channels, num_classes)

    def run(
        self,
        images: Tensor,
        extras: Iterable[tuple[Any, ...]],
        generator: torch.Generator | None,
        *,
        copies: int = 1,
    ) -> Tensor:
        """Run the layers; ``extras`` gives what each cell is called with besides its two inputs.

        Of ``copies`` images that follow each other the features lose the same values to dropout.
        """
        older = newer = self.stem(images)
        for cell, extra in zip(self.cells, extras, strict=True):
            older, newer = newer, cell(older, newer, *extra)
        features = self.pool(newer).flatten(1)
        if self.training and self.dropout > 0:
            features = dropout(features, self.dropout, generator=generator, copies=copies)
        return self.classifier(features)

    def running_layers(self, *_args: Any, **_kwargs: Any) -> Sequence[str]:
        """Return the names of the Conv2d and Linear layers that a forward with these arguments runs."""
        return layers_below(self, "")

    def feature_points(self) -> dict[str, str]:
        """Return, for each Conv2d whose output goes to a BatchNorm alone, the names of both modules."""
        return feature_points(self)

    def activated_points(self) -> frozenset[str]:
        """Return the names of the Conv2d whose feature point goes to an activation function alone."""
        return activated_points(self)
