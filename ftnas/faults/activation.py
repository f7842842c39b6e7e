"""Meets activation functions, modules or not, where the feature buffer is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftnas.faults.trace import Call, is_activation
from ftnas.quantize import Grid

Meet = Callable[[Call, Tensor, Grid | None, bool], Tensor]
"""What an activation's output goes through: (layer call, output, grid of its input if it lies on it, in place)."""


class ActivationMode(TorchFunctionMode):
    """While it is on, the output of the activation function that consumes an expected tensor goes through ``meet``."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self._meet = meet
        self._expected: dict[int, tuple[Tensor, Call, Grid | None]] = {}

    def expect(self, feature: Tensor, call: Call, grid: Grid | None) -> None:
        """Wait for the activation function of a feature point, which lies on a grid (None: not quantized)."""
        self._expected[id(feature)] = (feature, call, grid)  # held, so that its id stays its own

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
        found = self._expected.pop(id(feature), None)
        result = func(*args, **kwargs)
        if found is None or not isinstance(result, Tensor):
            return result
        _, call, grid = found
        # zero and the values themselves are on the input's grid; what other functions give is not
        keeps = getattr(func, "__name__", "").rstrip("_") == "relu"
        return self._meet(call, result, grid if keeps else None, result is feature)
