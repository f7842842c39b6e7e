"""Meets activation functions, modules or not, where the feature buffer is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ftnas.dataflow import Call, is_activation
from ftnas.quantize import Grid

Meet = Callable[[Call, Tensor, Grid | None], Tensor]
"""What an activation's output goes through: (layer call, output, grid of its input if the output lies on it)."""


class ActivationMode(TorchFunctionMode):
    """While it is on, the output of the activation function that consumes an expected tensor goes through ``meet``."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self._meet = meet
        self._expected: dict[int, tuple[Tensor, Call, Grid | None]] = {}

    def expect(self, feature: Tensor, call: Call, grid: Grid | None) -> None:
        """Wait for the activation function of a feature point, which lies on a grid (None: not quantized)."""
        self._expected[id(feature)] = (feature, call, grid)  # held, so that its id stays its own

    def replace(self, feature: Tensor, other: Tensor) -> None:
        """Wait for another tensor in the place of a feature point, if that is waited for."""
        if id(feature) in self._expected:
            _, call, grid = self._expected.pop(id(feature))
            self._expected[id(other)] = (other, call, grid)

    def check(self, model: nn.Module) -> None:
        """Raise a RuntimeError when an activation function of a model that was expected has not run."""
        if not self._expected:
            return
        _, (layer, _), _ = next(iter(self._expected.values()))
        why = (
            "a model whose path changes must declare feature_points(), and activated_points() -> the layers that one "
            "follows"
        )
        for name, module in model.named_modules():
            if module._backward_hooks or module._backward_pre_hooks:
                why = (
                    f"the full backward hook of {name!r} puts other tensors in the place of what the module reads and "
                    "gives; take it off, and give a hook to the tensor itself (Tensor.register_hook)"
                )
                break
        raise RuntimeError(
            f"no activation function followed layer {layer!r}, so that its buffer value was not met; {why}"
        )

    def clear(self) -> None:
        """Forget what has not been met."""
        self._expected.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._expected or not is_activation(func):
            return func(*args, **kwargs)
        feature = args[0] if args else kwargs.get("input")
        if feature is None or id(feature) not in self._expected:
            return func(*args, **kwargs)
        _, call, grid = self._expected.pop(id(feature))
        name = getattr(func, "__name__", "")
        # zero and the values themselves are on the input's grid; what other functions give is not
        grid = grid if name.rstrip("_") == "relu" else None
        if not (name.endswith("_") or kwargs.get("inplace")):
            return self._meet(call, func(*args, **kwargs), grid)
        # the faults go where the caller looks for the result, but not into what the gradient of the function needs
        learning = torch.is_grad_enabled() and feature.requires_grad
        result = func(
            feature.clone() if learning else feature, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
        )
        stored = self._meet(call, result, grid)
        return feature if stored is feature else feature.copy_(stored)
