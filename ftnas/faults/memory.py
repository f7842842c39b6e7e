"""Writing to a tensor where a plan says, whatever its memory format, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ftnas.faults.base import Plan


def storage(values: Tensor) -> Tensor:
    """Return the one-dimensional view over the memory of a dense tensor of any memory format."""
    if values.is_contiguous():
        return values.view(-1)
    return values.as_strided((values.numel(),), (1,))


def positions(sites: Tensor, values: Tensor) -> Tensor:
    """Translate row-major sites of a tensor into positions in `storage`, so that a plan fits any memory format.

    Padding (sites equal to the number of values) becomes position 0.
    """
    return _offsets(torch.where(sites < values.numel(), sites, 0), values)


def hit_positions(plan: Plan, values: Tensor) -> Tensor:
    """Return the position in `storage` of each value that a plan hits, int64 [K * span]; any position for padding."""
    if plan.at is not None:
        return _offsets(plan.at, values)
    count = max(1, plan.num_values)
    if plan.span > 1 or plan.population % count:
        return positions(plan.values_hit(), values)
    # the population is whole tensors, so that the remainder makes padding the first value
    return _offsets(plan.sites if plan.whole and plan.population == count else plan.sites % count, values)


def values_at(values: Tensor, plan: Plan) -> Tensor:
    """Return a copy of the values that a plan hits, [K * span]; any value for padding."""
    return storage(values)[positions(plan.values_hit(), values)]


def _offsets(sites: Tensor, values: Tensor) -> Tensor:
    """Return the positions in `storage` of row-major sites of a tensor."""
    if values.is_contiguous():
        return sites
    offset = torch.zeros_like(sites)
    for size, stride in zip(reversed(values.shape), reversed(values.stride()), strict=True):
        offset += (sites % size) * stride
        sites = sites // size
    return offset


def count_distinct(at: Tensor, chosen: Tensor) -> Tensor:
    """Return how many different positions there are among those ``chosen``: an int64 scalar tensor."""
    ordered = torch.where(chosen, at, -1).sort().values
    first = torch.ones_like(chosen)
    first[1:] = ordered[1:] != ordered[:-1]
    return (first & (ordered >= 0)).sum()


def add_at_(values: Tensor, at: Tensor, deltas: Tensor, valid: Tensor | None, *, alpha: int = 1) -> Tensor:
    """Add ``alpha`` times ``deltas`` in place at positions of the storage, nothing where not ``valid`` (None: all)."""
    deltas = deltas if valid is None else torch.where(valid, deltas, 0.0)
    storage(values).index_add_(0, at, deltas.to(values.dtype), alpha=alpha)
    return values


def set_at_(values: Tensor, at: Tensor, new: Tensor, valid: Tensor) -> Tensor:
    """Set positions of the storage, distinct where ``valid``, to ``new``; the others stay what they are."""
    if len(at) == 0:
        return values
    memory = storage(values)
    # all entries must write: those that are not valid write what the first valid one writes, or if there is none, what
    # is there already
    first = valid.to(torch.uint8).argmax(dim=0, keepdim=True)  # kept a vector: a scalar index would wait for it
    new = new.to(values.dtype)
    one = torch.where(valid[first], new[first], memory[at[first]])
    memory.index_copy_(0, torch.where(valid, at, at[first]), torch.where(valid, new, one))
    return values


def restrict_range(values: Tensor, bound: float, *, out: Tensor | None = None) -> Tensor:
    """Return values clipped to [-bound, bound], NaN as 0, into ``out`` if given."""
    return torch.clamp(torch.nan_to_num(values, nan=0.0, out=out), -bound, bound, out=out)


def mark(values: Tensor, hit: Tensor, blocked: Tensor | None) -> Tensor:
    """Add the row-major values that are hit to a bool mask of the tensor's shape; N is padding."""
    marks = torch.zeros_like(values, dtype=torch.uint8)
    # padding shares a position with a value that may be hit: add, so that neither hides the other
    storage(marks).index_add_(0, positions(hit, marks), (hit < values.numel()).to(torch.uint8))
    return marks > 0 if blocked is None else blocked | (marks > 0)
