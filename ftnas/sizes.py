"""The baselines with their sizes on the terminal."""

from __future__ import annotations

import torch

from ftnas import baselines
from ftnas.listing import print_table
from ftnas.models import count
from ftnas.rng import isolated


def list_baselines() -> None:
    """Print every baseline with its parameters and FLOPs at 32x32, three channels, ten classes."""
    rows = []
    for name in baselines.names():
        with isolated(0, "list"), torch.device("meta"):
            model = baselines.create(name, num_classes=10, in_channels=3)
        size = count(model, (3, 32, 32))
        rows.append([name, f"{size.params / 1e6:.2f} M", f"{size.flops / 1e6:.0f} M"])
    print_table("Baselines (at 32x32, 10 classes, width 1; FLOPs = 2 x MAC)", ["name", "parameters", "FLOPs"], rows)
