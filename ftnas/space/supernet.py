"""The supernet: every edge and primitive of a space once, run along the path of any genotype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftnas.saturated import MARK, PLAIN, saturate_cell
from ftnas.space.genotype import Cell, Genotype
from ftnas.space.macro import CellBase, CellNetwork, layers_below
from ftnas.space.ops import NONE, make_primitive, module_label
from ftnas.space.space import NUM_INPUTS, CellPlan, Space


class SupernetCell(CellBase):
    """One cell with a module for each (node, source, primitive), such as ``edges.4_1_sep_conv_3x3``.

    Two edges of a node with the same source and primitive share the module, which then runs twice.
    """

    def __init__(self, plan: CellPlan, space: Space) -> None:
        super().__init__(plan, space, affine=False)
        self.edges = nn.ModuleDict()
        self._keys: dict[tuple[int, int, str], str] = {}
        for node in range(NUM_INPUTS, space.nodes):
            for source in range(node):
                for op in space.primitives:
                    if op == NONE:
                        continue
                    key = f"{node}_{source}_{module_label(op)}"
                    self._keys[node, source, op] = key
                    self.edges[key] = make_primitive(
                        op,
                        in_channels=plan.channels,
                        out_channels=plan.channels,
                        stride=self.edge_stride(source),
                        affine=False,
                    )
        choice = None
        if space.saturation is not None:
            choice = saturate_cell(self, space.saturation.functions, space.saturation.scale)
        self._choice = choice

    def edge_name(self, node: int, source: int, op: str) -> str:
        """Return the name, within the cell, of an edge's shared module."""
        return f"edges.{self._keys[node, source, op]}"

    def forward(self, older: Tensor, newer: Tensor, cell: Cell, function: str = PLAIN) -> Tensor:
        """Map the outputs of the two previous cells to [B, channels * inner nodes, H, W] along one cell's edges."""
        if self._choice is not None:
            self._choice.now = function
        states = self.inputs(older, newer)
        edges, keys = self.edges, self._keys
        for number, node in enumerate(cell, start=NUM_INPUTS):
            outputs = [edges[keys[number, source, op]](states[source]) for op, source in node if op != NONE]
            states.append(self.node(outputs, states))
        return torch.cat(states[NUM_INPUTS:], dim=1)


class Supernet(CellNetwork):
    """Shared weights for every genotype of a space (FTT-NAS section 4.3).

    BatchNorms have neither affine parameters nor running statistics: they always normalise by the batch. Layers are
    initialised from the global generator, as torch does; wrap the call in ``ftnas.rng.isolated``.

    Args:
        space: The space.
        num_classes: Number of classes.
        in_channels: Of the images.
        dropout: Rate before the classifier in training, in [0, 1).

    Raises:
        ValueError: A primitive of the user's own cannot be imported, or the rate is out of range.
    """

    def __init__(self, space: Space, *, num_classes: int, in_channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__(
            space,
            (SupernetCell(plan, space) for plan in space.layout()),
            num_classes=num_classes,
            in_channels=in_channels,
            dropout=dropout,
            affine=False,
        )
        self.space = space
        self.num_classes, self.in_channels = num_classes, in_channels
        self._cell_types = [plan.cell_type for plan in space.layout()]
        self._below: dict[str, tuple[str, ...]] = {}
        use_batch_statistics(self)

    def forward(
        self,
        images: Tensor,
        genotype: Genotype,
        *,
        dropout_generator: torch.Generator | None = None,
        copies: int = 1,
    ) -> Tensor:
        """Map float images [B, in_channels, H, W] to logits [B, num_classes] along the genotype's path.

        Parameters off the path take no part: their gradients stay as they were, None at first. Of ``copies`` images
        that follow each other the features lose the same values to dropout.

        Raises:
            ValueError: The space does not hold the genotype; or dropout is on, in training, without
                ``dropout_generator``.
        """
        genotype.validate(self.space)
        cells, functions = genotype.cells, genotype.saturation
        paths = [(cells[cell_type], functions.get(cell_type, PLAIN)) for cell_type in self._cell_types]
        return self.run(images, paths, dropout_generator, copies=copies)

    def running_layers(self, _images: Tensor, genotype: Genotype, **_kwargs: Any) -> Sequence[str]:
        """Return the names of the Conv2d and Linear layers on a genotype's path, each once."""
        genotype.validate(self.space)
        blocks = dict.fromkeys(shared for _, shared in _path_names(self, genotype))
        for block in blocks.keys() - self._below.keys():
            self._below[block] = layers_below(self, block)
        return [layer for block in blocks for layer in self._below[block]]


def use_batch_statistics(root: nn.Module) -> None:
    """Make every BatchNorm below normalise by its batch always, in evaluation too, and keep no running statistics."""
    for module in root.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def copy_path(supernet: Supernet, genotype: Genotype, network: CellNetwork) -> None:
    """Copy a path's shared weights into the discrete network of the same genotype, space and size.

    Afterwards both compute the same function in training mode. Two edges that share a module get a copy each; affine
    parameters and running statistics, which the supernet lacks, are reset.

    Raises:
        ValueError: The network was built for another genotype or size; it may then be half copied.
    """
    genotype.validate(supernet.space)
    if len(supernet.cells) != len(network.cells):
        raise ValueError(f"copy_path: both need {len(supernet.cells)} cells, got {len(network.cells)} in the network")
    for name, shared_name in _path_names(supernet, genotype):
        try:
            target = network.get_submodule(name)
        except AttributeError:
            raise ValueError(f"copy_path: the network has no {name}; build it of the same genotype") from None
        _copy(supernet.get_submodule(shared_name), target, name=name)


def _path_names(supernet: Supernet, genotype: Genotype) -> list[tuple[str, str]]:
    """Return, for everything on a path that holds weights, its name in the network and in the supernet."""
    names = [("stem", "stem"), ("classifier", "classifier")]
    for index, cell in enumerate(supernet.cells):
        assert isinstance(cell, SupernetCell)
        prefix = f"cells.{index}"
        names.append((f"{prefix}.preprocess", f"{prefix}.preprocess"))
        for number, node in enumerate(genotype.cells[cell.plan.cell_type], start=NUM_INPUTS):
            names += [
                (f"{prefix}.nodes.{number}.{i}", f"{prefix}.{cell.edge_name(number, edge.source, edge.op)}")
                for i, edge in enumerate(node)
                if edge.op != NONE
            ]
    return names


def _copy(source: nn.Module, target: nn.Module, *, name: str) -> None:
    norms = {prefix: module for prefix, module in target.named_modules() if isinstance(module, _BatchNorm)}
    for norm in norms.values():
        norm.reset_parameters()
    # what a layer was saturated with is decided by the genotype, and not copied
    values, own = ({k: v for k, v in m.state_dict().items() if not _is_mark(k)} for m in (source, target))
    expected = {key for key in own if key in values or key.rpartition(".")[0] not in norms}
    for key in sorted(expected | values.keys()):
        if key not in own or key not in values or own[key].shape != values[key].shape:
            raise ValueError(f"copy_path: {name}.{key} does not fit; build the network of the same genotype and size")
    target.load_state_dict(values, strict=False)


def _is_mark(key: str) -> bool:
    return key.rpartition(".")[2] == MARK
