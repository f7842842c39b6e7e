"""Files that survive a kill: atomic writes, checkpoints, JSON-lines journals, and a lock."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows has none: there, two processes on one run are the user's to avoid
    fcntl = None  # type: ignore[assignment]

LARGE = 16 * 2**20
"""Bytes of a checkpoint that takes a while to write."""

_LOADABLE = (
    *(torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device),
    *(bool, int, float, complex, str, bytes, type(None)),
)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file by ``data`` in one step: who reads, or is killed, sees old or new."""
    with _replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that takes its place when the body ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name, not a random one: what a killed process left behind is overwritten by the next write.
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with _named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_journal(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read a JSON-lines file.

    Returns:
        The records of all whole lines (none without a file), and whether a torn last line was left out.

    Raises:
        ValueError: It cannot be read, or a whole line is not a JSON object.
    """
    if not path.exists():
        return [], False
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object; restore the file or remove that line")
        records.append(record)
    return records, bool(tail)


class Journal:
    """An append-only file of JSON objects, one a line.

    A line counts once its newline is there. A torn last line, which a killed process leaves, is ignored when
    reading and cut off before the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset: int | None = None

    @property
    def offset(self) -> int:
        """Size of all whole lines, in bytes; a checkpoint stores it, and ``truncate`` goes back to it."""
        if self._offset is None:
            data = self.path.read_bytes() if self.path.exists() else b""
            self._offset = data.rfind(b"\n") + 1
        return self._offset

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one whole line and hand it to the operating system.

        Raises:
            ValueError: The record holds NaN or an infinity, which JSON does not know.
            OSError: The file, which it names, cannot be written; whole lines are kept, and the next append mends it.
        """
        try:
            line = json.dumps(dict(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        except ValueError as error:
            raise ValueError(f"{self.path.name}: a record must be finite JSON ({error}), got {record!r}") from None
        start = self.offset
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not "ab": a torn last line must be overwritten, not continued.
        with _named(self.path), open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(line)
        self._offset = start + len(line)

    def records(self) -> list[dict[str, Any]]:
        """Return all records; ValueError when a whole line is not a JSON object."""
        return read_journal(self.path)[0]

    def truncate(self, offset: int) -> None:
        """Cut the file back to ``offset`` bytes.

        Raises:
            ValueError: The file is shorter than that, or the offset is not the end of a line.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        if not 0 <= offset <= len(data):
            raise ValueError(f"{self.path}: the checkpoint counts {offset} bytes, the file has {len(data)}; restore it")
        if offset and data[offset - 1 : offset] != b"\n":
            raise ValueError(f"{self.path}: byte {offset} is not the end of a line; the file is of another run")
        if len(data) > offset:
            os.truncate(self.path, offset)
        self._offset = offset

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        if self.path.exists():
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values in one step.

    Args:
        path: The file; its folder is made when missing.
        state: Tensors, plain Python values, and dicts, lists, tuples and sets of them.

    Raises:
        TypeError: A value that ``load_checkpoint`` could not read back; the message tells where it is.
    """
    _check_loadable(state, path.name)
    whole = io.BytesIO()  # torch hides the reason where it cannot write to a file, such as a full disk
    torch.save(state, whole)
    with _replacing(path) as file:
        file.write(whole.getbuffer())


class Checkpoints:
    """Writes the checkpoints of a training so that this takes at most a twentieth of its time.

    Small ones are always due. A large one, which can take as long as a tenth of an epoch on a GPU, is when 19 times as
    long has passed as the last one took; a training that is cut loses no more than that, and the epoch it was in.

    Args:
        write: Writes a state and returns its file.
        clock: Returns seconds.
    """

    def __init__(
        self, write: Callable[[Mapping[str, Any]], Path], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._pause_s, self._done = 0.0, clock()

    @property
    def due(self) -> bool:
        """Whether it is time to write one."""
        return self._clock() - self._done >= self._pause_s

    def write(self, state: Mapping[str, Any]) -> None:
        """Write one."""
        start = self._clock()
        large = self._write(state).stat().st_size >= LARGE
        self._done = self._clock()
        self._pause_s = 19 * (self._done - start) if large else 0.0


def load_checkpoint(path: str | Path) -> Any:
    """Read a file of tensors and plain values, onto the CPU, without running code from it.

    Raises:
        ValueError: One line that names the file: missing, truncated, damaged or foreign.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        damaged = _damaged(path)
        if damaged is None:
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a dozen kinds here, by which byte of the file is wrong
        raise ValueError(
            f"{path}: not a whole checkpoint of tensors and plain values ({type(error).__name__}); "
            "it is truncated or of another program"
        ) from None
    raise ValueError(f"{path}: damaged: {damaged!r} in it has another checksum; take an intact copy")


def _damaged(path: str | Path) -> str | None:
    """Return the first part of a file of ours whose checksum is wrong: PyTorch writes it, and does not look at it."""
    if not zipfile.is_zipfile(path):  # the format of before, which has none
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _check_loadable(value: Any, where: str) -> None:
    """Raise TypeError, with the key path, for what ``torch.load(weights_only=True)`` would refuse."""
    if isinstance(value, Mapping) and type(value).__name__ in ("dict", "OrderedDict"):
        for key, item in value.items():
            _check_loadable(key, f"{where}: key {key!r}")
            _check_loadable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_loadable(item, f"{where}[{index}]")
    elif type(value) not in _LOADABLE:
        raise TypeError(f"{where}: a checkpoint holds tensors and plain values, got {type(value).__name__}")


class Lock:
    """A lock file that one process holds, until ``release``, or until it is collected or the process ends.

    Where the system or the file system knows no locks, nothing is locked.

    Raises:
        BlockingIOError: Another holder has it.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return  # a network file system without locks
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A data loader's worker inherits the open file, and could outlive a killed run and keep it locked.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
