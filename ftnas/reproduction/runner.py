"""Does the runs of a study that are not done yet."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType

from ftnas.progress import say
from ftnas.reproduction.digests import check_images
from ftnas.reproduction.jobs import finished, measure, train, trained
from ftnas.reproduction.runs import Run
from ftnas.reproduction.study import Planned
from ftnas.rundir import InUseError

_PATIENCE_S = 5.0
NOTHING: Mapping[str, Run] = MappingProxyType({})


def run(
    planned: Sequence[Planned], earlier: Mapping[str, Run] = NOTHING, *, rows: Container[str] | None = None
) -> None:
    """Train and measure what is missing, the first seed of all rows first.

    What another process is at is left to it, and looked at again when the rest is done.

    Args:
        planned: Rows with their runs, whose images are checked.
        earlier: Hashes of trainings that are left out -> what is known of them from elsewhere.
        rows: Names of the rows to run; None takes all.

    Raises:
        ValueError: A user's mistake, at once; runs in the cache were made with other images.
        RuntimeError: Trainings failed; all the rest is done.
    """
    failures: list[str] = []
    num_seeds = max(len(entry.jobs) for entry in planned)
    todo = [(entry, index) for index in range(num_seeds) for entry in planned if index < len(entry.jobs)]
    for unit in todo:
        check_images(*unit, earlier)
    todo = [(entry, index) for entry, index in todo if rows is None or entry.row.name in rows]
    todo = [(entry, index) for entry, index in todo if entry.jobs[index].key not in earlier]
    todo = [(entry, index) for entry, index in todo if not finished(entry.jobs[index], entry.measurements)]
    while todo:
        busy = []
        for entry, index in todo:
            try:
                _one(entry, index)
            except InUseError:
                busy.append((entry, index))
            except RuntimeError as error:
                failures.append(f"{entry.row.name}, seed {entry.jobs[index].seed}: {error}")
                say(f"warning: {failures[-1]}")
        if len(busy) == len(todo):
            time.sleep(_PATIENCE_S)
        todo = busy
    if failures:
        raise RuntimeError(f"{len(failures)} trainings failed, the others are done; the last: {failures[-1]}")


def _one(entry: Planned, index: int) -> None:
    check_images(entry, index, NOTHING)  # another process may have made it since
    job = entry.jobs[index]
    if not trained(job):
        say(f"{entry.row.name}, seed {job.seed}: training in {job.folder}")
        train(job)
    for measurement in entry.measurements:
        measure(job, measurement)
