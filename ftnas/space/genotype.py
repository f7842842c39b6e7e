"""Genotypes: the cells of one architecture as an immutable value, its file, its random changes, its canonical key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftnas.settings import did_you_mean
from ftnas.shipped import find_file, shipped_names
from ftnas.space.cells import Cell, Edge, Node, canonical_cell, edges, parse_cell, short
from ftnas.space.ops import NONE, SKIP
from ftnas.space.space import NUM_INPUTS, CellType, Space, load_space
from ftnas.storage import atomic_write

__all__ = ["Cell", "Edge", "Genotype", "Space", "genotype_names", "load_space"]

FOLDER = "configs/genotypes"
VERSION = 1
SATURATION = "saturation"
_CELL_TYPES: tuple[CellType, ...] = ("normal", "reduce")


Decisions = dict[CellType, list[list[int]]]


@dataclass(frozen=True)
class Genotype:
    """The cells of one architecture. Equal and hashable by its cells, whatever its name.

    Attributes:
        items: Pairs of cell type and cell, ``normal`` before ``reduce``.
        name: What tables and pictures call it.
        space: Name of the space that it was drawn from, if known.
        functions: The function of each cell's weights, in the order of ``items``; empty in spaces that leave it open.
    """

    items: tuple[tuple[CellType, Cell], ...]
    name: str = field(default="", compare=False)
    space: str | None = field(default=None, compare=False)
    functions: tuple[str, ...] = ()

    @property
    def cells(self) -> dict[CellType, Cell]:
        """The cell of each type: for each inner node, from node 2 on, its two edges."""
        return dict(self.items)

    @property
    def saturation(self) -> dict[CellType, str]:
        """The function of the weights of each type of cell; empty where the space does not decide on it."""
        return {cell_type: name for (cell_type, _), name in zip(self.items, self.functions, strict=False)}

    # Files

    @classmethod
    def load(cls, name_or_path: str | Path) -> Genotype:
        """Load a shipped genotype by name, or a file by its path.

        Raises:
            ValueError: One line: no such file, or what is wrong with it.
        """
        path = find_file(name_or_path, FOLDER, ".json", kind="genotype")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"genotype {str(path)!r}: not readable as JSON: {error}") from None
        return cls.from_dict(data, where=f"genotype {str(name_or_path)!r}")

    def save(self, path: str | Path) -> None:
        """Write the JSON file; the old one stays whole until the new one is complete."""
        atomic_write(Path(path), _to_json(self.to_dict()).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``version``, ``name``, ``space`` where known, and each cell as in ``from_dict``."""
        head: dict[str, Any] = {"version": VERSION, "name": self.name}
        if self.space is not None:
            head["space"] = self.space
        if self.functions:
            head[SATURATION] = dict(self.saturation)
        for cell_type, cell in self.items:
            head[cell_type] = {
                str(number): [[edge.op, edge.source] for edge in node]
                for number, node in enumerate(cell, start=NUM_INPUTS)
            }
        return head

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "genotype") -> Genotype:
        """Build a genotype from plain data.

        Args:
            data: ``{"version": 1, "name": str, "space": str, "normal": cell, "reduce": cell}`` with at least one
                cell; a cell is ``{"2": [[primitive, source], [primitive, source]], "3": ...}``. Where the space decides
                on it, also ``"saturation": {"normal": function, "reduce": function}``.
            where: Prefix of messages.

        Raises:
            ValueError: One line: the rule, what was received.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: expected a JSON object, got {short(data)}")
        known = ("version", "name", "space", SATURATION, *_CELL_TYPES)
        for key in data:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(key, known)}")
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(f"{where}: version: this release reads version {VERSION}, got {version!r}")
        for key in ("name", "space"):
            if not isinstance(data.get(key, ""), str):
                raise ValueError(f"{where}: {key}: a text, got {short(data[key])}")
        items = tuple(
            (cell_type, parse_cell(data[cell_type], where=f"{where}: {cell_type}"))
            for cell_type in _CELL_TYPES
            if cell_type in data
        )
        if not items:
            raise ValueError(f"{where}: at least one cell, {' or '.join(_CELL_TYPES)}, got none")
        functions = _parse_functions(data, [cell_type for cell_type, _ in items], where=where)
        return cls(items=items, name=data.get("name", ""), space=data.get("space"), functions=functions)

    # Relation to a space

    def validate(self, space: Space) -> None:
        """Check that the space holds this genotype.

        Raises:
            ValueError: One line: the cell, node and edge that the space does not have.
        """
        have, need = [cell_type for cell_type, _ in self.items], list(space.cell_types)
        if have != need:
            raise ValueError(f"genotype: space {space.name!r} has cells {need}, got {have}")
        self._validate_functions(space)
        for cell_type, cell in self.items:
            if len(cell) + NUM_INPUTS != space.nodes:
                raise ValueError(
                    f"genotype: {cell_type}: space {space.name!r} has {space.nodes} nodes in a cell, "
                    f"got {len(cell) + NUM_INPUTS}"
                )
            for number, edge in edges(cell):
                if edge.op not in space.primitives:
                    raise ValueError(
                        f"genotype: {cell_type}: node {number}: space {space.name!r} has no primitive {edge.op!r}; "
                        f"{did_you_mean(edge.op, space.primitives)}"
                    )

    def _validate_functions(self, space: Space) -> None:
        if bool(self.functions) != bool(space.functions):
            does = "decides on the function of each cell's weights" if space.functions else "has no such decision"
            has = f"saturation {self.saturation}" if self.functions else "no saturation"
            raise ValueError(f"genotype: space {space.name!r} {does}, and the genotype has {has}")
        for cell_type, function in self.saturation.items():
            if function not in space.functions:
                raise ValueError(
                    f"genotype: saturation: {cell_type}: space {space.name!r} has no function {function!r}; "
                    f"{did_you_mean(function, space.functions)}"
                )

    def to_decisions(self, space: Space) -> Decisions:
        """Return what a controller decides: per inner node ``[source_a, source_b, op_a, op_b]``.

        Sources are node numbers; ops are indices into ``space.primitives``. Where the space decides on functions, a
        last row ``[function]`` holds the index into ``space.functions``.

        Raises:
            ValueError: The space does not hold this genotype.
        """
        self.validate(space)
        index = {name: i for i, name in enumerate(space.primitives)}
        last = {cell_type: [[space.functions.index(name)]] for cell_type, name in self.saturation.items()}
        return {
            cell_type: [[a.source, b.source, index[a.op], index[b.op]] for a, b in cell] + last.get(cell_type, [])
            for cell_type, cell in self.items
        }

    @classmethod
    def from_decisions(
        cls, space: Space, decisions: Mapping[CellType, Sequence[Sequence[int]]], *, name: str = ""
    ) -> Genotype:
        """Build a genotype from decisions, the form of ``to_decisions``.

        Raises:
            ValueError: A decision is out of its range, or cells or nodes are missing.
        """
        if set(decisions) != set(space.cell_types):
            raise ValueError(f"decisions: for the cells {list(space.cell_types)}, got {list(decisions)}")
        items, functions, choices = [], [], decision_sizes(space)
        for cell_type in space.cell_types:
            rows = decisions[cell_type]
            if [len(row) for row in rows] != [len(sizes) for sizes in choices]:
                more = " and one of 1" if space.functions else ""
                raise ValueError(
                    f"decisions: {cell_type}: {space.nodes - NUM_INPUTS} rows of 4{more}, got {short(rows)}"
                )
            for row, sizes in zip(rows, choices, strict=True):
                if any(not 0 <= value < size for value, size in zip(row, sizes, strict=True)):
                    raise ValueError(f"decisions: {cell_type}: each under {sizes} and not negative, got {list(row)}")
            items.append((cell_type, tuple(_node_from_row(space, row) for row in rows if len(row) == 4)))
            functions += [space.functions[rows[-1][0]]] if space.functions else []
        return cls(items=tuple(items), name=name, space=space.name, functions=tuple(functions))

    @classmethod
    def random(cls, space: Space, *, generator: torch.Generator) -> Genotype:
        """Draw a genotype uniformly over decisions (source, source, op, op of every inner node, function).

        Args:
            space: The space.
            generator: A CPU generator.
        """
        decisions: Decisions = {
            cell_type: [[_draw(size, generator) for size in sizes] for sizes in decision_sizes(space)]
            for cell_type in space.cell_types
        }
        return cls.from_decisions(space, decisions)

    def mutate(self, space: Space, *, generator: torch.Generator) -> Genotype:
        """Change one decision (of an edge, or a function), drawn uniformly, to another value, drawn uniformly.

        A change that leaves an isomorphic architecture (such as the source of a ``none`` edge) is drawn again, so
        that the child's canonical key always differs from the parent's.

        Raises:
            ValueError: The space does not hold this genotype.
        """
        decisions = self.to_decisions(space)
        sizes = decision_sizes(space)
        slots = [
            (cell_type, node, slot)
            for cell_type in space.cell_types
            for node, node_sizes in enumerate(sizes)
            for slot, size in enumerate(node_sizes)
            if size > 1
        ]
        own_key = self.canonical_key()
        while True:
            cell_type, node, slot = slots[_draw(len(slots), generator)]
            old = decisions[cell_type][node][slot]
            new = _draw(sizes[node][slot] - 1, generator)
            decisions[cell_type][node][slot] = new + (new >= old)
            child = Genotype.from_decisions(space, decisions)
            if child.canonical_key() != own_key:
                return child
            decisions[cell_type][node][slot] = old

    # What it is

    def canonical_key(self) -> str:
        """Return a text that isomorphic architectures share, and others do not.

        Isomorphic are cells that differ in the numbering of inner nodes, in the order of a node's edges, or in the
        source of ``none`` edges. Two nodes that compute the same expression stay two, as they are separate modules.
        """
        functions = {cell_type: f"@{name}" for cell_type, name in self.saturation.items()}
        return ";".join(
            f"{cell_type}{functions.get(cell_type, '')}:{canonical_cell(cell)}" for cell_type, cell in self.items
        )

    def only_skips_and_nones(self) -> list[CellType]:
        """Return the types of the cells that compute nothing, for a search to report."""
        return [cell_type for cell_type, cell in self.items if all(edge.op in (NONE, SKIP) for _, edge in edges(cell))]

    def unread_cells(self, space: Space) -> list[int]:
        """Return the numbers of the space's cells whose output reaches no classifier, for a search to report.

        Cell i reads node 0 from the output of cell i - 2 and node 1 from that of cell i - 1, so that e.g. a normal cell
        without a path from node 1 leaves the cell before it unread.
        """
        reads = {name: {edge.source for _, edge in edges(cell) if edge.op != NONE} for name, cell in self.items}
        types = [plan.cell_type for plan in space.layout()]
        read = {len(types) - 1}
        for number in reversed(range(len(types))):
            if number in read:
                read |= {number - NUM_INPUTS + source for source in reads[types[number]] if source < NUM_INPUTS}
        return [number for number in range(len(types)) if number not in read]

    def describe(self) -> str:
        """Return one line for each inner node, e.g. ``normal n2 = skip(0) + sep_conv_3x3(1)``, and function."""
        nodes = [
            f"{cell_type} n{number} = {a.op}({a.source}) + {b.op}({b.source})"
            for cell_type, cell in self.items
            for number, (a, b) in enumerate(cell, start=NUM_INPUTS)
        ]
        return "\n".join(nodes + [f"{cell_type} weights: {name}" for cell_type, name in self.saturation.items()])


def genotype_names() -> list[str]:
    """Return the names of the shipped genotypes."""
    return shipped_names(FOLDER, ".json")


def decision_sizes(space: Space) -> list[tuple[int, ...]]:
    """Return the number of values of each decision on a cell, in the rows of `Genotype.to_decisions`."""
    num_ops = len(space.primitives)
    nodes: list[tuple[int, ...]] = [(number, number, num_ops, num_ops) for number in range(NUM_INPUTS, space.nodes)]
    return nodes + ([(len(space.functions),)] if space.functions else [])


def _node_from_row(space: Space, row: Sequence[int]) -> Node:
    source_a, source_b, op_a, op_b = row
    return (
        Edge(space.primitives[op_a], int(source_a)),
        Edge(space.primitives[op_b], int(source_b)),
    )


def _draw(size: int, generator: torch.Generator) -> int:
    return int(torch.randint(size, (), generator=generator))


def _parse_functions(data: Mapping[str, Any], cells: Sequence[CellType], *, where: str) -> tuple[str, ...]:
    if SATURATION not in data:
        return ()
    given = data[SATURATION]
    if (
        not isinstance(given, Mapping)
        or set(given) != set(cells)
        or not all(isinstance(v, str) for v in given.values())
    ):
        raise ValueError(f"{where}: saturation: a function for each of {list(cells)}, got {short(given)}")
    return tuple(given[cell_type] for cell_type in cells)


def _to_json(data: Mapping[str, Any]) -> str:
    """Return JSON with one line for each node, so that a person can read and edit it."""
    lines = []
    for key, value in data.items():
        if key in _CELL_TYPES:
            rows = ",\n".join(f"    {json.dumps(node)}: {json.dumps(edges)}" for node, edges in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
