"""Lines of runs.jsonl, one a training: written with a result, and read where a table takes earlier results in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ftnas.progress import say
from ftnas.records import SCHEMA
from ftnas.reproduction.jobs import (
    TEST_DIGEST,
    TRAIN_DIGEST,
    Job,
    Measurement,
    cost,
    digest_in,
    finished,
    machine,
    records,
)
from ftnas.reproduction.study import Planned
from ftnas.settings import Rate, first_problem
from ftnas.storage import read_journal

FILE = "runs.jsonl"
Key = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]


class Run(BaseModel):
    """One training with its measurements. Keys that are not used here are allowed.

    Attributes:
        row: What the table calls the network.
        seed: Training seed.
        trained_for: What it was trained for, e.g. ``mibb 0.0003``.
        training: Hash of the training.
        search: Hash of the search before it, if there was one.
        measurements: Hash of each sweep.
        train_cpu_s: Processor time of the training, in seconds.
        train_wall_s: The time that passed.
        search_cpu_s: Processor time of the search, which trainings from other seeds share.
        measure_cpu_s: Processor time of the measurements; None where it was not kept.
        commit: Of the training.
        machines: What all of it ran on.
        train_digest: Of the training images; None where it was not kept.
        test_digest: Of the test images; None where it was not kept.
        num_images: Of the test set.
        params: Parameters of the network.
        flops: 2 x MAC for one image.
        accuracy: Sweep -> rate -> accuracy in [0, 1] of each device, from the first on; at "0" one without faults.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    row: str
    seed: int
    trained_for: str
    training: Key
    search: Key | None = None
    measurements: dict[str, Key]
    train_cpu_s: float
    train_wall_s: float
    search_cpu_s: float | None = None
    measure_cpu_s: float | None = None
    commit: str | None = None
    machines: tuple[str, ...]
    train_digest: str | None = None
    test_digest: str | None = None
    num_images: int = Field(ge=1)
    params: int
    flops: int
    accuracy: dict[str, dict[str, list[Rate]]]

    def covers(self, job: Job, measurements: Sequence[Measurement]) -> bool:
        """Tell whether it is of the same training, and has all that is to be measured."""
        return self.training == job.key and all(
            self.measurements.get(found.sweep.label) == job.measure_key(found)
            and all(
                len(self._accuracy(found, rate)) >= (found.devices if rate else 1) for rate in (0.0, *found.sweep.rates)
            )
            for found in measurements
        )

    def records(self, measurement: Measurement) -> list[dict[str, Any]]:
        """Return a sweep as `ftnas.reproduction.jobs.records` does, without the correctness of each image."""
        same = {
            "schema": SCHEMA,
            "model": self.row,
            "train_seed": self.seed,
            "training": self.trained_for,
            "fault": measurement.sweep.label,
            "rate_name": measurement.sweep.fault.rate_name,
            **self.model_dump(include={"num_images", "params", "flops"}),
        }
        return [
            {**same, "rate": rate, "device": device if rate else None, "accuracy": accuracy}
            for rate in sorted({0.0, *measurement.sweep.rates})
            for device, accuracy in enumerate(self._accuracy(measurement, rate)[: measurement.devices if rate else 1])
        ]

    def _accuracy(self, measurement: Measurement, rate: float) -> list[float]:
        return self.accuracy.get(measurement.sweep.label, {}).get(_shown(rate), [])


class Cost(NamedTuple):
    """Processor time of runs in seconds, whether that is all of it, and the machines that they ran on."""

    cpu_s: float
    is_all: bool
    machines: list[str]


def _shown(rate: float) -> str:
    return f"{rate:g}"


def earlier_results(folders: Sequence[Path], planned: Sequence[Planned]) -> dict[str, Run]:
    """Return, by the hash of the training, what earlier results know of runs that the cache does not have.

    Results of one run that differ are told; of two earlier ones the last is taken, none where the cache has its own.

    Args:
        folders: Of results, with a ``runs.jsonl``.
        planned: The runs of a study.

    Raises:
        ValueError: One line: no result there, what is wrong with it, or none of it is of this study.
    """
    found: dict[str, Run] = {}
    of_study = False
    runs = [run for folder in folders for run in _read(folder / FILE)]
    for entry in planned:
        for job in entry.jobs:
            same = [run for run in runs if run.covers(job, entry.measurements)]
            own = finished(job, entry.measurements)
            of_study |= bool(same)
            if same and not own:
                found[job.key] = same[-1]
            known = [_accuracies(run.records(measurement) for measurement in entry.measurements) for run in same]
            if own and same:
                known.append(_accuracies(records(job, measurement) for measurement in entry.measurements))
            if any(each != known[-1] for each in known):
                say(
                    f"warning: {entry.row.name}, seed {job.seed} (train {job.key}): results differ; "
                    f"{'that of the cache' if own else 'the last of them'} is taken"
                )
    where = f"--earlier {', '.join(map(str, folders))}"
    if folders and not of_study:
        raise ValueError(
            f"{where}: none of its runs is one of this study under these settings, measured to the end; give the "
            "overrides that they were made with, or leave it out"
        )
    if folders and not found:
        say(f"{where}: the cache has all of its runs that are of this study")
    return found


def _accuracies(sweeps: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[tuple[float, int | None], float]]:
    """Return the accuracy of each device at each rate, for each sweep."""
    return [{(line["rate"], line["device"]): line["accuracy"] for line in lines} for lines in sweeps]


def _read(path: Path) -> Iterator[Run]:
    lines, torn = read_journal(path)
    if torn or not lines:
        raise ValueError(f"{path}: {'its last line is torn' if torn else 'no result is there'}; give a folder of --out")
    for number, line in enumerate(lines, start=1):
        try:
            yield Run.model_validate(line)
        except pydantic.ValidationError as error:
            problem = first_problem(error, Run, f"{path}: line {number}")
            raise ValueError(f"{problem}; make that result anew, by --report") from None


def runs(planned: Sequence[Planned], earlier: Mapping[str, Run]) -> list[Run]:
    """Return what is there of every training of which something was measured, in the order of rows and seeds."""
    found = []
    for entry in planned:
        for job in entry.jobs:
            run = earlier.get(job.key)
            run = _of_cache(entry, job) if run is None else run.model_copy(update={"row": entry.row.name})
            if run is not None:
                found.append(run)
    return found


def _of_cache(entry: Planned, job: Job) -> Run | None:
    lines = [line for found in entry.measurements for line in records(job, found)]
    if not lines:
        return None
    accuracy: dict[str, dict[str, list[float]]] = {}
    for line in sorted(lines, key=lambda line: line["device"] or 0):
        at_rate = accuracy.setdefault(line["fault"], {}).setdefault(_shown(line["rate"]), [])
        if len(at_rate) == (line["device"] or 0):  # a list has no gaps
            at_rate.append(line["accuracy"])
    folders = [job.measure_folder(found) for found in entry.measurements]
    spent, measured = cost(job.folder), [cost(folder) for folder in folders]
    searched = [cost(job.search_folder)] if job.searches else []
    return Run(
        row=entry.row.name,
        seed=job.seed,
        trained_for=lines[-1]["training"],
        training=job.key,
        search=job.search_key if job.searches else None,
        measurements={found.sweep.label: job.measure_key(found) for found in entry.measurements},
        train_cpu_s=spent["cpu_s"],
        train_wall_s=spent["wall_s"],
        search_cpu_s=searched[0]["cpu_s"] if searched else None,
        measure_cpu_s=round(sum(found["cpu_s"] for found in measured), 1),
        commit=spent["commit"],
        machines=tuple(sorted({name for found in [spent, *measured, *searched] for name in found["machines"]})),
        train_digest=digest_in(job.folder, TRAIN_DIGEST),
        test_digest=digest_in(folders[0], TEST_DIGEST),
        **{name: lines[0][name] for name in ("num_images", "params", "flops")},
        accuracy=accuracy,
    )


def total_cost(planned: Sequence[Planned], earlier: Mapping[str, Run]) -> Cost:
    """Return what all runs of a study took (shared ones too), those that are not measured yet included."""
    folders: set[Path] = set()
    taken: dict[str, Run] = {}
    for entry in planned:
        for job in entry.jobs:
            if job.key in earlier:
                taken[job.key] = earlier[job.key]
                continue
            folders |= {job.folder, *(job.measure_folder(found) for found in entry.measurements)}
            folders |= {job.search_folder} if job.searches else set()
    spent = [cost(folder) for folder in folders]
    searches = {run.search: run.search_cpu_s or 0.0 for run in taken.values() if run.search is not None}
    seconds = sum(found["cpu_s"] for found in spent) + sum(searches.values())
    seconds += sum(run.train_cpu_s + (run.measure_cpu_s or 0.0) for run in taken.values())
    machines = {name for found in spent for name in found["machines"]}
    machines |= {name for run in taken.values() for name in run.machines}
    is_all = all(run.measure_cpu_s is not None for run in taken.values()) and all(found["is_all"] for found in spent)
    return Cost(seconds, is_all, sorted(machines) or [machine()])
