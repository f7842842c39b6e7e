"""Where things go in a picture: nodes of a cell, labels beside lines. Geometry only, no drawing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Cell = Mapping[str, Sequence[Sequence[Any]]]
Plan = Mapping[int, tuple[float, float]]

Point = tuple[float, float]
Line = tuple[Point, Point]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

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


def free_place(
    point: Point, *, size: tuple[float, float], inside: Sequence[float], taken: Iterable[Box], gap: float = 0.13
) -> Box | None:
    """Return the first place for a text around a point that lies ``inside`` and meets nothing ``taken``, or None.

    Beside the point is tried first, then above and below it, then the same farther away; all in one unit.

    Args:
        point: (x, y).
        size: Width and height of the text.
        inside: Left, bottom, right and top of the picture.
        taken: What it must not meet.
        gap: From the point to the text.
    """
    (x, y), (wide, high) = point, size
    right, left, middle = x + gap, x - gap - wide, x - wide / 2
    corners = [(right, y - high / 2), (left, y - high / 2), (middle, y + gap), (middle, y - gap - high)]
    for far in (0.75 * gap, 1.5 * gap, 2.25 * gap):
        corners += [(right, y - far - high), (left, y + far), (right, y + far), (left, y - far - high)]
        corners += [(middle, y + gap + far), (middle, y - gap - far - high)]
    others = list(taken)
    for a, b in corners:
        box = (a, b, a + wide, b + high)
        contained = a >= inside[0] and b >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        if contained and not any(meet(box, other) for other in others):
            return box
    return None


def meet(a: Box, b: Box) -> bool:
    """Return whether two boxes overlap; sides that touch do not count."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def round_ticks(low: float, *, high: float) -> list[float]:
    """Return three to seven round numbers in [low, high], low < high, at equal distances of 1, 2 or 5 x 10^k."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def shorten(name: str, *, longest: int) -> str:
    """Return a name of at most ``longest`` characters: one that is longer loses its middle to an ellipsis."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - half]}…{name[-half:]}"
