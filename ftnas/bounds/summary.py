"""What a trained feed-forward network does, as operations whose errors can be bounded, by tracing its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ftnas.bounds.lower import lower
from ftnas.bounds.ops import Activation, Affine, Box, Concat, Constant, MaxPool, Norm, Op
from ftnas.bounds.trace import PREFIX, check_in_place, label, outputs_of, path, trace
from ftnas.rng import generator

Change = Callable[[Tensor], Tensor]
AGREE = 1e-4
"""Largest difference of a summary's outputs from the model's, both in float64, as a share of the largest output."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a summary.

    Attributes:
        op: None for the input.
        inputs: Nodes that it reads.
        shape: Of its output, of one sample.
        name: Of its module, or of its function.
    """

    op: Op | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Layer:
    """The neurons of one Linear or Conv2d: what it hands to the next layers.

    Attributes:
        name: Of the module.
        point: The node before the activation function (its feature point).
        node: The node whose values the neurons send: the output of the activation function where one alone reads the
            feature point, else the feature point.
        shape: Of the values, [units] or [C, H, W].
    """

    name: str
    point: int
    node: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """A network as operations in the order of their run; the weights are copies in float64.

    Attributes:
        nodes: The first is the input.
        layers: In the order of their run. The layer that gives the output is none of them: its neurons are the
            network's outputs (*When Neurons Fail*, Figure 1), and what one of them loses is lost.
    """

    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]

    @property
    def num_outputs(self) -> int:
        """Return M."""
        return self.nodes[-1].shape[0]

    @torch.no_grad()
    def run(self, inputs: Tensor, change: Mapping[int, Change] | None = None) -> list[Tensor]:
        """Return the value of every node, float64 [B, ...].

        Args:
            inputs: [B, ...].
            change: What is done to the values of a node before others read them, e.g. failures.

        Raises:
            ValueError: The inputs are of another shape than the summary.
        """
        self._check(inputs)
        values: list[Tensor] = []
        for number, node in enumerate(self.nodes):
            value = inputs.double() if node.op is None else self._apply(node, Op.run, values)
            values.append(change[number](value) if change and number in change else value)
        return values

    @torch.no_grad()
    def boxes(self, box: Box) -> list[Box]:
        """Return intervals that hold every value of every node for inputs in a box of float64 [B, ...] each."""
        self._check(box.low)
        boxes: list[Box] = []
        for node in self.nodes:
            if node.op is None:
                boxes.append(Box(box.low.double(), box.high.double()))
            elif isinstance(node.op, Constant):
                value = node.op.value.expand(len(box.low), *node.shape)
                boxes.append(Box(value, value))
            else:
                boxes.append(node.op.box(*(boxes[i] for i in node.inputs)))
        return boxes

    def spread(self, errors: Mapping[int, Tensor], *, batch: int) -> list[Tensor | None]:
        """Bound the errors of every node from errors that enter at some, float64 [batch, ...]; None where none comes.

        It is linear in these (`Op.spread`), so that it bounds expected errors by expected errors too.

        Args:
            errors: By node, what is added to the error that arrives there; they may require gradients.
            batch: Size of the batch.
        """
        found: list[Tensor | None] = []
        for number, node in enumerate(self.nodes):
            arriving: Tensor | None = None
            if node.op is not None and any(found[i] is not None for i in node.inputs):
                parts = [self._or_zero(found[i], i, batch) for i in node.inputs]
                arriving = node.op.spread(*parts)
            own = errors.get(number)
            found.append(arriving if own is None else own if arriving is None else arriving + own)
        return found

    def layer(self, name: str) -> Layer:
        """Return a layer by its name; ValueError when there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f"no layer {name!r}; the layers are {', '.join(layer.name for layer in self.layers)}")

    def output_of(self, name: str) -> int:
        """Return the node that holds what a module gives, the last one that runs in it; 0 for ``input``.

        Raises:
            ValueError: The module has no operation of its own here, for instance because it was folded.
        """
        inside = [n for n, node in enumerate(self.nodes) if node.name == name or node.name.startswith(f"{name}.")]
        if not inside:
            raise ValueError(f"layer {name!r} has no operation of its own; take the layer before or after it")
        return inside[-1]

    def with_head(self, matrix: Tensor) -> Summary:
        """Return the network followed by a linear map of its outputs, e.g. differences of logits.

        Where the last operation is a Linear the two are one, so that nothing is lost.

        Args:
            matrix: [outputs, M].
        """
        matrix = matrix.double().to(self.device)
        last = self.nodes[-1]
        if isinstance(last.op, Affine) and last.op.window is None:
            weight, bias = matrix @ last.op.weight, matrix @ last.op.bias
            op = Affine(weight, bias, None, weight, torch.ones_like(bias))
            return replace(self, nodes=(*self.nodes[:-1], replace(last, op=op, shape=(len(matrix),))))
        op = Affine(matrix, matrix.new_zeros(len(matrix)), None, matrix, matrix.new_ones(len(matrix)))
        return replace(self, nodes=(*self.nodes, Node(op, (len(self.nodes) - 1,), (len(matrix),), "head")))

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next((n.op.weight.device for n in self.nodes if isinstance(n.op, Affine)), torch.device("cpu"))

    def structure(self) -> str:
        """Return the operations, their constants and shapes in words, without the weights."""
        lines = []
        for node in self.nodes:
            op = node.op
            kind = type(op).__name__
            if isinstance(op, Activation):
                kind += f" {op.kind} {op.lipschitz}"
            elif isinstance(op, Affine):
                kind += f" {op.window}"
            elif isinstance(op, (MaxPool, Concat)):
                kind = repr(op)
            if op is not None and op.constants:
                kind += f" ({op.constants})"
            lines.append(f"{node.name}: {kind} of {node.inputs} -> {node.shape}")
        return "\n".join(lines)

    def _check(self, inputs: Tensor) -> None:
        shape = self.nodes[0].shape
        if tuple(inputs.shape[1:]) != shape:
            raise ValueError(
                f"the summary is of samples of shape {shape}, got {tuple(inputs.shape[1:])}; summarize the model anew"
            )

    def _apply(self, node: Node, function: Callable[..., Tensor], values: Sequence[Tensor]) -> Tensor:
        assert node.op is not None
        if isinstance(node.op, Constant):
            constant: Tensor = node.op.value.expand(len(values[0]), *node.shape)
            return constant
        result: Tensor = getattr(node.op, function.__name__)(*(values[i] for i in node.inputs))
        return result

    def _or_zero(self, value: Tensor | None, number: int, batch: int) -> Tensor:
        if value is not None:
            return value
        return torch.zeros(batch, *self.nodes[number].shape, dtype=torch.float64, device=self.device)


@torch.no_grad()
def summarize(model: nn.Module, shape: Sequence[int], *, fold: bool = True) -> Summary:
    """Trace a network.

    Bounded are: Linear, Conv2d, BatchNorm in evaluation, max, average and adaptive average pooling, increasing
    activation functions with a Lipschitz constant, reshapes, slices, zero padding, dropout in evaluation, sums and
    concatenations of values, and sums and products with numbers.

    Args:
        model: From float images or vectors [B, *shape] to [B, M], seen in evaluation mode; it is not changed.
        shape: Of a sample.
        fold: Whether a BatchNorm that alone reads a layer becomes part of it, as in `ftnas.inject`, and nn.Identity
            is left out.

    Raises:
        ValueError: One line: the layer or function that is not bounded, by name; or the outputs are not the model's.
    """
    graph, values = trace(model, tuple(shape))
    modules = {f"{PREFIX}{name}" if name else PREFIX[:-1]: module for name, module in model.named_modules()}
    check_in_place(graph, modules)
    nodes: list[Node] = []
    op: Op | None
    read: list[fx.Node]
    index: dict[fx.Node, int] = {}
    for call in graph.nodes:
        if call.op == "output":
            nodes = _checked_output(call.args[0], nodes, index)
            break
        if call.op == "placeholder":
            op, read, name = None, [], "input"
        elif call.op == "get_attr":
            raise ValueError(f"{label(call)!r} is used by a function and not by a layer, which is not bounded")
        else:
            module = modules.get(str(call.target)) if call.op == "call_module" else None
            op, read = lower(call, module, values)
            name = path(call)
            if fold and isinstance(module, nn.Identity):
                index[call] = index[read[0]]
                continue
        index[call] = len(nodes)
        inputs = tuple(index[source] for source in read)
        nodes.append(Node(op, inputs, tuple(values[call.name].shape[1:]), name))
    nodes = _fold(nodes) if fold else nodes
    summary = Summary(tuple(nodes), tuple(_layers(nodes)))
    _compare(summary, model)
    return summary


def _compare(summary: Summary, model: nn.Module) -> None:
    """Refuse a summary that gives other outputs than the model, on random inputs of several sizes."""
    sizes = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    inputs = torch.randn(*summary.nodes[0].shape, len(sizes), generator=generator(0, "summary"), dtype=torch.float64)
    inputs = (inputs * sizes).movedim(-1, 0).to(summary.device)
    wanted = outputs_of(model, inputs)
    off = float((summary.run(inputs)[-1] - wanted).abs().amax())
    if not off <= AGREE * float(wanted.abs().amax()) + 1e-9:
        raise ValueError(
            f"{type(model).__name__} gives other outputs than the layers it is made of would, by {off:.3g} on random "
            "inputs; a layer does something else than its type says, or its values are not finite"
        )


def _checked_output(output: object, nodes: list[Node], index: Mapping[fx.Node, int]) -> list[Node]:
    """Return the nodes up to the output, which must be one vector for each sample."""
    if not isinstance(output, fx.Node) or len(nodes[index[output]].shape) != 1:
        raise ValueError("the network must give one vector of outputs for each sample, [B, M]; wrap it so that it does")
    return nodes[: index[output] + 1]


def _fold(nodes: Sequence[Node]) -> list[Node]:
    """Fold each BatchNorm that alone reads an Affine into it, and drop what nothing reads."""
    readers = _readers(nodes)
    merged: dict[int, int] = {}
    kept = dict(enumerate(nodes))
    for number, node in enumerate(nodes):
        if not isinstance(node.op, Norm):
            continue
        source = node.inputs[0]
        before = nodes[source]
        if not isinstance(before.op, Affine) or len(readers[source]) != 1:
            continue
        if before.op.window is None and len(before.shape) > 1:
            raise ValueError(
                f"layer {node.name!r} normalises positions and not the features that {before.name!r} gives, "
                "which is not bounded; a Conv2d of kernel 1 and BatchNorm2d are"
            )
        folded = before.op.scaled(node.op.factor.flatten(), node.op.shift.flatten())
        constants = " ".join(filter(None, (before.op.constants, node.op.constants)))
        kept[source] = replace(before, op=replace(folded, constants=constants))
        merged[number] = source
    needed = {merged.get(len(nodes) - 1, len(nodes) - 1)}
    for number in reversed(range(len(nodes))):
        if number in needed:
            needed |= {merged.get(i, i) for i in kept[number].inputs}
    order = sorted(needed | {0})
    place = {number: position for position, number in enumerate(order)}
    return [replace(kept[n], inputs=tuple(place[merged.get(i, i)] for i in kept[n].inputs)) for n in order]


def _readers(nodes: Sequence[Node]) -> list[list[int]]:
    readers: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for source in node.inputs:
            readers[source].append(number)
    return readers


def _layers(nodes: Sequence[Node]) -> list[Layer]:
    readers = _readers(nodes)
    layers: list[Layer] = []
    times: dict[str, int] = {}
    for number, node in enumerate(nodes):
        if not isinstance(node.op, Affine):
            continue
        read = readers[number]
        active = len(read) == 1 and isinstance(nodes[read[0]].op, Activation)
        sends = read[0] if active else number
        times[node.name] = times.get(node.name, 0) + 1
        name = node.name if times[node.name] == 1 else f"{node.name}#{times[node.name]}"
        if sends != len(nodes) - 1:
            layers.append(Layer(name, number, sends, nodes[sends].shape))
    return layers
