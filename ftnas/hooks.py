"""Hooks that change what a module gives, for all who read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def on_output(
    module: nn.Module,
    change: Callable[[Any], Tensor],
    *,
    active: Callable[[], bool],
    copied: Callable[[Tensor, Tensor], None] = lambda _given, _copy: None,
) -> Callable[[], None]:
    """Put another tensor in the place of what a module gives.

    A module with ``inplace=True`` works on a copy of its input then, and the result is written over the input itself:
    so a caller who ignores what such a module returns, and reads on what it was given, gets the other tensor too, and
    no gradient misses the values that it needs.

    Args:
        module: Any.
        change: Given the output, returns what takes its place, of the same shape.
        active: Whether to do so in the call that begins.
        copied: Told the input of a module in place and the copy that it works on, before it does.

    Returns:
        What takes the hook away.
    """
    given: list[Tensor] = []

    def begin(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given.clear()
        if not getattr(own, "inplace", False) or not active():
            return None
        given.append(args[0] if args else kwargs["input"])
        copy = given[0].clone()
        copied(given[0], copy)
        return (copy, *args[1:]), {name: value for name, value in kwargs.items() if name != "input"}

    def end(_own: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if given:
            return given.pop().copy_(change(output))
        return change(output) if active() else None

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
