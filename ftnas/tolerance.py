"""What each layer of a trained model tolerates: bounds, certificates and rounding beside failures that were run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ftnas import boundplots, plots
from ftnas.bounds import (
    BoxOfInputs,
    Cost,
    Failures,
    Summary,
    certify,
    certify_samples,
    every_image,
    intervals,
    local_answers,
    margins,
    neuron_costs,
    of_samples,
    precision,
    summarize,
    synapse_costs,
    write_certificate,
)
from ftnas.bounds.attack import Attack
from ftnas.bounds.fep import receptive
from ftnas.bounds.summary import Layer
from ftnas.campaign import Subject
from ftnas.data import ImageSet
from ftnas.progress import say, track
from ftnas.quantize import FixedPoint
from ftnas.rng import generator
from ftnas.rundir import Folder
from ftnas.settings import Count, Positive, Settings

SCHEMA = 1
NUMBERS = "bounds.json"
TABLE = "table.md"
KEYS = frozenset("model train_seed failures images accuracy budget certificate bits layers".split())
OF_A_LAYER = frozenset("name components paths alone".split())
OF_NEURONS = OF_A_LAYER | frozenset("fep on_images images_that_tolerate_one measured".split())
"""What a file of numbers has at least; of the layers, what those of synapses and of neurons have."""


class ToleranceConfig(Settings):
    """What to bound, and what to run beside it.

    Attributes:
        failures: What fails, and how.
        budget: Largest error of an output that the certificate allows, in its units; None: half the median distance
            between the two largest logits of the images, so that half of them keep their answers.
        share: Of the images that the certificate over images must hold for.
        bits: Word widths whose rounding is bounded.
        images: Test images, stratified, always the same ones.
        failing: Numbers of neurons of a layer that are made to fail; where a layer has fewer, they are left out.
        draws: Random choices of these neurons that are run, beside the choice that the bound thinks worst.
        local_images: The first of the images, for which the signed effects of all neurons are followed too: sharper, at
            the cost of one pass of as many images as a layer has neurons, for each image, layer and number of failures.
    """

    failures: Failures = Failures()
    budget: Positive | None = None
    share: float = Field(default=0.5, gt=0.0, le=1.0)
    bits: tuple[int, ...] = (8, 6, 4)
    images: Count = 50
    failing: tuple[Count, ...] = (1, 4, 16)
    draws: Count = 20
    local_images: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _runnable(self) -> ToleranceConfig:
        if self.failures.kind == "byzantine" and self.failures.capacity is None:
            raise ValueError("failures: without a capacity no network tolerates a byzantine component; give capacity")
        for bits in self.bits:
            FixedPoint(bits=bits)
        whole_lies = self.failures.unit == "channel" and self.failures.kind != "crash"
        if self.local_images and (whole_lies or self.failures.component == "synapse"):
            raise ValueError("local_images are for single neurons, or channels that crash; leave it out here")
        return self


def run_tolerance(
    subjects: Sequence[Subject], images: ImageSet, *, config: ToleranceConfig, seed: int, folder: Folder
) -> str:
    """Bound every model that has no numbers yet; write tables, pictures and certificates.

    Args:
        subjects: Trained models.
        images: The chosen test images, on the models' device.
        config: What to do.
        seed: Of the random failures.
        folder: Of the run; everything goes to its ``bounds``.

    Returns:
        The tables in Markdown.

    Raises:
        ValueError: A model cannot be summarised: one line with the layer that is not bounded. Or its numbers are there
            and damaged.
    """
    stage, texts = folder.stage("bounds"), []
    for subject in subjects:
        own = stage.stage(f"{subject.name}/seed-{subject.train_seed}")
        if not own.file(NUMBERS).exists():
            own.write_json(NUMBERS, bound_model(subject, images, config=config, seed=seed, folder=own))
        numbers = _read(own.file(NUMBERS))
        if not own.file("bounds.svg").exists():
            plots.save(boundplots.bound_against_truth(numbers), own.file("bounds"))
        texts.append(table(numbers))
    text = "\n".join(texts)
    stage.write_text(TABLE, text)
    return text


def _read(path: Path) -> dict[str, Any]:
    """Read the numbers of a model; ValueError in one line for what this version has not written."""
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        numbers = None
    if isinstance(numbers, dict) and numbers.get("schema") == SCHEMA:
        wanted = OF_NEURONS if "images_certificate" in numbers else OF_A_LAYER
        layers = numbers.get("layers")
        if numbers.keys() >= KEYS and isinstance(layers, list):
            if all(isinstance(layer, dict) and layer.keys() >= wanted for layer in layers):
                return numbers
    raise ValueError(
        f"{path}: damaged, or not of schema {SCHEMA} that this version reads; remove it and go on with "
        "ftnas bounds --resume RUN, which makes it anew"
    )


@torch.no_grad()
def bound_model(
    subject: Subject, images: ImageSet, *, config: ToleranceConfig, seed: int, folder: Folder
) -> dict[str, Any]:
    """Return all numbers of one model, and write its certificates into a folder."""
    model = subject.load()
    inputs, labels = next(images.batches(images.num_images))
    try:
        summary = summarize(model, images.shape)
    except ValueError as error:
        raise ValueError(f"{subject.name}: {error}") from None
    logits = summary.run(inputs)[-1]
    best = logits.topk(2, dim=1).values
    budget = config.budget or float((best[:, 0] - best[:, 1]).median()) / 2
    box = box_of(images)
    certificate = certify(model, box, shape=images.shape, failures=config.failures, budget=budget)
    write_certificate(folder.file("certificate.json"), certificate)
    numbers: dict[str, Any] = {
        "schema": SCHEMA,
        "model": subject.name,
        "train_seed": subject.train_seed,
        "failures": config.failures.model_dump(mode="json"),
        "images": images.num_images,
        "local_images": min(config.local_images, images.num_images),
        "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
        "budget": budget,
        "certificate": {"failures": sum(certificate.counts), "search": certificate.search, "gap": certificate.gap},
        "bits": _rounding(summary, box, inputs, config),
    }
    if config.failures.component == "neuron":
        shared = certify_samples(model, inputs, failures=config.failures, share=config.share)
        write_certificate(folder.file("images.json"), shared)
        assert shared.domain.kind == "samples"
        certified = len(shared.domain.certified)
        numbers["images_certificate"] = {"failures": sum(shared.counts), "certified": certified}
        numbers["layers"] = _layers(summary, box, inputs, config, budget, seed=seed)
    else:
        costs = synapse_costs(summary, intervals(summary, *box.ends(images.shape)), config.failures)
        numbers["layers"] = [_alone(cost, budget) for cost in costs]
    return numbers


def box_of(images: ImageSet) -> BoxOfInputs:
    """Return all images that there can be: every pixel from black to white, normalised."""
    return every_image(images.mean, images.std)


def _alone(cost: Cost, budget: float) -> dict[str, Any]:
    """Return what a layer tolerates when no other one fails, and what one failure costs at most."""
    budgets = torch.full((len(cost.sums),), budget, dtype=torch.float64, device=cost.sums.device)
    one = cost.at(torch.tensor([1], device=cost.sums.device)).amax()
    return {"name": cost.name, "components": cost.components, "paths": float(one), "alone": cost.tolerance(budgets)}


def _layers(
    summary: Summary, box: BoxOfInputs, inputs: Tensor, config: ToleranceConfig, budget: float, *, seed: int
) -> list[dict[str, Any]]:
    failures, anywhere = config.failures, intervals(summary, *box.ends(summary.nodes[0].shape))
    here, ahead = of_samples(summary, inputs), margins(summary, inputs, config.failures)
    boxed, costs = neuron_costs(summary, anywhere, failures), neuron_costs(summary, here, failures)
    attack = Attack(summary, inputs, failures)
    found = []
    with track("bounds", len(summary.layers)) as bar:
        parts = zip(summary.layers, boxed, costs, ahead.tolerated(), strict=True)
        for layer, cost, own, tolerated in parts:
            line = _alone(cost, budget)
            deviation = float(failures.deviation(anywhere.boxes[layer.node]).amax())
            span = math.prod(layer.shape) // cost.components
            line["fep"] = receptive(summary, {layer.name: span}, {layer.name: deviation})
            line["on_images"] = float(own.at(torch.tensor([1], device=own.sums.device)).amax())
            line["images_that_tolerate_one"] = float((tolerated >= 1).double().mean())
            line["median_tolerated"] = int(tolerated.median())
            draws = generator(seed, "bounds", layer.name)
            line["measured"] = [
                {
                    "failing": count,
                    "bound": float(own.at(torch.tensor([count], device=own.sums.device)).amax()),
                    "certified": float((tolerated >= count).double().mean()),
                    **attack.run(layer, count, draws=config.draws, generator=draws, first=config.local_images),
                    **_local(summary, inputs, layer, count, config),
                }
                for count in config.failing
                if count <= cost.components
            ]
            found.append(line)
            bar.advance()
    return found


def _local(summary: Summary, inputs: Tensor, layer: Layer, count: int, config: ToleranceConfig) -> dict[str, float]:
    """Return the sharper bound for the first images, and the share of them that it certifies; nothing for none."""
    if not config.local_images:
        return {}
    some = inputs[: config.local_images]
    errors, kept = local_answers(summary, some, layer, count=count, failures=config.failures)
    return {"local": float(errors.amax()), "local_certified": float(kept.double().mean())}


def _rounding(summary: Summary, box: BoxOfInputs, inputs: Tensor, config: ToleranceConfig) -> list[dict[str, Any]]:
    """Bound rounding at each width, over the box and over the images; nothing where weights are saturated."""
    lines = []
    for bits in config.bits:
        form = FixedPoint(bits=bits)
        try:
            boxed = precision(summary, intervals(summary, *box.ends(summary.nodes[0].shape)), form)
        except ValueError as error:
            say(f"note: {error}")
            return []
        own = precision(summary, of_samples(summary, inputs), form)
        lines.append(
            {
                "bits": bits,
                "box": float(boxed.error.amax()),
                "images": float(own.error.amax()),
                "of_features": float(own.features.amax()),
                "of_weights": float(own.weights.amax()),
            }
        )
    return lines


def table(numbers: dict[str, Any]) -> str:
    """Return the tables of one model in Markdown."""
    what, found = numbers["failures"], numbers["certificate"]
    accuracy, budget = f"{100 * numbers['accuracy']:.1f}%", f"{numbers['budget']:.3g}"
    how = f"{found['search']}, gap {found['gap']}"
    lines = [
        f"## {numbers['model']}, seed {numbers['train_seed']}",
        "",
        f"{what['component']} {what['kind']}; {numbers['images']} test images, accuracy {accuracy}.",
        f"Certified within an error of {budget} of each logit, for every image: {found['failures']} failures ({how}).",
    ]
    if "images_certificate" in numbers:
        own = numbers["images_certificate"]
        lines += [
            f"Certified to leave the answers of {own['certified']} of these images: {own['failures']} failures.",
            "",
            "One failure, and what a layer tolerates when no other layer fails:",
        ]
    lines += ["", *(_layer_table if "images_certificate" in numbers else _synapse_table)(numbers["layers"])]
    if numbers["bits"]:
        keys = ("box", "images", "of_features", "of_weights")
        lines += ["", *_head("bits", "any image, at most", "these images, at most", "of features", "of weights")]
        lines += [f"| {x['bits']} | {' | '.join(f'{x[key]:.3g}' for key in keys)} |" for x in numbers["bits"]]
    return "\n".join(lines) + "\n"


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _synapse_table(layers: Sequence[dict[str, Any]]) -> list[str]:
    lines = _head("layer", "synapses", "one fails, at most", "tolerated within the error")
    return lines + [f"| {x['name']} | {x['components']} | {x['paths']:.3g} | {x['alone']} |" for x in layers]


def _layer_table(layers: Sequence[dict[str, Any]]) -> list[str]:
    head = ("layer", "neurons", "Fep", "any image", "these images", "seen", "signed, first images", "seen there")
    lines = _head(*head, "tolerated", "images that bear 1")
    for x in layers:
        one: dict[str, Any] = next((entry for entry in x["measured"] if entry["failing"] == 1), {})
        seen = " | ".join(f"{one[key]:.3g}" if key in one else "-" for key in ("error", "local", "error_first"))
        bounds = " | ".join(f"{x[key]:.3g}" for key in ("fep", "paths", "on_images"))
        share = f"{100 * x['images_that_tolerate_one']:.0f}%"
        lines.append(f"| {x['name']} | {x['components']} | {bounds} | {seen} | {x['alone']} | {share} |")
    return lines
