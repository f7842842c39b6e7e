"""What failures can do to the outputs at worst: neurons that crash or lie, synapses too.

Let the values that at most f_l neurons of layer l send be off by at most c_i each, and let all other neurons compute
what they receive. Following every error through the operations (`ftnas.bounds.ops`) output m is off by at most

    sum over layers l of the f_l largest G_l[m, i] c_i

where G_l[m, i] is the sum over all paths from neuron i to output m of the product of |weights| and Lipschitz
constants along it: |W_{L+1}| K |W_L| K ... |W_{l+1}| in a chain. The forward error propagation (Fep) of El Mhamdi and
Guerraoui, *When Neurons Fail*, Theorem 2, puts the largest weight of a layer in the place of each, so that it is no
smaller for failures in one layer. The proof is in docs/certificates.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from ftnas.bounds.ops import Activation, Affine, Box
from ftnas.bounds.ranges import Ranges
from ftnas.bounds.summary import Layer, Summary
from ftnas.settings import Positive, Settings

CHUNK = 64
"""Outputs that are followed back at once."""


class Failures(Settings):
    """How a component fails.

    Attributes:
        kind: ``crash``: it sends 0; ``byzantine``: it sends anything within its capacity.
        component: A neuron, or a synapse: one weight's use at one position, which adds to what a neuron receives.
        capacity: C of a Byzantine component; None is no limit, under which nothing is tolerated (Lemma 1).
        capacity_of: ``deviation``: what it sends is at most C away from what it should send (the Fep of the paper).
            ``transmitted``: what it sends is within -C and C (Assumption 1), so that it deviates by up to
            C + sup|value|.
        unit: Of a Conv2d, a neuron is one ``position`` of one channel, or a whole ``channel``.
    """

    kind: Literal["crash", "byzantine"] = "crash"
    component: Literal["neuron", "synapse"] = "neuron"
    capacity: Positive | None = None
    capacity_of: Literal["deviation", "transmitted"] = "deviation"
    unit: Literal["position", "channel"] = "position"

    @model_validator(mode="after")
    def _effective(self) -> Failures:
        if self.kind == "crash" and (self.capacity is not None or self.capacity_of != "deviation"):
            raise ValueError("capacity has no effect on kind crash, which sends 0; leave it out")
        if self.component == "synapse" and self.unit != "position":
            raise ValueError("unit has no effect on synapses; leave it out")
        return self

    def describe(self) -> str:
        """Return it in a few words."""
        what = f"{self.kind} of a {'channel' if self.unit == 'channel' else self.component}"
        if self.kind == "crash":
            return what
        limit = "no limit" if self.capacity is None else f"{self.capacity:.6g}"
        return f"{what}, {'off by' if self.capacity_of == 'deviation' else 'sending'} at most {limit}"

    def deviation(self, box: Box) -> Tensor:
        """Bound how far a failed component's value is from the right one, which lies in the box; [B, ...]."""
        if self.kind == "crash":
            return box.largest
        limit = float("inf") if self.capacity is None else self.capacity
        if self.capacity_of == "deviation":
            return torch.full_like(box.low, limit)
        return torch.maximum(limit - box.low, limit + box.high)


@dataclass(frozen=True, eq=False)
class Cost:
    """What the failures of one layer cost at most, for each output (or each constraint).

    Attributes:
        name: Of the layer.
        sums: float64 [rows, n + 1], sums of the 0, 1, ..., n largest effects.
        times: How many components share each effect: the synapses of a neuron.
    """

    name: str
    sums: Tensor
    times: int = 1

    @property
    def components(self) -> int:
        """Return how many components the layer has."""
        return (self.sums.shape[1] - 1) * self.times

    def at(self, counts: Tensor) -> Tensor:
        """Return the cost of int64 counts [K]: float64 [rows, K]."""
        whole, rest = counts // self.times, counts % self.times
        above = (whole + 1).clamp_max(self.sums.shape[1] - 1)
        cost = self.sums[:, whole] * self.times
        partial = (self.sums[:, above] - self.sums[:, whole]) * rest
        return torch.where(rest > 0, cost + partial, cost)

    def tolerated(self, budgets: Tensor) -> Tensor:
        """Return for each row the most neurons within its budget when no other layer fails, int64 [rows]."""
        assert self.times == 1
        whole = torch.searchsorted(self.sums.contiguous(), budgets[:, None].contiguous(), right=True)[:, 0] - 1
        return whole

    def tolerance(self, budgets: Tensor) -> int:
        """Return the largest count whose cost is within budgets [rows] when no other layer fails."""
        low, high = 0, self.components
        while low < high:
            middle = (low + high + 1) // 2
            fits = bool((self.at(torch.tensor([middle], device=self.sums.device))[:, 0] <= budgets).all())
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def gains(summary: Summary, nodes: Sequence[int]) -> list[Tensor]:
    """Return G for each of some nodes, float64 [M, ...]: how far an error of 1 at a value moves each output at most.

    Raises:
        ValueError: There are none.
    """
    if not nodes:
        raise ValueError("the network has no neurons before its outputs that could fail; take component: synapse")
    found: list[list[Tensor]] = [[] for _ in nodes]
    device = summary.device
    for part in torch.arange(summary.num_outputs, device=device).split(CHUNK):
        leaves = [
            torch.zeros(len(part), *summary.nodes[n].shape, dtype=torch.float64, device=device, requires_grad=True)
            for n in nodes
        ]
        with torch.enable_grad():
            out = summary.spread(dict(zip(nodes, leaves, strict=True)), batch=len(part))[-1]
            picked = out[:, part].diagonal().sum() if out is not None else torch.zeros((), requires_grad=True)
            grads = torch.autograd.grad(picked, leaves, allow_unused=True)
        for rows, leaf, grad in zip(found, leaves, grads, strict=True):
            rows.append(torch.zeros_like(leaf.detach()) if grad is None else grad)
    return [torch.cat(rows) for rows in found]


@torch.no_grad()
def neuron_costs(summary: Summary, ranges: Ranges, failures: Failures) -> list[Cost]:
    """Return the cost of failing neurons of each layer; one row for each output, or each sample and output.

    Args:
        summary: The network.
        ranges: What its neurons can send, over B samples or one box (B = 1).
        failures: Of neurons.

    Returns:
        In the order of ``summary.layers``; rows are [B, M] flattened.
    """
    found = gains(summary, [layer.node for layer in summary.layers])
    costs = []
    for layer, gain in zip(summary.layers, found, strict=True):
        effects = _product(gain, failures.deviation(ranges.boxes[layer.node]), layer.name)
        whole = failures.unit == "channel" and len(layer.shape) == 3
        costs.append(
            Cost(
                layer.name, sums_of_largest((effects.flatten(3).sum(3) if whole else effects.flatten(2)).flatten(0, 1))
            )
        )
    return costs


@torch.no_grad()
def synapse_costs(summary: Summary, ranges: Ranges, failures: Failures) -> list[Cost]:
    """Return the cost of failing synapses into each layer, the output layer included (Theorem 4, in its sound form).

    A synapse from i to j that fails adds at most C to what neuron j receives (Lemma 2), or takes |w_ji y_i| away when
    it crashes; so it moves neuron j by at most K times that. All synapses of a neuron may fail.

    Args:
        summary: The network.
        ranges: What its neurons can send.
        failures: Of synapses.

    Returns:
        For every Linear and Conv2d in the order of their run; rows are [B, M] flattened.
    """
    points = [number for number, node in enumerate(summary.nodes) if isinstance(node.op, Affine)]
    if not points:
        raise ValueError("the network has no Linear and no Conv2d, so that it has no synapses")
    costs = []
    for point, gain in zip(points, gains(summary, points), strict=True):
        op, node = summary.nodes[point].op, summary.nodes[point]
        assert isinstance(op, Affine)
        source = ranges.boxes[node.inputs[0]]
        check_shape(summary.nodes[node.inputs[0]].shape, source.low, node.name)
        deviation = _per_synapse(op, source, failures).view(len(source.low), -1, *[1] * (len(node.shape) - 1))
        effects = _product(gain, deviation.expand(-1, *node.shape), node.name).flatten(2).flatten(0, 1)
        costs.append(Cost(node.name, sums_of_largest(effects), times=op.fan_in))
    return costs


def _per_synapse(op: Affine, source: Box, failures: Failures) -> Tensor:
    """Bound what the worst synapse of each output neuron (each channel) adds or takes away: [B, out]."""
    if failures.kind == "byzantine" and failures.capacity_of == "deviation":
        limit = float("inf") if failures.capacity is None else failures.capacity
        return source.low.new_full((len(source.low), len(op.bias)), limit)
    largest = source.largest.flatten(2).amax(2) if source.low.dim() > 2 else source.largest  # [B, in]
    if op.window is None:
        sent = (op.weight.abs() * largest[:, None, :]).amax(2)
    else:
        weight = op.weight.abs().flatten(2).amax(2)  # [out, in / groups]
        by_group = largest.unflatten(1, (op.window.groups, -1)).repeat_interleave(
            len(weight) // op.window.groups, dim=1
        )
        sent = (weight * by_group).amax(2)
    if failures.kind == "crash":
        return sent
    return sent + (float("inf") if failures.capacity is None else failures.capacity)


def check_shape(shape: Sequence[int], values: Tensor, layer: str) -> None:
    """Refuse values [B, ...] that are not of the shape that a layer has in the summary, so that nothing broadcasts."""
    if tuple(values.shape[1:]) != tuple(shape):
        raise ValueError(
            f"layer {layer!r} has values of shape {tuple(shape)} in the summary, and ranges of shape "
            f"{tuple(values.shape[1:])}; take ranges of the same summary"
        )


def _product(gain: Tensor, deviation: Tensor, layer: str) -> Tensor:
    """Return [M, ...] times [B, ...] as [B, M, ...]; what has no way to an output costs nothing, however far off."""
    check_shape(gain.shape[1:], deviation, layer)
    product = gain * deviation[:, None]
    return torch.where((gain == 0).expand_as(product), 0.0, product)


def sums_of_largest(effects: Tensor) -> Tensor:
    """Return sums of the largest effects [rows, n] of each row: [rows, n + 1]."""
    effects = effects.sort(dim=1, descending=True).values
    return torch.cat([effects.new_zeros(len(effects), 1), effects.cumsum(dim=1)], dim=1)


def total(costs: Sequence[Cost], counts: Sequence[int]) -> Tensor:
    """Return what counts of failures, one for each layer, cost together: float64 [rows].

    Raises:
        ValueError: A layer has fewer components, or a count is negative, or there is not one for each layer.
    """
    if len(counts) != len(costs):
        raise ValueError(f"one count for each of {len(costs)} layers, got {len(counts)}")
    for cost, count in zip(costs, counts, strict=True):
        if not 0 <= count <= cost.components:
            raise ValueError(f"layer {cost.name!r} has {cost.components} components, so that {count} cannot fail")
    device = costs[0].sums.device
    parts = [cost.at(torch.tensor([n], device=device))[:, 0] for cost, n in zip(costs, counts, strict=True)]
    return torch.stack(parts).sum(dim=0)


def lipschitz(summary: Summary, layer: Layer) -> float:
    """Return K of a layer's activation function, 1 without one."""
    op = summary.nodes[layer.node].op
    return op.lipschitz if isinstance(op, Activation) else 1.0
