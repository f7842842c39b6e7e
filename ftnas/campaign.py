"""Fixed-rate campaigns: models x fault models x rates x devices, known ones too -> a record each, resumable by key."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from ftnas.data import ImageSet
from ftnas.evaluate import answers
from ftnas.faults.hardware import AnyFault, Hardware, device_label, load_device
from ftnas.faults.inject import Errors, inject
from ftnas.faults.injection import Injection
from ftnas.faults.plans import PlanSet
from ftnas.models import Complexity, about
from ftnas.pool import Box, InProcess, Pool
from ftnas.progress import track
from ftnas.records import read_record
from ftnas.rng import seed_for
from ftnas.rundir import Folder
from ftnas.settings import Count, Positive, Settings
from ftnas.survey import MIN_DEVICES, enough

RECORDS = "records.jsonl"
SCHEMA = 1


class SweepConfig(Settings):
    """One fault model over several rates.

    Attributes:
        fault: The fault model; its own rate gives the shares that the sweep keeps (SAF0 to SAF1).
        name: What records and tables call the sweep; the fault model's name when left out.
        also: Further fault models in the same injection, at their own rates, at all rates above 0. At rate 0 nothing
            fails, and the number formats that they bring along stay.
        rates: Rates (or sigmas) above 0; the fault-free hardware is always measured too.
    """

    fault: AnyFault
    name: str | None = None
    also: tuple[AnyFault, ...] = ()
    rates: tuple[Positive, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_range(self) -> SweepConfig:
        for rate in self.rates:
            self.fault.with_rate(rate)
            if self.rates.count(rate) > 1:
                raise ValueError(f"rates: each is given once, got {rate:g} twice")
        return self

    @property
    def label(self) -> str:
        """What records and tables call the sweep."""
        return self.name or self.fault.name

    @property
    def rate_name(self) -> str:
        """What its rates are of."""
        return self.fault.rate_name

    def under(
        self, hardware: Hardware, model: nn.Module, rate: float, *, seed: int, errors: Errors | None = None
    ) -> Injection:
        """Put the fault model at a rate under a model."""
        also = self.also if rate else [fault.with_rate(0.0) for fault in self.also]
        return hardware.with_fault(self.fault.with_rate(rate), *also).inject(model, seed=seed, errors=errors)


@dataclass(frozen=True, eq=False)
class KnownDevice:
    """A device whose faults are known, in place of a sweep: its one rate is the share of units that are hit.

    Attributes:
        label: What records and tables call it.
        plans: Its faults.
    """

    label: str
    plans: PlanSet

    rate_name: ClassVar[str] = "share_of_units_hit"

    @property
    def rates(self) -> tuple[float, ...]:
        """The share of units that are hit, 0 where there are none."""
        units = sum(plan.population for plan in self.plans.plans.values())
        return (self.plans.hits() / max(1, units),)

    @contextmanager
    def under(self, hardware: Hardware, model: nn.Module, rate: float, **_: Any) -> Iterator[Injection]:
        """Put the device under a model; at rate 0 nothing of it fails."""
        with inject(model, plans=self.plans, quantization=hardware.quantization) as injection:
            if rate:
                yield injection
            else:
                with injection.paused():
                    yield injection


def known_devices(files: Sequence[str]) -> list[KnownDevice]:
    """Read the devices of ``campaign.defects``.

    Raises:
        ValueError: One line: no such file, it is no device, or no fault of it hits anything.
    """
    found = []
    for file in files:
        try:
            device = KnownDevice(device_label(file), load_device(file))
        except ValueError as error:
            raise ValueError(f"campaign.defects: {error}") from None
        if not device.plans.hits():
            raise ValueError(f"campaign.defects: nothing of {file} fails, so that it has no effect; remove it")
        found.append(device)
    return found


class CampaignConfig(Settings):
    """What to measure.

    Attributes:
        sweeps: Fault models and rates.
        defects: Files of known devices (defect maps or plans), on each of which every model is measured too.
        devices: Devices per rate; a device is a seed, common to all models. With ``half_width`` the most there are.
        half_width: Stop a point early, after at least 20 devices, once its 95% Student interval over the devices is at
            most this far to each side (accuracy in [0, 1]); None measures all devices.
        interval: How reports make the interval over devices with one training seed: Student's t, or the bootstrap over
            devices and images.
        images: Take this many test images, stratified, always the same ones; None takes all.
        batch_size: Images per forward; a setting of the result, since the range of features, and with it the step of
            their words, is found anew for each batch (unless ``quantization.features.range`` gives it), and float sums
            depend on it too.
        errors: ``hard`` or ``soft``; None: hard for weights, soft for features.
    """

    sweeps: tuple[SweepConfig, ...] = ()
    defects: tuple[str, ...] = ()
    devices: Count = 10
    half_width: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    interval: Literal["student", "bootstrap"] = "student"
    images: Count | None = None
    batch_size: Count = 200
    errors: Errors | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CampaignConfig:
        if not self.sweeps and not self.defects:
            raise ValueError("a campaign measures sweeps or defects (known devices), and there is neither")
        labels = [*(sweep.label for sweep in self.sweeps), *map(device_label, self.defects)]
        for label in labels:
            if labels.count(label) > 1:
                what = "files of defects" if label not in labels[: len(self.sweeps)] else "sweeps"
                raise ValueError(f"two {what} are called {label!r}; give one of them another name")
        if self.half_width is not None and self.devices <= MIN_DEVICES:
            raise ValueError(
                f"half_width stops after {MIN_DEVICES} devices at the earliest, so that with devices={self.devices} it "
                "has no effect; allow more devices or remove it"
            )
        return self


@dataclass(frozen=True)
class Subject:
    """One trained model of a campaign.

    Attributes:
        name: What tables call it.
        train_seed: Seed of its training.
        training: What it was trained for, e.g. ``mibb 0.0003`` or ``clean``.
        complexity: Parameters and FLOPs.
        load: Returns the model in evaluation mode, on the device of the images.
    """

    name: str
    train_seed: int
    training: str
    complexity: Complexity
    load: Callable[[], nn.Module]

    @property
    def identity(self) -> dict[str, Any]:
        """What records say of it: ``model``, ``train_seed``, ``training``, ``flops``, ``params``."""
        size = {"flops": self.complexity.flops, "params": self.complexity.params}
        return {"model": self.name, "train_seed": self.train_seed, "training": self.training, **size}


class Point(NamedTuple):
    """One record to be made; ``device`` is None at rate 0."""

    sweep: SweepConfig | KnownDevice
    rate: float
    device: int | None

    def key(self, subject: Subject) -> tuple[Any, ...]:
        """Return what a record of the point is found by."""
        return subject.name, subject.train_seed, self.sweep.label, self.rate, self.device


def run_campaign(
    subjects: Sequence[Subject],
    images: ImageSet,
    *,
    config: CampaignConfig,
    hardware: Hardware,
    seed: int,
    folder: Folder,
    pool: Pool | None = None,
) -> list[dict[str, Any]]:
    """Measure every model at every point; points that the folder's records hold already are not measured again.

    Args:
        subjects: Trained models; names and training seeds together are unique.
        images: Test images, on the device.
        config: The grid.
        hardware: Number formats and faulted layers; its fault model plays no part here.
        seed: Of the devices.
        folder: Where ``records.jsonl`` lies.
        pool: Does the measurements; None: this process.

    Returns:
        All records, as ``records.jsonl`` holds them.

    Raises:
        ValueError: Two subjects of one name and training seed.
    """
    identities = [(subject.name, subject.train_seed) for subject in subjects]
    for identity in identities:
        if identities.count(identity) > 1:
            raise ValueError(f"campaign: two models are called {identity[0]!r} (training seed {identity[1]})")
    pool = pool or InProcess()
    journal = folder.journal(RECORDS)
    done = {
        _key_of(record, f"{journal.path}: record {n}"): read_record(record, f"{journal.path}: record {n}").accuracy
        for n, record in enumerate(journal.records(), start=1)
    }
    grid = list(_grid(config, known_devices(config.defects)))
    measured = sum(point.key(subject) in done for subject in subjects for point in grid)
    shared = pool.put(images)
    with track("campaign", len(grid) * len(subjects), done=measured) as progress:
        for subject in subjects:
            left = [point for point in grid if point.key(subject) not in done]
            if not left:
                continue
            job = pool.put(Measure(subject.identity, subject.load(), shared, config, hardware, seed))
            pending: set[Point] = set()
            settled = partial(_settled, subject=subject, done=done, pending=pending, config=config)
            ahead, points = tee(_unsettled(left, settled, pending))
            for point, result in zip(points, pool.map(job, ahead), strict=True):
                pending.discard(point)
                if settled(point):  # by what was measured meanwhile
                    continue
                record = result.get()
                journal.append(record)
                done[point.key(subject)] = float(record["accuracy"])
                progress.advance(f"{subject.name}, {record['fault']} {point.rate:g}: {record['accuracy']:.1%}")
            if spared := sum(point.key(subject) not in done for point in left):
                progress.advance(num=spared)
    return [dict(record) for record in journal.records()]


def _unsettled(points: Sequence[Point], settled: Callable[[Point], bool], pending: set[Point]) -> Iterator[Point]:
    """Yield the points to be measured, each as late as it is asked for, and note them as pending."""
    for point in points:
        if not settled(point):
            pending.add(point)
            yield point


def _settled(
    point: Point,
    *,
    subject: Subject,
    done: Mapping[tuple[Any, ...], float],
    pending: Collection[Point],
    config: CampaignConfig,
) -> bool:
    """Tell whether the devices before this one are enough for the half-width that was asked for.

    It depends on the records alone, so that a campaign that was interrupted, or was measured by workers, stops where
    one left alone does.
    """
    if config.half_width is None or point.device is None:
        return False
    before = [point._replace(device=device) for device in range(point.device)]
    missing = [earlier for earlier in before if earlier.key(subject) not in done]
    if missing:  # an earlier device was left out, since those before it were enough; or it is on its way
        return any(earlier not in pending for earlier in missing)
    return len(before) >= MIN_DEVICES and enough([done[p.key(subject)] for p in before], half_width=config.half_width)


def _grid(config: CampaignConfig, known: Sequence[KnownDevice]) -> Iterator[Point]:
    for sweep in config.sweeps:
        yield Point(sweep, 0.0, None)
        for rate in sorted(set(sweep.rates)):
            for device in range(config.devices):
                yield Point(sweep, rate, device)
    for chip in known:
        yield Point(chip, 0.0, None)
        yield Point(chip, chip.rates[0], 0)


def _key_of(record: dict[str, Any], where: str) -> tuple[Any, ...]:
    names = ("model", "train_seed", "fault", "rate", "device")
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; restore the file, or remove that line to measure it again")
    return tuple(record[name] for name in names)


@dataclass(frozen=True)
class Measure:
    """The job of a pool that measures one model at points of the grid: what one record says.

    Attributes:
        identity: What records say of the model.
        model: In evaluation mode.
        images: Test images.
        config: Batches and errors.
        hardware: Number formats and faulted layers.
        seed: Of the devices.
    """

    identity: dict[str, Any]
    model: nn.Module
    images: Box[ImageSet]
    config: CampaignConfig
    hardware: Hardware
    seed: int

    def __call__(self, point: Point) -> dict[str, Any]:
        """Return the record of a point."""
        sweep = point.sweep
        device_seed = seed_for(self.seed, "device", point.device or 0)
        name, errors = self.identity["model"], self.config.errors
        with (
            about(name),
            sweep.under(self.hardware, self.model, point.rate, seed=device_seed, errors=errors) as injection,
        ):
            found = answers(self.model, self.images.get().batches(self.config.batch_size))
        record, correct = injection.record, found.correct
        size = {name: self.identity[name] for name in ("flops", "params")}
        return {
            "schema": SCHEMA,
            **{name: self.identity[name] for name in ("model", "train_seed", "training")},
            "fault": sweep.label,
            "rate_name": sweep.rate_name,
            "rate": point.rate,
            "device": point.device,
            "accuracy": float(correct.double().mean()),
            "num_images": len(correct),
            "nonfinite": int(found.nonfinite.sum()),
            "nonfinite_weights": record.nonfinite,
            "nan_zeroed": record.nan_zeroed,
            "features_zeroed": record.features_zeroed,
            "hits": record.hits,
            "sites": record.sites,
            **size,
            "correct": _packed(correct),
        }


def _packed(correct: Tensor) -> str:
    """Return one bit per image, in order, as base64; read back by ``numpy.unpackbits``."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
