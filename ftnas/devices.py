"""Devices: which one, where a value can be read without waiting, and how exactly a GPU computes."""

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


def pick_device(name: str) -> torch.device:
    """Return the torch device of a config's ``device``, and have GPUs compute exactly; ValueError when not there."""
    compute_exactly()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch sees no CUDA device here; use device=cpu or auto")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={name}: torch sees {torch.cuda.device_count()} here, from cuda:0 on")
        torch.cuda.set_device(device)  # streams and graphs are of the current one
    return device
