"""A network cut at a layer: what comes out of the layer, and what the rest makes of it when units crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ftnas.settings import did_you_mean

INPUT = "input"
Unit = Literal["value", "channel"]


class Cut:
    """A model in evaluation mode, seen from the output of one layer on (*Fatal Brain Damage*, definition 2).

    A unit that crashes is read as 0 by everything after the layer. Failures at a layer are failures at the input of
    the rest, so that every statement about the input holds at any layer (definition 3).

    Args:
        model: From inputs [B, ...] to outputs [B, M]; the samples of a batch do not see each other in evaluation mode.
        layer: Name of a module that runs once per forward and gives one tensor, or ``input``. Failures hit what it
            gives: name the activation function to crash neurons after it.
        unit: ``value``: every value of a sample by itself; ``channel``: all values of a channel [B, C, ...] together.

    Raises:
        ValueError: No such layer.
    """

    def __init__(self, model: nn.Module, layer: str = INPUT, *, unit: Unit = "value") -> None:
        self.model = model.eval()
        modules = {name: module for name, module in model.named_modules() if name}
        if layer != INPUT and layer not in modules:
            raise ValueError(f"no layer {layer!r}; {did_you_mean(layer, [INPUT, *modules])}")
        self.layer, self.unit = layer, unit
        self._module = None if layer == INPUT else modules[layer]

    @torch.no_grad()
    def values(self, inputs: Tensor) -> Tensor:
        """Return what the layer gives for float inputs [B, ...]: float [B, ...].

        Raises:
            ValueError: The layer runs not once, or gives no tensor with a batch dimension.
        """
        if self._module is None:
            return inputs.clone()
        seen: list[Tensor | None] = []

        def keep(_module: nn.Module, _args: object, output: object) -> None:
            seen.append(output.clone() if isinstance(output, Tensor) else None)  # before something changes it in place

        handle = self._module.register_forward_hook(keep)
        try:
            self.model(inputs.clone())
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0] is None or seen[0].shape[:1] != inputs.shape[:1]:
            raise ValueError(f"layer {self.layer!r} runs {len(seen)} times, or gives no batch; cut at another layer")
        return seen[0]

    def rest(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from the layer's values [K, ...] to outputs [K, M], on these inputs [B, ...].

        What bypasses the layer (a skip) is that of the inputs, repeated for K = k B values in blocks of B. The model
        gets a copy of the values, through which gradients pass, so that operations in place leave the caller's alone.
        """

        def run(values: Tensor) -> Tensor:
            if self._module is None:
                outputs: Tensor = self.model(values.clone())
                return outputs
            repeated = inputs.repeat(len(values) // len(inputs), *[1] * (inputs.dim() - 1))

            def give(module: nn.Module, _args: object, output: Tensor) -> Tensor:
                in_place = getattr(module, "inplace", False)  # then what it read is the same memory, read by others too
                return output.copy_(values) if in_place else values.clone()

            handle = self._module.register_forward_hook(give)
            try:
                outputs = self.model(repeated)
            finally:
                handle.remove()
            return outputs

        return run

    def num_units(self, values: Tensor) -> int:
        """Return how many units a sample of the layer's values [B, ...] has."""
        return int(values.shape[1]) if self.unit == "channel" else int(values[0].numel())

    def masked(self, values: Tensor, alive: Tensor) -> Tensor:
        """Return values [B, ...] under K masks of units alive, bool [K, units]: [K, B, ...]."""
        shape = (len(alive), 1, values.shape[1], *[1] * (values.dim() - 2))
        mask = alive.view(shape) if self.unit == "channel" else alive.view(len(alive), 1, *values.shape[1:])
        return torch.where(mask, values, 0.0)  # NaN and infinities too

    def by_unit(self, products: Tensor) -> Tensor:
        """Sum over the values of each unit.

        Args:
            products: [M, B, *shape of a sample].

        Returns:
            [M, B, units].
        """
        if self.unit == "value":
            return products.flatten(2)
        return products.flatten(3).sum(dim=3) if products.dim() > 3 else products
