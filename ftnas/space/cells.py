"""Cells as values: their edges, their canonical text, reading them from plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from ftnas.space.ops import NONE
from ftnas.space.space import NUM_INPUTS


class Edge(NamedTuple):
    """One incoming connection of a node: the primitive, and the node that it comes from."""

    op: str
    source: int


Node = tuple[Edge, Edge]
Cell = tuple[Node, ...]  # nodes 2, 3, ...; nodes 0 and 1 are the cell's inputs


def edges(cell: Cell) -> Iterator[tuple[int, Edge]]:
    """Give (number of the node, edge) of every edge."""
    for number, node in enumerate(cell, start=NUM_INPUTS):
        for edge in node:
            yield number, edge


def canonical_cell(cell: Cell) -> str:
    """Return the least text of a cell over all relabellings that keep sources before their nodes.

    Nodes get their new numbers one by one. A node's text is fixed once its sources have theirs, so only the nodes
    with the least text can come next; where several have it, each is tried.
    """
    nodes = list(enumerate(cell, start=NUM_INPUTS))
    partial: list[dict[int, int]] = [{0: 0, 1: 1}]  # old number -> new number
    texts = []
    for number, _ in nodes:
        found: list[tuple[str, dict[int, int]]] = []
        for labels in partial:
            for old, node in nodes:
                if old not in labels and all(edge.op == NONE or edge.source in labels for edge in node):
                    text = "+".join(sorted(_edge_text(edge, labels) for edge in node))
                    found.append((text, {**labels, old: number}))
        least = min(text for text, _ in found)
        texts.append(least)
        partial = [labels for text, labels in found if text == least]
    return "|".join(texts)


def _edge_text(edge: Edge, labels: dict[int, int]) -> str:
    return NONE if edge.op == NONE else f"{edge.op}({labels[edge.source]})"


def parse_cell(data: Any, *, where: str) -> Cell:
    """Read a cell as `Genotype.from_dict` takes it; raises a ValueError of one line."""
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"{where}: nodes by number, from '2' on, got {short(data)}")
    expected = [str(number) for number in range(NUM_INPUTS, NUM_INPUTS + len(data))]
    if sorted(data) != sorted(expected):
        raise ValueError(f"{where}: nodes {', '.join(expected)}, got {', '.join(map(str, data))}")
    return tuple(_parse_node(data[number], int(number), where=f"{where}: node {number}") for number in expected)


def _parse_node(data: Any, number: int, *, where: str) -> Node:
    if not isinstance(data, (list, tuple)) or len(data) != 2:
        raise ValueError(f"{where}: two edges, got {short(data)}")
    edges = []
    for edge in data:
        if not isinstance(edge, (list, tuple)) or len(edge) != 2 or not isinstance(edge[0], str):
            raise ValueError(f"{where}: an edge is [primitive, source], got {short(edge)}")
        op, source = edge
        if type(source) is not int or not 0 <= source < number:
            raise ValueError(f"{where}: a source is an earlier node, 0..{number - 1}, got {source!r}")
        edges.append(Edge(op, source))
    return cast(Node, tuple(edges))


def short(value: Any) -> str:
    """Return a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
