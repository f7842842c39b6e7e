"""Hooks that change what a module gives, for all who read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ftnas.undisturbed import version


def on_output(
    module: nn.Module,
    change: Callable[[Any], Tensor],
    *,
    active: Callable[[], bool],
    replaced: Callable[[Tensor, Tensor], None] = lambda _given, _other: None,
) -> Callable[[], None]:
    """Put another tensor in the place of what a module gives.

    A module with ``inplace=True`` works on a copy of its input then. Where it returns that copy, the result is written
    over the input itself: so a caller who ignores what such a module returns, and reads on what it was given, gets the
    other tensor too, and no gradient misses the values that it needs.

    Args:
        module: Any.
        change: Given the output, returns what takes its place, of the same shape.
        active: Whether to do so in the call that begins.
        replaced: Told each tensor in whose place another one comes, and that one.

    Returns:
        What takes the hook away.
    """
    given: list[tuple[Tensor, Tensor, int]] = []

    def begin(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given.clear()
        if not getattr(own, "inplace", False) or not active():
            return None
        original = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if original is None:
            return None
        copy = original.clone()
        replaced(original, copy)
        given.append((original, copy, version(copy)))
        return (
            tuple(copy if value is original else value for value in args),
            {name: copy if value is original else value for name, value in kwargs.items()},
        )

    def end(_own: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if not given and not active():
            return None
        other = change(output)
        if given:
            original, copy, before = given.pop()
            if output is copy:
                other = original.copy_(other)
            elif before < 0 or version(copy) != before:
                original.copy_(copy)  # changed on the way to an output of its own
        if other is not output:
            replaced(output, other)
        return other

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
