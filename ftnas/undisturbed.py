"""A forward that leaves no trace: what it moved is put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST_PARTS = 100_000
"""Of what the attributes of a model hold: so many are looked at."""

Undo = Callable[[], None]


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; -1 where nothing counts that."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back after the body, bit for bit, what a forward may move.

    That are parameters, buffers and attributes of the modules (with what lists, sets, dicts and deques in them hold,
    tensors and generators, not the insides of other objects), what modules and hooks there are, and the global random
    states of torch, NumPy and Python. Where a model makes something in its first forward, the next one is the first.
    None of it counts as a change in place, so that gradients of earlier forwards still find what they need.
    """
    seen: set[int] = set()
    undo: list[Undo] = []
    for counts, tensors in ((True, model.parameters()), (False, model.buffers())):
        for tensor in tensors:  # BatchNorm moves its buffers without counting
            seen.add(id(tensor))
            undo.append(_kept_tensor(tensor, counts=counts))
    undo += _kept_attributes([module.__dict__ for module in model.modules()], seen)
    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for put_back in undo:
            put_back()


def _kept_attributes(waiting: list[Any], seen: set[int]) -> list[Undo]:
    """Return what puts back containers, and the tensors and generators in them, however deep."""
    undo: list[Undo] = []
    for _ in range(_MOST_PARTS):
        if not waiting:
            break
        item = waiting.pop()
        if id(item) in seen:
            continue
        if isinstance(item, dict):
            undo.append(_kept_dict(item))
            waiting.extend(item.values())
        elif isinstance(item, (list, deque, tuple)):
            if not isinstance(item, tuple):
                undo.append(_kept_sequence(item))
            waiting.extend(item)
        elif isinstance(item, set):
            undo.append(_kept_set(item))
        elif type(item) is Tensor:
            undo.append(_kept_tensor(item, counts=True))
        elif (state := _kept_state(item)) is not None:
            undo.append(state)
        else:
            continue
        seen.add(id(item))
    return undo


def _kept_tensor(tensor: Tensor, *, counts: bool) -> Undo:
    """Return what puts back the values of a tensor; at most where it says that they changed, if it ``counts`` that."""
    if any(step == 0 and size > 1 for step, size in zip(_strides(tensor), tensor.shape, strict=False)):
        return lambda: None  # expanded: nothing can be written to it
    before, values = version(tensor), tensor.detach().clone()

    def put_back() -> None:
        if counts and version(tensor) == before >= 0:
            return
        with torch.no_grad():  # what is written is what was there: autograd need not count it
            (tensor if tensor.is_inference() else tensor.data).copy_(values)

    return put_back


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout == torch.strided and not tensor.is_nested else ()


def _kept_dict(table: dict[Any, Any]) -> Undo:
    saved = dict(table)

    def put_back() -> None:
        if [(key, id(value)) for key, value in table.items()] != [(key, id(value)) for key, value in saved.items()]:
            table.clear()
            table.update(saved)

    return put_back


def _kept_sequence(items: list[Any] | deque[Any]) -> Undo:
    saved = list(items)

    def put_back() -> None:
        if [id(value) for value in items] != [id(value) for value in saved]:
            items.clear()
            items.extend(saved)

    return put_back


def _kept_set(items: set[Any]) -> Undo:
    saved = set(items)

    def put_back() -> None:
        if items != saved:
            items.clear()
            items.update(saved)

    return put_back


def _kept_state(item: Any) -> Undo | None:
    """Return what puts back the state of a random generator; None for anything else."""
    if isinstance(item, torch.Generator):
        return partial(_call, item.set_state, item.get_state())
    if isinstance(item, np.random.Generator):
        return partial(setattr, item.bit_generator, "state", item.bit_generator.state)
    if isinstance(item, np.random.RandomState):
        return partial(_call, item.set_state, item.get_state())
    if isinstance(item, random.Random):
        return partial(_call, item.setstate, item.getstate())
    return None


def _call(setter: Callable[[Any], Any], state: Any) -> None:
    setter(state)
