"""Failures that are run, to hold beside a bound: random neurons, and those that the bound thinks worst."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ftnas.bounds.ranges import of_samples
from ftnas.bounds.summary import Layer, Summary
from ftnas.bounds.worst import Failures, gains


class Attack:
    """Runs failures of one layer on given samples; the largest error that is seen is below the true worst one.

    Args:
        summary: The network.
        inputs: Samples, float [B, ...].
        failures: Of neurons, with a capacity where they lie.
    """

    def __init__(self, summary: Summary, inputs: Tensor, failures: Failures) -> None:
        self.summary, self.failures = summary, failures
        self.inputs = inputs
        self.values = summary.run(inputs)
        self.ranges = of_samples(summary, inputs)
        self.answers = self.values[-1].argmax(dim=1)
        nodes = [layer.node for layer in summary.layers]
        self.gains = dict(zip(nodes, (gain.amax(dim=0) for gain in gains(summary, nodes)), strict=True))

    @torch.no_grad()
    def run(
        self, layer: Layer, count: int, *, draws: int, generator: torch.Generator, first: int = 0
    ) -> dict[str, float]:
        """Return the largest ``error`` of an output and the smallest ``kept`` share of answers over the attacks.

        Args:
            layer: Whose neurons fail.
            count: How many.
            draws: Random choices, the same for all samples.
            generator: Draws them, on the CPU.
            first: Of so many samples alone, the largest error is given too, as ``error_first``.
        """
        units = self._units(layer)
        device = self.values[0].device
        random = (torch.randperm(units, generator=generator)[:count] for _ in range(draws))
        chosen = [drawn.to(device).expand(len(self.answers), -1) for drawn in random]
        chosen.append(self._worst(layer, count))
        error = torch.zeros(len(self.answers), dtype=torch.float64, device=device)
        kept = 1.0
        for failing in chosen:
            for sign in (1.0,) if self.failures.kind == "crash" else (1.0, -1.0):
                change = partial(self._fail, failing=failing, layer=layer, sign=sign)
                outputs = self.summary.run(self.inputs, {layer.node: change})[-1]
                error = torch.maximum(error, (outputs - self.values[-1]).abs().amax(dim=1))
                kept = min(kept, float((outputs.argmax(dim=1) == self.answers).double().mean()))
        found = {"error": float(error.amax()), "kept": kept}
        return found if first == 0 else {**found, "error_first": float(error[:first].amax())}

    def _units(self, layer: Layer) -> int:
        whole = self.failures.unit == "channel" and len(layer.shape) == 3
        return layer.shape[0] if whole else math.prod(layer.shape)

    def _worst(self, layer: Layer, count: int) -> Tensor:
        """Return for each sample the neurons that the bound gives the largest effects on any output, [B, count]."""
        effects = self.gains[layer.node] * self.failures.deviation(self.ranges.boxes[layer.node])
        units = self._units(layer)
        return effects.reshape(len(effects), units, -1).sum(dim=2).topk(count, dim=1).indices

    def _fail(self, values: Tensor, *, failing: Tensor, layer: Layer, sign: float) -> Tensor:
        units = self._units(layer)
        flat = values.reshape(len(values), units, -1).clone()
        index = failing[:, :, None].expand(-1, -1, flat.shape[2])
        if self.failures.kind == "crash":
            sent = torch.zeros_like(flat)
        else:
            capacity = sign * float(self.failures.capacity or 0.0)
            sent = flat + capacity if self.failures.capacity_of == "deviation" else torch.full_like(flat, capacity)
        return flat.scatter(1, index, sent.gather(1, index)).view_as(values)
