"""A model run over physical nodes that may be down: vanilla, DFG, ResiliNet, and skips on failure alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ftnas import rng
from ftnas.nodes.matching import Match, Matching
from ftnas.nodes.partition import INPUT, Link, Partition, Skip
from ftnas.settings import Positive, Rate, Settings

Mode = Literal["vanilla", "dfg", "resilinet", "on_failure"]


class Failout(Settings):
    """Shut physical nodes down while training: a mask per batch, nothing rescaled (ResiliNet, section 2.3).

    Nodes that no skip bypasses are never shut down.

    Attributes:
        rate: The rate of every node that ``rates`` does not name.
        rates: Rates of single nodes, e.g. their failure rates.
    """

    rate: Rate = 0.05
    rates: dict[str, Rate] = Field(default_factory=dict)

    def rates_of(self, partition: Partition) -> dict[str, float]:
        """Return the rate of each node that a skip bypasses."""
        partition.check_names(self.rates, where="failout.rates")
        bypassed = partition.bypassed()
        for name, rate in self.rates.items():
            if rate and name not in bypassed:
                raise ValueError(f"failout.rates.{name} = {rate} has no effect, no skip bypasses that node; set 0")
        return {name: self.rates.get(name, self.rate) for name in partition.parents if name in bypassed}

    def within(self, partition: Partition) -> Failout:
        """Return the same for a map with fewer skips, without the rates of nodes that none of these bypasses."""
        bypassed = partition.bypassed()
        return self.model_copy(update={"rates": {name: r for name, r in self.rates.items() if name in bypassed}})

    def sample(self, partition: Partition, *, generator: torch.Generator) -> frozenset[str]:
        """Draw the nodes that are down for one batch: each on its own, with its rate."""
        rates = self.rates_of(partition)
        draws = torch.rand(len(rates), generator=generator).tolist()
        return frozenset(name for (name, rate), draw in zip(rates.items(), draws, strict=True) if draw < rate)


class Weighting(Settings):
    """Weights of hyperconnections (ResiliNet, section 4).

    Attributes:
        scheme: ``one``; ``reliability``, 1 - the failure rate of the source; ``relative``, that over the sum of all
            incoming hyperconnections of the target; ``uniform``, drawn once from [0, ``high``].
        high: Of ``uniform`` only.
    """

    scheme: Literal["one", "reliability", "relative", "uniform"] = "one"
    high: Positive = 1.0

    @model_validator(mode="after")
    def _effective(self) -> Weighting:
        if self.high != 1.0 and self.scheme != "uniform":
            raise ValueError(f"high has no effect on the scheme {self.scheme}; leave it out, or take uniform")
        return self

    def weights(self, links: list[Link], *, failure_rates: Mapping[str, float], seed: int) -> list[float]:
        """Return one weight per hyperconnection; ``input`` is fully reliable."""
        if self.scheme == "one":
            return [1.0] * len(links)
        if self.scheme == "uniform":
            draws = torch.rand(len(links), generator=rng.generator(seed, "hyperconnections"), dtype=torch.float64)
            return [self.high * draw for draw in draws.tolist()]
        reliable = [1.0 - failure_rates.get(link.source, 0.0) for link in links]
        if self.scheme == "reliability":
            return reliable
        sums = {link.to: 0.0 for link in links}
        for link, value in zip(links, reliable, strict=True):
            sums[link.to] += value
        return [value / sums[link.to] if value else 0.0 for link, value in zip(links, reliable, strict=True)]


class SplitNetwork(nn.Module):
    """The blocks of a sequential model on physical nodes, joined by weighted hyperconnections.

    The input of a node is the sum of its incoming hyperconnections that carry information. A node that is down, or
    that receives nothing, sends nothing. A skip is active always in ``dfg``, and in ``resilinet`` while training; in
    ``resilinet`` in evaluation mode only while one of the nodes that it bypasses is down; in ``on_failure`` that is so
    while training too. ``vanilla`` has no skips.

    Args:
        blocks: The model, block after block.
        partition: Which node hosts which block.
        shape: The shape of one image or sample, without the batch.
        mode: ``vanilla``, ``dfg``, ``resilinet`` or ``on_failure``.
        matching: How hyperconnections between unlike shapes are matched.
        weights: One per hyperconnection of `links`, 1 without.

    Raises:
        ValueError: The partition does not fit the blocks, or shapes cannot be matched.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        *,
        partition: Partition,
        shape: tuple[int, ...],
        mode: Mode = "resilinet",
        matching: Matching = "projection",
        weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        partition.check_covers(len(blocks))
        self.partition = partition.without_skips() if mode == "vanilla" else partition
        self.mode: Mode = mode
        self.absent: frozenset[Link] = frozenset()  # skips that are disconnected, see `use`
        self.links = self.partition.links()
        self.weights = [1.0] * len(self.links) if weights is None else list(weights)
        if len(self.weights) != len(self.links):
            raise ValueError(f"one weight per hyperconnection: {len(self.links)} needed, got {len(self.weights)}")
        self._given = list(self.weights)
        self.order = [node.name for node in self.partition.ordered()]
        self.nodes = nn.ModuleList(nn.Sequential(*(blocks[b] for b in node.blocks)) for node in partition.ordered())
        self.shapes: dict[str, tuple[int, ...]] = {}  # source -> shape of what it sends for one sample
        self.matches = self._matches(shape, matching)

    def _matches(self, shape: tuple[int, ...], matching: Matching) -> nn.ModuleList:
        """Follow shapes upwards; the first hyperconnection of a node gives the shape that the others match."""
        outputs, inputs = {INPUT: shape}, {}
        was_training = self.nodes.training
        self.nodes.eval()
        with torch.no_grad():
            for name, module in zip(self.order, self.nodes, strict=True):
                first = next(link for link in self.links if link.to == name)
                inputs[name] = outputs[first.source]
                try:
                    outputs[name] = tuple(module(torch.zeros(1, *inputs[name])).shape[1:])
                except RuntimeError as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(
                        f"node {name!r} cannot take what {first.source!r} sends, of shape {inputs[name]}: {reason}; a "
                        "node without children gets the input itself"
                    ) from None
        self.nodes.train(was_training)
        self.shapes = outputs
        return nn.ModuleList(Match(outputs[link.source], inputs[link.to], matching=matching) for link in self.links)

    def active(self, link: Link, down: Collection[str]) -> bool:
        """Whether a hyperconnection is used while some nodes are down."""
        if not link.bypassed:
            return True
        if link in self.absent:
            return False
        always = self.mode == "dfg" or (self.mode == "resilinet" and self.training)
        return always or any(name in down for name in link.bypassed)

    def use(
        self, mode: Mode, *, skips: Collection[Skip] | None = None, survival: Mapping[str, float] | None = None
    ) -> None:
        """Run a trained network in another way than it was trained in.

        Args:
            mode: Of the skips that stay.
            skips: Those that stay; None for all.
            survival: Source -> probability by which its hyperconnections are multiplied, as dropout would at inference.
        """
        self.mode = mode
        if skips is not None:
            stay = {(skip.source, skip.to) for skip in skips}
            self.absent = frozenset(k for k in self.links if k.bypassed and (k.source, k.to) not in stay)
        shares = survival or {}
        self.weights = [w * shares.get(link.source, 1.0) for w, link in zip(self._given, self.links, strict=True)]

    def informed(self, down: Collection[str]) -> set[str]:
        """Return the sources that send information while some nodes are down, ``input`` among them."""
        informed = {INPUT}
        for name in self.order:
            sources = [link.source for link in self.links if link.to == name and self.active(link, down)]
            if name not in down and any(source in informed for source in sources):
                informed.add(name)
        return informed

    def carries(self, down: Collection[str]) -> bool:
        """Whether any information reaches the answer of the top."""
        return self.partition.top in self.informed(down)

    def forward(self, inputs: Tensor, down: Collection[str] = ()) -> Tensor | None:
        """Answer while some nodes are down.

        Args:
            inputs: float [B, *shape].
            down: Names of the nodes that are down.

        Returns:
            Logits [B, classes], or None if no information reaches the top.
        """
        self.partition.check_names(down, where="down")
        sent: dict[str, Tensor] = {INPUT: inputs}
        for name, module in zip(self.order, self.nodes, strict=True):
            if name in down:
                continue
            received = None
            for link, match, weight in zip(self.links, self.matches, self.weights, strict=True):
                if link.to != name or link.source not in sent or not self.active(link, down):
                    continue
                value = match(sent[link.source])
                value = value if weight == 1.0 else value * weight
                received = value if received is None else received + value
            if received is not None:
                sent[name] = module(received)
        return sent.get(self.partition.top)
