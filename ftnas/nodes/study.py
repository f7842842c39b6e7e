"""Variants of a split network, trained from several seeds and evaluated over every pattern of failures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, model_validator
from torch.nn import functional

from ftnas import rng
from ftnas.augment import AugmentConfig
from ftnas.data import ImageSet, load
from ftnas.datasets import DataConfig
from ftnas.nodes.exact import PatternAccuracy, average, evaluate
from ftnas.nodes.matching import Matching
from ftnas.nodes.models import SplitModel
from ftnas.nodes.network import Failout, Mode, SplitNetwork, Weighting
from ftnas.nodes.partition import Partition
from ftnas.rundir import Folder, RunDir
from ftnas.settings import Count, Positive, Rate, Settings, parse
from ftnas.stats import seed_interval

CHUNK = 256


class Variant(Settings):
    """One way to train and run the network: `resilinet` needs ``failout``, `dfg` may have it, `vanilla` not."""

    mode: Mode
    failout: Failout | None = None
    weights: Weighting = Weighting()
    weights_setting: str = "normal"

    @model_validator(mode="after")
    def _effective(self) -> Variant:
        if self.mode == "vanilla" and self.failout is not None:
            raise ValueError("failout has no effect on mode vanilla, nothing bypasses its nodes; leave it out")
        if self.mode == "resilinet" and self.failout is None:
            raise ValueError("mode resilinet needs failout; give its rate, e.g. failout: {rate: 0.05}")
        return self


class NodesConfig(Settings):
    """A study of split networks.

    Attributes:
        partition: Nodes and skips.
        settings: Failure settings: name -> node -> probability of failure; every node is named.
        variants: Name -> how to train and run.
        seeds: Trainings of each variant, with seeds ``seed`` to ``seed + seeds - 1``.
        lr: Of Adam.
    """

    name: str
    seed: int = 0
    seeds: Count = 5
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: SplitModel
    partition: Partition
    matching: Matching = "projection"
    settings: dict[str, dict[str, Rate]]
    variants: dict[str, Variant] = Field(min_length=1)
    epochs: Count
    batch_size: Count
    lr: Positive = 0.001

    @model_validator(mode="after")
    def _names_fit(self) -> NodesConfig:
        names = set(self.partition.parents)
        for name, rates in self.settings.items():
            self.partition.check_names(rates, where=f"settings.{name}")
            if set(rates) != names:
                raise ValueError(f"settings.{name}: no rate for {sorted(names - set(rates))}; give each node one")
        for name, variant in self.variants.items():
            if variant.failout is not None:
                variant.failout.rates_of(self.partition)
            if variant.weights.scheme in ("reliability", "relative") and variant.weights_setting not in self.settings:
                raise ValueError(f"variants.{name}.weights_setting: no failure setting {variant.weights_setting!r}")
        return self


def read_nodes_config(path: str | Path) -> NodesConfig:
    """Read the YAML file of a study; ValueError in one line for what is wrong in it."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no config file {path}; give a YAML file of a study of nodes, e.g. configs/nodes/*.yaml")
    try:
        return parse(NodesConfig, yaml.safe_load(file.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None


def open_study(path: str | Path, out: Path | None) -> tuple[NodesConfig, RunDir]:
    """Read a config and open its run folder, made when missing.

    Raises:
        ValueError: The folder belongs to another config.
    """
    config = read_nodes_config(path)
    plain = config.model_dump(mode="json")
    folder = out if out is not None else Path("runs") / config.name
    if not folder.exists():
        return config, RunDir.create(folder, plain)
    run = RunDir.open(folder)
    if run.config != plain:
        run.close()
        raise ValueError(f"{folder} holds a run of another config; give another --out, or remove it")
    return config, run


def build(config: NodesConfig, variant: Variant, images: ImageSet, *, seed: int) -> SplitNetwork:
    """Build one variant; the blocks start from the same weights in all variants of a seed."""
    partition = config.partition.without_skips() if variant.mode == "vanilla" else config.partition
    links = partition.links()
    rates = config.settings.get(variant.weights_setting, {})
    with rng.isolated(seed, "nodes", "blocks"):
        blocks = config.model.blocks(images.shape, num_classes=images.num_classes)
    with rng.isolated(seed, "nodes", "matches"):
        return SplitNetwork(
            blocks,
            partition=partition,
            shape=images.shape,
            mode=variant.mode,
            matching=config.matching,
            weights=variant.weights.weights(links, failure_rates=rates, seed=seed),
        )


def fit(network: SplitNetwork, images: ImageSet, config: NodesConfig, *, failout: Failout | None, seed: int) -> int:
    """Train by Adam on the cross-entropy, the nodes of a mask per batch shut down.

    Returns:
        How many batches were left out because no information reached the top.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    masks = rng.generator(seed, "nodes", "failout")
    left_out = 0
    network.train()
    for epoch in range(config.epochs):
        for inputs, labels in images.batches(
            config.batch_size, seed=seed, epoch=epoch, augment=config.augment, drop_last=True
        ):
            down = failout.sample(network.partition, generator=masks) if failout else frozenset()
            logits = network(inputs, down)
            if logits is None:
                left_out += 1
                continue
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(logits, labels).backward()
            optimizer.step()
    return left_out


def train_all(config: NodesConfig, folder: Folder) -> None:
    """Train every variant and seed that has no model file yet."""
    images = load(config.data, "train")
    for name, variant in config.variants.items():
        for seed in range(config.seed, config.seed + config.seeds):
            if folder.file(_file(name, seed)).exists():
                continue
            network = build(config, variant, images, seed=seed)
            left_out = fit(network, images, config, failout=variant.failout, seed=seed)
            folder.save(_file(name, seed), {"state": network.state_dict(), "left_out": left_out})
            print(f"trained {name}, seed {seed}; batches without information: {left_out}", flush=True)


def evaluate_all(config: NodesConfig, folder: Folder) -> list[dict[str, Any]]:
    """Evaluate every trained model that has no records yet; return all records.

    A record: variant, seed, down (names), accuracy, informed.

    Raises:
        ValueError: A model is not trained yet.
    """
    images = load(config.data, "test")
    journal = folder.journal("records.jsonl")
    per_model = 2 ** len(config.partition.nodes)
    records = list(journal.records())
    for name, variant in config.variants.items():
        for seed in range(config.seed, config.seed + config.seeds):
            have = {tuple(r["down"]) for r in records if r["variant"] == name and r["seed"] == seed}
            if len(have) == per_model:
                continue
            if not folder.file(_file(name, seed)).exists():
                raise ValueError(f"{name}, seed {seed} is not trained yet; run ftnas nodes train first")
            network = build(config, variant, images, seed=seed)
            network.load_state_dict(folder.load(_file(name, seed), keys=("state",))["state"])
            results = evaluate(network, images.batches(CHUNK), num_classes=images.num_classes)
            for result in results:
                if result.down in have:
                    continue
                record = {"variant": name, "seed": seed, "down": list(result.down), "accuracy": result.accuracy}
                record["informed"] = result.informed
                journal.append(record)
                records.append(record)
    return records


def table(config: NodesConfig, records: list[dict[str, Any]]) -> str:
    """Return Markdown: average accuracy per failure setting, then accuracy per pattern, in percent, 95% over seeds."""
    settings = {"no failure": dict.fromkeys(config.partition.parents, 0.0), **config.settings}
    lines = _head("variant", settings)
    for name in config.variants:
        cells = [_cell([_mean(found, rates) for found in _by_seed(records, name)]) for rates in settings.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_head("down", config.variants)]
    for down in _downs(records):
        cells = []
        for name in config.variants:
            rows = [found[down] for found in _by_seed(records, name)]
            cells.append(_cell([row["accuracy"] for row in rows]) + ("" if rows[0]["informed"] else " (guess)"))
        lines.append(f"| {', '.join(down) or 'none'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


Found = dict[tuple[str, ...], dict[str, Any]]


def _file(name: str, seed: int) -> str:
    return f"{name}-{seed}.pt"


def _head(first: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]


def _by_seed(records: list[dict[str, Any]], name: str) -> list[Found]:
    seeds = sorted({record["seed"] for record in records if record["variant"] == name})
    return [{tuple(r["down"]): r for r in records if r["variant"] == name and r["seed"] == seed} for seed in seeds]


def _downs(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(record["down"]) for record in records))


def _mean(found: Found, rates: dict[str, float]) -> float:
    results = [PatternAccuracy(down, row["accuracy"], row["informed"]) for down, row in found.items()]
    return average(results, failure_rates=rates)


def _cell(values: list[float]) -> str:
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    interval = seed_interval(values)
    return f"{100 * interval.mean:.2f} ± {50 * (interval.high - interval.low):.2f}"
