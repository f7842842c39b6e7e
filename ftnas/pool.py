"""Candidates against one version of the shared weights, scored in order; the pool that does it in this process.

Every pool gives the same results, bit for bit, at the same number of threads per candidate and the same batches.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ftnas.evaluate import Score, score
from ftnas.faults.hardware import Hardware
from ftnas.progress import say
from ftnas.settings import Count, Settings
from ftnas.space import Genotype, Supernet

Batches = Sequence[tuple[Tensor, Tensor]]
Events = Callable[..., None]


class PoolConfig(Settings):
    """Who scores candidates. The number of workers changes the time, and not the result.

    Attributes:
        workers: Processes of Ray; 0 scores in this process, without Ray.
        threads: CPU threads per candidate, on which float sums depend. None takes the run's own number; with workers
            it is 1 where it is not given.
        address: Of a running Ray cluster to join; None starts Ray on this machine alone, for as long as it is needed.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    threads: Count | None = None
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


@dataclass(frozen=True)
class Terms:
    """What all candidates of one call have in common.

    Attributes:
        alpha_r: Weight of the faulty accuracy, in [0, 1].
        draws: Fault draws per batch.
        first_draw: Number of the first draw.
    """

    alpha_r: float
    draws: int = 1
    first_draw: int = 0


@dataclass(frozen=True)
class Task:
    """One candidate: its place in the call, and its genotype as plain data."""

    id: int
    genotype: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What came of one candidate.

    Attributes:
        id: That of its task.
        ok: Whether it was scored.
        value: Clean accuracy, faulty accuracy and reward; zeros for a failure.
        reason: Why it failed, one line; empty when it did not.
        pid: The process that scored it.
    """

    id: int
    ok: bool
    value: tuple[float, float, float]
    reason: str = ""
    pid: int = 0

    @property
    def score(self) -> Score:
        """The accuracies and the reward; all 0 for a failure."""
        clean, faulty, reward = self.value
        return Score(clean=clean, faulty=faulty, reward=reward)


class Scorer:
    """Scores single candidates on a supernet under injected faults; what runs in this process and in a worker alike."""

    def __init__(self, supernet: Supernet, hardware: Hardware, threads: int) -> None:
        self._supernet, self._hardware, self._threads = supernet, hardware, threads
        self._open = contextlib.ExitStack()
        self._stale = False

    def open(self, seed: int) -> None:
        """Put the hardware under the supernet as it is now; its weights are quantized once for all candidates."""
        self.close()
        self._supernet.eval()
        self._seed, self._stale = seed, False
        self._injection = self._open.enter_context(self._hardware.inject(self._supernet, seed=seed, errors="soft"))

    def close(self) -> None:
        """Take the hardware away again."""
        self._open.close()

    def score(self, task: Task, batches: Batches, terms: Terms) -> Result:
        """Score one candidate; an exception in it is a result too, and leaves nothing behind for the next one."""
        if self._stale:
            self.open(self._seed)
        try:
            genotype = Genotype.from_dict(task.genotype)
            with _num_threads(self._threads):
                found = score(
                    partial(self._supernet, genotype=genotype),
                    self._injection,
                    batches,
                    alpha_r=terms.alpha_r,
                    draws=terms.draws,
                    first_draw=terms.first_draw,
                )
        except Exception as error:
            # left as by an error: an injection that was cut short has nothing to check
            self._open.__exit__(type(error), error, error.__traceback__)
            self._stale = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Result(task.id, False, (0.0, 0.0, 0.0), reason, os.getpid())
        return Result(task.id, True, (found.clean, found.faulty, found.reward), pid=os.getpid())


class Pool(ABC):
    """An ordered map over candidates against one version of the shared weights. A context manager, which closes it."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @abstractmethod
    def weights(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Take the supernet's weights as they are now, and the stream of fault draws, for the calls in the body."""

    @abstractmethod
    def _map(self, tasks: Sequence[Task], batches: Batches, terms: Terms) -> Iterator[Result]:
        """Yield the results in any order."""

    @abstractmethod
    def close(self) -> None:
        """End whatever the pool started."""

    def score(
        self, genotypes: Sequence[Genotype], batches: Batches, terms: Terms, *, done: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """Score candidates on common images and draws; equal ones are scored once.

        Args:
            genotypes: The candidates.
            batches: Float images [B, C, H, W] and int64 labels [B].
            terms: How all of them are scored.
            done: Called after each distinct candidate.

        Returns:
            Scores in the order of the candidates. One that raises is in the events, with its reason, and scores 0.
        """
        distinct = list(dict.fromkeys(genotypes))
        tasks = [Task(index, genotype.to_dict()) for index, genotype in enumerate(distinct)]
        found: dict[int, Result] = {}
        for result in self._map(tasks, batches, terms):
            found[result.id] = result
            done()
        for task in tasks:  # in order, so that the events do not depend on who was faster
            if not found[task.id].ok:
                say(f"warning: a candidate failed and scores 0: {found[task.id].reason}")
                self._events("candidate_failed", reason=found[task.id].reason, genotype=task.genotype)
        scores = {genotype: found[index].score for index, genotype in enumerate(distinct)}
        return [scores[genotype] for genotype in genotypes]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(Pool):
    """Scores one candidate after the other in this process: the reference."""

    def __init__(self, supernet: Supernet, hardware: Hardware, *, threads: int, events: Events) -> None:
        super().__init__(events)
        self._scorer = Scorer(supernet, hardware, threads)

    @contextlib.contextmanager
    def weights(self, seed: int) -> Iterator[None]:
        """See `Pool.weights`."""
        self._scorer.open(seed)
        try:
            yield
        finally:
            self._scorer.close()

    def _map(self, tasks: Sequence[Task], batches: Batches, terms: Terms) -> Iterator[Result]:
        return (self._scorer.score(task, batches, terms) for task in tasks)

    def close(self) -> None:
        """Nothing was started."""


def num_threads(config: PoolConfig) -> int:
    """Return the CPU threads per candidate."""
    return config.threads or torch.get_num_threads()


@contextlib.contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
