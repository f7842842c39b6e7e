"""Which units of a layer a fault may hit: targets and protection, by channel, position and bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ftnas import devices
from ftnas.faults.base import Fault, Plan, Site, Where


def restrict(plan: Plan, site: Site, fault: Fault, *, only: Where | None, never: Sequence[Where]) -> Plan:
    """Take from a plan what a target leaves out or a protection covers.

    The draw stays what it was, so that a model with protection and one without meet common faults: the hits that remain
    are the same. On the CPU the others are taken out, elsewhere they become padding, so that nothing waits.

    Args:
        plan: A draw for one tensor.
        site: The tensor.
        fault: The model that drew it.
        only: Hits elsewhere are taken out; None keeps all.
        never: Hits in one of these are taken out; that they are about this layer has been checked.

    Returns:
        A plan whose ``at_risk`` counts the units that remain, and whose ``rate`` is theirs.
    """
    if (only is None or _whole_layer(only)) and not never:
        return plan
    allowed = allowed_cells(site, fault, only=only, never=never)
    elsewhere = allowed.to(plan.sites.device, non_blocking=True)  # so that a training step never waits
    value = plan.sites * plan.span
    channel = value // site.channel_stride % site.channels
    place = value % site.map_size
    num_bits = len(allowed)
    bit = fault.bits_hit(plan).clamp_max(num_bits - 1) if fault.num_bits(site) is not None else torch.zeros_like(value)
    keep = plan.valid & elsewhere[bit, channel, place]
    at_risk, rate = _remaining(plan, allowed)
    kept = (
        plan.taken(keep)
        if devices.is_readable(keep.device)
        else replace(plan, sites=torch.where(keep, plan.sites, plan.population))
    )
    return replace(kept, at_risk=at_risk, rate=rate)


def allowed_cells(site: Site, fault: Fault, *, only: Where | None, never: Sequence[Where]) -> Tensor:
    """Return what may be hit: bool [bits (1 for a model without), channels, rows * columns].

    Raises:
        ValueError: A bit, channel or position that the tensor does not have, or that the model does not tell apart.
    """
    num_bits = fault.num_bits(site)
    shape = (num_bits or 1, site.channels, site.map_size)
    allowed = torch.ones(shape, dtype=torch.bool) if only is None else _cells(only, site, fault, shape)
    for where in never:
        # bits that a model does not tell apart cannot save its values: ECC does not help against a dead neuron
        if where.bits is None or num_bits is not None:
            allowed &= ~_cells(where, site, fault, shape)
    return allowed


def _cells(where: Where, site: Site, fault: Fault, shape: tuple[int, int, int]) -> Tensor:
    cells = torch.ones(shape, dtype=torch.bool)
    if where.bits is not None:
        if fault.num_bits(site) is None:
            raise ValueError(f"{fault.name} hits whole values, so that where.bits has no effect; remove it")
        cells &= _chosen(where.bits, shape[0], f"{site.layer!r}: where.bits")[:, None, None]
    if where.channels is not None:
        cells &= _chosen(where.channels, shape[1], f"{site.layer!r}: where.channels")[None, :, None]
    if where.positions is not None:
        rows, columns = site.map_shape
        if getattr(fault, "unit", None) == "channel" or site.map_size == 1:
            raise ValueError(
                f"{site.layer!r}: {fault.name} has no positions to tell apart here; remove where.positions"
            )
        for row, column in where.positions:
            if row >= rows or column >= columns:
                raise ValueError(f"{site.layer!r}: where.positions must lie in {rows} x {columns}, got {[row, column]}")
        flat = [row * columns + column for row, column in where.positions]
        cells &= _chosen(flat, shape[2], "positions")[None, None, :]
    return cells


def _chosen(indices: Sequence[int], size: int, name: str) -> Tensor:
    if max(indices) >= size:
        raise ValueError(f"{name} must be in 0..{size - 1}, got {max(indices)}")
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[list(indices)] = True
    return chosen


def _remaining(plan: Plan, allowed: Tensor) -> tuple[int, float]:
    """Return the number of units that remain at risk, and the probability that one of them is hit."""
    num_bits, _, _ = allowed.shape
    if plan.population * plan.span == num_bits * plan.num_values:  # a unit is a bit (or a value, without bits)
        share = allowed.double().mean()
        return round(plan.population * float(share)), plan.rate
    values = allowed.any(dim=0).double().mean()  # a unit is a value or a cell of it, and which bit is hit is drawn
    if not float(values):
        return 0, 0.0
    return round(plan.population * float(values)), plan.rate * float(allowed.double().mean() / values)


def _whole_layer(where: Where) -> bool:
    return where.channels is None and where.positions is None and where.bits is None
