"""The clean and the faulty part of a step on a GPU, side by side where neither reads what the other computes.

Most kernels of a small network do not fill a GPU: within a CUDA graph the two parts become branches, on two streams,
that run at once. Without a graph the GPU waits for the host: the backward pass of the clean part, which PyTorch issues
from C++, is issued while Python issues the faulty forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

    def issued(self, loss: Tensor) -> None:
        """Take note of the loss of the first part, to which only that of the second will be added, if there is one."""

    def second(self) -> AbstractContextManager[None]:
        """Compute the second part in the body; both are there after it."""
        return nullcontext()

    def backward(self, total: Tensor, parts: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Set the gradients, None before the first part, of a loss that is the sum of the losses of the parts."""
        total.backward()


IN_TURN = InTurn()


class Overlapped(InTurn):
    """The first part's backward pass is issued by a second thread while this one issues the second part's forward.

    All is asked of one stream, and gradients of the second part are added to those of the first.

    Args:
        device: Of the parts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backward")
        self._running: Future[None] | None = None

    def issued(self, loss: Tensor) -> None:
        """Begin the backward pass of the first part."""
        stream = torch.cuda.current_stream(self._device) if _has_streams(self._device) else None

        def backward() -> None:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                loss.backward(retain_graph=True)  # the second part may go through the same nodes

        self._running = self._thread.submit(backward)

    @contextlib.contextmanager
    def second(self) -> Iterator[None]:
        """Compute the second part in the body; where that fails, nothing runs on behind it."""
        try:
            yield
        except BaseException:
            self._finish()
            raise

    def backward(self, total: Tensor, parts: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Set the gradients: what the second part adds comes after what the first left."""
        if not self._finish():
            total.backward()
            return
        for part in parts[1:]:
            part.backward()

    def _finish(self) -> bool:
        """Wait for the thread; tell whether it had something to do."""
        running, self._running = self._running, None
        if running is None:
            return False
        running.result()
        return True


class Branches(InTurn):
    """Two parts on two streams of a GPU; results are those of one after the other, bit for bit.

    Layer by layer the second waits for the first, and in the first step for all of it: BatchNorms move their running
    statistics in turn, and a weight that is read by itself is rounded once, for both.

    Args:
        model: On a GPU, from images to logits, inside an injection; the parts run within its ``weights_shared()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = [m for m in model.modules() if isinstance(m, _BatchNorm) or is_stored(m)]
        self._device = next(model.parameters()).device
        self._side = torch.cuda.Stream(self._device)
        self._passed: dict[nn.Module, torch.cuda.Event] = {}
        self._is_first_step = True
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
        if self._is_first_step:  # in which the first part makes tables and numbers that both read from then on
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            self._is_first_step = False
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
    """Return how the parts of a step of a model inside an injection run: on a GPU side by side.

    In a graph in turn where a forward may write more than the statistics of BatchNorms: other buffers, or counts of
    NaN.
    """
    device = next(model.parameters()).device
    if not _has_streams(device):
        return InTurn()
    if not graphed:
        return Overlapped(device)
    modules = list(model.modules())
    buffers = any(module._buffers and not isinstance(module, _BatchNorm) for module in modules)
    counts_nan = any(bound_of(module, FEATURE) is not None for module in modules)
    return InTurn() if buffers or counts_nan else Branches(model)


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
