"""A model's forward as a list of calls with concrete shapes, by torch.fx."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

BATCH = 2
"""Samples that a trace is made with."""

IN_PLACE = frozenset({operator.iadd, operator.imul, operator.isub, operator.itruediv})
VIEWS = frozenset(
    {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "detach", "getitem", "dropout", "identity"}
)


def _recorded(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Return the method that records ``x += y`` as what it is; a trace would say ``x + y``."""
    return lambda x, y: x.tracer.create_proxy("call_function", function, (x, y), {})


class Shaped(fx.Proxy):
    """A value of a trace that knows its shape, so that code which computes with shapes can be traced."""

    concrete: Any = None
    __iadd__, __isub__ = _recorded(operator.iadd), _recorded(operator.isub)
    __imul__, __itruediv__ = _recorded(operator.imul), _recorded(operator.itruediv)

    @property
    def shape(self) -> torch.Size:
        """Return the shape, with the batch of the trace."""
        shape: torch.Size = self.concrete.shape
        return shape

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]


class Tracer(fx.Tracer):
    """Runs every call on zeros beside recording it; what comes out as a plain number is a number in the trace.

    Args:
        example: float [BATCH, ...].
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.values: dict[str, Any] = {}
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is one call: torch's own are, and our pooling, which does the same in another way."""
        ours = isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)) and type(m).__module__.startswith("ftnas.")
        return ours or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a value that knows its shape."""
        return Shaped(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Record a call and run it."""
        made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind == "output":
            return made
        self._running = True
        try:
            value = self._run(kind, target, made.node.args, made.node.kwargs)
        finally:
            self._running = False
        if not isinstance(value, Tensor):
            return value
        made.concrete = value
        self.values[made.node.name] = value
        return made

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record the call of a module, unless it is run for its value."""
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record the use of a parameter, unless it is used by what is run for its value."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.example
        if kind == "get_attr":
            return operator.attrgetter(target)(self.root)
        args, kwargs = fx.node.map_arg((args, kwargs), lambda node: self.values[node.name].clone())
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


class _Root(nn.Module):
    """Calls a model with images alone, so that its other arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


PREFIX = "model."


@torch.no_grad()
def trace(model: nn.Module, shape: tuple[int, ...]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Trace a model in evaluation mode; its training flags stay as they were.

    Args:
        model: From [B, *shape] to [B, M].
        shape: Of a sample.

    Returns:
        The calls, module names with `PREFIX`, and the value of each on zeros.

    Raises:
        ValueError: One line: the forward cannot be traced, for instance because it branches on values.
    """
    first = next(model.parameters(), torch.empty(0))
    example = torch.zeros(BATCH, *shape, dtype=first.dtype if first.is_floating_point() else None, device=first.device)
    tracer = Tracer(example)
    with _evaluating(model, shape):
        graph = tracer.trace(_Root(model))
    return graph, tracer.values


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a model gives in evaluation mode and in float64; it stays as it was.

    Args:
        model: From [B, ...] to [B, M].
        inputs: float64 [B, ...].

    Raises:
        ValueError: One line: it does not run on them.
    """
    exact = {}
    for prefix, module in model.named_modules():  # each module once, where names alone would meet a shared one twice
        for name, value in itertools.chain(module._parameters.items(), module._buffers.items()):
            if value is not None and value.is_floating_point():
                exact[f"{prefix}.{name}" if prefix else name] = value.double()
    with _evaluating(model, tuple(inputs.shape[1:])):
        outputs: Tensor = functional_call(model, exact, (inputs.clone(),), tie_weights=False)
    return outputs


@contextmanager
def _evaluating(model: nn.Module, shape: tuple[int, ...]) -> Iterator[None]:
    """Put a model in evaluation mode for the body; what goes wrong there is one line."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    except (fx.proxy.TraceError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} cannot be summarised for samples of shape {shape}: {reason}"
        ) from None
    finally:
        for module in training:
            module.training = True


def check_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Refuse what overwrites a value that something reads later.

    Raises:
        ValueError: One line with the name of the operation.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        viewed = node.args and isinstance(node.args[0], fx.Node) and _is_view(node, modules)
        root[node] = root[node.args[0]] if viewed else node
    for node in graph.nodes:
        if not _in_place(node, modules):
            continue
        hit = root[node.args[0]]
        for other in graph.nodes:
            late = [user for user in other.users if order[user] > order[node]]
            if late and root[other] is hit and not _derived(other, node, root):
                raise ValueError(
                    f"{label(node)!r} overwrites in place what {label(late[0])!r} reads later, which is not "
                    "summarised; use inplace=False"
                )


def _derived(value: fx.Node, node: fx.Node, root: dict[fx.Node, fx.Node]) -> bool:
    """Return whether a value is what an operation in place gave, or a view of it."""
    while value is not node and root[value] is not value:
        value = value.args[0]  # type: ignore[assignment]  # a view has a value as its first argument
    return value is node


def label(node: fx.Node) -> str:
    """Return the name of a call: of its module, or of its function."""
    if node.op == "call_module":
        return str(node.target).removeprefix(PREFIX)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def path(node: fx.Node) -> str:
    """Return the name of a call's module, or of its function after that of the module that calls it."""
    if node.op == "call_module":
        return label(node)
    stack = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    inside = stack[-1].removeprefix(PREFIX) if stack and stack[-1].startswith(PREFIX) else ""
    return f"{inside}.{label(node)}" if inside else label(node)


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(
            modules[str(node.target)], (nn.Flatten, nn.Identity, nn.Unflatten, nn.modules.dropout._DropoutNd)
        )
    return label(node) in VIEWS or _in_place(node, modules)


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    name = label(node)
    return name.endswith("_") or node.target in IN_PLACE or node.kwargs.get("inplace") is True
