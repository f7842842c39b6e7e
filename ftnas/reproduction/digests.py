"""Which images the runs of a cache were made with, so that none is taken for one of another data set.

Hashes of runs leave out where the images lie, which may change; the digest of the images that a run noted tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from ftnas.data import DataConfig, load
from ftnas.reproduction.jobs import TEST_DIGEST, TRAIN_DIGEST, Job, digest_in, test_images
from ftnas.reproduction.runs import Run
from ftnas.reproduction.study import Planned


class _Part(NamedTuple):
    """Images of a data set: all for training, or so many for tests."""

    data: DataConfig
    kind: str
    number: int | None = None


def check_images(entry: Planned, index: int, earlier: Mapping[str, Run]) -> None:
    """Check that what is known of a row, from one of its seeds, was made with the images that are given now.

    Reads the images where a run noted their digest.

    Args:
        entry: The row.
        index: Of the seed.
        earlier: What is known of runs that the cache does not have: hash of the training -> its line of ``runs.jsonl``.

    Raises:
        ValueError: One line: which run was made with others; or the images are missing.
    """
    job = entry.jobs[index]
    fix = "leave out that --earlier" if job.key in earlier else "give another --cache"
    for run, part, noted in _noted(entry, job, earlier):
        given = _digest(part)
        if noted != given:
            where = f"{part.data.name}, root {part.data.root}"
            raise ValueError(
                f"{run} was made with other {part.kind} images: their digest is {noted[:12]}, that of the given ones "
                f"({where}) is {given[:12]}; {fix}"
            )


def check_agreement(planned: Sequence[Planned], earlier: Mapping[str, Run]) -> None:
    """Check that all runs of a study that took the same data set took the same images; reads no image.

    Args:
        planned: The runs.
        earlier: As in `check_images`.

    Raises:
        ValueError: One line: two runs that did not.
    """
    first: dict[_Part, tuple[str, str]] = {}
    for entry in planned:
        for job in entry.jobs:
            for run, part, noted in _noted(entry, job, earlier):
                other, digest = first.setdefault(part, (run, noted))
                if digest != noted:
                    raise ValueError(
                        f"{run} and {other} were made with different {part.kind} images, which no table compares; "
                        "give another --cache, and make them anew"
                    )


@lru_cache
def _digest(part: _Part) -> str:
    if part.kind == "training":
        return load(part.data, "train").digest
    return test_images(part.data, part.number).digest


def _noted(entry: Planned, job: Job, earlier: Mapping[str, Run]) -> Iterator[tuple[str, _Part, str]]:
    """Yield each run of a training that noted a digest, in words, of which images, and the digest."""
    data, name = job.config.data, f"{entry.row.name}, seed {job.seed}"
    training, tests = _Part(data, "training"), [_Part(data, "test", found.images) for found in entry.measurements]
    run = earlier.get(job.key)
    found: list[tuple[str, _Part, str | None]]
    if run is not None:
        where = f"the earlier result of {name}"
        found = [(where, training, run.train_digest), *((where, part, run.test_digest) for part in tests)]
    else:
        searches = [job.search_folder] if job.searches else []
        folders = [(folder, training, TRAIN_DIGEST) for folder in [*searches, job.folder]]
        measured = [job.measure_folder(found) for found in entry.measurements]
        folders += [(folder, part, TEST_DIGEST) for folder, part in zip(measured, tests, strict=True)]
        found = [(f"{folder} ({name})", part, digest_in(folder, key)) for folder, part, key in folders]
    for where, part, digest in found:
        if digest is not None:
            yield where, part, digest
