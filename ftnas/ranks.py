"""Processes that train one set of shared weights together: what they tell each other, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another rank ended in the middle of what all do together."""


class Ranks:
    """One process's place among all that train together; alone, nothing is sent and torch.distributed not used.

    With more than one, the default process group must be there, and all ranks must make the same calls in the same
    order.

    Args:
        rank: Of this process, 0 to ``size - 1``.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the files and the controller."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Return, on every rank, what ``make`` returns on rank 0; it is called there alone."""
        if self.size == 1:
            return make()
        held: list[Any] = [make() if self.first else None]
        with _together():
            dist.broadcast_object_list(held, src=0)
        shared: T = held[0]
        return shared

    def total(self, values: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place, and return it."""
        if self.size > 1:
            with _together():
                dist.all_reduce(values)
        return values

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the ranks that have one; where none has, it stays None.

        Args:
            parameters: The same on every rank, in the same order, of one dtype and device; the ranks need not have
                gradients of the same ones.
        """
        if self.size == 1:
            return
        device = parameters[0].device
        used = self.total(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device))
        users = dict(zip(parameters, used.tolist(), strict=True))
        shared = [parameter for parameter in parameters if users[parameter]]
        if not shared:
            return
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in shared]
        summed = self.total(torch.cat(parts)).split([p.numel() for p in shared])
        for parameter, gradient in zip(shared, summed, strict=True):
            parameter.grad = (gradient / users[parameter]).view_as(parameter)

    def check_equal(self, parameters: Sequence[nn.Parameter], *, where: str) -> None:
        """Compare the parameters' bits, as a sum.

        Raises:
            RuntimeError: The ranks hold different values.
        """
        if self.size == 1:
            return
        bits = torch.cat([p.detach().reshape(-1) for p in parameters]).view(torch.int32)
        ends = torch.stack([bits.sum(dtype=torch.int64), -bits.sum(dtype=torch.int64)])
        with _together():
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if ends.sum().item() != 0:
            raise RuntimeError(f"the ranks hold different weights after {where}; run them on machines of one kind")


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo knows no error of its own
        raise RankLostError(f"another rank is gone: {' '.join(str(error).split())}") from None
