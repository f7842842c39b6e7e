"""YAML text to plain data: nothing in it is executed, and no key of a section is given twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys, here refuses them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # before merges (<<), whose keys a section may well give again
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_yaml(source: str | Path) -> Any:
    """Return what a file (a path) or a text (a string) holds.

    Raises:
        ValueError: One line: not YAML, or a key twice in one section, with its line; or the file is not readable.
    """
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"not readable: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        context = "" if error.context is None else f"{error.context}: "
        raise ValueError(f"not valid YAML: {context}{error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
