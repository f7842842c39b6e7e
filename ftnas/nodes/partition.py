"""Which blocks lie on which physical node, and which hyperconnections join the nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pydantic import model_validator

from ftnas.settings import Settings, did_you_mean

INPUT = "input"  # the source of the data: feeds every node without children, never fails


class Node(Settings):
    """A physical node: the blocks that it hosts, in order, and the node that it sends to (None: the top)."""

    name: str
    blocks: tuple[int, ...]
    to: str | None = None


class Skip(Settings):
    """A skip hyperconnection from a node, or from ``input``, to a node further up."""

    source: str
    to: str


class Link(NamedTuple):
    """One hyperconnection.

    Attributes:
        bypassed: The nodes strictly between source and target; empty for a simple hyperconnection.
    """

    source: str
    to: str
    bypassed: tuple[str, ...]


class Partition(Settings):
    """A tree of physical nodes over the blocks of a model (Yousefpour et al., ResiliNet, section 2.1 and Figure 2).

    Every node but one, the top, sends to another; a node may have several children, whose outputs are added.

    Raises:
        ValueError: A node without blocks, a name twice, an unknown name, a cycle, several tops, blocks out of
            order, or a skip that bypasses nothing.
    """

    nodes: tuple[Node, ...]
    skips: tuple[Skip, ...] = ()

    @model_validator(mode="after")
    def _is_a_tree(self) -> Partition:
        names = [node.name for node in self.nodes]
        for node in self.nodes:
            if names.count(node.name) > 1:
                raise ValueError(f"every node needs a name of its own, {node.name!r} is there twice; rename one")
            if node.name == INPUT:
                raise ValueError(f"{INPUT!r} is the source of the data and cannot name a node; rename it")
            if not node.blocks:
                raise ValueError(f"node {node.name!r} hosts no blocks; give it one or leave it out")
            if node.to is not None and node.to not in names:
                raise ValueError(f"node {node.name!r} sends to unknown {node.to!r}; {did_you_mean(node.to, names)}")
        for node in self.nodes:
            self._check_way(node.name)
        tops = [node.name for node in self.nodes if node.to is None]
        if len(tops) != 1:
            raise ValueError(f"exactly one node is the top (no 'to'), got {tops}; let the others send to it")
        self._check_order()
        self._check_skips(names)
        return self

    def _check_way(self, name: str) -> None:
        seen = [name]
        to = self.parents[name]
        while to is not None:
            if to in seen:
                raise ValueError(f"nodes in a cycle: {' -> '.join([*seen, to])}; let one of them be the top")
            seen.append(to)
            to = self.parents[to]

    def _check_order(self) -> None:
        blocks = {node.name: node.blocks for node in self.nodes}
        for node in self.nodes:
            if list(node.blocks) != sorted(node.blocks):
                raise ValueError(f"the blocks of node {node.name!r} are in no rising order: {node.blocks}; sort them")
            if node.to is not None and max(node.blocks) > min(blocks[node.to]):
                raise ValueError(
                    f"node {node.name!r} has block {max(node.blocks)}, after block {min(blocks[node.to])} of "
                    f"{node.to!r}, to which it sends; data flow from low blocks to high ones"
                )

    def _check_skips(self, names: list[str]) -> None:
        for skip in self.skips:
            for name, known in ((skip.source, [INPUT, *names]), (skip.to, names)):
                if name not in known:
                    raise ValueError(f"skip {skip.source} -> {skip.to}: no node {name!r}; {did_you_mean(name, known)}")
            if not self._between(skip):
                raise ValueError(
                    f"the skip {skip.source} -> {skip.to} bypasses no node; its target must lie at least two steps up"
                )
            if self.skips.count(skip) > 1:
                raise ValueError(f"the skip {skip.source} -> {skip.to} is there twice; leave one out")

    @property
    def parents(self) -> dict[str, str | None]:
        """The node to which each node sends."""
        return {node.name: node.to for node in self.nodes}

    @property
    def top(self) -> str:
        """The node that gives the answer."""
        return next(node.name for node in self.nodes if node.to is None)

    def children(self, name: str) -> list[str]:
        """Return the nodes that send to a node, in the order of the map."""
        return [node.name for node in self.nodes if node.to == name]

    def ordered(self) -> list[Node]:
        """Return the nodes, children before parents."""
        return sorted(self.nodes, key=lambda node: node.blocks[0])

    def links(self) -> list[Link]:
        """Return every hyperconnection: the simple ones, from ``input`` to the leaves too, then the skips."""
        simple = []
        for node in self.ordered():
            sources = self.children(node.name) or [INPUT]
            simple += [Link(source, node.name, ()) for source in sources]
        return simple + [Link(skip.source, skip.to, self._between(skip)) for skip in self.skips]

    def bypassed(self) -> set[str]:
        """Return the nodes that at least one skip bypasses."""
        return {name for skip in self.skips for name in self._between(skip)}

    def without_skips(self) -> Partition:
        """Return the same nodes with simple hyperconnections only."""
        return self.with_skips(())

    def with_skips(self, skips: Iterable[Skip]) -> Partition:
        """Return the same nodes with these skips alone; ValueError for one that this map does not have."""
        chosen = tuple(skips)
        for skip in chosen:
            if skip not in self.skips:
                known = ", ".join(f"{known.source} -> {known.to}" for known in self.skips) or "none"
                raise ValueError(f"the map has no skip {skip.source} -> {skip.to}; it has: {known}")
        return Partition(nodes=self.nodes, skips=chosen)

    def check_covers(self, num_blocks: int) -> None:
        """Raise ValueError unless every block of a model is on exactly one node."""
        hosted = [block for node in self.nodes for block in node.blocks]
        twice = sorted({block for block in hosted if hosted.count(block) > 1})
        if twice:
            raise ValueError(f"blocks on more than one node, or twice on one: {twice}; host each once")
        absent = sorted(set(range(num_blocks)) - set(hosted))
        if absent:
            raise ValueError(f"blocks on no node: {absent}; the model has blocks 0 to {num_blocks - 1}")
        unknown = sorted(set(hosted) - set(range(num_blocks)))
        if unknown:
            raise ValueError(f"the model has no blocks {unknown}, only 0 to {num_blocks - 1}; take them out of the map")

    def check_names(self, names: Iterable[str], *, where: str) -> None:
        """Raise ValueError for a name that is no node of this map."""
        known = list(self.parents)
        for name in names:
            if name not in known:
                raise ValueError(f"{where}: unknown node {name!r}; {did_you_mean(name, known)}")

    def _between(self, skip: Skip) -> tuple[str, ...]:
        """Return the nodes that a skip bypasses: none if its target is not above its source."""
        starts = [n.name for n in self.nodes if not self.children(n.name)] if skip.source == INPUT else []
        starts = starts or [parent for parent in [self.parents.get(skip.source)] if parent is not None]
        between: list[str] = []
        for start in starts:
            way: list[str] = []
            name: str | None = start
            while name is not None and name != skip.to:
                way.append(name)
                name = self.parents[name]
            if name == skip.to:
                between += [node for node in way if node not in between]
        return tuple(between)
