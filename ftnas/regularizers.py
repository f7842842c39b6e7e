"""What a training may add to its loss, or do to its units, so that crashes matter less.

`CrashVariance` is the variance of b3 as a penalty, `Dropout` crashes units in training (El Mhamdi et al., *Fatal Brain
Damage*, section 3.5), `Fep` is the forward error propagation of *When Neurons Fail* (El Mhamdi and Guerraoui) as a
penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ftnas.hooks import on_output
from ftnas.settings import Positive, Settings, did_you_mean

Chance = Annotated[float, Field(gt=0.0, lt=1.0)]

_STEADY = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
"""Layers that move values by no more in all than what they read moves, but for those of `_steep`."""


class _AtLayers(Settings):
    """What is done to the units that layers give.

    Attributes:
        layers: Whose outputs: names, name patterns, or types in small letters such as ``relu``.
        rate: Crash probability of a unit.
        unit: One ``position`` of one channel, or a whole ``channel``; a Linear has one unit for each output.
    """

    layers: tuple[str, ...] = Field(min_length=1)
    rate: Chance
    unit: Literal["position", "channel"] = "position"

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers of a model.

        Raises:
            ValueError: One line: a selector that matches no layer.
        """
        named = {name: module for name, module in model.named_modules() if name}
        chosen: dict[str, nn.Module] = {}
        for selector in self.layers:
            own = {n: m for n, m in named.items() if _kind(m) == selector}
            found = own or {n: m for n, m in named.items() if fnmatchcase(n, selector)}
            if not found:
                types = {_kind(module) for module in named.values()}
                raise ValueError(
                    f"regularizers: {selector!r} matches no layer; by type {did_you_mean(selector, types)}"
                )
            chosen |= found
        return list(chosen.values())


def _kind(module: nn.Module) -> str:
    """Return a type in small letters; a layer whose weight is parametrized (saturated, say) has that of its base."""
    kind = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    return kind.__name__.lower()


class CrashVariance(_AtLayers):
    """Add weight times the variance of the logits when units crash, to first order (b3), summed over the logits.

    The penalty is ``rate`` sum_i (x_i d(v . y)/dx_i)^2, averaged over the batch, with independent signs v drawn for
    each image: in the mean over v it is sum_k Var y_k, from one backward. Several layers add up (Proposition 10).
    BatchNorm in training lets samples see each other, by which it is off by about a share 1 / batch size.

    Attributes:
        weight: Factor on the variance.
    """

    name: Literal["crash_variance"] = "crash_variance"
    weight: Positive = 1.0


class Dropout(_AtLayers):
    """Crash units in training: each is read as 0 with probability ``rate``; the others are not scaled up."""

    name: Literal["dropout"] = "dropout"


class Fep(Settings):
    """Add weight times the logarithm of the forward error propagation of a chain.

    One unit of each hidden layer fails by 1 at most: Fep = sum_l w_{l+1} prod_{l' > l + 1} n_l' w_l' over the hidden
    layers l, with the largest absolute weight w and the inputs n of a unit of each layer, and Lipschitz constants of
    at most 1. A layer's gradient is that of its largest weight.

    Attributes:
        weight: Factor on log Fep.
    """

    name: Literal["fep"] = "fep"
    weight: Positive


Regularizer = Annotated[CrashVariance | Dropout | Fep, Field(discriminator="name")]


class Regularization:
    """The regularizers of one model in training.

    Args:
        regularizers: Settings.
        model: Whose layers they name; not injected yet.

    Raises:
        ValueError: One line: a selector that matches no layer, or a network that is no chain of known layers (`Fep`).
    """

    def __init__(self, regularizers: Sequence[CrashVariance | Dropout | Fep], model: nn.Module) -> None:
        self.names = tuple(dict.fromkeys(r.name for r in regularizers if not isinstance(r, Dropout)))
        self._variances = [(r, r.modules(model)) for r in regularizers if isinstance(r, CrashVariance)]
        self._dropouts = [(r, r.modules(model)) for r in regularizers if isinstance(r, Dropout)]
        self._feps = [(r, chain_of(model)) for r in regularizers if isinstance(r, Fep)]
        self._generator: torch.Generator | None = None
        self._seen: dict[int, list[tuple[Tensor, int]]] | None = None

    @contextmanager
    def attached(self, replaced: Callable[[Tensor, Tensor], None] = lambda _given, _other: None) -> Iterator[None]:
        """Crash units by dropout, and let ``watching`` see values, in forwards with gradients within the body.

        Args:
            replaced: Told each tensor in whose place dropout puts another one, and that one; an injection has one.
        """
        undo: list[Callable[[], None]] = []
        try:
            for config, modules in self._dropouts:
                drop = self._dropping(config)
                # an injection looks at the model once, without gradients: that draws nothing
                active = torch.is_grad_enabled
                undo += [on_output(module, drop, active=active, replaced=replaced) for module in modules]
            for number, (_, modules) in enumerate(self._variances):
                undo += [module.register_forward_hook(self._watching(number)).remove for module in modules]
            yield
        finally:
            for remove in undo:
                remove()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the values of the layers of `CrashVariance` for ``penalties``, within the body."""
        self._seen = {number: [] for number in range(len(self._variances))}
        try:
            yield
        finally:
            self._seen = None

    def step(self, generator: torch.Generator) -> None:
        """Take the random numbers of the next step from a generator on the model's device."""
        self._generator = generator

    def penalties(self, logits: Tensor | None) -> dict[str, Tensor]:
        """Return what is added to the loss, by name: float32 scalars with gradients.

        Args:
            logits: float [B, M] of the forward that was watched; None where there is no `CrashVariance`.

        Raises:
            ValueError: A watched layer did not run, or something changed its output in place.
        """
        found: dict[str, Tensor] = {}
        for number, (config, _) in enumerate(self._variances):
            if logits is None or self._seen is None:
                raise RuntimeError("crash_variance needs the logits of a forward that was watched")
            values = _unchanged(config, self._seen[number])
            _add(found, config.name, config.weight * config.rate * self._squares(config, logits, values))
        for fep, layers in self._feps:
            _add(found, fep.name, fep.weight * log_fep([layer.weight for layer in layers]))
        return found

    def _squares(self, config: CrashVariance, logits: Tensor, values: list[Tensor]) -> Tensor:
        """Return the mean over images of sum_i (x_i d(v . y)/dx_i)^2 with random signs v: float32 scalar."""
        signs = torch.rand(logits.shape, generator=self._generator, device=logits.device) < 0.5
        projected = torch.where(signs, logits.float(), -logits.float()).sum()
        gradients = torch.autograd.grad(projected, values, create_graph=True)
        total = logits.new_zeros((), dtype=torch.float32)
        for value, gradient in zip(values, gradients, strict=True):
            effect = value.float() * gradient.float()
            effect = effect.flatten(2).sum(dim=2) if config.unit == "channel" and effect.dim() > 2 else effect
            total = total + effect.square().sum() / len(logits)
        return total

    def _dropping(self, config: Dropout) -> Callable[[Tensor], Tensor]:
        def drop(output: Tensor) -> Tensor:
            shape = output.shape[:2] if config.unit == "channel" else output.shape
            draws = torch.rand(shape, generator=self._generator, device=output.device, dtype=torch.float32)
            alive = draws >= config.rate
            return output * alive.view(*shape, *[1] * (output.dim() - len(shape)))

        return drop

    def _watching(self, number: int) -> Callable[[nn.Module, object, Tensor], None]:
        def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
            if self._seen is not None and torch.is_grad_enabled():
                self._seen[number].append((output, output._version))

        return watch


def log_fep(weights: Sequence[Tensor]) -> Tensor:
    """Return log Fep of the weights of a chain in order, [outputs, inputs, ...] each: a scalar; see `Fep`."""
    largest = [weight.abs().amax().log() for weight in weights]
    total, parts = largest[-1].new_zeros(()), []
    for log_w, weight in zip(reversed(largest[1:]), reversed(weights[1:]), strict=True):
        parts.append(total + log_w)
        total = total + log_w + torch.log(torch.tensor(float(weight[0].numel()), device=weight.device))
    return torch.logsumexp(torch.stack(parts), dim=0)


def chain_of(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Return the layers of a chain that have weights, in the order in which they run.

    Raises:
        ValueError: One line: values that join, a layer that runs twice, an unknown or too steep layer, or fewer than
            two of them.
    """
    modules, layers = dict(model.named_modules()), []
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
        raise ValueError(f"fep is for chains of layers, and this network cannot be traced: {error}") from None
    for node in graph.nodes:
        if node.op == "output" or node.op == "placeholder":
            continue
        if len(node.all_input_nodes) != 1 or len(node.users) != 1:
            raise ValueError(f"fep is for chains of layers, and values join or part at {node.name!r}; remove fep")
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(module)
        elif not isinstance(module, _STEADY) and node.target is not torch.flatten:
            kind = type(module).__name__ if module is not None else str(node.target)
            raise ValueError(
                f"fep is for chains of Linear, Conv2d, activation and pooling, got {kind} at {node.name!r}"
            )
        elif module is not None and _steep(module):
            raise ValueError(
                f"fep is for layers that move no more than they read, and {node.target!r} {_steep(module)}"
            )
    if len(layers) < 2 or len(set(map(id, layers))) < len(layers):
        raise ValueError("fep needs two layers with weights or more, each of which runs once")
    return layers


def _steep(module: nn.Module) -> str:
    """Return how a layer of the known ones moves more than what it reads moves; nothing where it does not."""
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        sizes, strides, apart = (_pair(getattr(module, name, 1)) for name in ("kernel_size", "stride", "dilation"))
        if strides[0] < sizes[0] or strides[1] < sizes[1] or apart != (1, 1):
            return f"has windows of {sizes} that overlap, at strides {strides} and dilations {apart}"
    if isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) not in ((1, 1), (None, None)):
        return f"can repeat values, with output size {module.output_size}; pool to size 1"
    for kind, name in ((nn.ELU, "alpha"), (nn.LeakyReLU, "negative_slope")):
        if isinstance(module, kind) and abs(getattr(module, name)) > 1:
            return f"has {name} {getattr(module, name)}; use at most 1"
    return ""


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _unchanged(config: CrashVariance, seen: list[tuple[Tensor, int]]) -> list[Tensor]:
    if not seen:
        raise ValueError(f"regularizers: no layer of {', '.join(config.layers)} ran; name layers that do")
    if any(value._version != version for value, version in seen):
        names = ", ".join(config.layers)
        raise ValueError(f"regularizers: outputs of {names} are changed in place; name the layer that changes them")
    return [value for value, _ in seen]


def _add(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value
