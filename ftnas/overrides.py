"""A config file as plain data: YAML, then ``key.path=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftnas.shipped import find_file
from ftnas.yaml_text import read_yaml


def read_data(name_or_path: str | Path, overrides: Sequence[str] = (), *, folder: str) -> dict[str, Any]:
    """Read a config file and apply overrides; a section ``x-shared``, a place for YAML anchors, is left out.

    Args:
        name_or_path: A shipped config's name, or a path.
        overrides: ``key.path=value``, each value in YAML.
        folder: Where shipped configs lie, e.g. ``configs``.

    Raises:
        ValueError: One line: the file, key or value that is wrong.
    """
    path = find_file(name_or_path, folder, ".yaml", kind="config")
    try:
        data = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(data).__name__}")
    data.pop("x-shared", None)
    for override in overrides:
        _override(data, override)
    return data


def _override(data: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in place; intermediate sections are made where they are missing."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(f"an override is written key.path=value, got {override!r}")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: the value {text!r} is {error}") from None
    section: Any = data
    for index, key in enumerate(keys):
        last = index == len(keys) - 1
        if isinstance(section, list):
            if not key.isdigit() or int(key) >= len(section):
                raise ValueError(f"{path}: {key!r} is not an index into a list of {len(section)}")
            position: Any = int(key)
        elif isinstance(section, dict):
            position = key
        else:
            raise ValueError(f"{path}: {'.'.join(keys[:index])} is a value, not a section")
        if last:
            section[position] = value
        elif isinstance(section, dict):
            # copied, so that an override never reaches a second section through a YAML anchor
            inner = section.get(position)
            section[position] = (
                dict(inner) if isinstance(inner, dict) else list(inner) if isinstance(inner, list) else {}
            )
            section = section[position]
        else:
            section[position] = dict(section[position]) if isinstance(section[position], dict) else section[position]
            section = section[position]
