"""A sharper bound for given samples: signed effects, and activation functions only as steep as they can get there.

The sum over paths takes every weight by its magnitude and every activation function at its steepest. Here the effect
of each failing neuron of one layer is followed with its sign. At every value v of a sample the error is

    sum over failing i of d_i[v],      |d_i[v] - t_i A[i, v]| <= r[i, v],      |t_i| <= 1 (t_i = 1 for a crash)

so that at most f failing neurons move v by at most e[v], the sum of the f largest |A[i, v]| + r[i, v]. (For a crash
effects of both signs cancel: the larger one of the f largest A + r above 0 and of the f largest r - A.) Linear
operations act on A and, by magnitude, on r. An activation function changes an error t, |t| <= e, by s t with a slope s
between two numbers that follow from the value and e. It is the same for all d_i of v: with the middle slope m and half
the distance h, A becomes m A and r becomes m r + h (|A| + r). A ReLU whose input cannot change its sign is exact. So is
a maximum that no failure can move elsewhere; for another one A becomes 0 and r the largest |A| + r of the window.

Since m + h is at most K, |A| + r is never above the product of magnitudes: the bound is never above the sum over paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftnas.bounds.margins import SLACK
from ftnas.bounds.ops import Activation, Affine, Box, Constant, MaxPool, Op, Scale
from ftnas.bounds.summary import Layer, Summary
from ftnas.bounds.worst import Failures


@dataclass(frozen=True, eq=False)
class _Form:
    """The error of one sample at a node.

    Attributes:
        effects: A, float64 [units, ...].
        rest: r, float64 [units, ...].
    """

    effects: Tensor
    rest: Tensor


@torch.no_grad()
def local_errors(summary: Summary, inputs: Tensor, layer: Layer, *, count: int, failures: Failures) -> Tensor:
    """Bound the error of every output of each sample when at most ``count`` neurons of one layer fail: float64 [B, M].

    One pass of all neurons of the layer through the rest of the network for each sample.

    Args:
        summary: The network.
        inputs: The samples, [B, ...].
        layer: Whose neurons fail.
        count: How many, from 1.
        failures: Of neurons; whole channels for crashes alone.

    Raises:
        ValueError: Failures of synapses, or of whole channels that are no crashes.
    """
    _check(failures)
    values = summary.run(inputs)
    found = [
        _one(summary, [value[b : b + 1] for value in values], layer, count=count, failures=failures)
        for b in range(len(inputs))
    ]
    return torch.cat(found)


@torch.no_grad()
def local_answers(
    summary: Summary, inputs: Tensor, layer: Layer, *, count: int, failures: Failures
) -> tuple[Tensor, Tensor]:
    """Bound the errors of the logits as `local_errors` does, and tell which samples keep their answers.

    Args:
        summary: Of a classifier, M logits.
        inputs: The samples, [B, ...].
        layer: Whose neurons fail.
        count: How many, from 1.
        failures: As of `local_errors`.

    Returns:
        Errors, float64 [B, M], and whether no failure can take the lead away, bool [B].
    """
    _check(failures)
    values = summary.run(inputs)
    eye = torch.eye(summary.num_outputs, dtype=torch.float64, device=summary.device)
    errors, kept = [], []
    for number, logits in enumerate(values[-1]):
        answer = int(logits.argmax())
        ahead = (logits[answer] - logits) * (1.0 - SLACK)
        head = summary.with_head(torch.cat([eye, eye[answer] - eye]))  # the difference to itself is 0
        own = [value[number : number + 1] for value in values]
        found = _one(head, own, layer, count=count, failures=failures)
        errors.append(found[:, : len(eye)])
        kept.append((found[0, len(eye) :] <= ahead).all())
    return torch.cat(errors), torch.stack(kept)


def _check(failures: Failures) -> None:
    if failures.component != "neuron" or (failures.unit == "channel" and failures.kind != "crash"):
        raise ValueError("local bounds are of single neurons, or of channels that crash")


def _one(summary: Summary, values: list[Tensor], layer: Layer, *, count: int, failures: Failures) -> Tensor:
    forms: list[_Form | None] = []
    for number, node in enumerate(summary.nodes):
        if number == layer.node:
            forms.append(_start(values[number], layer, failures))
            continue
        parts = [forms[i] for i in node.inputs]
        if node.op is None or all(part is None for part in parts):
            forms.append(None)
            continue
        blank = [torch.zeros_like(values[i]) for i in node.inputs]
        read = [_Form(zero, zero) if part is None else part for part, zero in zip(parts, blank, strict=True)]
        source = values[node.inputs[0]]
        reach = None
        if isinstance(node.op, (Activation, MaxPool)):
            reach = _reach(read[0], count, failures)
        forms.append(_through(node.op, read, source, reach))
    last = forms[-1]
    none = torch.zeros(1, summary.num_outputs, dtype=torch.float64, device=summary.device)
    return none if last is None else _reach(last, count, failures)


def _start(value: Tensor, layer: Layer, failures: Failures) -> _Form:
    """Return one effect for each neuron: what it loses, or how far it can be off."""
    shape = value.shape[1:]
    size = -value if failures.kind == "crash" else failures.deviation(Box(value, value))
    if failures.unit == "channel" and len(layer.shape) == 3:
        own = torch.eye(shape[0], dtype=value.dtype, device=value.device)[:, :, None, None] * size
    else:
        own = torch.diag(size.flatten()).view(-1, *shape)
    return _Form(own, torch.zeros_like(own))


def _reach(form: _Form, count: int, failures: Failures) -> Tensor:
    """Return e, [1, ...]."""
    most = min(count, len(form.effects))
    if failures.kind == "crash":
        up, down = (_largest((part + form.rest).clamp_min(0.0), most) for part in (form.effects, -form.effects))
        return torch.maximum(up, down)
    return _largest(form.effects.abs() + form.rest, most)


def _largest(effects: Tensor, count: int) -> Tensor:
    if count == 1:
        return effects.amax(dim=0, keepdim=True)
    return effects.topk(count, dim=0).values.sum(dim=0, keepdim=True)


def _through(op: Op, read: list[_Form], source: Tensor, reach: Tensor | None) -> _Form:
    if isinstance(op, Affine):
        return _Form(op.apply(read[0].effects, op.weight), op.bound(read[0].rest))
    if isinstance(op, Scale):
        return _Form(read[0].effects * op.factor, op.bound(read[0].rest))
    if isinstance(op, Activation):
        assert reach is not None
        low, high = _slopes(op, source, reach)
        middle, half = (low + high) / 2, (high - low) / 2
        effects, rest = read[0].effects, read[0].rest
        return _Form(effects * middle, rest * middle + (effects.abs() + rest) * half)
    if isinstance(op, MaxPool):
        assert reach is not None
        return _maximum(op, read[0], source, reach)
    assert not isinstance(op, Constant)
    units = max(len(form.effects) for form in read)
    wide = [[part.expand(units, *part.shape[1:]) for part in (form.effects, form.rest)] for form in read]
    return _Form(*(op.run(*parts) for parts in zip(*wide, strict=True)))


def _slopes(op: Activation, value: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers between which (f(x + t) - f(x)) / t lies for 0 < |t| <= e."""
    none = torch.zeros_like(value)
    steepest = none + op.lipschitz
    if op.kind != "ReLU":
        return none, steepest
    apart = reach.clamp_min(1e-300)
    low = torch.where(value > 0, (value / apart).clamp_max(1.0), none)
    high = torch.where(value > 0, steepest, ((value + reach) / apart).clamp(0.0, 1.0))
    return low, high


def _maximum(op: MaxPool, form: _Form, value: Tensor, reach: Tensor) -> _Form:
    """Take the effects on each window's largest value where no other one can become larger."""
    found, at = F.max_pool2d(value, op.size, op.stride, op.padding, op.dilation, op.ceil_mode, return_indices=True)
    flat, places = at.flatten(2), at.shape[2:]
    lowest = (value - reach).flatten(2).gather(2, flat).view_as(found)
    others = _second(op, value + reach, flat)
    if others is None:
        others = torch.full_like(lowest, math.inf)
    sure = lowest >= others.view_as(lowest)
    index = flat.expand(len(form.effects), -1, -1)
    effects, rest = (part.flatten(2).gather(2, index).unflatten(2, places) for part in (form.effects, form.rest))
    worst = op.run(form.effects.abs() + form.rest)
    return _Form(torch.where(sure, effects, 0.0), torch.where(sure, rest, worst))


def _second(op: MaxPool, high: Tensor, chosen: Tensor) -> Tensor | None:
    """Return the largest value of each window but the chosen one, [1, C, windows]; None where that is not known."""
    if op.ceil_mode:
        return None
    channels, rows, columns = high.shape[1:]
    pad = (op.padding[1], op.padding[1], op.padding[0], op.padding[0])
    windows = F.unfold(F.pad(high, pad, value=-math.inf), op.size, op.dilation, 0, op.stride)
    number = torch.arange(rows * columns, dtype=high.dtype, device=high.device).view(1, 1, rows, columns)
    numbers = F.unfold(F.pad(number, pad, value=-1.0), op.size, op.dilation, 0, op.stride)
    inside = windows.view(1, channels, -1, windows.shape[-1])
    own = numbers[:, None] == chosen[:, :, None].to(high.dtype)
    return inside.masked_fill(own, -math.inf).amax(dim=2)
