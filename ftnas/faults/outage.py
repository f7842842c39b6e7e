"""Physical nodes that are down: what the parts of a network on them give is zero (ResiliNet, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor, nn

from ftnas.faults.base import FAULTS, Fault, Plan, Site
from ftnas.faults.sampling import bernoulli_sites, persisting
from ftnas.hooks import on_output
from ftnas.quantize import Grid
from ftnas.rng import generator
from ftnas.settings import Rate, did_you_mean


def _to_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


Hosting = Annotated[
    tuple[tuple[str, tuple[str, ...]], ...],  # not a dict: a fault model is a frozen value
    BeforeValidator(_to_pairs),
    PlainSerializer(dict),
    Field(min_length=1),
]


@FAULTS.register("node_down")
class NodeDown(Fault):
    """A physical node is down: the outputs of all modules on it are zero, at once.

    One draw for each node and forward, so that all images of a batch meet the same nodes, as in failout; a hard error
    keeps one draw.

    Attributes:
        rate: Probability that a node is down, each on its own.
        nodes: Node -> names, or name patterns, of the modules that it hosts, e.g. ``{n1: [cells.1], n2: [cells.2]}``.
    """

    rate: Rate
    nodes: Hosting

    name: ClassVar[str] = "node_down"
    target: ClassVar[Literal["weight", "feature", "module"]] = "module"
    rate_name: ClassVar[str] = "rate"
    needs_quantization: ClassVar[bool] = False

    @model_validator(mode="after")
    def _whole_nodes(self) -> Self:
        if self.where is not None:
            raise ValueError("where has no effect on node_down, whose nodes say what is hit; leave it out")
        persisting(self.rate, self.persistence)
        return self

    def num_codes(self, site: Site) -> int:
        """Return 0: a whole node is no single fault of a layer."""
        return 0

    def sample(self, site: Site, *, generator: torch.Generator) -> Plan:
        """Draw whether one node is down: a single unit, hit or not; codes are 0."""
        rate = persisting(self.rate, self.persistence)
        sites = bernoulli_sites(1, rate, generator=generator)
        return Plan(sites, torch.zeros_like(sites), 1, rate, site.shape, span=site.num_values)

    def apply_(self, values: Tensor, plan: Plan, grid: Grid | None) -> Tensor:
        """Silence the node in place; see `Fault.apply_`."""
        return values.zero_() if len(plan.sites) else values

    def hosted(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """Return the modules of each node.

        Raises:
            ValueError: A name that matches nothing, or a module on two nodes or inside another that is hosted.
        """
        names = [name for name, _ in model.named_modules() if name]
        owner: dict[str, str] = {}
        for node, patterns in self.nodes:
            for pattern in patterns:
                matched = [name for name in names if fnmatchcase(name, pattern)]
                if not matched:
                    raise ValueError(f"node_down: nodes.{node}: no module {pattern!r}; {did_you_mean(pattern, names)}")
                for name in matched:
                    if name in owner:
                        raise ValueError(f"node_down: module {name} is on {owner[name]} and on {node}; host it once")
                    owner[name] = node
        for name in owner:
            above = next((other for other in owner if name.startswith(f"{other}.")), None)
            if above is not None:
                raise ValueError(f"node_down: module {name} is part of {above}, which is hosted too; host it once")
        return {node: [model.get_submodule(name) for name, at in owner.items() if at == node] for node, _ in self.nodes}


class Outages:
    """The nodes of one model that may be down, and which are, draw by draw.

    Args:
        model: Hosts the modules.
        faults: Number in the injection -> fault.
        seed: Of the stream of draws.
        hard: One draw for always.
    """

    def __init__(self, model: nn.Module, faults: dict[int, NodeDown], *, seed: int, hard: bool) -> None:
        self._faults, self._seed, self._hard = faults, seed, hard
        self._hosted = {number: fault.hosted(model) for number, fault in faults.items()}
        self._drawn: dict[tuple[int, str], tuple[int | str, Plan]] = {}
        self._counted: set[tuple[int, str, int | str]] = set()

    def __bool__(self) -> bool:
        return bool(self._faults)

    def attach(
        self,
        current: Callable[[], int | None],
        count: Callable[[int, str, Plan], None],
        replaced: Callable[[Tensor, Tensor], None],
    ) -> Sequence[Callable[[], None]]:
        """Hook the modules; return what takes the hooks away.

        Args:
            current: Number of the draw of the forward that runs; None without faults.
            count: Takes the number of a fault, a node and each fresh plan.
            replaced: Told each tensor in whose place another one comes, and that one.
        """
        undo = []
        for number, hosted in self._hosted.items():
            for node, modules in hosted.items():
                silenced = self._silencer(number, node, current, count)
                for module in modules:
                    undo.append(on_output(module, silenced, active=lambda: current() is not None, replaced=replaced))
        return undo

    def _silencer(
        self,
        number: int,
        node: str,
        current: Callable[[], int | None],
        count: Callable[[int, str, Plan], None],
    ) -> Callable[[Any], Tensor]:
        def silenced(output: Any) -> Tensor:
            draw = current()
            assert draw is not None
            if not isinstance(output, Tensor):
                raise ValueError(f"node_down: a module of node {node} gives no single tensor; host others")
            when = "device" if self._hard else draw
            known, plan = self._drawn.get((number, node), (None, None))
            if plan is None or known != when:
                fault = self._faults[number]
                stream = generator(self._seed, fault.name, number, when, node)
                plan = fault.sample(Site(node, (1,), macs=0, bits=None), generator=stream)
                self._drawn[number, node] = when, plan
                if (number, node, when) not in self._counted:  # a draw that candidates share is one draw
                    self._counted.add((number, node, when))
                    count(number, node, plan)
            return torch.zeros_like(output) if len(plan.sites) else output

        return silenced
