"""Candidates of a search, scored against one version of the shared weights, in order."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftnas.evaluate import Score, score
from ftnas.faults.hardware import Hardware
from ftnas.pool import Box, Events, Pool
from ftnas.progress import say
from ftnas.space import Genotype, Supernet

Batches = Sequence[tuple[Tensor, Tensor]]
Vector = np.ndarray[Any, Any]


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
class Weights:
    """One version of the shared weights.

    Attributes:
        version: Its number.
        seed: Of the stream of fault draws.
        vector: The weights, as `FlatWeights` reads them; None where the scorer holds the supernet itself.
    """

    version: int
    seed: int
    vector: Box[Vector] | None


@dataclass(frozen=True)
class Candidate:
    """One candidate and what it is scored on; the images have a number, by which a worker knows them again."""

    genotype: dict[str, Any]
    terms: Terms
    weights: Weights
    images: tuple[int, Box[Any]]


def scored(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Leave out a last batch of one image among batches of ``size``: a supernet normalises by those of the batch."""
    return (batch for batch in batches if size == 1 or len(batch[1]) > 1)


def num_scored(num_images: int, size: int) -> int:
    """Return how many batches `scored` gives."""
    return num_images // size + (num_images % size > 1)


class Scorer:
    """Scores single candidates on a supernet under injected faults: the job of the pool."""

    def __init__(self, supernet: Supernet, hardware: Hardware, *, joint: bool = False) -> None:
        self._supernet, self._hardware, self._joint = supernet, hardware, joint
        self._open: contextlib.ExitStack | None = None
        self._flat: FlatWeights | None = None  # made by a worker
        self._version = self._number = -1
        self._batches: Batches = ()

    def __call__(self, candidate: Candidate) -> Score:
        """Score one candidate; an exception in it leaves nothing behind for the next one."""
        self._take(candidate)
        terms = candidate.terms
        try:
            genotype = Genotype.from_dict(candidate.genotype)
            return score(
                partial(self._supernet, genotype=genotype),
                self._injection,
                self._batches,
                alpha_r=terms.alpha_r,
                draws=terms.draws,
                first_draw=terms.first_draw,
                joint=self._joint,
            )
        except BaseException as error:
            if self._open is not None:  # left as by an error: an injection that was cut short has nothing to check
                self._open.__exit__(type(error), error, error.__traceback__)
            self._open = None
            raise

    def close(self) -> None:
        """Take the faults away from the supernet."""
        if self._open is not None:
            self._open.close()
        self._open, self._version = None, -1

    def _take(self, candidate: Candidate) -> None:
        """Put the hardware under the weights; they are quantized once for all candidates of a version."""
        weights, (number, images) = candidate.weights, candidate.images
        if weights.version != self._version:
            self.close()
            if weights.vector is not None:
                self._flat = self._flat or FlatWeights(self._supernet)
                self._flat.write(weights.vector.get())
            self._version = weights.version
        if self._open is None:
            self._supernet.eval()
            self._open = contextlib.ExitStack()
            injection = self._hardware.inject(self._supernet, seed=weights.seed, errors="soft", draw_on="device")
            self._injection = self._open.enter_context(injection)
            self._open.enter_context(injection.weights_shared())
        if number != self._number:
            self._batches = [(_tensor(x), _tensor(y)) for x, y in images.get()]
            self._number = number


class Candidates:
    """Scores candidates of one supernet by a pool.

    Args:
        pool: Does the work.
        supernet: Shared weights; they are read at each `weights`.
        hardware: Faults and number formats.
        events: Takes a kind and fields: what went wrong.
        joint: Compute the clean and the one faulty forward of a candidate as one.

    Raises:
        ValueError: The pool has workers, and the supernet is not on the CPU.
    """

    def __init__(
        self, pool: Pool, supernet: Supernet, hardware: Hardware, *, events: Events, joint: bool = False
    ) -> None:
        device = next(supernet.parameters()).device
        if not pool.shares_memory and device.type != "cpu":
            raise ValueError(f"pool.workers score on the CPU, and the run is on {device}; use workers=0")
        self._pool, self._supernet, self._events = pool, supernet, events
        self._scorer = Scorer(supernet, hardware, joint=joint)
        self._job = pool.put(self._scorer)
        self._version = self._number = self._tried = self._failed = 0
        self._reason = ""
        self._weights: Weights | None = None
        self._flat = FlatWeights(supernet)

    @contextlib.contextmanager
    def weights(self, seed: int) -> Iterator[None]:
        """Take the supernet's weights as they are now, and the stream of fault draws, for the calls in the body.

        Raises:
            RuntimeError: After the body, where every candidate failed: there is something wrong with more than one.
        """
        self._version += 1
        self._tried = self._failed = 0
        vector = None if self._pool.shares_memory else self._pool.put(self._flat.read())
        self._weights = Weights(self._version, seed, vector)
        try:
            yield
        finally:
            self._weights = None
            self._scorer.close()
        if self._tried and self._failed == self._tried:
            raise RuntimeError(f"no candidate could be scored, all {self._tried} failed, the last with {self._reason}")

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

        Raises:
            RuntimeError: One could not be scored for a reason of the machine (no memory left, workers that die), which
                says nothing of the candidate.
        """
        assert self._weights is not None, "within `weights` only"
        self._number += 1
        images = (self._number, self._pool.put(batches if self._pool.shares_memory else _arrays(batches)))
        distinct = list(dict.fromkeys(genotypes))
        tasks = [Candidate(genotype.to_dict(), terms, self._weights, images) for genotype in distinct]
        scores: dict[Genotype, Score] = {}
        for genotype, result in zip(distinct, self._pool.map(self._job, tasks), strict=True):
            if result.accident:
                self._events("candidate_lost", reason=result.reason, genotype=genotype.to_dict())
                raise RuntimeError(
                    f"a candidate could not be scored, for no fault of its own: {result.reason}; see to the machine, "
                    "or use fewer workers or threads; --resume goes on"
                )
            scores[genotype] = result.value or Score(clean=0.0, faulty=0.0, reward=0.0)
            self._tried += 1
            done()
            if not result.ok:
                say(f"warning: a candidate failed and scores 0: {result.reason}")
                self._events("candidate_failed", reason=result.reason, genotype=genotype.to_dict())
                self._failed += 1
                self._reason = result.reason
        return [scores[genotype] for genotype in genotypes]


class FlatWeights:
    """All parameters and buffers of a module as one vector of bytes, uint8 [bytes], and back.

    They lie by number format, wide ones first so that each is aligned, in the order of the module. The module is gone
    through once: for a supernet that takes as long as the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for value in itertools.chain(module.parameters(), module.buffers()):
            groups.setdefault(value.dtype, []).append(value)
        self._groups = sorted(groups.values(), key=lambda group: -group[0].element_size())
        self._sizes = [sum(value.numel() * value.element_size() for value in group) for group in self._groups]
        self._vector: Vector | None = None

    def read(self) -> Vector:
        """Return the values as they are now, in memory that the next call writes to again."""
        if self._vector is None:
            self._vector = np.empty(sum(self._sizes), np.uint8)
        for group, part in self._parts(self._vector):
            torch.cat([value.detach().cpu().reshape(-1) for value in group], out=part)
        return self._vector

    @torch.no_grad()
    def write(self, vector: Vector) -> None:
        """Copy values of a module of the same architecture into this one; the vector itself is left alone."""
        for group, part in self._parts(vector):
            for value, flat in zip(group, part.split([value.numel() for value in group]), strict=True):
                value.copy_(flat.view(value.shape))

    def _parts(self, vector: Vector) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield each group with its part of the vector, as a flat tensor of its format in the same memory."""
        assert len(vector) == sum(self._sizes), "another architecture"
        start = 0
        for group, size in zip(self._groups, self._sizes, strict=True):
            with warnings.catch_warnings():  # on memory that is not to be written to, which `write` does not
                warnings.simplefilter("ignore")
                flat = torch.from_numpy(vector[start : start + size])
            yield group, flat.view(group[0].dtype)
            start += size


def _tensor(array: Tensor | Vector) -> Tensor:
    """Return a tensor; an array is copied, since what lies in an object store belongs to every worker."""
    return array if isinstance(array, Tensor) else torch.tensor(array)


def _arrays(batches: Batches) -> list[tuple[Vector, Vector]]:
    return [(x.contiguous().numpy(), y.numpy()) for x, y in batches]
