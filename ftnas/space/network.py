"""The discrete network of one genotype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftnas.saturated import PLAIN, saturate_cell
from ftnas.space.genotype import Cell, Genotype
from ftnas.space.macro import CellBase, CellNetwork
from ftnas.space.ops import NONE, make_primitive
from ftnas.space.space import NUM_INPUTS, CellPlan, Space


class NetworkCell(CellBase):
    """One cell: each inner node the sum of two edges, all inner nodes concatenated.

    ``nodes.4.0`` is the first edge of node 4. The weights of its convolutions pass through ``function``.
    """

    def __init__(self, cell: Cell, plan: CellPlan, space: Space, *, function: str = PLAIN) -> None:
        super().__init__(plan, space, affine=True)
        self.nodes = nn.ModuleDict()
        self._active: list[tuple[str, list[tuple[int, int]]]] = []  # node, [(edge, its source)], `none` left out
        for number, node in enumerate(cell, start=NUM_INPUTS):
            self.nodes[str(number)] = nn.ModuleList(
                make_primitive(
                    edge.op,
                    in_channels=plan.channels,
                    out_channels=plan.channels,
                    stride=self.edge_stride(edge.source),
                )
                for edge in node
            )
            self._active.append((str(number), [(i, edge.source) for i, edge in enumerate(node) if edge.op != NONE]))
        if space.saturation is not None:
            saturate_cell(self, [function], space.saturation.scale)

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        """Map the outputs of the two previous cells to [B, channels * inner nodes, H, W]."""
        states = self.inputs(older, newer)
        for number, active in self._active:
            edges = self.nodes[number]
            outputs = [edges[i](states[source]) for i, source in active]  # type: ignore[index]
            states.append(self.node(outputs, states))
        return torch.cat(states[NUM_INPUTS:], dim=1)


class Network(CellNetwork):
    """The discrete network, every edge its own module, BN with affine parameters. Made by ``build_network``."""

    def forward(self, images: Tensor, *, dropout_generator: torch.Generator | None = None) -> Tensor:
        """Map float images [B, in_channels, H, W] to logits [B, num_classes].

        Raises:
            ValueError: Dropout is on, in training, without ``dropout_generator``.
        """
        return self.run(images, [()] * len(self.cells), dropout_generator)


def build_network(
    genotype: Genotype,
    space: Space,
    *,
    num_classes: int,
    in_channels: int = 3,
    channels: int | None = None,
    cells: int | None = None,
    dropout: float = 0.0,
) -> Network:
    """Build the discrete network of a genotype.

    Layers are initialised from the global generator, as torch does; wrap the call in ``ftnas.rng.isolated``.

    Args:
        genotype: The architecture.
        space: The space that it belongs to.
        num_classes: Number of classes.
        in_channels: Of the images.
        channels: Of the first cell, instead of the space's.
        cells: Number of cells, instead of the space's; as many reductions, at even parts of the depth.
        dropout: Rate before the classifier in training, in [0, 1).

    Raises:
        ValueError: The space does not hold the genotype, or a size is out of range.
    """
    sized = space.resized(channels=channels, cells=cells)
    genotype.validate(sized)
    by_type, functions = genotype.cells, genotype.saturation
    return Network(
        sized,
        (
            NetworkCell(by_type[plan.cell_type], plan, sized, function=functions.get(plan.cell_type, PLAIN))
            for plan in sized.layout()
        ),
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=dropout,
        affine=True,
    )
