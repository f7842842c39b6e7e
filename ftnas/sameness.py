"""What a run began with, by digests in its ``run.json``: data, files that its config names, the user's own code."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

from ftnas.progress import say
from ftnas.registry import import_name
from ftnas.rundir import RunDir


def check_data(run: RunDir, digest: str, name: str, what: str) -> None:
    """Note the data of a run by their digest.

    Args:
        run: The open run folder.
        digest: Of the data as they are now.
        name: Under which ``run.json`` holds it.
        what: The data are, e.g. ``training images``.

    Raises:
        ValueError: It was begun with others.
    """
    before = run.info.get(name)
    if before not in (None, digest):
        raise ValueError(
            f"data: the {what} are not those that {run.path} was begun with (digest {digest[:12]}, then "
            f"{before[:12]}); give those, or begin another run with --out"
        )
    run.describe(**{name: digest})


def check_file(run: RunDir, setting: str, name: str | None) -> None:
    """Note a file that the config names by its digest.

    Raises:
        ValueError: It was changed since.
    """
    if name is None or not Path(name).is_file():
        return  # a shipped one, or one that is missing, which whoever reads it says
    if _note(run, setting, Path(name)):
        raise ValueError(
            f"{setting}: {name} was changed since {run.path} began with it; restore it, or begin another run with --out"
        )


def note_factory(run: RunDir, setting: str, name: str | None) -> None:
    """Note the file that a factory of the user's own is defined in; say so where it was changed since.

    A file of code holds more than a network, so that a change of it is no reason to end a run.
    """
    if name is None:
        return
    try:
        path = Path(inspect.getfile(import_name(name, "factory")))
    except (TypeError, OSError):  # built in, or made in a session
        return
    if path.is_file() and _note(run, setting, path):
        say(
            f"warning: {setting}: {path} was changed since {run.path} began with it; where the network is another one "
            "now, so are the results from here on: restore it, or begin another run with --out"
        )


def _note(run: RunDir, setting: str, path: Path) -> bool:
    """Note a file's digest where there is none, and tell whether there is another one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known: dict[str, str] = run.info.get("files", {})
    if known.get(setting, digest) != digest:
        return True
    run.describe(files={**known, setting: digest})
    return False
