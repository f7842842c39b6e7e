"""Where the shipped search spaces, configs and genotypes lie, in a wheel and in a checkout."""

from __future__ import annotations

import os
from pathlib import Path

from ftnas.settings import did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """Return the folder of shipped files, ``search_spaces`` or ``configs``.

    It lies inside the package (``_search_spaces``, ``_configs``) when installed from a wheel, and beside it in a
    checkout or an editable install.
    """
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def shipped_names(folder: str, suffix: str) -> list[str]:
    """Return the names, without suffix and sorted, of the shipped files in a folder such as ``configs/genotypes``."""
    top, _, below = folder.partition("/")
    return sorted(path.stem for path in (shipped_folder(top) / below).glob(f"*{suffix}"))


def find_file(name_or_path: str | Path, folder: str, suffix: str, *, kind: str) -> Path:
    """Return the path of a user's file or, for a bare name, of the shipped file of that name.

    Args:
        name_or_path: Taken as a path where it holds a ``/`` or ends in the suffix, else as a shipped name.
        folder: Where shipped files lie, e.g. ``search_spaces`` or ``configs/genotypes``.
        suffix: Of the files, e.g. ``.yaml``.
        kind: What it is, for messages.

    Raises:
        ValueError: There is no such file, or no such name (the message tells the nearest).
    """
    text = os.fspath(name_or_path)
    if text.endswith(suffix) or "/" in text or os.sep in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f"{kind}: no such file, got {text!r}; shipped: {_join(folder, suffix)}")
        return path
    names = shipped_names(folder, suffix)
    if text not in names:
        raise ValueError(f"unknown {kind} {text!r}; {did_you_mean(text, names)}; a file is given as PATH{suffix}")
    top, _, below = folder.partition("/")
    return shipped_folder(top) / below / f"{text}{suffix}"


def _join(folder: str, suffix: str) -> str:
    return ", ".join(shipped_names(folder, suffix)) or "nothing"
