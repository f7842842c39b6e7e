"""The clean and the faulty forward of a step side by side, on two streams of a GPU, and so their backward passes.

Most kernels of a small network do not fill a GPU. Within a CUDA graph the two forwards, neither of which reads what
the other computes, become branches that run at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ftnas.faults import Injection
from ftnas.faults.bounds import FEATURE, bound_of


class Branches:
    """A model whose second forward within ``injection.weights_shared()`` runs beside the first.

    Results are those of one after the other, bit for bit: where both move the running statistics of a BatchNorm, the
    second waits for the first. Backward passes run on the streams of their forwards. Off a GPU, and where a forward may
    write other things that the next one writes too, they run one after the other.

    Args:
        model: From images to logits.
        injection: Its hardware.
        wanted: Whether to have them side by side at all.
    """

    def __init__(self, model: nn.Module, injection: Injection, *, wanted: bool) -> None:
        self._model, self._injection = model, injection
        self._device = next(model.parameters()).device
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        apart = wanted and _has_streams(self._device) and not _writes(model)
        self._side = torch.cuda.Stream(self._device) if apart else None
        self._passed: dict[nn.Module, torch.cuda.Event] = {}
        self._step: Any = None
        self._images: Tensor | None = None
        self._forked = False

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of float images [B, C, H, W]; what follows on the current stream comes after them."""
        if self._side is None:
            return self._run(images, ())
        step = self._injection.shared
        if step is None or step is not self._step:
            # kept until the next step: the second stream reads what was made on the first, whose memory would be reused
            self._step, self._images, self._forked = step, images, False
            # the injection's own hook comes before this one and reads the weights for both
            begins = self._model.register_forward_pre_hook(self._note)
            ends = (norm.register_forward_hook(self._note, prepend=True) for norm in self._norms)
            return self._run(images, (begins, *ends))
        self._forked = True
        self._side.wait_event(self._passed[self._model])
        with torch.cuda.stream(self._side):
            logits = self._run(images, [norm.register_forward_pre_hook(self._wait) for norm in self._norms])
        self.join()
        return logits

    def join(self) -> None:
        """Let the current stream wait for the other, forwards or backwards."""
        if self._side is not None and self._forked:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _run(self, images: Tensor, hooks: Iterable[RemovableHandle]) -> Tensor:
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            logits: Tensor = self._model(images)
            return logits

    def _note(self, module: nn.Module, *_: Any) -> None:
        self._passed[module] = torch.cuda.current_stream(self._device).record_event()

    def _wait(self, module: nn.Module, *_: Any) -> None:
        if module in self._passed:
            torch.cuda.current_stream(self._device).wait_event(self._passed[module])


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def _writes(model: nn.Module) -> bool:
    """Tell whether forwards may write more than the statistics of BatchNorms: other buffers, counts of NaN."""
    modules = list(model.modules())
    buffers = any(module._buffers and not isinstance(module, _BatchNorm) for module in modules)
    return buffers or any(bound_of(module, FEATURE) is not None for module in modules)
