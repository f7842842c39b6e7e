"""Devices: where a value can be read without waiting, and how exactly a GPU computes."""

from __future__ import annotations

import torch


def is_readable(device: torch.device) -> bool:
    """Tell whether the values of tensors on a device can be read without waiting."""
    return device.type == "cpu"


def compute_exactly() -> None:
    """Let this process compute on GPUs in float32 where tensors are float32, and the same in every run.

    cuDNN's convolutions would round what they multiply to 10 bits (TF32), and add up in an order that changes.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
