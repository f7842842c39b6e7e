"""A run folder: atomic checkpoints, JSON-lines journals, resolved config, TensorBoard sink."""

from __future__ import annotations

import contextlib
import datetime
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml

import ftnas
from ftnas.storage import Journal, Lock, atomic_write, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

KIND = "ftnas run"
_LOCK = ".lock"
_OWN = (_LOCK, "config.yaml", "run.json", "events.jsonl")
"""What every run begins with."""
SCHEMA = 1
_LOCK_PATIENCE_S = 0.5  # what a killed run had just started may hold its files for a moment longer


class InUseError(ValueError):
    """Another process holds the run."""


class Folder:
    """One folder of a run, of the run itself or of a stage: everything is written through here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journals: dict[str, Journal] = {}
        self._stages: dict[str, Folder] = {}
        self._writer: SummaryWriter | None = None

    def file(self, name: str) -> Path:
        """Return the path of a file of this folder; ValueError for a name that leads out of it."""
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"a name in a run folder is relative and without '..', got {name!r}")
        return self.path / name

    def stage(self, name: str) -> Folder:
        """Return the sub-folder of a stage, e.g. ``search``, made when missing."""
        if name not in self._stages:
            path = self.file(name)
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                _refuse(path, error)
            self._stages[name] = Folder(path)
        return self._stages[name]

    def save(self, name: str, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint in one step, after the journals of this folder: it never counts bytes they lack.

        ``name`` is the file name with its suffix, e.g. ``checkpoint.pt``.

        Raises:
            TypeError: The state holds more than tensors and plain values: ``load`` runs no code from a file.
        """
        for journal in self._journals.values():
            journal.sync()
        path = self.file(name)
        save_checkpoint(path, state)
        return path

    def load(self, name: str, *, keys: Sequence[str] = ()) -> Any:
        """Read a checkpoint back, tensors on the CPU.

        Args:
            name: As in ``save``.
            keys: What it must hold at least.

        Raises:
            ValueError: No such file, or it is truncated or foreign, lacks a key, or holds more than plain values.
        """
        path = self.file(name)
        state = load_checkpoint(path)
        for key in keys:
            if not isinstance(state, dict) or key not in state:
                raise ValueError(f"{path}: not a checkpoint of this stage, it has no {key!r}; restore or remove it")
        return state

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file (UTF-8) in one step."""
        path = self.file(name)
        atomic_write(path, text.encode())
        return path

    def write_json(self, name: str, data: Any) -> Path:
        """Write a JSON file in one step; ValueError for NaN or an infinity."""
        return self.write_text(name, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def journal(self, name: str) -> Journal:
        """Return the journal of that file name; the same object for the same name."""
        if name not in self._journals:
            self._journals[name] = Journal(self.file(name))
        return self._journals[name]

    def events(self, kind: str, **fields: Any) -> None:
        """Add a line to ``events.jsonl``: seconds since 1970, kind, fields (NaN as text)."""
        plain = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }
        self.journal("events.jsonl").append({"time_s": round(time.time(), 3), "kind": kind, **plain})

    def tensorboard(self, *, purge_step: int | None = None) -> SummaryWriter:
        """Return the TensorBoard writer of ``tensorboard/``, opened on first use, closed with the run.

        Args:
            purge_step: On resume, the first step that is written again; TensorBoard hides older events from it on.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # costs a second; most commands log nothing

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)
        return self._writer

    def close(self) -> None:
        """Close the TensorBoard writers of this folder and its stages."""
        for stage in self._stages.values():
            stage.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class RunDir(Folder):
    """The folder of one run, held by one process at a time. A context manager, which closes it.

    A new run that a user's mistake (a ValueError) ends before it has made anything leaves no folder behind, and the
    run that it was to replace comes back.
    """

    def __init__(
        self, path: Path, lock: Lock, *, new: bool = False, filled: bool = False, replaced: Path | None = None
    ) -> None:
        super().__init__(path)
        self._lock, self._new, self._filled, self._replaced = lock, new, filled, replaced

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False) -> RunDir:
        """Make a run folder with ``config.yaml`` and ``run.json`` in it.

        Args:
            path: Where; a missing or an empty folder, or with ``overwrite`` one that holds a run.
            config: The resolved config, of plain values.
            overwrite: Replace an earlier run. It lies beside the new one until that is closed, and a folder that is not
                a run is never removed.

        Raises:
            ValueError: One line: the folder exists, is no run, is in use, or cannot be written.
        """
        path = Path(path).expanduser()
        target = path.resolve()
        try:
            version = code_version()  # before the lock: a git process must not inherit it
            old = _occupied(target, path)
            if old and not _is_run(target):
                raise ValueError(f"{path} holds files and no run of ours, so it is left alone; choose another place")
            if old and not overwrite:
                raise ValueError(
                    f"run folder {path} exists already; continue it with --resume {quoted(path)} or replace it with "
                    "--overwrite"
                )
            with contextlib.ExitStack() as undo:
                # An empty folder is filled in place: it may be a mount point, in a parent that is not ours.
                fresh = target if target.is_dir() and not old else _sibling(target, "new")
                fresh.mkdir(parents=True, exist_ok=True)
                if fresh != target:
                    undo.callback(shutil.rmtree, fresh, ignore_errors=True)
                lock = _take_lock(fresh, path)
                undo.callback(lock.release)
                if any(entry.name != _LOCK for entry in fresh.iterdir()):
                    raise _taken(path)
                for name in _OWN[:3]:
                    undo.callback((fresh / name).unlink, missing_ok=True)
                _describe(fresh, config, version)
                replaced = None
                if old:
                    replaced = _swap(fresh, target, path)
                elif fresh != target:
                    _move(fresh, target, path)
                undo.pop_all()
        except OSError as error:
            _refuse(path, error)
        return cls(target, lock, new=True, filled=fresh == target, replaced=replaced)

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open a run to go on with it, and note the code version in ``events.jsonl``.

        Raises:
            ValueError: One line: no run there, its config was changed since, another process holds it, or it
                cannot be written.
        """
        path = Path(path).expanduser()
        if not _is_run(path):
            if (path / "run.json").is_file():
                raise ValueError(f"{path / 'run.json'} is torn or of another program; restore it, or start a new run")
            raise ValueError(f"{path} is not a run folder: it has no run.json; check the path, or start a new run")
        target = path.resolve()
        stored = json.loads((target / "run.json").read_text(encoding="utf-8")).get("config_sha256")
        config = target / "config.yaml"
        if not config.is_file() or hashlib.sha256(config.read_bytes()).hexdigest() != stored:
            raise ValueError(
                f"{config} was changed since the run began; restore it, or start a new run with the change"
            )
        try:
            version = code_version()  # before the lock: a git process must not inherit it
            run = cls(target, _take_lock(target, path))
            for left in target.parent.glob(f".{glob.escape(target.name)}.old-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            run.events("opened", **version)
        except OSError as error:
            _refuse(path, error)
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, as read from ``config.yaml``."""
        return dict(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")) or {})

    @property
    def info(self) -> dict[str, Any]:
        """What ``run.json`` holds: versions, config hash, command, and whatever ``describe`` added."""
        return dict(json.loads((self.path / "run.json").read_text(encoding="utf-8")))

    def describe(self, **facts: Any) -> None:
        """Add facts for the report to ``run.json``, e.g. ``dataset_digest=...``; an old value is replaced."""
        self.write_json("run.json", {**self.info, **facts})

    @property
    def passing(self) -> bool:
        """Whether a user's mistake leaves nothing of the run: it is new and has made nothing yet."""
        return self._new and not self.made_anything()

    def made_anything(self) -> bool:
        """Tell whether there is a file beyond those that every run begins with."""
        return any(p.name not in _OWN or p.parent != self.path for p in self.path.rglob("*") if not p.is_dir())

    def close(self) -> None:
        """Close the TensorBoard writers, remove the run that was replaced, and let another process have this one."""
        super().close()
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ValueError) and self.passing:
            self._withdraw()
        self.close()

    def _withdraw(self) -> None:
        """Leave things as they were before the run."""
        super().close()
        shutil.rmtree(self.path, ignore_errors=True)
        if self._filled:  # an empty folder was there before
            self.path.mkdir(exist_ok=True)
        if self._replaced is not None:
            os.rename(self._replaced, self.path)
            self._replaced = None


def quoted(path: str | Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def code_version() -> dict[str, str | None]:
    """Return ``version`` of the package and git's ``commit`` (``-dirty`` added), None outside a checkout."""
    return {"version": ftnas.__version__, "commit": _commit(Path(__file__).resolve().parent)}


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    # A hook or an outer git command must not redirect the question to its own repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        # An installed package may lie inside somebody else's checkout: the file must be tracked there.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _describe(folder: Path, config: Mapping[str, Any], version: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, then ``run.json``: a folder with a run.json is whole."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()
    atomic_write(folder / "config.yaml", text)
    info = {
        "kind": KIND,
        "schema": SCHEMA,
        **version,
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "command": shlex.join(sys.argv),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    atomic_write(folder / "run.json", (json.dumps(info, indent=1) + "\n").encode())


def _is_run(path: Path) -> bool:
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("kind") == KIND


def _swap(fresh: Path, target: Path, shown: Path) -> Path:
    """Put ``fresh`` in the place of the run ``target``; return where the old one lies now."""
    lock = _take_lock(target, shown)
    try:
        aside = _sibling(target, "old")
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(aside, target)
            raise
        return aside
    finally:
        lock.release()


def _move(fresh: Path, target: Path, shown: Path) -> None:
    """Put ``fresh`` where nothing was; InUseError where another process has put a run there meanwhile."""
    try:
        os.rename(fresh, target)
    except OSError:
        if _is_run(target):
            raise _taken(shown) from None
        raise


def _taken(shown: Path) -> InUseError:
    return InUseError(f"run folder {shown} was made by another process just now; wait for it, or choose another place")


def _occupied(target: Path, shown: Path) -> bool:
    """Tell whether there is a folder with something in it; ValueError for a file."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"run folder {shown} is a file; choose another place")
    return target.is_dir() and any(target.iterdir())


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{secrets.token_hex(4)}")


def _take_lock(folder: Path, shown: Path) -> Lock:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            return Lock(folder / _LOCK)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
        raise InUseError(f"run folder {shown} is in use by another process; wait for it or stop it")


def _refuse(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or type(error).__name__
    raise ValueError(f"run folder {path} cannot be written ({reason}); choose another place") from None
