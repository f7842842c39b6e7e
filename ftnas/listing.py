"""What there is: the lists of baselines, spaces and configs on the terminal."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from ftnas import baselines
from ftnas.config import config_names, read_config
from ftnas.models import count
from ftnas.rng import isolated
from ftnas.space import load_space, space_names


def _print(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def list_baselines() -> None:
    """Print every baseline with its parameters and FLOPs at 32x32, three channels, ten classes."""
    rows = []
    for name in baselines.names():
        with isolated(0, "list"), torch.device("meta"):
            model = baselines.create(name, num_classes=10, in_channels=3)
        size = count(model, (3, 32, 32))
        rows.append([name, f"{size.params / 1e6:.2f} M", f"{size.flops / 1e6:.0f} M"])
    _print("Baselines (at 32x32, 10 classes, width 1; FLOPs = 2 x MAC)", ["name", "parameters", "FLOPs"], rows)


def list_spaces() -> None:
    """Print every shipped space."""
    rows = []
    for name in space_names():
        space = load_space(name)
        size = f"{space.cells} cells, {space.nodes} nodes, {space.channels} channels"
        rows.append([name, size, space.preprocess, ", ".join(space.primitives)])
    _print("Search spaces", ["name", "size", "preprocess", "primitives"], rows)


def list_configs() -> None:
    """Print every shipped config with its stages."""
    rows = []
    for name in config_names():
        config = read_config(name)
        stages = [stage for stage in ("search", "control", "train", "campaign") if getattr(config, stage) is not None]
        rows.append([name, config.data.name, ", ".join(stages), config.description])
    _print("Configs: ftnas run NAME", ["name", "data", "stages", "description"], rows)
