"""Where things go in a picture: nodes of a cell, labels beside lines. Geometry only, no drawing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Cell = Mapping[str, Sequence[Sequence[Any]]]
Plan = Mapping[int, tuple[float, float]]

Point = tuple[float, float]
Line = tuple[Point, Point]

OUTPUT = -1
CHIP = 1.06
"""Width of a label, which stands at the left of the node that its edge leads to."""
CHIP_PITCH = 0.3
COLUMN = 2.1
REACH = 0.45
"""An edge is a Bezier curve that is level at both ends: its control points lie this share of its width inside."""
_CHIP_START = 1.36  # from the node's middle to the left side of its labels
_ROW = 0.55
_TRIED = 3000


class Edge(NamedTuple):
    """An edge of a cell: ``place`` counts the edges of ``node``."""

    node: int
    place: int
    source: int
    op: str


def edges(cell: Cell) -> list[Edge]:
    """Return all edges of ``{"2": [["skip", 0], ...], ...}``."""
    return [
        Edge(int(node), place, int(source), str(op))
        for node, inputs in cell.items()
        for place, (op, source) in enumerate(inputs)
    ]


def half_width(node: int) -> float:
    """Return half the width of a node's box."""
    return 0.3 if node in (0, 1, OUTPUT) else 0.22


def ends(plan: Plan, cell: Cell, edge: Edge) -> Line:
    """Return the ends ((x, y), (x, y)) of an edge: the right side of its source, the left side of its label."""
    x, y = plan[edge.node]
    start = plan[edge.source][0] + half_width(edge.source), plan[edge.source][1]
    middle = (len(cell[str(edge.node)]) - 1) / 2
    return start, (x - _CHIP_START, y + CHIP_PITCH * (middle - edge.place))


def plan_cell(cell: Cell) -> dict[int, tuple[float, float]]:
    """Return (x, y) of every node: columns by depth, rows such that edges are short, rarely cross and hit no node.

    With up to four inner nodes the best of all placements, with more the best of a fixed sample.
    """
    nodes, links = sorted(int(node) for node in cell), edges(cell)
    depth = {0: 0, 1: 0}
    for node in nodes:
        depth[node] = 1 + max((depth[edge.source] for edge in links if edge.node == node), default=0)
    right = (max(depth.values()) + 0.55) * COLUMN
    fixed = {0: (0.0, _ROW), 1: (0.0, -_ROW), OUTPUT: (right, 0.0)}
    rows = [_ROW * row for row in range(-3, 4)]
    tried: Iterable[tuple[float, ...]] = itertools.product(rows, repeat=len(nodes))
    if len(nodes) > 4:
        random = np.random.default_rng(0)
        tall = [_ROW * row for row in range(-len(nodes), len(nodes) + 1)]
        tried = [tuple(map(float, random.choice(tall, len(nodes)))) for _ in range(_TRIED)]
    plans = (fixed | {node: (depth[node] * COLUMN, y) for node, y in zip(nodes, ys, strict=True)} for ys in tried)
    return min(plans, key=lambda plan: round(_cost(cell, plan, nodes, links), 9))


def _cost(cell: Cell, plan: Plan, nodes: list[int], links: list[Edge]) -> float:
    """Weigh what makes a drawing hard to read: labels that meet, edges behind nodes, crossings, steep edges."""
    cost = 0.1 * sum(abs(plan[node][1]) for node in nodes)
    for a, b in itertools.combinations(nodes, 2):
        if plan[a][0] == plan[b][0]:
            room = CHIP_PITCH * (len(cell[str(a)]) + len(cell[str(b)])) / 2 + 0.15
            cost += 100 * (abs(plan[a][1] - plan[b][1]) < room)
    if cost >= 100:
        return cost
    lines = [ends(plan, cell, edge) for edge in links]
    for (x0, y0), (x1, y1) in lines:
        cost += 0.25 * abs(y1 - y0)
        for node in nodes:
            x, y = plan[node]
            left = x - _CHIP_START
            if x0 < left < x1 - 0.5:  # it passes this node's column, labels and all
                passed = [(min(at, x1) - x0) / (x1 - x0) for at in (left, left + 0.5, left + 1.0, x)]
                cost += 6 * any(abs(y0 + _bend(share) * (y1 - y0) - y) < 0.42 for share in passed)
    return cost + sum(_cross(one, other) for one, other in itertools.combinations(lines, 2))


def _bend(share: float) -> float:
    """Return how far up a drawn edge is, in [0, 1], after this share of its way to the right."""
    return _BENDS[round(share * (len(_BENDS) - 1))]


def _bends(num: int) -> list[float]:
    t = np.linspace(0, 1, 1000)
    x = 3 * REACH * t * (1 - t) ** 2 + 3 * (1 - REACH) * t**2 * (1 - t) + t**3
    height: list[float] = np.interp(np.linspace(0, 1, num), x, 3 * t**2 - 2 * t**3).tolist()
    return height


_BENDS = _bends(101)


def _cross(a: Line, b: Line) -> bool:
    start, end = max(a[0][0], b[0][0]), min(a[1][0], b[1][0])
    if start >= end:
        return False
    return (_height(a, start) - _height(b, start)) * (_height(a, end) - _height(b, end)) < -1e-9


def _height(line: Line, x: float) -> float:
    (x0, y0), (x1, y1) = line
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move ascending heights as little as needed, so that neighbours are ``gap`` apart and all lie in [0, 1].

    Where they cannot all fit, the order and the gaps hold and the ends stick out.
    """
    groups: list[tuple[float, int]] = []  # runs that touch: the mean place of the lowest member, and how many
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and groups[-2][0] + gap * groups[-2][1] > groups[-1][0]:
            (a, na), (b, nb) = groups[-2:]
            groups[-2:] = [((a * na + (b - gap * na) * nb) / (na + nb), na + nb)]
    placed = [low + gap * i for low, members in groups for i in range(members)]
    count = len(placed)
    for index in range(count):
        placed[index] = max(placed[index], gap * index)
    for index in range(count):
        placed[index] = min(placed[index], max(1.0, gap * (count - 1)) - gap * (count - 1 - index))
    return placed
