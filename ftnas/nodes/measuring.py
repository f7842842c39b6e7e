"""Accuracy of trained variants over every pattern of failures, with the table and the picture of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ftnas.charts import dot_rows
from ftnas.nodes.exact import PatternAccuracy, average, evaluate
from ftnas.nodes.fitting import CHUNK, samples_of, test_set, trained
from ftnas.nodes.study import NO_FAILURE, NodesConfig
from ftnas.plots import save
from ftnas.progress import track
from ftnas.rundir import RunDir
from ftnas.stats import Interval, paired_difference, seed_interval

RECORDS = "records.jsonl"


def evaluate_all(config: NodesConfig, folder: RunDir) -> list[dict[str, Any]]:
    """Evaluate every trained model that has no records yet; return all records.

    A record: variant, seed, down (names), accuracy, informed.

    Raises:
        ValueError: A model is not trained yet.
    """
    images = test_set(config, samples_of(config, folder)[1])
    journal = folder.journal(RECORDS)
    records = list(journal.records())
    have: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for record in records:
        have.setdefault((record["variant"], record["seed"]), set()).add(tuple(record["down"]))
    tasks = [(name, seed) for name in config.variants for seed in config.all_seeds]
    per_model = 2 ** len(config.partition.nodes)
    missing = [task for task in tasks if len(have.get(task, ())) < per_model]
    with track("models evaluated", len(tasks), done=len(tasks) - len(missing), after_s=1.0) as bar:
        for name, seed in missing:
            network = trained(config, name, images, seed=seed, folder=folder)
            for result in evaluate(network, images.batches(CHUNK), num_classes=images.num_classes):
                if result.down in have.get((name, seed), ()):
                    continue
                record = {"variant": name, "seed": seed, "down": list(result.down), "accuracy": result.accuracy}
                record["informed"] = result.informed
                journal.append(record)
                records.append(record)
            bar.advance(f"{name}, seed {seed}")
    return records


def averages(config: NodesConfig, records: list[dict[str, Any]]) -> dict[str, list[Interval]]:
    """Return, by variant, the exact average accuracy in each failure setting, 95% over seeds; no failure first."""
    found = {name: _by_seed(records, name) for name in config.variants}
    return {
        name: [seed_interval([_mean(seed, rates) for seed in found[name]]) for rates in config.rates.values()]
        for name in config.variants
    }


def differences(config: NodesConfig, records: list[dict[str, Any]], *, against: str) -> dict[str, list[Interval]]:
    """Return, by other variant, its average accuracy less that of ``against``, paired by seed, in each setting."""
    other = _by_seed(records, against)
    found: dict[str, list[Interval]] = {}
    for name in config.variants:
        if name == against:
            continue
        own = _by_seed(records, name)
        found[name] = [
            paired_difference([_mean(seed, rates) for seed in own], [_mean(seed, rates) for seed in other])
            for rates in config.rates.values()
        ]
    return found


def table(config: NodesConfig, records: list[dict[str, Any]]) -> str:
    """Return Markdown: average accuracy per failure setting, then accuracy per pattern, in percent, 95% over seeds.

    With ``compare`` in the config, differences to that variant in between.
    """
    lines = _head("variant", _shown(config))
    for name, intervals in averages(config, records).items():
        lines.append(f"| {name} | {' | '.join(map(_cell, intervals))} |")
    if config.compare is not None:
        lines += ["", *_head(f"points above {config.compare}", _shown(config))]
        for name, intervals in differences(config, records, against=config.compare).items():
            cells = [f"{100 * d.mean:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})" for d in intervals]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_head("down", config.variants)]
    for down in _downs(records):
        cells = []
        for name in config.variants:
            rows = [found[down] for found in _by_seed(records, name)]
            cell = _cell(seed_interval([row["accuracy"] for row in rows]))
            cells.append(cell + ("" if rows[0]["informed"] else " (guess)"))
        lines.append(f"| {', '.join(down) or 'none'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(config: NodesConfig, folder: RunDir) -> str:
    """Evaluate what is not evaluated yet, write ``table.md``, ``plot.png`` and ``plot.svg``; return the table."""
    records = evaluate_all(config, folder)
    text = table(config, records)
    folder.write_text("table.md", text)
    save(dot_rows(averages(config, records), _shown(config), title=config.name), folder.file("plot"))
    return text


Found = dict[tuple[str, ...], dict[str, Any]]


def _shown(config: NodesConfig) -> list[str]:
    return ["no failure" if name == NO_FAILURE else name for name in config.rates]


def _head(first: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]


def _by_seed(records: Sequence[dict[str, Any]], name: str) -> list[Found]:
    seeds = sorted({record["seed"] for record in records if record["variant"] == name})
    return [{tuple(r["down"]): r for r in records if r["variant"] == name and r["seed"] == seed} for seed in seeds]


def _downs(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(record["down"]) for record in records))


def _mean(found: Found, rates: dict[str, float]) -> float:
    results = [PatternAccuracy(down, row["accuracy"], row["informed"]) for down, row in found.items()]
    return average(results, failure_rates=rates)


def _cell(interval: Interval) -> str:
    if interval.low != interval.low:
        return f"{100 * interval.mean:.2f}"
    return f"{100 * interval.mean:.2f} ± {50 * (interval.high - interval.low):.2f}"
