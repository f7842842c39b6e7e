"""What a report says: the comparison as a table for the terminal, Markdown and CSV, and its result in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ftnas.records import Comparison, Difference, is_known
from ftnas.stats import ROUNDING, Interval
from ftnas.vulnerability import ProtectionStudy, Vulnerability
from ftnas.vulnerability import to_csv as csv_text

_FAULT_NAMES = {"mibb": "MiBB", "adsaf": "adSAF"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An entry of the comparison table: percent, ``mark`` +1 or -1 where it clearly differs from the reference."""

    interval: Interval | None
    best: bool = False
    mark: int = 0

    @property
    def number(self) -> str:
        """The mean in percent, or a dash."""
        return "–" if self.interval is None else f"{100 * self.interval.mean:.1f}"

    @property
    def mean(self) -> str:
        """The mean in percent, with a mark for a clear difference."""
        return self.number + {1: " ▲", -1: " ▼", 0: ""}[self.mark]

    @property
    def half_width(self) -> str:
        """The longer side of the interval in points, as the terminal shows it, or nothing."""
        if self.interval is None or not is_known(self.interval.low):
            return ""
        return f"±{100 * max(self.interval.high - self.interval.mean, self.interval.mean - self.interval.low):.1f}"

    @property
    def bounds(self) -> str:
        """The interval in percent, or nothing where there is none."""
        if self.interval is None or not is_known(self.interval.low):
            return ""
        return f"{100 * max(0.0, self.interval.low):.1f}–{100 * min(1.0, self.interval.high):.1f}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report shows, computed; nothing is written yet.

    Attributes:
        path: The run folder.
        comparison: The records.
        tables: Fault -> rows of cells, one a model; columns are rate 0, the rates above, and their mean.
        differences: Of every model to the first, at every rate and over the mean of the rates above 0.
        genotypes: Stage -> genotype, of the searches the run holds.
        searches: Stage -> (trials, updates).
        info: ``run.json``, empty where missing.
        config: Text of ``config.yaml``, empty where missing.
        notes: What is missing or was left out.
        vulnerabilities: What single faults do.
        protections: What to protect.
    """

    path: Path
    comparison: Comparison
    tables: dict[str, list[list[Cell]]]
    differences: list[Difference]
    genotypes: dict[str, dict[str, Any]]
    searches: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    info: dict[str, Any]
    config: str
    notes: list[str]
    vulnerabilities: list[Vulnerability]
    protections: list[ProtectionStudy]

    @property
    def reference(self) -> str:
        """Name of the model that the others are compared with: the first one measured."""
        return self.comparison.models[0].name if self.comparison.models else "none"

    def spelt(self, fault: str) -> str:
        """Return a fault's usual spelling, or its label where another fault of the run is spelt alike."""
        return spellings([*self.comparison.faults, *(found.fault for found in self.vulnerabilities)])[fault]

    def headline(self, fault: str) -> str:
        """Say in words who keeps the highest accuracy under a fault, and whether that is certain."""
        rates, shown = self.comparison.rates[fault], self.spelt(fault)
        means = [
            (row[-1].interval.mean, model.name)
            for model, row in zip(self.comparison.models, self.tables[fault], strict=True)
            if row[-1].interval is not None
        ]
        if not rates or not means:
            return f"No model was measured at all {shown} rates: there is nothing to rank."
        means.sort(key=lambda entry: -entry[0])
        value, winner = means[0]
        over = f"averaged over {len(rates)} rates" if len(rates) > 1 else f"at rate {rates[0]:g}"
        if len(means) == 1:
            return f"Under {shown} faults, {over}, {winner} keeps {100 * value:.1f}%. It was compared with nothing."
        text = self._first_two(fault, over, *means[:2])
        rival = means[1][1]
        behind = self.comparison.difference(fault, winner, self.reference, None)
        if self.reference not in (winner, rival) and behind is not None:
            side = "above" if behind.interval.mean < -ROUNDING else "below"
            text += f" {self.reference} is {points(behind)} {side} {winner} ({certainty(behind)})."
        return text

    def _first_two(self, fault: str, over: str, first: tuple[float, str], second: tuple[float, str]) -> str:
        """Compare the two highest means: each is of a model's own devices, the difference of those that both have."""
        shown, (value, winner), (other, rival) = self.spelt(fault), first, second
        gap = self.comparison.difference(fault, winner, rival, None)
        both = f"{over}, {winner} ({100 * value:.1f}%) and {rival} ({100 * other:.1f}%)"
        if gap is None:
            return f"No clear winner under {shown} faults: {both} have no device in common."
        same = abs(gap.interval.mean - (value - other)) <= ROUNDING
        where = "" if same else " on the devices that both have"
        if gap.verdict > 0:
            return (
                f"Under {shown} faults, {over}, {winner} is the most accurate: {100 * value:.1f}%, "
                f"{points(gap)} above {rival}, the next best{where} ({certainty(gap)})."
            )
        if gap.interval.mean < -ROUNDING:
            lead = "The order depends on the devices" if gap.verdict else "No clear winner"
            apart = f", each on its own devices; {rival} is {points(gap)} above {winner}{where}"
        else:
            lead, apart = "No clear winner", f" differ by {points(gap)}{where}"
        return f"{lead} under {shown} faults: {both}{apart} ({certainty(gap)})."

    def method(self) -> str:
        """Say how the intervals were made, for the captions."""
        seeds = max(len(model.seeds) for model in self.comparison.models)
        data = f"{self.comparison.num_images} test images, {self.comparison.devices_a_rate} devices a rate"
        if seeds == 1:
            how = "Student t" if self.comparison.interval == "student" else "bootstrap of devices and images"
            return (
                f"95% intervals over devices ({how}; differences paired by device); {data}, one training seed: "
                "they tell nothing about another training."
            )
        return (
            f"95% intervals of the hierarchical bootstrap over training seeds, devices and images; {data}, {seeds} "
            "training seeds. A difference counts as clear only where Welch's t over training seeds excludes zero too: "
            "with few seeds the bootstrap is too narrow."
        )


def fault_name(fault: str) -> str:
    """Return a fault model's usual spelling."""
    return _FAULT_NAMES.get(fault, fault.replace("_", " "))


def spellings(faults: Iterable[str]) -> dict[str, str]:
    """Return the usual spelling of each label; those that would differ in case or spaces alone stay as they are."""
    alike = {fault: " ".join(fault_name(fault).casefold().split()) for fault in faults}
    count = Counter(alike.values())
    return {fault: fault_name(fault) if count[alike[fault]] == 1 else fault for fault in alike}


def rate_label(rate_name: str) -> str:
    """Return a rate's name for people: ``mac_error_rate`` is the MAC error rate."""
    words = {"mac": "MAC", "sa0": "SA0", "sa1": "SA1", "saf": "SAF"}
    return " ".join(words.get(word, word) for word in rate_name.split("_"))


def points(difference: Difference) -> str:
    """Return the size of a difference in percentage points."""
    return f"{abs(100 * difference.interval.mean):.1f} points"


def certainty(difference: Difference) -> str:
    """Return the interval of a difference in words: the one that decides whether zero is excluded."""
    interval = difference.shown
    if not is_known(interval.low):
        return "too few devices or training seeds for an interval"
    zero = "zero is excluded" if difference.verdict else "zero is not excluded"
    return f"95% interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f}: {zero}"


def header(report: Report, fault: str) -> list[str]:
    """Return the comparison table's column titles."""
    rates = report.comparison.rates[fault]
    return ["model", "params", "FLOPs", "clean", *(f"{rate:g}" for rate in rates), *(["mean"] if rates else [])]


def big(number: int) -> str:
    """Return a count as 2.71M, 919M or 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def legend(report: Report) -> str:
    """Return the line that explains the table's signs."""
    return (
        f"Accuracy in percent; bold: the best of a column; ▲ above, ▼ below {report.reference} with an interval of the "
        "difference that excludes zero (95% each, not corrected for their number); mean: over the rates above 0."
    )


def comparison_table(report: Report, fault: str) -> Table:
    """Return the comparison under one fault, for the terminal."""
    title = f"Accuracy (%) under {report.spelt(fault)} by {rate_label(report.comparison.faults[fault])}"
    table = Table(
        title=Text(title), caption=Text(f"{legend(report)} {report.method()}"), caption_justify="left", box=SIMPLE_HEAD
    )
    # Sizes stand under the names, so that seven columns of numbers fit into 80 characters.
    table.add_column(Text("model\nparams, FLOPs"), overflow="fold", min_width=14)
    for name in header(report, fault)[3:]:
        table.add_column(Text(name), justify="right", no_wrap=True, min_width=6)
    for model, row in zip(report.comparison.models, report.tables[fault], strict=True):
        cells = [Text(model.name).append(f"\n{big(model.params)}, {big(model.flops)}", style="dim")]
        for cell in row:
            text = Text(cell.mean, style="bold" if cell.best else "")
            cells.append(text.append(f"\n{cell.half_width}", style="not bold dim") if cell.half_width else text)
        table.add_row(*cells)
    return table


def vulnerability_table(report: Report, *, top: int = 5) -> Table:
    """Return what single faults do, for the terminal: each model as a whole, and its most vulnerable layers."""
    table = Table(
        title=Text("Probability (%) that one fault changes the answer"),
        caption=Text("95% intervals of stratified samples; a fault and an image at a time."),
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column(Text("model, fault"), overflow="fold")
    table.add_column(Text("part"), overflow="fold")
    table.add_column(Text("probability"), justify="right", no_wrap=True)
    for entry in report.vulnerabilities:
        name = Text(f"{entry.name}, {report.spelt(entry.fault)}")
        if entry.whole is None:
            table.add_row(name, Text(entry.missing), "")
        else:
            table.add_row(name, Text("all"), Text(chance_of(entry.whole)))
        for layer, interval in sorted(entry.layers.items(), key=lambda item: -item[1].mean)[:top]:
            table.add_row("", Text(layer), Text(chance_of(interval)))
    return table


def chance_of(interval: Interval) -> str:
    """Return a probability with its interval in percent, two digits that count."""
    percent = [100 * value for value in (interval.mean, interval.low, interval.high)]
    mean, low, high = (f"{value:.2g}" if value < 99.5 else f"{value:.0f}" for value in percent)
    return f"{mean} ({low} to {high})"


def to_markdown(report: Report) -> str:
    """Return headline, comparison table and notes of every fault as Markdown."""
    lines = []
    for fault, rows in report.tables.items():
        titles = header(report, fault)
        lines += [f"## {_md(report.spelt(fault))} by {_md(rate_label(report.comparison.faults[fault]))}", ""]
        lines += [_md(report.headline(fault)), "", "| " + " | ".join(titles) + " |"]
        lines += ["|" + "---|" + "---:|" * (len(titles) - 1)]
        for model, row in zip(report.comparison.models, rows, strict=True):
            cells = [_md(model.name), big(model.params), big(model.flops)]
            for cell in row:
                mean = f"**{cell.mean}**" if cell.best else cell.mean
                cells.append(f"{mean} ({cell.bounds})" if cell.bounds else mean)
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", _md(legend(report)), "", _md(report.method()), ""]
    return "\n".join([*lines, *(f"- {_md(note)}" for note in report.notes)]).rstrip() + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text.replace("\n", " "))


def to_csv(report: Report) -> str:
    """Return every mean with its intervals as CSV, one line a fault, model and rate (empty: mean of the rates)."""
    names = "fault,rate_name,rate,model,training,params,flops,train_seeds,mean,low,high,method,seed_low,seed_high"
    rows: list[Sequence[Any]] = [names.split(",")]
    for fault, rate_name in report.comparison.faults.items():
        rates = report.comparison.rates[fault]
        for rate, averaged in [(0.0, [0.0]), *((r, [r]) for r in rates), *([(None, rates)] if rates else [])]:
            for model in report.comparison.models:
                found = report.comparison.summary(fault, model.name, averaged)
                if found is not None:
                    size = (model.training, model.params, model.flops, len(model.seeds))
                    rows.append([fault, rate_name, rate, model.name, *size, *_numbers(*found)])
    return csv_text(rows)


def differences_to_csv(report: Report) -> str:
    """Return every difference to the reference as CSV; ``clear`` is 1 or -1 where zero is excluded, else 0."""
    names = "fault,rate,model,reference,mean,low,high,method,seed_low,seed_high,clear"
    rows: list[Sequence[Any]] = [names.split(",")]
    for d in report.differences:
        rows.append([d.fault, d.rate, d.model, d.reference, *_numbers(d.interval, d.over_seeds), d.verdict])
    return csv_text(rows)


def _numbers(interval: Interval, over_seeds: Interval | None) -> list[Any]:
    values = [interval.mean, interval.low, interval.high]
    seeds = [over_seeds.low, over_seeds.high] if over_seeds is not None else [None, None]
    shown = [f"{v:.6f}" if v is not None and is_known(v) else "" for v in (*values, *seeds)]
    return [*shown[:3], interval.method, *shown[3:]]
