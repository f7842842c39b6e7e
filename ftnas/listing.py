"""What ships: search spaces and configs on the terminal, read as plain YAML, so that the list comes without torch."""

from __future__ import annotations

import os
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftnas.shipped import shipped_folder, shipped_names

_NO_EDGE = 10_000
_STAGES = ("search", "control", "train", "campaign", "single_faults", "protections", "bounds")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on the standard output: in a terminal long cells, but names, are folded; else a row is a line."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        whole = console.measure(table, options=console.options.update(width=_NO_EDGE)).maximum
        console.width = max(console.width, whole)
    console.print(Text(title, style="table.title"))
    console.print(table)


def list_spaces() -> None:
    """Print every shipped space."""
    rows = []
    for name, space in _shipped("search_spaces"):
        size = f"{space['cells']} cells, {space['nodes']} nodes, {space['channels']} channels"
        if space.get("saturation"):
            size += f", weights by cell: {', '.join(space['saturation']['functions'])}"
        rows.append([name, size, space["preprocess"], ", ".join(space["primitives"])])
    print_table("Search spaces", ["name", "size", "preprocess", "primitives"], rows)


def list_configs() -> None:
    """Print every shipped config with its stages."""
    rows = []
    for name, config in _shipped("configs"):
        stages = [stage.replace("_", " ") for stage in _STAGES if config.get(stage)]
        rows.append([name, config["data"]["name"], ", ".join(stages), config["description"]])
    print_table("Configs: ftnas run NAME", ["name", "data", "stages", "description"], rows)


def _shipped(folder: str) -> list[tuple[str, dict[str, Any]]]:
    files = [(name, shipped_folder(folder) / f"{name}.yaml") for name in shipped_names(folder, ".yaml")]
    return [(name, yaml.safe_load(path.read_text(encoding="utf-8"))) for name, path in files]
