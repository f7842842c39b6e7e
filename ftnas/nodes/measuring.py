"""Accuracy of trained variants over every pattern of failures, and the tables of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ftnas.data import load
from ftnas.nodes.exact import PatternAccuracy, average, evaluate
from ftnas.nodes.fitting import build, trained
from ftnas.nodes.study import NodesConfig
from ftnas.rundir import Folder
from ftnas.stats import seed_interval

CHUNK = 256


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
            network = build(config, variant, images, seed=seed)
            trained(folder, name, seed, network)
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
