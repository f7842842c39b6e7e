"""What a campaign measured: reads records.jsonl, and compares models with intervals."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ftnas.settings import Rate, first_problem
from ftnas.stats import (
    Interval,
    decisive,
    hierarchical_bootstrap,
    hierarchical_paired_difference,
    mean_interval,
    paired_difference,
    seed_difference,
    seed_interval,
)
from ftnas.storage import read_journal

SCHEMA = 1
IntervalKind = Literal["student", "bootstrap"]


class Record(BaseModel):
    """One line of records.jsonl: one trained model on one device. Keys that are not used here are allowed.

    Attributes:
        device: The device's seed number; None at rate 0.
        rate: Of the sweep, or its sigma.
        accuracy: In [0, 1].
        hits: Of the faults; None where it was not kept.
        nonfinite: Images for which the model gave NaN or an infinity; they count as wrong.
        nan_zeroed: Weights that faults turned into NaN and the model read as 0.
        features_zeroed: Features that were NaN and that it read as 0.
        correct: Base64 of ``numpy.packbits`` of each image's correctness; None where it was not kept.
        flops: 2 x MAC for one image.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    model: str
    train_seed: int
    training: str
    fault: str
    rate_name: str
    rate: Annotated[float, Field(ge=0.0)]
    device: int | None
    accuracy: Rate
    num_images: int = Field(ge=1)
    flops: int
    params: int
    hits: int | None = None
    nonfinite: int = 0
    nan_zeroed: int = 0
    features_zeroed: int = 0
    correct: str | None = None

    def images(self) -> np.ndarray | None:
        """Return the correctness of each image, float64 [num_images] of 0 and 1, or None.

        Raises:
            ValueError: ``correct`` is not what it should be, or contradicts the accuracy.
        """
        if self.correct is None:
            return None
        try:
            packed = np.frombuffer(base64.b64decode(self.correct, validate=True), dtype=np.uint8)
        except binascii.Error:
            packed = np.zeros(0, dtype=np.uint8)
        bits = np.unpackbits(packed)[: self.num_images].astype(np.float64)
        if len(bits) != self.num_images or abs(bits.mean() - self.accuracy) > 1e-6:
            raise ValueError(
                f"{self.model}, rate {self.rate:g}, device {self.device}: 'correct' does not give the accuracy "
                f"{self.accuracy:g} over {self.num_images} images; measure it again"
            )
        return bits


@dataclass(frozen=True, kw_only=True)
class Model:
    """A row of the comparison: what one name, or one name and training, stands for."""

    name: str
    training: str
    params: int
    flops: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of ``model`` minus that of ``reference``, on the same devices and images.

    Attributes:
        rate: None for the mean over all rates above 0.
        interval: Paired over devices with one training seed a side, else the hierarchical bootstrap.
        over_seeds: With several training seeds: Welch's t over their means, which stays honest with few.
    """

    fault: str
    rate: float | None
    model: str
    reference: str
    interval: Interval
    over_seeds: Interval | None

    @property
    def shown(self) -> Interval:
        """The interval that tables and sentences give: over training seeds, unless the other alone includes zero."""
        return self.interval if self.over_seeds is None else decisive((self.over_seeds, self.interval))

    @property
    def verdict(self) -> int:
        """1 or -1 where every interval excludes zero on that side; 0 where one includes it or there is none."""
        return self.shown.side


@dataclass(kw_only=True)
class Comparison:
    """All records of a run, by fault, model and rate.

    Attributes:
        models: In the order of the records; the first is the reference.
        faults: Name of each fault model -> name of its rate.
        rates: Fault -> ascending rates above 0.
        notes: What was left out, and why.
        num_images: Of the test set.
        devices: All device seeds.
        interval: How intervals over devices are made where there is one training seed.
    """

    models: list[Model]
    faults: dict[str, str]
    rates: dict[str, list[float]]
    notes: list[str]
    num_images: int
    devices: list[int]
    interval: IntervalKind = "student"
    _points: dict[tuple[str, str, float], dict[tuple[int, int | None], Record]] = field(repr=False)

    @property
    def devices_a_rate(self) -> str:
        """Return the number of devices at each rate above 0, or the smallest and the largest: ``5 to 10``."""
        points = [point for (_, _, rate), point in self._points.items() if rate > 0]
        counts = [len({device for s, device in point if s == seed}) for point in points for seed, _ in point]
        few, many = min(counts, default=0), max(counts, default=0)
        return str(few) if few == many else f"{few} to {many}"

    def seeds(self, fault: str, model: str, rates: Sequence[float]) -> set[int]:
        """Return the training seeds that were measured at each of the rates."""
        return set.intersection(*({seed for seed, _ in self._points.get((fault, model, rate), {})} for rate in rates))

    def values(
        self,
        fault: str,
        model: str,
        rates: Sequence[float],
        *,
        devices: set[int | None] | None = None,
        seeds: set[int] | None = None,
    ) -> tuple[np.ndarray, list[int | None]] | None:
        """Return accuracies averaged over ``rates``, and the devices that every training seed has at each of them.

        Args:
            fault: Its name.
            model: Name of a row.
            rates: One, or several with the same devices.
            devices: Keep these only.
            seeds: Keep these training seeds only.

        Returns:
            float64 [seed, device, image] in the order of the seeds, without the last axis where the images were not
            kept; None where nothing was measured.
        """
        points = [self._points.get((fault, model, rate), {}) for rate in rates]
        found = {seed for point in points for seed, _ in point}
        chosen_seeds = sorted(found if seeds is None else found & seeds)
        sets = [{device for s, device in point if s == seed} for point in points for seed in chosen_seeds]
        common = set.intersection(*sets) if sets else set()
        order = sorted(common if devices is None else common & devices, key=lambda device: device or 0)
        if not order:
            return None
        chosen = [[[point[seed, device] for device in order] for seed in chosen_seeds] for point in points]
        kept = all(record.correct is not None for point in chosen for row in point for record in row)
        sizes = {record.num_images for point in chosen for row in point for record in row}
        if kept and len(sizes) == 1:
            array = np.array([[[record.images() for record in row] for row in point] for point in chosen])
        else:
            array = np.array([[[record.accuracy for record in row] for row in point] for point in chosen])
        return array.mean(axis=0), order

    def summary(self, fault: str, model: str, rates: Sequence[float]) -> tuple[Interval, Interval | None] | None:
        """Return the mean accuracy with its 95% interval, and with several training seeds the t interval over them.

        With one training seed: Student's t over devices, or the bootstrap over devices and images. With several: the
        hierarchical bootstrap over training seeds, and over the devices and images that they share.
        """
        found = self.values(fault, model, rates)
        if found is None:
            return None
        array = found[0]
        if len(array) == 1:
            if self.interval == "bootstrap" and array.shape[1] > 1:
                return _device_bootstrap(array[0]), None
            return mean_interval(_device_means(array)), None
        return hierarchical_bootstrap(array, crossed=range(1, array.ndim)), seed_interval(array)

    def difference(self, fault: str, model: str, reference: str, rate: float | None) -> Difference | None:
        """Compare two models at one rate, or over the mean of all rates above 0, on the devices both have."""
        rates = self.rates[fault] if rate is None else [rate]
        first, second = (self.values(fault, name, rates) for name in (model, reference))
        if first is None or second is None:
            return None
        common = set(first[1]) & set(second[1])
        first, second = (self.values(fault, name, rates, devices=common) for name in (model, reference))
        if first is None or second is None:
            return None
        a, b = first[0], second[0]
        if a.ndim != b.ndim or a.shape[1:] != b.shape[1:]:
            a, b = (x.mean(axis=2) if x.ndim == 3 else x for x in (a, b))
        over_seeds = None
        if len(a) == len(b) == 1 and self.interval == "bootstrap" and a.shape[1] > 1:
            interval = _device_bootstrap(a[0] - b[0])
        elif len(a) == len(b) == 1:
            interval = paired_difference(_device_means(a), _device_means(b))
        else:
            interval = hierarchical_paired_difference(a, b)
            over_seeds = seed_difference(a, b)
        return Difference(
            fault=fault, rate=rate, model=model, reference=reference, interval=interval, over_seeds=over_seeds
        )


def _device_means(array: np.ndarray) -> np.ndarray:
    means: np.ndarray = array[0].reshape(array.shape[1], -1).mean(axis=1)
    return means


def _device_bootstrap(array: np.ndarray) -> Interval:
    """Return the mean of [device, ...] with the bootstrap over devices, and over the images that they share."""
    found = hierarchical_bootstrap(array, crossed=range(1, array.ndim))
    return replace(found, method="bootstrap over devices and images" if array.ndim > 1 else "bootstrap over devices")


def read_comparison(path: Path, *, interval: IntervalKind = "student") -> Comparison:
    """Read ``records.jsonl``. A torn last line and a repeated measurement are left out, and noted.

    ``interval`` is how intervals over devices are made where there is one training seed: Student's t, or the bootstrap.

    Raises:
        ValueError: One line: no records, a schema of another version, or a record with a wrong value.
    """
    lines, torn = read_journal(path)
    if not lines:
        raise ValueError(f"{path}: no records; measure models first with `ftnas campaign`")
    notes = [f"The last line of {path.name} is torn and was left out."] if torn else []
    records = [read_record(line, f"{path}: record {number}") for number, line in enumerate(lines, start=1)]
    trainings: dict[str, set[str]] = {}
    for record in records:
        trainings.setdefault(record.model, set()).add(record.training)
    points: dict[tuple[str, str, float], dict[tuple[int, int | None], Record]] = {}
    members: dict[str, list[Record]] = {}
    repeated = 0
    for record in records:
        alone = len(trainings[record.model]) == 1
        name = record.model if alone else f"{record.model} ({record.training})"
        point = points.setdefault((record.fault, name, record.rate), {})
        repeated += (record.train_seed, record.device) in point
        point[record.train_seed, record.device] = record
        members.setdefault(name, []).append(record)
    if repeated:
        notes.append(f"{repeated} measurements occur twice; the last of each counts.")
    faults = {record.fault: record.rate_name for record in records}
    return Comparison(
        models=[_model(name, group) for name, group in members.items()],
        faults=faults,
        rates={f: sorted({r.rate for r in records if r.fault == f and r.rate > 0}) for f in faults},
        notes=[*notes, *_gaps(points)],
        num_images=records[0].num_images,
        devices=sorted({record.device for record in records if record.device is not None}),
        interval=interval,
        _points=points,
    )


def nothing_compared() -> Comparison:
    """Return what a run without fault rates compares."""
    return Comparison(models=[], faults={}, rates={}, notes=[], num_images=0, devices=[], _points={})


def read_record(line: dict[str, object], where: str) -> Record:
    """Check one line of ``records.jsonl``; raises a ValueError that begins with ``where``."""
    if line.get("schema") != SCHEMA:
        raise ValueError(f"{where}: schema {SCHEMA} is what this version reads, got {line.get('schema')!r}")
    try:
        return Record.model_validate(line)
    except pydantic.ValidationError as error:
        raise ValueError(first_problem(error, Record, where)) from None


def _model(name: str, group: list[Record]) -> Model:
    first = group[0]
    seeds = tuple(sorted({record.train_seed for record in group}))
    return Model(name=name, training=first.training, params=first.params, flops=first.flops, seeds=seeds)


def _gaps(points: dict[tuple[str, str, float], dict[tuple[int, int | None], Record]]) -> list[str]:
    """Tell where some models have fewer devices or rates than others: not finished, or precise enough with them."""
    notes = []
    names = list(dict.fromkeys(name for _, name, _ in points))
    for fault, rate in dict.fromkeys((fault, rate) for fault, _, rate in points):
        counts = {name: len(points.get((fault, name, rate), {})) for name in names}
        seeds = {name: len({seed for f, n, r in points if n == name for seed, _ in points[f, n, r]}) for name in names}
        short = [name for name in names if counts[name] / seeds[name] < max(counts[n] / seeds[n] for n in names)]
        if short:
            notes.append(f"{fault}, rate {rate:g}: fewer devices were measured for {', '.join(short)} than for others.")
    for (fault, name, rate), point in points.items():
        if rate and all(record.hits == 0 for record in point.values()):
            notes.append(f"{fault}, rate {rate:g}: no fault hit anything in {name}; the rate is too low to tell more.")
    for what, field_name in (("weights", "nan_zeroed"), ("features", "features_zeroed")):
        for name in names:
            count = sum(getattr(r, field_name) for p in points if p[1] == name for r in points[p].values())
            if count:
                notes.append(f"{name}: {count} {what} that were NaN were read as 0, as its saturation says.")
    broken = {name: sum(r.nonfinite for p in points if p[1] == name for r in points[p].values()) for name in names}
    notes += [
        f"{name}: {count} answers were NaN or infinite; they count as wrong." for name, count in broken.items() if count
    ]
    return notes


def is_known(value: float) -> bool:
    """Tell whether a bound exists (NaN stands for none)."""
    return not math.isnan(value)
