"""Which images the runs of a cache were made with, so that none is taken for one of another data set.

Hashes of runs leave out where the images lie, which may change; the digest of the images that a run noted tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ftnas.data import DataConfig, load
from ftnas.reproduction.jobs import TEST_DIGEST, Job, Measurement, test_images
from ftnas.reproduction.runs import Run
from ftnas.reproduction.study import Planned


class _Part(NamedTuple):
    """Images of a data set: all for training, or so many for tests."""

    data: DataConfig
    kind: str
    number: int | None = None


def check_images(entry: Planned, index: int) -> None:
    """Check that what a row has in the cache, from one of its seeds, was made with the images that are given now.

    Reads the images where a run noted their digest.

    Raises:
        ValueError: One line: which run was made with others; or the images are missing.
    """
    job = entry.jobs[index]
    for folder, part, noted in _noted(job, entry.measurements):
        given = _digest(part)
        if noted != given:
            where = f"{part.data.name}, root {part.data.root}"
            raise ValueError(
                f"{folder} ({entry.row.name}, seed {job.seed}) was made with other {part.kind} images: their digest "
                f"is {noted[:12]}, that of the given ones ({where}) is {given[:12]}; give another --cache"
            )


def check_agreement(planned: Sequence[Planned], earlier: Mapping[str, Run] | None = None) -> None:
    """Check that all runs of a study that took the same data set took the same images; reads no image.

    Args:
        planned: The runs.
        earlier: What is known of others: hash of the training -> its line of ``runs.jsonl``.

    Raises:
        ValueError: One line: two runs that did not.
    """
    first: dict[_Part, tuple[str, str]] = {}
    for entry in planned:
        for job in entry.jobs:
            for where, part, noted in _of_row(entry, job, earlier or {}):
                other, digest = first.setdefault(part, (where, noted))
                if digest != noted:
                    raise ValueError(
                        f"{where} and {other} were made with different {part.kind} images, which no table compares; "
                        "give another --cache, and make them anew"
                    )


def _of_row(entry: Planned, job: Job, earlier: Mapping[str, Run]) -> Iterator[tuple[str, _Part, str]]:
    """Yield, for one training of a row, each run in words that noted a digest, of which images, and the digest."""
    name, run = f"{entry.row.name}, seed {job.seed}", earlier.get(job.key)
    if run is None:
        for folder, part, noted in _noted(job, entry.measurements):
            yield f"{folder} ({name})", part, noted
    elif run.test_digest is not None:
        for images in {found.images for found in entry.measurements}:
            yield f"the earlier result of {name}", _Part(job.config.data, "test", images), run.test_digest


@lru_cache
def _digest(part: _Part) -> str:
    if part.kind == "training":
        return load(part.data, "train").digest
    return test_images(part.data, part.number).digest


def _noted(job: Job, measurements: Sequence[Measurement]) -> Iterator[tuple[Path, _Part, str]]:
    """Yield each run folder that noted a digest, of which images, and the digest."""
    data = job.config.data
    searches = [job.search_folder] if job.searches else []
    runs = [(folder, "dataset_digest", _Part(data, "training")) for folder in [*searches, job.folder]]
    runs += [(job.measure_folder(found), TEST_DIGEST, _Part(data, "test", found.images)) for found in measurements]
    for folder, name, part in runs:
        path = folder / "run.json"
        digest = json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None
        if digest is not None:
            yield folder, part, digest
