"""How a training step computes: memory format and number format of convolutions, kernels of the rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftnas import rounding
from ftnas.quantize import BF16_BITS, FixedPoint, FloatFormat
from ftnas.settings import Settings

TF32_BITS = 11
"""Words that TF32 holds exactly."""
_LANES = 16
"""Float32 values in the widest vector of a CPU."""


class Compute(Settings):
    """How the forwards and backwards of a training step compute; scores and campaigns always compute in float32.

    Rounding to fixed point and faults are computed in float32 in every case.

    Attributes:
        channels_last: Hold maps and kernels with the channels innermost.
        autocast: ``bf16`` computes convolutions and Linear layers in bfloat16; ``tf32`` lets the convolutions of an
            NVIDIA GPU round what they multiply to 11 significant bits; None computes in float32.
        fused_rounding: Round by kernels that torch.compile fuses, to the same values. For GPUs: it slows a CPU.
        cuda_graph: Replay the step of a fixed network as one CUDA graph, with the same results. For GPUs alone.
        cudnn_benchmark: Let cuDNN time its convolutions when it meets a layer, and take the fastest. Which that is may
            change from run to run, and with it the last bits of what a seed gives. For NVIDIA GPUs alone.
    """

    channels_last: bool = False
    autocast: Literal["bf16", "tf32"] | None = None
    fused_rounding: bool = False
    cuda_graph: bool = False
    cudnn_benchmark: bool = False

    def prepare(self, model: nn.Module) -> list[nn.Conv2d]:
        """Put a model's kernels into the memory format; the parameters stay the same objects.

        Returns:
            The layers that `forward` has to know of.
        """
        if not self.channels_last:
            return []
        model.to(memory_format=torch.channels_last)
        return [m for m in model.modules() if isinstance(m, nn.Conv2d) and _overruns(m)]

    def images(self, images: Tensor) -> Tensor:
        """Return float images [B, C, H, W] in the memory format."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    @contextmanager
    def forward(self, device: torch.device, layers: Sequence[nn.Conv2d] = ()) -> Iterator[None]:
        """Run a forward on a device in the body, of a model for which `prepare` returned ``layers``."""
        kernels = rounding.fused() if self.fused_rounding else nullcontext()
        with kernels, torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast == "bf16"):
            with ExitStack() as stack:
                for layer in layers if device.type == "cpu" else ():
                    stack.callback(layer.register_forward_pre_hook(_cut, with_kwargs=True).remove)
                yield

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Run steps, forwards and backwards, in the body."""
        flags = torch.backends.cudnn
        before = flags.allow_tf32, flags.benchmark
        flags.allow_tf32 = flags.allow_tf32 or self.autocast == "tf32"
        flags.benchmark = flags.benchmark or self.cudnn_benchmark
        try:
            yield
        finally:
            flags.allow_tf32, flags.benchmark = before

    def check(self, formats: Sequence[FixedPoint | FloatFormat], name: str) -> None:
        """Refuse formats of weights and features that ``autocast`` does not hold exactly.

        Raises:
            ValueError: Words of more than 8 bits for bf16, and of more than 11 for tf32, but for number formats that
                are parts of it.
        """
        if self.autocast is None:
            return
        most, parts = {"bf16": (BF16_BITS, ("bf16",)), "tf32": (TF32_BITS, ("bf16", "fp16"))}[self.autocast]
        bits = max((f.bits for f in formats if not (isinstance(f, FloatFormat) and f.dtype in parts)), default=0)
        if bits > most:
            raise ValueError(
                f"{name}.autocast={self.autocast} holds words of up to {most} bits exactly, and here are words of "
                f"{bits}; set autocast to null or use fewer bits"
            )

    def check_joint(self, name: str) -> None:
        """Refuse what a forward on pairs of rows does not do; see `ftnas.faults.joint`.

        Raises:
            ValueError: One line.
        """
        for setting in ("channels_last", "fused_rounding"):
            if getattr(self, setting):
                raise ValueError(f"joint forwards do not know {setting}; set {name}.{setting} to false")
        if self.autocast == "bf16":
            raise ValueError(f"joint forwards round float32 features; set {name}.autocast to tf32 or null")

    def check_device(self, device: torch.device, name: str, *, obstacle: str | None) -> None:
        """Refuse what a device does not do, and a CUDA graph of what cannot be one.

        Raises:
            ValueError: No CUDA device, or an ``obstacle`` to a graph.
        """
        if self.cuda_graph and obstacle is not None:
            raise ValueError(f"{name}.cuda_graph replays steps, but {obstacle}; set it to false")
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"{name}.cuda_graph needs a CUDA device, and this runs on {device}; set it to false")
        if self.autocast == "tf32" and device.type != "cuda":
            raise ValueError(f"{name}.autocast=tf32 needs a CUDA device, and this runs on {device}; set it to null")
        if self.cudnn_benchmark and device.type != "cuda":
            raise ValueError(f"{name}.cudnn_benchmark needs a CUDA device, and this runs on {device}; set it to false")


def _overruns(layer: nn.Conv2d) -> bool:
    """Tell whether oneDNN may write past its memory in the backward of a layer with the channels innermost.

    For the gradient of a strided 1x1 kernel it copies the map, piece by piece, to where whole vectors of channels would
    lie, in memory that has room for the channels alone (oneDNN issue 6035). That corrupts the heap, or threads hang.
    """
    strided = layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.padding in ((0, 0), "valid")
    return strided and layer.groups == 1 and layer.in_channels < _LANES


def _cut(layer: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave out a map's last column, or row, that a strided 1x1 kernel steps over: oneDNN does not copy such a map."""
    given = args[0] if args else kwargs["input"]
    dim, less = (-1, (0, -1)) if layer.stride[-1] > 1 else (-2, (0, 0, 0, -1))
    # unlike a slice, padding by -1 gives a gradient that has the channels innermost too
    return (F.pad(given, less) if given.shape[dim] % layer.stride[dim] == 0 else given,), {}
