"""An ordered map over tasks: its settings, its contract, and the pool that does it in this process.

Every pool gives the same results, bit for bit, at the same number of threads per task and the same batches.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from pydantic import Field, model_validator

from ftnas.settings import Settings

Events = Callable[..., None]
_NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch's RuntimeError says where the CPU's memory is full."""
T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


class PoolConfig(Settings):
    """Who scores candidates, trains final networks and measures them. Workers change the time, and not the result.

    Attributes:
        workers: Processes of Ray; 0 does all in this process, without Ray.
        threads: CPU threads per task, on which float sums depend. None takes the run's own number; with workers it is
            1 where it is not given.
        address: Of a running Ray cluster to join; None starts Ray on this machine alone, for as long as it is needed.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    address: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_thread(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("workers") and data.get("threads") is None:
            return {**data, "threads": 1}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> PoolConfig:
        if self.address is not None and self.workers == 0:
            raise ValueError("address is of a Ray cluster, which workers=0 does not use; set workers or remove address")
        return self


class LostError(RuntimeError):
    """A task came to no end for a reason that is not its own: its worker died, or what it reads is lost."""


class Box(ABC, Generic[T_co]):
    """A value that many tasks read: where there are workers, it travels to each of them once."""

    @abstractmethod
    def get(self) -> T_co:
        """Return the value; not to be changed in place, since others read the same."""


@dataclass(frozen=True)
class Result(Generic[R]):
    """What came of one task.

    Attributes:
        value: What the job returned; None for a failure.
        error: What it raised instead; None when it did not.
        pid: The process that did it.
    """

    value: R | None
    error: Exception | None = None
    pid: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.error is None

    @property
    def accident(self) -> bool:
        """Whether it failed for a reason of the machine, so that it may well be done another time."""
        kinds = (LostError, MemoryError, torch.OutOfMemoryError)
        return isinstance(self.error, kinds) or any(words in str(self.error) for words in _NO_MEMORY)

    @property
    def reason(self) -> str:
        """Why it failed, one line; empty when it did not."""
        return "" if self.error is None else f"{type(self.error).__name__}: {' '.join(str(self.error).split())}"

    def get(self) -> R:
        """Return the value, or raise what the job raised."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class Pool(ABC):
    """Does tasks, in order. A context manager, which closes it.

    Attributes:
        threads: CPU threads of torch per task.
        shares_memory: Whether jobs see this process's own objects, and not copies of them.
    """

    threads: int
    shares_memory: bool

    @abstractmethod
    def put(self, value: T) -> Box[T]:
        """Keep a value for tasks to read."""

    @abstractmethod
    def map(self, job: Box[Callable[[T], R]], tasks: Iterable[T]) -> Iterator[Result[R]]:
        """Yield the job's results in the order of the tasks, which are taken no sooner than there is work for them.

        An exception that the job raises is a result too.
        """

    @abstractmethod
    def close(self) -> None:
        """End whatever the pool started."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Kept(Box[T]):
    """A value of this process."""

    value: T

    def get(self) -> T:
        """See `Box.get`."""
        return self.value


class InProcess(Pool):
    """Does one task after the other in this process: the reference."""

    shares_memory = True

    def __init__(self, *, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()

    def put(self, value: T) -> Box[T]:
        """See `Pool.put`."""
        return Kept(value)

    def map(self, job: Box[Callable[[T], R]], tasks: Iterable[T]) -> Iterator[Result[R]]:
        """See `Pool.map`."""
        for task in tasks:
            yield attempt(job.get(), task, threads=self.threads)

    def close(self) -> None:
        """Nothing was started."""


def attempt(job: Callable[[T], R], task: T, *, threads: int) -> Result[R]:
    """Do one task on that many threads of torch; an exception becomes part of the result."""
    try:
        with num_threads(threads):
            return Result(job(task), pid=os.getpid())
    except Exception as error:
        return Result(None, _portable(error), os.getpid())


def _portable(error: Exception) -> Exception:
    """Return the exception, or one that says the same where it cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Run the body on that many threads of torch."""
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
