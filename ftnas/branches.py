"""The clean and the faulty part of a step side by side, on two streams of a GPU: forwards, losses and backward passes.

Most kernels of a small network do not fill a GPU. Within a CUDA graph the two parts, neither of which reads what the
other computes, become branches that run at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ftnas.faults.bounds import FEATURE, bound_of
from ftnas.faults.stored import is_stored


class InTurn:
    """One part after the other."""

    def first(self) -> AbstractContextManager[None]:
        """Compute the first part in the body, from images to its loss."""
        return nullcontext()

    def second(self) -> AbstractContextManager[None]:
        """Compute the second part in the body; both are there after it."""
        return nullcontext()

    def backward(self, total: Tensor, parts: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Set the gradients, None before, of a loss that is the sum of the losses of the parts."""
        total.backward()


IN_TURN = InTurn()


class Branches(InTurn):
    """Two parts on two streams of a GPU; results are those of one after the other, bit for bit.

    Layer by layer the second waits for the first: BatchNorms move their running statistics in turn, and a weight that
    is read by itself is rounded once, for both.

    Args:
        model: On a GPU, from images to logits, inside an injection; the parts run within its ``weights_shared()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm) or is_stored(m)]
        self._device = next(model.parameters()).device
        self._side = torch.cuda.Stream(self._device)
        self._passed: dict[nn.Module, torch.cuda.Event] = {}
        # on purpose: gradients of the second part come from its stream
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Compute the first part in the body, on the current stream."""
        self._passed.clear()
        # the injection's own hook comes before this one and reads the weights for both
        begins = self._model.register_forward_pre_hook(self._note)
        with _removed(begins, *(layer.register_forward_hook(self._note, prepend=True) for layer in self._layers)):
            yield

    @contextlib.contextmanager
    def second(self) -> Iterator[None]:
        """Compute the second part in the body, on the other stream; the current one waits for it."""
        if not self._passed:  # there is no first
            yield
            return
        self._side.wait_event(self._passed[self._model])
        waits = (layer.register_forward_pre_hook(self._wait) for layer in self._layers)
        with _removed(*waits), torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def backward(self, total: Tensor, parts: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Set the gradients; those of each part are computed on its stream."""
        if len(parts) < 2:
            total.backward()
            return
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        # kept, as the other part may go through the same nodes, and reads memory of the current stream
        one = torch.autograd.grad(parts[0], learning, retain_graph=True, allow_unused=True)
        with torch.cuda.stream(self._side):
            other = torch.autograd.grad(parts[1], learning, allow_unused=True)
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        both = [n for n in range(len(learning)) if one[n] is not None and other[n] is not None]
        sums = torch._foreach_add([one[number] for number in both], [other[number] for number in both])
        found = dict(zip(both, sums, strict=True))
        for number, parameter in enumerate(learning):
            gradient = found.get(number, one[number] if other[number] is None else other[number])
            parameter.grad = gradient if gradient is None else _laid_out(gradient, parameter)

    def _note(self, module: nn.Module, *_: Any) -> None:
        self._passed[module] = torch.cuda.current_stream(self._device).record_event()

    def _wait(self, module: nn.Module, *_: Any) -> None:
        if module in self._passed:
            torch.cuda.current_stream(self._device).wait_event(self._passed[module])


def parts_of_a_step(model: nn.Module, *, graphed: bool) -> InTurn:
    """Return how the parts of a step of a model inside an injection run: side by side in a graph, on a GPU.

    In turn where a forward may write more than the statistics of BatchNorms: other buffers, or counts of NaN.
    """
    modules = list(model.modules())
    buffers = any(module._buffers and not isinstance(module, _BatchNorm) for module in modules)
    counts_nan = any(bound_of(module, FEATURE) is not None for module in modules)
    apart = graphed and _has_streams(next(model.parameters()).device) and not buffers and not counts_nan
    return Branches(model) if apart else InTurn()


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


@contextlib.contextmanager
def _removed(*hooks: RemovableHandle) -> Iterator[None]:
    """Remove hooks after the body."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient that lies in memory as its parameter does, as `Tensor.backward` leaves it."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
