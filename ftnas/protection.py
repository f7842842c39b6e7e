"""What to protect: which layers to triplicate, ECC-protect or clip within a budget; predicted, then measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ftnas.campaign import Subject
from ftnas.data import ImageSet
from ftnas.dataflow import trace_feature_points
from ftnas.evaluate import answers
from ftnas.faults.hardware import AnyFault, Hardware
from ftnas.faults.select import LAYER_TYPES, exactly, macs_per_output
from ftnas.knapsack import ROUNDING, decay, predict, sets_to_try
from ftnas.models import about
from ftnas.progress import Tracker, say, track
from ftnas.quantize import SMALLEST_RANGE
from ftnas.rng import seed_for
from ftnas.rundir import Folder, Journal
from ftnas.settings import Count, Positive, Rate, Settings

RECORDS = "protection.jsonl"
SCHEMA = 1

Method = Literal["triplicate", "ecc", "clip"]


class ProtectionConfig(Settings):
    """A what-if: the best layers to protect against one fault model at one rate.

    How much each layer matters is measured on training images, by faults in that layer alone. Sets of layers are then
    made, by benefit per cost and as the best that the budget allows, and measured on the test images.

    Attributes:
        fault: The fault model, at the rate to protect against.
        name: What records and tables call it; the fault model's name and the method when left out.
        method: ``triplicate``: the layer is computed three times and voted, at twice its multiply-accumulates more.
            ``ecc``: its words carry a SECDED code, at that many check bits more; all errors in them count as corrected.
            ``clip``: its features are clipped to the largest magnitude that calibration saw, at one operation a value.
        budget: Largest overhead, as a share of all multiply-accumulates (``triplicate``, ``clip``) or of all weight
            bits (``ecc``).
        target: Accuracy to keep; the cheapest of the sets tried that is measured to keep it is recommended. None: the
            best of them.
        devices: Devices per measurement.
        images: Training images to choose on, stratified.
        batch_size: Images per forward.
    """

    fault: AnyFault
    name: str | None = None
    method: Method
    budget: Positive
    target: Annotated[Rate, Field(gt=0.0)] | None = None
    devices: Count = 10
    images: Count = 500
    batch_size: Count = 200

    @model_validator(mode="after")
    def _fitting(self) -> ProtectionConfig:
        if self.fault.target == "module":
            raise ValueError(
                f"{self.fault.name} takes whole nodes down, and protection is of layers; give another fault"
            )
        if self.method == "ecc" and self.fault.target != "weight":
            raise ValueError(
                f"ecc guards words of weights, and {self.fault.name} hits {self.fault.target}s; take triplicate or clip"
            )
        return self

    @property
    def label(self) -> str:
        """What records and tables call it."""
        return self.name or f"{self.fault.name}, {self.method}"


def overheads(model: nn.Module, image: Tensor, method: Method, bits: int) -> dict[str, float]:
    """Return what it costs to protect each Conv2d and Linear, as a share of the whole model's MACs or weight bits.

    A layer whose weight others read, and which is never called itself, can be protected by ``ecc`` alone.

    Args:
        model: In evaluation mode.
        image: One image, [1, C, H, W].
        method: How a layer is protected.
        bits: Width of a weight's word.
    """
    values: dict[str, int] = {}

    def seen(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values[name] = values.get(name, 0) + output.numel()

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    handles = [module.register_forward_hook(seen(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    if method == "ecc":
        total = sum(module.weight.numel() for module in layers.values())
        share = check_bits(bits) / bits
        return {name: share * layer.weight.numel() / total for name, layer in layers.items()}
    macs = {name: number * macs_per_output(layers[name]) for name, number in values.items()}
    total = sum(macs.values())
    if method == "clip":
        return {name: number / total for name, number in values.items()}
    return {name: 2.0 * number / total for name, number in macs.items()}


def check_bits(bits: int) -> int:
    """Return the check bits of a Hamming code that corrects one and detects two errors in a word of ``bits``."""
    check = 1
    while 2**check < bits + check + 1:
        check += 1
    return check + 1


def run_protection(
    subjects: Sequence[Subject],
    choosing: ImageSet,
    testing: ImageSet,
    *,
    config: ProtectionConfig,
    hardware: Hardware,
    seed: int,
    folder: Folder,
) -> None:
    """Find out for every model what to protect; measurements that ``protection.jsonl`` holds are not made again.

    Args:
        subjects: Trained models.
        choosing: Training images, on the device: what to choose on.
        testing: Test images, on the device: what to measure on.
        config: What to protect against, and how.
        hardware: Number formats, faulted layers; its fault model plays no part here.
        seed: Of the devices.
        folder: Where ``protection.jsonl`` lies.
    """
    journal = folder.journal(RECORDS)
    for subject in subjects:
        _Study(subject, config=config, hardware=hardware, seed=seed, journal=journal).run(choosing, testing)


class _Study:
    """One model's what-if."""

    def __init__(
        self,
        subject: Subject,
        *,
        config: ProtectionConfig,
        hardware: Hardware,
        seed: int,
        journal: Journal,
    ) -> None:
        self._subject, self._model, self._config = subject, subject.load(), config
        self._under = hardware.with_fault(config.fault)
        self._batch_size, self._seed, self._journal = config.batch_size, seed, journal
        self._done = dict(
            _read(record, f"{journal.path}: record {n}") for n, record in enumerate(journal.records(), start=1)
        )
        self._bounds: dict[str, float] = {}
        self._at_risk: frozenset[str] = frozenset()

    def run(self, choosing: ImageSet, testing: ImageSet) -> None:
        """Choose on one set of images, measure on the other."""
        config = self._config
        image = next(iter(testing.batches(1)))[0]
        with about(self._subject.name), torch.no_grad(), self._under.inject(self._model, seed=0) as injection:
            self._model(image)
        layers = [name for name, layer in injection.record.faults[0].layers.items() if layer.sites]
        self._at_risk = frozenset(layers)
        costs = overheads(self._model, image, config.method, self._under.formats()[0].bits)
        layers = self._priced(layers, costs)
        if config.method == "clip":
            self._bounds = feature_bounds(self._model, choosing, self._under, batch_size=self._batch_size)
        with track(f"protect {self._subject.name}", 1 + (len(layers) + 1) * config.devices) as progress:
            clean = self._measure("clean", (), choosing, progress)
            whole = self._measure("unprotected", (), choosing, progress)
            alone = {layer: self._measure("alone", (layer,), choosing, progress) for layer in layers}
        ends = {"clean": clean, "chance": 1.0 / len(choosing.classes)}
        decays = {layer: decay(accuracy, **ends) for layer, accuracy in alone.items()}
        if whole < clean - ROUNDING and not any(decays.values()):
            say(
                f"note: {self._subject.name}, {config.label}: faults in no layer alone take accuracy, those in all "
                f"together take {100 * (clean - whole):.1f} points; the choice of layers rests on their cost alone"
            )

        def foresee(names: Sequence[str]) -> float:
            return predict(names, decays, unprotected=whole, **ends)

        tried = sets_to_try(decays, costs, config.budget, foresee, config.target)
        with track(f"measure protected {self._subject.name}", len(tried) * config.devices) as progress:
            for names in tried:
                facts = {"overhead": float(sum(costs[name] for name in names)), "predicted": foresee(names)}
                accuracy = self._measure("measured", names, testing, progress, **facts)
                if config.target is not None and accuracy >= config.target:
                    return

    def _priced(self, layers: list[str], costs: Mapping[str, float]) -> list[str]:
        """Leave out layers that the method cannot protect, and say so."""
        out = [layer for layer in layers if layer not in costs]
        if out:
            say(
                f"note: {self._subject.name}, {self._config.label}: {', '.join(out)} is never called, others read its "
                f"weight, and {self._config.method} cannot protect it; ecc could"
            )
        return [layer for layer in layers if layer in costs]

    def _measure(
        self, stage: str, names: tuple[str, ...], images: ImageSet, progress: Tracker, **facts: float
    ) -> float:
        """Return the mean accuracy over the devices, on hardware that the stage and the layers decide."""
        under, bounds = self._under, None
        if stage == "clean":
            under = under.at_rest()
        elif stage == "alone":
            under = under.model_copy(update={"layers": tuple(exactly(name) for name in names)})
        elif self._config.method == "clip":
            bounds = {name: self._bounds[name] for name in names}
        elif set(names) >= self._at_risk:  # an injection that could hit nothing is refused
            under = under.at_rest()
        else:
            under = under.model_copy(update={"protect": (*under.protect, *(exactly(name) for name in names))})
        found = []
        for device in range(1 if stage == "clean" else self._config.devices):
            key = (self._subject.name, self._subject.train_seed, self._config.label, stage, names, device)
            if key not in self._done:
                self._done[key] = self._accuracy(under, bounds, device, images)
                setup = {"method": self._config.method, "target": self._config.target, "num_images": images.num_images}
                record = dict(zip(_KEYS, key, strict=True))
                self._journal.append({"schema": SCHEMA, **record, **setup, **facts, "accuracy": self._done[key]})
            found.append(self._done[key])
            progress.advance(f"{stage} {', '.join(names[-1:])}")
        return math.fsum(found) / len(found)

    def _accuracy(self, under: Hardware, bounds: Mapping[str, float] | None, device: int, images: ImageSet) -> float:
        seed = seed_for(self._seed, "device", device)
        with under.inject(self._model, seed=seed, bounds=bounds) as injection:
            del injection
            return float(answers(self._model, images.batches(self._batch_size)).correct.double().mean())


def feature_bounds(model: nn.Module, images: ImageSet, hardware: Hardware, *, batch_size: int) -> dict[str, float]:
    """Return the largest magnitude (> 0) of each layer's feature point over images, on hardware at rest."""
    batches = list(images.batches(batch_size))
    points = trace_feature_points(model, (batches[0][0],), {}).points
    largest: dict[str, float] = {}
    modules = dict(model.named_modules())

    def seen(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            largest[layer] = max(largest.get(layer, 0.0), float(output.abs().amax()))

        return hook

    with hardware.at_rest().inject(model, seed=0):
        pairs = {(layer, point) for (layer, _), (point, _) in points.items()}
        handles = [modules[point].register_forward_hook(seen(layer)) for layer, point in pairs]
        try:
            answers(model, batches)
        finally:
            for handle in handles:
                handle.remove()
    return {layer: max(bound, SMALLEST_RANGE) for layer, bound in largest.items()}


_KEYS = ("model", "train_seed", "protection", "stage", "layers", "device")


def _read(record: Mapping[str, Any], where: str) -> tuple[tuple[Any, ...], float]:
    """Return the key and the accuracy of a line of ``protection.jsonl``; raises a ValueError that begins with where."""
    try:
        key = tuple(tuple(record[key]) if key == "layers" else record[key] for key in _KEYS)
        return key, float(record["accuracy"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged ({error}); remove the line, and it is measured again") from None
