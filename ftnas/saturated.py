"""Saturated layers: the parametrization of a weight that passes through a bounded function after it is read.

Its state has plain names and says the function; copies and pickles work as those of a plain layer. The verbs, and what
the functions are: `ftnas.faults.saturation`. A `Choice` lets layers change their function together, as a supernet does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "arctan": torch.atan, "softsign": F.softsign}
PLAIN = "none"
"""In a `Choice`: the weight as it is."""
MARK = "saturation"
"""Name in a layer's state of what it was saturated with: the text of `Saturated.identity`, as uint8 [length]."""


class AfterMemory(nn.Module):
    """A parametrization that the layer applies to what it reads: an injection acts on what goes into it.

    Attributes:
        zeroes_nan: Whether it reads NaN as 0.
        identity: What it is, in words.
    """

    zeroes_nan: bool
    identity: str


def after_memory(module: nn.Module) -> AfterMemory | None:
    """Return what a layer applies to the weight that it reads, None without."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = module.parametrizations.weight  # type: ignore[union-attr]
    return next((p for p in chain if isinstance(p, AfterMemory)), None)  # type: ignore[union-attr]


class Choice:
    """A function that layers share and that may change from one forward to the next.

    Attributes:
        names: What there is to choose from: functions, and ``none``.
        now: The one in force.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.now = self.names[0]


class Saturated(AfterMemory):
    """The parametrization of one weight of any shape: s * f(w / s); same shape and dtype.

    Attributes:
        function: Name of f.
        scale: s.
        zeroes_nan: Whether NaN is read as 0.
        identity: What a checkpoint says that it was trained with.
        choice: Decides on f at each call in place of ``function``; None where f is fixed.
    """

    def __init__(self, function: str, scale: float, *, zeroes_nan: bool, choice: Choice | None = None) -> None:
        super().__init__()
        self.function, self.scale, self.zeroes_nan, self.choice = function, scale, zeroes_nan, choice
        self.identity = f"{function} scale={scale!r}"

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the layer computes with."""
        function = self.function if self.choice is None else self.choice.now
        if function == PLAIN:
            return weight
        x = weight if self.scale == 1.0 else weight / self.scale
        # what is not finite is replaced before f and not after it, or its gradient would be NaN
        largest = torch.finfo(x.dtype).max
        x = torch.nan_to_num(x, nan=0.0) if self.zeroes_nan else x.clamp(-largest, largest)
        out = FUNCTIONS[function](x)
        return out if self.scale == 1.0 else out * self.scale

    def extra_repr(self) -> str:
        """Say it in ``print(model)``."""
        return f"{self.identity}, nan={'zero' if self.zeroes_nan else 'keep'}"


def saturate_cell(cell: nn.Module, names: Sequence[str], scale: float) -> Choice | None:
    """Saturate the convolutions of a cell that has not run yet, in place.

    Args:
        cell: Holds them.
        names: One function, or several to choose from in turn; ``none`` among them leaves weights as they are.
        scale: s of s * f(w / s).

    Returns:
        What decides between several; None for one.
    """
    if list(names) == [PLAIN]:
        return None
    choice = Choice(names) if len(names) > 1 else None
    for module in cell.modules():
        if isinstance(module, nn.Conv2d):
            attach(module, Saturated("|".join(names), scale, zeroes_nan=True, choice=choice))
    return choice


def chain(module: nn.Module) -> parametrize.ParametrizationList:
    """Return the parametrizations of a layer's weight, in their order."""
    return cast(parametrize.ParametrizationList, module.parametrizations.weight)  # type: ignore[union-attr]


def put_on(module: nn.Module, parametrization: nn.Module) -> None:
    """Add a parametrization of a layer's weight, which stays the tensor that it is.

    torch's own way sets the tensor to itself. That counts as a change in place, and the gradient of a parameter then
    gets past what hangs on the end of its graph: under DistributedDataParallel it is averaged no longer.
    """
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    own = next((table for table in tables if table.get("weight") is not None), None)
    if own is None:
        parametrize.register_parametrization(module, "weight", parametrization, unsafe=True)
        return
    weight: Tensor = own["weight"]
    stand_in = torch.empty(0, dtype=weight.dtype, device=weight.device)
    learns = isinstance(weight, nn.Parameter)
    own["weight"] = nn.Parameter(stand_in, requires_grad=weight.requires_grad) if learns else stand_in
    try:
        parametrize.register_parametrization(module, "weight", parametrization, unsafe=True)
    except BaseException:
        own["weight"] = weight
        raise
    held: dict[str, Any] = chain(module)._parameters if learns else chain(module)._buffers
    held["original"] = weight


def attach(module: nn.Module, saturated: Saturated) -> None:
    """Saturate a layer in place."""
    alone = not parametrize.is_parametrized(module, "weight")
    put_on(module, saturated)
    if alone:
        # torch refuses to pickle what is parametrized, since the class is made on the fly; ours can be made again
        type(module).__reduce_ex__ = _reduce  # type: ignore[method-assign,assignment]
    module.register_state_dict_post_hook(_marked_state)
    module.register_load_state_dict_pre_hook(_checked_state)


def detach(module: nn.Module) -> None:
    """Take the function of a saturated layer, the only parametrization that it has, off its weight."""
    order = [*module._parameters]
    _remove_hooks(module)
    # torch deletes the property from the class, which a deep copy shares with its original: give the module its own
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for parameter in order:  # the weight came back as the last one; it stood before a bias
        module._parameters[parameter] = module._parameters.pop(parameter)


def _remove_hooks(module: nn.Module) -> None:
    """Take our hooks off by what they are: a copy of a module shares no handles with the original."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) in (_marked_state, _checked_state)]:
            del hooks[key]


def _marked_state(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    plain_name(module, state, prefix, local_metadata)
    found = after_memory(module)
    if isinstance(found, Saturated):
        state[prefix + MARK] = torch.tensor(list(found.identity.encode()), dtype=torch.uint8)


def _checked_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    mark, found = state.pop(prefix + MARK, None), after_memory(module)
    if isinstance(mark, Tensor) and isinstance(found, Saturated):
        check_mark(mark, found, prefix[:-1])
    inner_name(module, state, prefix)


def check_mark(mark: Tensor, own: Saturated, layer: str) -> None:
    """Refuse the state of a layer that was trained with another function than its own."""
    text = bytes(mark.tolist()).decode(errors="replace")
    if text != own.identity:
        raise ValueError(
            f"the state was trained with another function: layer {layer!r} is saturated by {own.identity}, the "
            f"state by {text}; saturate the model as it was trained"
        )


def _reduce(module: nn.Module, protocol: int) -> Any:
    """Pickle a saturated layer as the plain layer with its stored weight, and what it is saturated with."""
    found = after_memory(module)
    if not isinstance(found, Saturated) or len(chain(module)) > 1:
        raise RuntimeError("a layer with parametrizations of its own cannot be pickled; send its state_dict")
    base: type[nn.Module] = type(module).__bases__[0]
    plain = object.__new__(base)
    plain.__dict__.update(module.__dict__)
    for hooks in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        plain.__dict__[hooks] = copy.copy(module.__dict__[hooks])
    _remove_hooks(plain)
    plain.__dict__["_modules"] = {k: v for k, v in module._modules.items() if k != "parametrizations"}
    plain.__dict__["_parameters"] = {"weight": chain(module).original, **module._parameters}
    return _rebuild, (plain, found)


def _rebuild(plain: nn.Module, found: Saturated) -> nn.Module:
    attach(plain, found)
    return plain


_INNER = "parametrizations.weight.original"


def plain_name(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Call the stored weight of a state by its plain name, in its place: a hook after ``state_dict``."""
    if prefix + _INNER in state:
        others = [key for key in state if key.startswith(prefix) and key != prefix + _INNER]
        state[prefix + "weight"] = state.pop(prefix + _INNER)
        for key in others:  # a parametrization comes after what the layer has itself; a weight before its bias
            state[key] = state.pop(key)


def inner_name(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `plain_name`: a hook before ``load_state_dict``."""
    if prefix + "weight" in state:
        state[prefix + _INNER] = state.pop(prefix + "weight")
