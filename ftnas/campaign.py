"""Fixed-rate campaigns: models x fault models x rates x devices -> one record each, resumable by key."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from ftnas.data import ImageSet
from ftnas.evaluate import answers
from ftnas.faults.hardware import AnyFault, Hardware
from ftnas.faults.inject import Errors
from ftnas.models import Complexity
from ftnas.progress import track
from ftnas.rng import seed_for
from ftnas.rundir import Folder
from ftnas.settings import Count, Settings
from ftnas.survey import MIN_DEVICES, enough

RECORDS = "records.jsonl"
SCHEMA = 1


class SweepConfig(Settings):
    """One fault model over several rates.

    Attributes:
        fault: The fault model; its own rate gives the shares that the sweep keeps (SAF0 to SAF1).
        name: What records and tables call the sweep; the fault model's name when left out.
        also: Further fault models in the same injection, at their own rates, at all rates above 0.
        rates: Rates (or sigmas) above 0; the fault-free hardware is always measured too.
    """

    fault: AnyFault
    name: str | None = None
    also: tuple[AnyFault, ...] = ()
    rates: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_range(self) -> SweepConfig:
        for rate in self.rates:
            self.fault.with_rate(rate)
        return self

    @property
    def label(self) -> str:
        """What records and tables call the sweep."""
        return self.name or self.fault.name


class CampaignConfig(Settings):
    """What to measure.

    Attributes:
        sweeps: Fault models and rates.
        devices: Devices per rate; a device is a seed, common to all models. With ``half_width`` the most there are.
        half_width: Stop a point early, after at least 20 devices, once its 95% Student interval over the devices is at
            most this far to each side (accuracy in [0, 1]); None measures all devices.
        interval: How reports make the interval over devices with one training seed: Student's t, or the bootstrap over
            devices and images.
        images: Take this many test images, stratified, always the same ones; None takes all.
        batch_size: Images per forward; a setting of the result, since float sums depend on it.
        errors: ``hard`` or ``soft``; None: hard for weights, soft for features.
    """

    sweeps: tuple[SweepConfig, ...] = Field(min_length=1)
    devices: Count = 10
    half_width: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    interval: Literal["student", "bootstrap"] = "student"
    images: Count | None = None
    batch_size: Count = 200
    errors: Errors | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CampaignConfig:
        labels = [sweep.label for sweep in self.sweeps]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sweeps are called {label!r}; give one of them another name")
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


class _Point(NamedTuple):
    """One record to be made; ``device`` is None at rate 0."""

    sweep: SweepConfig
    rate: float
    device: int | None

    def key(self, subject: Subject) -> tuple[Any, ...]:
        return subject.name, subject.train_seed, self.sweep.label, self.rate, self.device


def run_campaign(
    subjects: Sequence[Subject],
    images: ImageSet,
    *,
    config: CampaignConfig,
    hardware: Hardware,
    seed: int,
    folder: Folder,
) -> list[dict[str, Any]]:
    """Measure every model at every point; points that the folder's records hold already are not measured again.

    Args:
        subjects: Trained models; names and training seeds together are unique.
        images: Test images, on the device.
        config: The grid.
        hardware: Number formats and faulted layers; its fault model plays no part here.
        seed: Of the devices.
        folder: Where ``records.jsonl`` lies.

    Returns:
        All records, as ``records.jsonl`` holds them.

    Raises:
        ValueError: Two subjects of one name and training seed.
    """
    identities = [(subject.name, subject.train_seed) for subject in subjects]
    for identity in identities:
        if identities.count(identity) > 1:
            raise ValueError(f"campaign: two models are called {identity[0]!r} (training seed {identity[1]})")
    journal = folder.journal(RECORDS)
    done = {
        _key_of(record, f"{journal.path}: record {n}"): float(record["accuracy"])
        for n, record in enumerate(journal.records(), start=1)
    }
    grid = list(_grid(config))
    measured = sum(point.key(subject) in done for subject in subjects for point in grid)
    with track("campaign", len(grid) * len(subjects), done=measured) as progress:
        for subject in subjects:
            model: nn.Module | None = None
            for point in grid:
                key = point.key(subject)
                if key in done:
                    continue
                if _settled(point, subject, done, config):
                    progress.advance()
                    continue
                model = subject.load() if model is None else model
                record = _measure(subject, model, point, images, config=config, hardware=hardware, seed=seed)
                journal.append(record)
                done[key] = float(record["accuracy"])
                progress.advance(f"{subject.name}, {record['fault']} {point.rate:g}: {record['accuracy']:.1%}")
    return [dict(record) for record in journal.records()]


def _settled(point: _Point, subject: Subject, done: dict[tuple[Any, ...], float], config: CampaignConfig) -> bool:
    """Tell whether the devices before this one are enough for the half-width that was asked for.

    It depends on the records alone, so that a campaign that was interrupted stops where one left alone does.
    """
    if config.half_width is None or point.device is None:
        return False
    before = [point._replace(device=device).key(subject) for device in range(point.device)]
    if any(key not in done for key in before):
        return True  # an earlier device was left out, since those before it were enough
    values = [done[key] for key in before]
    return len(values) >= MIN_DEVICES and enough(values, half_width=config.half_width)


def _grid(config: CampaignConfig) -> Iterator[_Point]:
    for sweep in config.sweeps:
        yield _Point(sweep, 0.0, None)
        for rate in sorted(set(sweep.rates) - {0.0}):
            for device in range(config.devices):
                yield _Point(sweep, rate, device)


def _key_of(record: dict[str, Any], where: str) -> tuple[Any, ...]:
    names = ("model", "train_seed", "fault", "rate", "device")
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; restore the file, or remove that line to measure it again")
    return tuple(record[name] for name in names)


def _measure(
    subject: Subject,
    model: nn.Module,
    point: _Point,
    images: ImageSet,
    *,
    config: CampaignConfig,
    hardware: Hardware,
    seed: int,
) -> dict[str, Any]:
    sweep = point.sweep
    under = hardware.with_fault(sweep.fault, *(sweep.also if point.rate else ())).with_rate(point.rate)
    device_seed = seed_for(seed, "device", point.device or 0)
    with under.inject(model, seed=device_seed, errors=config.errors) as injection:
        found = answers(model, images.batches(config.batch_size))
    record, correct = injection.record, found.correct
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "train_seed": subject.train_seed,
        "training": subject.training,
        "fault": sweep.label,
        "rate_name": sweep.fault.rate_name,
        "rate": point.rate,
        "device": point.device,
        "accuracy": float(correct.double().mean()),
        "num_images": len(correct),
        "nonfinite": int(found.nonfinite.sum()),
        "nonfinite_weights": record.nonfinite,
        "hits": record.hits,
        "sites": record.sites,
        "flops": subject.complexity.flops,
        "params": subject.complexity.params,
        "correct": _packed(correct),
    }


def _packed(correct: Tensor) -> str:
    """Return one bit per image, in order, as base64; read back by ``numpy.unpackbits``."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
