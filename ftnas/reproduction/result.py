"""What came out of a study, beside what was published: Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftnas.records import Comparison, is_known, nothing_compared, read_comparison
from ftnas.reproduction import figures
from ftnas.reproduction.jobs import records, trained, trained_for
from ftnas.reproduction.orderings import Pair, Result, check
from ftnas.reproduction.runs import FILE, Cost, Run, runs, total_cost
from ftnas.reproduction.study import Planned, PublishedTable, Scale, Study, StudySweep, rates_at
from ftnas.stats import Interval
from ftnas.storage import atomic_write
from ftnas.tables import big, fault_name
from ftnas.vulnerability import to_csv

RECORDS = "records.jsonl"
_VERDICTS = {
    "holds": "holds",
    "reversed": "**does not hold: the reverse was measured**",
    "undecided": "undecided: zero is not excluded",
    "not run": "not run",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A study with what was measured so far.

    Attributes:
        study: The study.
        scale: Name of the scale.
        settings: What it changes.
        planned: Rows and runs.
        comparison: All records; models are called as the rows.
        results: The orderings.
        published: The published tables.
        earlier: Hash of a training -> what an earlier result knows of it, which stands for the runs of the cache.
    """

    study: Study
    scale: str
    settings: Scale
    planned: Sequence[Planned]
    comparison: Comparison
    results: Sequence[Result]
    published: Mapping[str, PublishedTable]
    earlier: Mapping[str, Run] = field(default_factory=dict)

    def interval(self, name: str, sweep: StudySweep, rate: float) -> Interval | None:
        """Return our accuracy at a published rate: over training seeds where there are several, else over devices."""
        if sweep.label not in self.comparison.faults:
            return None
        found = self.comparison.summary(sweep.label, name, rates_at(sweep, self.scale, [rate]))
        return None if found is None else found[1] or found[0]

    def theirs(self, row: Planned, sweep: StudySweep, rate: float) -> float | None:
        """Return the published accuracy, or None."""
        if sweep.published is None or row.row.published is None:
            return None
        return self.published[sweep.published].accuracy(row.row.published, rate)

    def points(self, sweep: StudySweep) -> dict[str, list[tuple[float, Interval]]]:
        """Return our rates and accuracies by row, as far as they were measured; rate 0 is fault-free."""
        published = (0.0, *sweep.rates)
        rates = list(zip(published, rates_at(sweep, self.scale, published), strict=True))
        found: dict[str, list[tuple[float, Interval]]] = {}
        for entry in self.planned:
            measured = [(own, self.interval(entry.row.name, sweep, rate)) for rate, own in rates]
            found[entry.row.name] = [(own, interval) for own, interval in measured if interval is not None]
        return found

    def has_one_seed(self, name: str) -> bool:
        """Tell whether some of a row's accuracies come from one training seed."""
        measured = [
            self.comparison.seeds(sweep.label, name, rates_at(sweep, self.scale, [rate]))
            for sweep in self.study.sweeps
            for rate in (0.0, *sweep.rates)
        ]
        return any(len(seeds) == 1 for seeds in measured)

    @property
    def cost(self) -> Cost:
        """What all runs of the study took (shared ones too)."""
        return total_cost(self.planned, self.earlier)


def collect(
    study: Study,
    planned: Sequence[Planned],
    *,
    scale: str,
    settings: Scale,
    published: Mapping[str, PublishedTable],
    out: Path,
    earlier: Mapping[str, Run] | None = None,
) -> Outcome:
    """Join the records of all rows in ``out/records.jsonl``, and compare them.

    Args:
        study: The study.
        planned: Its rows and runs.
        scale: Name of the scale.
        settings: What it changes.
        published: The published tables.
        out: Folder of the result, made when missing.
        earlier: What earlier results know of runs that the cache does not have.
    """
    earlier = earlier or {}
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for entry in planned:
        for job in entry.jobs:
            for measurement in entry.measurements:
                # the rate protocol may end at another rate for each seed, and the row is one all the same
                same = {"model": entry.row.name, "training": entry.row.name}
                found = earlier[job.key].records(measurement) if job.key in earlier else records(job, measurement)
                lines += [{**line, **same} for line in found]
    atomic_write(out / RECORDS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    comparison = read_comparison(out / RECORDS) if lines else nothing_compared()
    results = check(study, comparison, scale=scale, published=published)
    return Outcome(
        study=study,
        scale=scale,
        settings=settings,
        planned=planned,
        comparison=comparison,
        results=results,
        published=published,
        earlier=earlier,
    )


def write(outcome: Outcome, out: Path) -> str:
    """Write ``table.md`` and ``.csv``, ``result.json``, ``runs.jsonl`` and pictures to a folder; return Markdown."""
    text = to_markdown(outcome)
    for sweep in outcome.study.sweeps:
        if figures.worth_drawing(points := outcome.points(sweep)):
            figures.draw(points, fault_name(sweep.label), out)
    atomic_write(out / "table.md", text.encode())
    atomic_write(out / "table.csv", to_csv(_lines(outcome)).encode())
    atomic_write(out / "result.json", (json.dumps(_plain(outcome), indent=1) + "\n").encode())
    found = [run.model_dump(mode="json", exclude_none=True) for run in runs(outcome.planned, outcome.earlier)]
    atomic_write(out / FILE, "".join(json.dumps(run) + "\n" for run in found).encode())
    return text


def to_markdown(outcome: Outcome) -> str:
    """Return the tables, the orderings and how they were made."""
    study = outcome.study
    lines = [f"# {study.title}", ""]
    if outcome.scale == "small" and study.small:
        lines += [f"Scale `small`: {study.small}", ""]
    for sweep in study.sweeps:
        lines += _table(outcome, sweep)
    if outcome.results:
        lines += _orderings(outcome.results)
    lines += [f"- {entry.row.name}: {entry.row.note}" for entry in outcome.planned if entry.row.note]
    lines += [f"- {row}: the rate protocol kept {rates}." for row, rates in _kept_rates(outcome).items()]
    lines += _mixed(outcome)
    lines += _taken(outcome)
    return "\n".join([*lines, "", *_how(outcome)]) + "\n"


def _mixed(outcome: Outcome) -> list[str]:
    """Return lines on rows whose trainings are of several networks: a search that is run anew may find another."""
    sizes: dict[str, dict[tuple[int, int], list[str]]] = {}
    for run in runs(outcome.planned, outcome.earlier):
        sizes.setdefault(run.row, {}).setdefault((run.params, run.flops), []).append(str(run.seed))
    return [
        f"- {row}: **its trainings are of different networks**, which a mean mixes: "
        + "; ".join(f"{params} parameters (seed {', '.join(seeds)})" for (params, _), seeds in found.items())
        + "."
        for row, found in sizes.items()
        if len(found) > 1
    ]


def _taken(outcome: Outcome) -> list[str]:
    """Return lines on what earlier results were taken for."""
    taken: list[str] = []
    unknown: list[str] = []
    for entry in outcome.planned:
        found = [outcome.earlier[job.key] for job in entry.jobs if job.key in outcome.earlier]
        for names, runs_of in ((taken, found), (unknown, [run for run in found if run.test_digest is None])):
            if runs_of:
                names.append(f"{entry.row.name} (seed {', '.join(str(run.seed) for run in runs_of)})")
    lines = [f"- From an earlier result, by the hashes of its runs: {'; '.join(taken)}."] if taken else []
    if unknown:
        lines.append(
            "- Not checked, as that result does not say it: that these were measured on the same images, "
            f"{'; '.join(unknown)}."
        )
    return lines


def _kept_rates(outcome: Outcome) -> dict[str, str]:
    """Return, by row, the training rate that the rate protocol kept for each seed."""
    kept = {}
    for entry in outcome.planned:
        protocol = [job for job in entry.jobs if job.by_rate_protocol]
        found = [
            (job.seed, outcome.earlier[job.key].trained_for if job.key in outcome.earlier else trained_for(job))
            for job in protocol
            if job.key in outcome.earlier or trained(job)
        ]
        if found:
            kept[entry.row.name] = ", ".join(f"{rate} (seed {seed})" for seed, rate in found)
    return kept


def _table(outcome: Outcome, sweep: StudySweep) -> list[str]:
    rates = (0.0, *sweep.rates)
    ours = rates_at(sweep, outcome.scale, rates)
    heads = [
        "clean" if not rate else f"{rate:g}" + (f" (ours {own:g})" if own != rate else "")
        for rate, own in zip(rates, ours, strict=True)
    ]
    lines = [f"## {fault_name(sweep.label)}, accuracy in percent", ""]
    lines += ["| network, training | | params | FLOPs | " + " | ".join(heads) + " |"]
    lines += ["|---|---|---:|---:|" + "---:|" * len(heads)]
    sizes = {model.name: model for model in outcome.comparison.models}
    for entry in outcome.planned:
        name = entry.row.name
        size = sizes.get(name)
        cells = [_cell(outcome.interval(name, sweep, rate)) for rate in rates]
        shown = [big(size.params), big(size.flops)] if size is not None else ["", ""]
        lines.append(f"| {name} | ours | {' | '.join([*shown, *cells])} |")
        theirs = [outcome.theirs(entry, sweep, rate) for rate in rates]
        if any(value is not None for value in theirs) and entry.row.published is not None and sweep.published:
            row = outcome.published[sweep.published].row(entry.row.published)
            assert row is not None
            shown = [f"{value:g}M" if value is not None else "" for value in (row.params, row.flops)]
            cells = ["" if value is None else f"{100 * value:.1f}" for value in theirs]
            lines.append(f"| | published | {' | '.join([*shown, *cells])} |")
    if figures.worth_drawing(outcome.points(sweep)):
        label = fault_name(sweep.label)
        lines += ["", f"![Accuracy over the rate of {label}]({figures.stem(label)}.png)"]
    return [*lines, ""]


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "not run"
    mean = f"{100 * interval.mean:.1f}"
    if not is_known(interval.low) or interval.low == interval.high:
        return mean
    return f"{mean} ({100 * max(0.0, interval.low):.1f}–{100 * min(1.0, interval.high):.1f})"


def _orderings(results: Sequence[Result]) -> list[str]:
    lines = ["## What the paper says, and what was measured here", ""]
    lines += ["Differences in points, with 95% intervals.", ""]
    lines += ["| claim | at this scale | comparison | ours | published |", "|---|---|---|---:|---:|"]
    for result in results:
        for number, pair in enumerate(result.pairs):
            head = (result.ordering.claim, _verdict(result)) if not number else ("", "")
            shown = pair.shown
            ours = "" if shown is None else _signed(shown)
            theirs = "" if pair.published is None else f"{100 * pair.published:+.1f}"
            lines.append(f"| {head[0]} | {head[1]} | {pair.better} minus {pair.worse} | {ours} | {theirs} |")
    return [*lines, ""]


def _verdict(result: Result) -> str:
    if result.ordering.measure != "same":
        return _VERDICTS[result.verdict]
    differs, unseen = "**does not hold: they differ**", "no difference is seen, which proves none"
    if result.verdict == "undecided" and not all(_is_over_seeds(pair) for pair in result.pairs):
        return "undecided: one training of a net, and trainings differ by chance"
    return {"reversed": differs, "undecided": unseen}.get(result.verdict, _VERDICTS[result.verdict])


def _is_over_seeds(pair: Pair) -> bool:
    """Tell whether both sides were trained from several seeds."""
    return pair.over_seeds is not None and is_known(pair.over_seeds.low)


def _signed(interval: Interval) -> str:
    if not is_known(interval.low):
        return f"{100 * interval.mean:+.1f}"
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def _how(outcome: Outcome) -> list[str]:
    settings = outcome.settings
    spent = outcome.cost
    seeds = sorted({seed for model in outcome.comparison.models for seed in model.seeds})
    alone = [entry.row.name for entry in outcome.planned if outcome.has_one_seed(entry.row.name)]
    over_devices = "over devices, which tells nothing of new trainings"
    if len(seeds) > 1:
        how = "Student's t over training seeds" + (
            f" (rows of one seed, {'; '.join(alone)}: {over_devices})" if alone else ""
        )
        claim = (
            "A claim holds where both Welch's t over training seeds and the hierarchical bootstrap over seeds, devices "
            "and images exclude zero, in every comparison that it is made of."
        )
        if alone:
            claim += (
                " Two nets of one seed each are compared over devices alone, and one of one seed with one of several "
                "is undecided."
            )
    else:
        how = f"Student's t {over_devices}"
        claim = "A claim holds where the interval, paired over devices, excludes zero in every comparison of it."
    return [
        f"Training seeds {', '.join(map(str, seeds)) or 'none yet'}; {settings.devices} devices a rate, the same ones "
        f"for all networks; {outcome.comparison.num_images} test images. Intervals: {how}. {claim} Intervals are not "
        "corrected for their number.",
        "",
        f"Processor time of all runs: {'' if spent.is_all else 'at least '}{spent.cpu_s / 60:.1f} minutes "
        f"({'; '.join(spent.machines)}). Config hashes and the "
        "accuracy of each seed and device are in runs.jsonl.",
    ]


def _lines(outcome: Outcome) -> list[list[Any]]:
    names = "row,fault,published_rate,rate,published,mean,low,high,method,seeds,params,flops"
    rows: list[list[Any]] = [names.split(",")]
    sizes = {model.name: model for model in outcome.comparison.models}
    for sweep in outcome.study.sweeps:
        for entry in outcome.planned:
            for rate in (0.0, *sweep.rates):
                name, own = entry.row.name, rates_at(sweep, outcome.scale, [rate])[0]
                head = [name, sweep.label, rate, own, outcome.theirs(entry, sweep, rate)]
                interval = outcome.interval(name, sweep, rate)
                if interval is None:
                    rows.append([*head, *[None] * 7])
                    continue
                size = sizes[name]
                bounds = [f"{value:.5f}" if is_known(value) else None for value in (interval.low, interval.high)]
                sizes_of = [len(size.seeds), size.params, size.flops]
                rows.append([*head, f"{interval.mean:.5f}", *bounds, interval.method, *sizes_of])
    return rows


def _plain(outcome: Outcome) -> dict[str, Any]:
    spent = outcome.cost
    orderings = [
        {
            "claim": result.ordering.claim,
            "verdict": result.verdict,
            "pairs": [
                {
                    **{key: getattr(pair, key) for key in ("better", "worse", "verdict", "published")},
                    "interval": _interval(pair.interval),
                    "over_seeds": _interval(pair.over_seeds),
                }
                for pair in result.pairs
            ],
        }
        for result in outcome.results
    ]
    scale = outcome.settings.model_dump(mode="json")
    return {
        "study": outcome.study.name,
        "scale": {"name": outcome.scale, **scale},
        "cpu_s": round(spent.cpu_s, 1),
        "cpu_s_is_all": spent.is_all,
        "machines": spent.machines,
        "orderings": orderings,
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    plain = asdict(interval)
    return {key: None if isinstance(value, float) and not is_known(value) else value for key, value in plain.items()}
