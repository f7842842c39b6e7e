"""A table or an observation of the paper as data: which rows from which configs, which sweeps, which orderings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftnas.campaign import SweepConfig
from ftnas.config import RunConfig, read_config
from ftnas.reproduction.jobs import Job, Measurement
from ftnas.rng import generator
from ftnas.settings import Count, Positive, Settings, did_you_mean, parse
from ftnas.shipped import find_file, shipped_names
from ftnas.space import Genotype, load_space
from ftnas.yaml_text import read_yaml

FOLDER = "configs/reproduction"
SCALES = ("small", "full")
_DATA = ("published", "scales")
_NO_EFFECT = {
    **dict.fromkeys(("campaign", "single_faults", "protections", "bounds"), "the study says what is measured"),
    **dict.fromkeys(("name", "description"), "runs are called after their hashes"),
    **dict.fromkeys(("control", "models", "train.asha"), "no row has it"),
    "train.seeds": "training seeds are those of the scale; give --seeds",
}


class PublishedRow(Settings):
    """A row of a published table: accuracies in percent, FLOPs and parameters in millions."""

    arch: str
    training: str | float
    acc: tuple[float, ...]
    flops: float | None = None
    params: float | None = None


class PublishedTable(Settings):
    """A published table: fault rates, 0 for none, and a row for each network."""

    rates: tuple[float, ...]
    rows: tuple[PublishedRow, ...]

    def accuracy(self, reference: Reference, rate: float) -> float | None:
        """Return the accuracy in [0, 1] that was published, or None."""
        row = self.row(reference)
        if row is None or rate not in self.rates:
            return None
        return row.acc[self.rates.index(rate)] / 100

    def row(self, reference: Reference) -> PublishedRow | None:
        """Return the row of a network, or None."""
        same = (row for row in self.rows if (row.arch, row.training) == (reference.arch, reference.training))
        return next(same, None)


class Reference(Settings):
    """Which published row."""

    arch: str
    training: str | float


class Sample(Settings):
    """A random architecture.

    Attributes:
        space: It is drawn from this space.
        seed: Of the draw.
        small_space: The space at the small scale, when it is another one.
    """

    space: str
    seed: int
    small_space: str | None = None


class Row(Settings):
    """A network of a table, trained in one way.

    Attributes:
        name: What the table calls it.
        config: The shipped config that trains it.
        model: Its name in the config's train section.
        settings: Overrides of the config, at every scale.
        small: Further ones at the small scale.
        sample: A random architecture that takes the place of the model's genotype.
        published: The published row, if there is one.
        note: What is not as in the paper.
    """

    name: str
    config: str
    model: str
    settings: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    sample: Sample | None = None
    published: Reference | None = None
    note: str = ""


class StudySweep(SweepConfig):
    """One fault model over the published rates.

    Attributes:
        published: Name of the published table.
        small_factor: Factor on the rates at the small scale.
    """

    published: str | None = None
    small_factor: Positive = 1.0


class Ordering(Settings):
    """One thing that the paper says, as a comparison of two rows.

    Attributes:
        claim: In words.
        better: Name of the row that is said to be above, or of several, each of them.
        worse: Name of the row that is said to be below, or of several.
        rates: Published rates over which accuracies are averaged; all above 0 when left out; 0 alone is fault-free.
        sweep: Of the sweeps of the study; the first when left out.
        measure: ``accuracy``; ``loss`` is the accuracy that faults take away, of which less is better; ``same`` says
            that there is no difference.
    """

    claim: str
    better: str | tuple[str, ...]
    worse: str | tuple[str, ...]
    rates: tuple[float, ...] | None = None
    sweep: str | None = None
    measure: Literal["accuracy", "loss", "same"] = "accuracy"

    @field_validator("rates")
    @classmethod
    def _of_devices_or_none(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and 0.0 in value and len(value) > 1:
            raise ValueError(f"rate 0 has one measurement and no devices, and is compared alone, got {list(value)}")
        return value

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every comparison that the claim is made of."""
        sides = [(side,) if isinstance(side, str) else side for side in (self.better, self.worse)]
        return [(better, worse) for better in sides[0] for worse in sides[1]]


class Study(Settings):
    """A table or an observation of the paper.

    Attributes:
        version: Schema version of the file, 1.
        name: What the command line calls it.
        title: Heading of the result.
        small: What the small scale changes, in words.
        sweeps: What is measured.
        weights: Read the magnitudes of the trained weights, by kind of convolution, in place of any sweep.
        rows: The networks.
        orderings: What the paper says of them.
    """

    version: Literal[1]
    name: str
    title: str
    small: str = ""
    sweeps: tuple[StudySweep, ...] = ()
    weights: bool = False
    rows: tuple[Row, ...] = Field(min_length=1)
    orderings: tuple[Ordering, ...] = ()

    @model_validator(mode="after")
    def _names(self) -> Study:
        if bool(self.sweeps) == self.weights:
            raise ValueError("a study measures sweeps or reads weights: give one of the two")
        if self.weights and self.orderings:
            raise ValueError("orderings compare accuracies and have no effect on weights; remove them")
        names = [row.name for row in self.rows]
        labels = [sweep.label for sweep in self.sweeps]
        for what, given in (("row", names), ("sweep", labels)):
            if len(set(given)) < len(given):
                raise ValueError(f"each {what} has a name of its own, got {', '.join(given)}")
        for ordering in self.orderings:
            for name in {name for pair in ordering.pairs for name in pair} - set(names):
                raise ValueError(f"orderings: no row is called {name!r}; there is: {', '.join(names)}")
            if ordering.sweep is not None and ordering.sweep not in labels:
                raise ValueError(f"orderings: no sweep is called {ordering.sweep!r}; there is: {', '.join(labels)}")
        return self


class Scale(Settings):
    """What a scale changes in every run.

    Attributes:
        seeds: Training seeds.
        devices: Per rate.
        images: Of the test set; None takes all.
        batch_size: Images per forward of a measurement.
        settings: Overrides of the configs.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    devices: Count
    images: Count | None = None
    batch_size: Count
    settings: tuple[str, ...] = ()


class _Scales(Settings):
    small: Scale
    full: Scale


class _Published(Settings):
    tables: dict[str, PublishedTable]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A row with its runs.

    Attributes:
        row: The row.
        jobs: One for each training seed.
        measurements: One for each sweep.
    """

    row: Row
    jobs: tuple[Job, ...]
    measurements: tuple[Measurement, ...]


ScaleName = Annotated[str, Field(pattern="^(small|full)$")]


def study_names() -> list[str]:
    """Return the names of the shipped studies."""
    return [name for name in shipped_names(FOLDER, ".yaml") if name not in _DATA]


def read_study(name_or_path: str | Path) -> Study:
    """Read a study by its shipped name, or a file by its path.

    Raises:
        ValueError: One line: no such study, or what is wrong with it.
    """
    text = str(name_or_path)
    if "/" not in text and not text.endswith(".yaml") and text not in study_names():
        raise ValueError(f"unknown study {text!r}; {did_you_mean(text, study_names())}; a file is given as PATH.yaml")
    return parse(Study, _read(name_or_path, kind="study"), where=str(name_or_path))


def read_scale(name: str) -> Scale:
    """Read what a scale changes.

    Raises:
        ValueError: There is no such scale.
    """
    if name not in SCALES:
        raise ValueError(f"a scale is one of {', '.join(SCALES)}, got {name!r}")
    scales = parse(_Scales, _read("scales", kind="scales"), where="scales")
    return scales.small if name == "small" else scales.full


def read_published() -> dict[str, PublishedTable]:
    """Return the published tables by name."""
    return parse(_Published, {"tables": _read("published", kind="figures")}, where="published").tables


def _read(name: str | Path, *, kind: str) -> Any:
    path = find_file(name, FOLDER, ".yaml", kind=kind)
    try:
        return read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def rates_at(sweep: StudySweep, scale: str, rates: Sequence[float]) -> tuple[float, ...]:
    """Return the rates that published ones become at a scale."""
    factor = sweep.small_factor if scale == "small" else 1.0
    return tuple(float(f"{rate * factor:.6g}") for rate in rates)


def plan(study: Study, *, scale: str, settings: Scale, cache: Path, overrides: Sequence[str] = ()) -> list[Planned]:
    """Return the rows of a study with their runs at a scale.

    Args:
        study: The study.
        scale: ``small`` or ``full``.
        settings: What the scale changes.
        cache: Folder of all runs.
        overrides: Further ``key.path=value`` for every config.

    Raises:
        ValueError: A row and its config do not fit together.
    """
    measurements = tuple(
        Measurement(
            sweep=SweepConfig(
                fault=sweep.fault, name=sweep.name, also=sweep.also, rates=rates_at(sweep, scale, sweep.rates)
            ),
            devices=settings.devices,
            images=settings.images,
            batch_size=settings.batch_size,
        )
        for sweep in study.sweeps
    )
    planned = []
    for row in study.rows:
        given = [*settings.settings, *row.settings, *(row.small if scale == "small" else ()), *overrides]
        config = _only(read_config(row.config, [*given, *_sampled(row, scale, cache)]), row)
        jobs = []
        for seed in settings.seeds:
            assert config.train is not None
            stage = config.train.model_copy(update={"seeds": (seed,)})
            jobs.append(Job(config=config.model_copy(update={"train": stage}), model=row.model, cache=cache))
        planned.append(Planned(row=row, jobs=tuple(jobs), measurements=measurements))
    return planned


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse a user's overrides that change no run of a study.

    Raises:
        ValueError: One line: which, and why.
    """
    for override in overrides:
        path = override.partition("=")[0].strip()
        for key, why in _NO_EFFECT.items():
            if path == key or path.startswith(f"{key}."):
                raise ValueError(f"{path}: has no effect on the runs of a study, {why}; leave it out")


def _sampled(row: Row, scale: str, cache: Path) -> list[str]:
    """Write the random genotype of a row, and return the override that names it."""
    if row.sample is None:
        return []
    stream = generator(row.sample.seed, "reproduction", "sample")
    small = row.sample.small_space if scale == "small" else None
    space = load_space(small or row.sample.space)
    path = cache / "genotypes" / f"{space.name}-{row.sample.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.stem}.{os.getpid()}.json")  # several processes may plan at once
    Genotype.random(space, generator=stream).save(own)
    os.replace(own, path)
    return [f"train.models.{row.model}.genotype={path.resolve()}"]


def _only(config: RunConfig, row: Row) -> RunConfig:
    """Return a config that trains the model of a row alone, and searches only what that model needs."""
    if config.train is None or row.model not in config.train.models:
        names = ", ".join(config.train.models) if config.train is not None else "nothing"
        raise ValueError(f"row {row.name!r}: config {row.config} trains {names}, not {row.model!r}")
    model = config.train.models[row.model]
    if model.genotype == "control":
        raise ValueError(f"row {row.name!r}: the control search of a config is no row of a table; take its search")
    stage = config.train.model_copy(update={"models": {row.model: model}, "asha": None})
    search = config.search if model.genotype == "search" else None
    return config.model_copy(update={"train": stage, "search": search, "control": None, "campaign": None})
