"""Single-fault campaigns: how likely one fault is to change the answer, by layer and bit; sampled or exhaustive."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from ftnas.campaign import Subject
from ftnas.data import ImageSet
from ftnas.evaluate import NONFINITE, top1
from ftnas.faults import Fault, Injection, Plan, PlanSet, Site, inject
from ftnas.faults.base import fault_class
from ftnas.faults.drawing import Key
from ftnas.faults.hardware import AnyFault, Hardware
from ftnas.faults.where import allowed_cells
from ftnas.models import about
from ftnas.progress import track
from ftnas.rng import seed_for
from ftnas.rundir import Folder
from ftnas.settings import Count, Settings
from ftnas.survey import allocate, sample_size

RECORDS = "single.jsonl"
SCHEMA = 1


def _without_rate(value: Any) -> Any:
    """Fill in a rate, which a single fault does not have, where a config leaves it out."""
    if not isinstance(value, Mapping) or "name" not in value:
        return value
    fault = fault_class(str(value["name"]))
    field = fault.model_fields.get(fault.rate_name)
    return {fault.rate_name: 0.0, **value} if field is not None and field.is_required() else value


class SingleFaultConfig(Settings):
    """One fault at a time: does it change the top-1 answer of the same hardware without faults (SDC)?

    An experiment is one fault, drawn without replacement from all that can happen, with one image, alone in its batch.

    Attributes:
        fault: The fault model; its rate is left out.
        name: What records and tables call it; the fault model's name when left out.
        images: Test images that a fault may meet, stratified, always the same ones.
        margin: Half-width of the interval of the probability over the whole model that the number of experiments is
            chosen for, by n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p))) with p = 0.5 (Leveugle et al. 2009).
        level: Confidence level of that.
        minimum: Experiments at least in each stratum, a bit of a layer.
        exhaustive: Do all experiments instead; for small networks.
    """

    fault: Annotated[AnyFault, BeforeValidator(_without_rate)]
    name: str | None = None
    images: Count = 100
    margin: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.01
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    minimum: Count = 8
    exhaustive: bool = False

    @model_validator(mode="after")
    def _countable(self) -> SingleFaultConfig:
        if self.fault.persistence != 1.0:
            raise ValueError("a single fault has no rate that persistence could multiply; remove it")
        probe = Site("", (1, 1, 1), 1, 8)
        if not self.fault.num_codes(probe):
            raise ValueError(f"{self.fault.name} has no single faults to count; measure it at a rate instead")
        return self

    @property
    def label(self) -> str:
        """What records and tables call it."""
        return self.name or self.fault.name


@dataclass(frozen=True)
class Faults:
    """The single faults of one stratum, numbered from 0: those of one bit of one tensor.

    Attributes:
        key: Number of the fault model (0), layer, call of the layer.
        site: The tensor; of a feature, that of one sample.
        bit: 0 for the least significant one; None for a fault model without bits.
        code: Given instead where several things can happen to a unit of a model without bits (SAF0, SAF1).
        units: The units that can be hit, numbered as the model's plans do.
        codes: What can happen to each of them.
        shape_of: A plan without hits, of the right population and span.
    """

    key: Key
    site: Site
    bit: int | None
    code: int | None
    units: range | Tensor
    codes: tuple[int, ...]
    shape_of: Plan

    def __len__(self) -> int:
        return len(self.units) * len(self.codes)

    def plan(self, number: int) -> Plan:
        """Return the plan of one of the faults, ``number`` in 0 .. len - 1."""
        code, unit = divmod(number, len(self.units))
        sites = torch.tensor([int(self.units[unit])])
        return replace(self.shape_of, sites=sites, codes=torch.tensor([self.codes[code]]), at_risk=1, rate=0.0)


def single_faults(injection: Injection, fault: Fault) -> list[Faults]:
    """Return all single faults of a model by stratum, from the tensors that an injection of the fault has met."""
    found: list[Faults] = []
    for key, (site, placed) in injection.sites().items():
        one = replace(site, shape=site.shape[1:]) if fault.target == "feature" else site
        found += _of_tensor(key, one, fault, allowed_cells(
            one, fault, only=fault.where, never=placed.never.get(site.layer, ())
        ))  # fmt: skip
    return [stratum for stratum in found if len(stratum)]


def _of_tensor(key: Key, site: Site, fault: Fault, allowed: Tensor) -> Iterator[Faults]:
    """Yield the strata of one tensor; ``allowed`` is bool [bits, channels, places]."""
    empty = fault.with_rate(0.0).sample(site, generator=torch.Generator())
    width = empty.num_values // empty.span  # units of one row: rows are bits, or cells of a weight
    rows = empty.population // max(1, width)
    num_bits, codes = fault.num_bits(site), torch.arange(fault.num_codes(site))
    if num_bits is None:
        units = _units(allowed[0], site, empty.span, range(rows))
        for code in codes.tolist():
            yield Faults(key, site, None, code if len(codes) > 1 else None, units, (code,), empty)
        return
    in_rows = rows == num_bits
    which = None if in_rows else fault.bits_hit(replace(empty, sites=torch.zeros_like(codes), codes=codes))
    for bit in range(num_bits):
        units = _units(allowed[bit], site, empty.span, range(bit, bit + 1) if in_rows else range(rows))
        own = codes if which is None else codes[which == bit]
        yield Faults(key, site, bit, None, units, tuple(own.tolist()), empty)


def _units(allowed: Tensor, site: Site, span: int, rows: range) -> range | Tensor:
    """Return the units of some rows that may be hit; ``allowed`` is bool [channels, places]."""
    width = site.num_values // span
    if bool(allowed.all()):
        return range(rows.start * width, rows.stop * width)
    value = torch.arange(width) * span
    inside = allowed[value // site.channel_stride % site.channels, value % site.map_size]
    chosen = inside.nonzero().squeeze(1)
    return torch.cat([chosen + row * width for row in rows])


def operator_of(layer: nn.Module) -> str:
    """Return the type of a layer in the field's terms: conv KxK, depthwise KxK, pointwise or linear."""
    if not isinstance(layer, nn.Conv2d):
        return "linear"
    kernel = f"{layer.kernel_size[0]}x{layer.kernel_size[1]}"
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return f"depthwise {kernel}"
    return "pointwise" if kernel == "1x1" else f"conv {kernel}"


def run_single_faults(
    subjects: Sequence[Subject],
    images: ImageSet,
    *,
    config: SingleFaultConfig,
    hardware: Hardware,
    seed: int,
    folder: Folder,
) -> None:
    """Do the experiments of every model; strata that the folder's ``single.jsonl`` holds are not done again.

    Args:
        subjects: Trained models.
        images: Test images, on the device.
        config: What to do.
        hardware: Number formats, faulted layers, protection; its fault model plays no part here.
        seed: Of the experiments; models share them where layer names and shapes agree.
        folder: Where ``single.jsonl`` lies, one line a stratum. Each tells how many its model and its tensor have.
    """
    journal = folder.journal(RECORDS)
    done = {_key_of(record, f"{journal.path}: record {n}") for n, record in enumerate(journal.records(), start=1)}
    batches = [image for image, _ in images.batches(1)]
    fault = config.fault
    for subject in subjects:
        model = subject.load()
        with about(subject.name):
            strata = _find(model, fault, hardware, batches[0])
        trials = _trials(strata, config, len(batches))
        sizes = Counter(stratum.key for stratum in strata)
        names = [(subject.name, subject.train_seed, config.label, *s.key[1:], s.bit, s.code) for s in strata]
        finished = sum(number for number, name in zip(trials, names, strict=True) if name in done)
        if finished == sum(trials):
            continue
        layers, depths = dict(model.named_modules()), {s.key[1]: 0 for s in strata}
        order = {layer: depth for depth, layer in enumerate(depths)}
        none = PlanSet((fault,), {})
        title = f"single faults, {subject.name}"
        with (
            track(title, sum(trials), done=finished) as progress,
            inject(model, plans=none, quantization=hardware.quantization) as injection,
            torch.no_grad(),
        ):
            clean = [int(top1(model(image.clone()))) for image in batches]
            for stratum, number, name in zip(strata, trials, names, strict=True):
                if name in done:
                    continue
                changed = broken = 0
                for which, image in draw_experiments(stratum, number, num_images=len(batches), seed=seed):
                    injection.replay(PlanSet((fault,), {stratum.key: stratum.plan(which)}))
                    answer = int(top1(model(batches[image].clone())))
                    changed += answer != clean[image]
                    broken += answer == NONFINITE
                    progress.advance(stratum.key[1])
                journal.append(
                    {
                        "schema": SCHEMA,
                        "model": subject.name,
                        "train_seed": subject.train_seed,
                        "fault": config.label,
                        "layer": stratum.key[1],
                        "call": stratum.key[2],
                        "bit": stratum.bit,
                        "code": stratum.code,
                        "depth": order[stratum.key[1]],
                        "operator": operator_of(layers[stratum.key[1]]),
                        "population": len(stratum) * len(batches),
                        "trials": number,
                        "changed": changed,
                        "nonfinite": broken,
                        "num_images": len(batches),
                        "strata": len(strata),
                        "layer_strata": sizes[stratum.key],
                    }
                )
                done.add(name)


def draw_experiments(stratum: Faults, number: int, *, num_images: int, seed: int) -> list[tuple[int, int]]:
    """Draw experiments of a stratum without replacement: (number of the fault, number of the image) each.

    Models share them where the names and shapes of their layers agree.
    """
    stream = seed_for(seed, "single", *stratum.key[1:], stratum.bit or 0, stratum.code or 0)
    total = len(stratum) * num_images
    if number == total:
        return [divmod(chosen, num_images) for chosen in range(total)]
    return [divmod(chosen, num_images) for chosen in random.Random(stream).sample(range(total), number)]


def _find(model: nn.Module, fault: Fault, hardware: Hardware, image: Tensor) -> list[Faults]:
    under = hardware.with_fault(fault.with_rate(0.0))
    with torch.no_grad(), under.inject(model, seed=0) as injection:
        model(image.clone())
    return single_faults(injection, fault)


def _trials(strata: Sequence[Faults], config: SingleFaultConfig, num_images: int) -> list[int]:
    populations = [len(stratum) * num_images for stratum in strata]
    if config.exhaustive:
        return populations
    number = sample_size(sum(populations), margin=config.margin, level=config.level)
    number = max(number, sum(min(population, config.minimum) for population in populations))
    return allocate(populations, number, minimum=config.minimum)


def _key_of(record: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    names = ("model", "train_seed", "fault", "layer", "call", "bit", "code")
    missing = next((name for name in names if name not in record), None)
    if missing is not None:
        raise ValueError(f"{where}: {missing!r} is missing; remove the line, and it is measured again")
    return tuple(record[name] for name in names)
