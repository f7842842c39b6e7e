"""A campaign: models x fault models x rates x devices -> one record each, resumable by key."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ftnas.data import ImageSet
from ftnas.evaluate import correct_predictions
from ftnas.faults.hardware import AnyFault, Hardware
from ftnas.faults.inject import Errors
from ftnas.models import Complexity
from ftnas.progress import track
from ftnas.rng import seed_for
from ftnas.rundir import Folder
from ftnas.settings import Count, Rate, Settings

RECORDS = "records.jsonl"
SCHEMA = 1


class SweepConfig(Settings):
    """One fault model over several rates.

    Attributes:
        fault: The fault model; its own rate gives the shares that the sweep keeps (SAF0 to SAF1).
        rates: Rates above 0; the fault-free hardware is always measured too.
    """

    fault: AnyFault
    rates: tuple[Rate, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rates_suit_the_fault(self) -> SweepConfig:
        for rate in self.rates:
            self.fault.with_rate(rate)
        return self


class CampaignConfig(Settings):
    """What to measure.

    Attributes:
        sweeps: Fault models and rates.
        devices: Devices per rate; a device is a seed, common to all models.
        images: Take this many test images, stratified, always the same ones; None takes all.
        batch_size: Images per forward; a setting of the result, since float sums depend on it.
        errors: ``hard`` or ``soft``; None: hard for weights, soft for features.
    """

    sweeps: tuple[SweepConfig, ...] = Field(min_length=1)
    devices: Count = 10
    images: Count | None = None
    batch_size: Count = 200
    errors: Errors | None = None

    @field_validator("sweeps")
    @classmethod
    def _tell_apart(cls, sweeps: tuple[SweepConfig, ...]) -> tuple[SweepConfig, ...]:
        names = [sweep.fault.name for sweep in sweeps]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"one sweep for each fault model, since records tell them apart by name, and {name!r} is there "
                    "twice; join their rates, or measure the second variant in a run of its own"
                )
        return sweeps


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
        return subject.name, subject.train_seed, self.sweep.fault.name, self.rate, self.device


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
    done = {_key_of(record, f"{journal.path}: record {n}") for n, record in enumerate(journal.records(), start=1)}
    grid = list(_grid(config))
    total = len(grid) * len(subjects)
    measured = sum(point.key(subject) in done for subject in subjects for point in grid)
    with track("campaign", total, done=measured) as progress:
        for subject in subjects:
            missing = [point for point in grid if point.key(subject) not in done]
            model = subject.load() if missing else None
            for point in missing:
                assert model is not None
                record = _measure(subject, model, point, images, config=config, hardware=hardware, seed=seed)
                journal.append(record)
                progress.advance(f"{subject.name}, {record['fault']} {point.rate:g}: {record['accuracy']:.1%}")
    return [dict(record) for record in journal.records()]


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
    under = hardware.with_fault(point.sweep.fault).with_rate(point.rate)
    device_seed = seed_for(seed, "device", point.device or 0)
    with under.inject(model, seed=device_seed, errors=config.errors) as injection:
        correct = correct_predictions(model, images.batches(config.batch_size))
    record = injection.record
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "train_seed": subject.train_seed,
        "training": subject.training,
        "fault": point.sweep.fault.name,
        "rate_name": point.sweep.fault.rate_name,
        "rate": point.rate,
        "device": point.device,
        "accuracy": float(correct.double().mean()),
        "num_images": len(correct),
        "hits": record.hits,
        "sites": record.sites,
        "flops": subject.complexity.flops,
        "params": subject.complexity.params,
        "correct": _packed(correct),
    }


def _packed(correct: Tensor) -> str:
    """Return one bit per image, in order, as base64; read back by ``numpy.unpackbits``."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
