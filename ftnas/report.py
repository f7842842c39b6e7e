"""A run's report: tables, pictures and one self-contained HTML file, from the files of its run folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from ftnas import heatmaps, plots
from ftnas.records import Comparison, Difference, IntervalKind, nothing_compared, read_comparison
from ftnas.stats import ROUNDING, Interval
from ftnas.storage import atomic_write, read_journal
from ftnas.tables import (
    Cell,
    Report,
    big,
    chance_of,
    comparison_table,
    differences_to_csv,
    header,
    legend,
    rate_label,
    to_csv,
    to_markdown,
    vulnerability_table,
)
from ftnas.vulnerability import protection_to_csv, read_protection, read_single, single_to_csv, unfinished

FOLDER = "report"
_STAGES = {"search": "search", "control": "random control"}
_INKS = {plots.INK: "ink", plots.MUTED: "muted", plots.GRID: "line", plots.FILL: "fill", plots.PAPER: "panel"}


def build_report(path: str | Path) -> Report:
    """Compute a report from a run folder's ``records.jsonl`` and whatever else of a run lies there.

    Raises:
        ValueError: One line: no such folder, a run that measures no accuracy, no records, or a record or genotype that
            cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    settings = _settings(path)
    _check_kind(path, settings)
    vulnerabilities, protections = read_single(path / "single.jsonl"), read_protection(path / "protection.jsonl")
    if (vulnerabilities or protections) and not (path / "records.jsonl").exists():
        comparison = nothing_compared()
    else:
        kind: IntervalKind = "bootstrap" if _section(settings, "campaign").get("interval") == "bootstrap" else "student"
        comparison = read_comparison(path / "records.jsonl", interval=kind)
    names = [model.name for model in comparison.models]
    differences = [
        found
        for fault in comparison.faults
        for rate in (0.0, *comparison.rates[fault], None)
        for name in names[1:]
        if (found := comparison.difference(fault, name, names[0], rate)) is not None
    ]
    genotypes, searches, notes = {}, {}, [*comparison.notes, *unfinished(vulnerabilities)]
    for stage in ("search", "control"):
        if (path / stage / "genotype.json").exists():
            genotypes[stage] = _read_json(path / stage / "genotype.json")
        trials, torn = read_journal(path / stage / "trials.jsonl")
        if trials:
            searches[stage] = trials, read_journal(path / stage / "updates.jsonl")[0]
        if torn:
            notes.append(f"The last line of {stage}/trials.jsonl is torn and was left out.")
    info = _read_json(path / "run.json") if (path / "run.json").exists() else {}
    searching = not settings or bool(_section(settings, "search"))
    missing = {
        "search/genotype.json: no discovered cells are shown": "search" in genotypes or not searching,
        "search/trials.jsonl: no search history is shown": "search" in searches or not searching,
        "config.yaml: the settings are unknown": bool(settings),
        "run.json: command, code version and dataset digest are unknown": bool(info),
    }
    notes += [f"This run has no {what}." for what, there in missing.items() if not there]
    return Report(
        path=path,
        comparison=comparison,
        tables={fault: _table(comparison, fault, differences) for fault in comparison.faults},
        differences=differences,
        genotypes=genotypes,
        searches=searches,
        info=info,
        config=settings,
        notes=notes,
        vulnerabilities=vulnerabilities,
        protections=protections,
    )


def _check_kind(path: Path, settings: str) -> None:
    """Refuse a run that has no measurements by what it is, where its config tells that."""
    whole = _config(settings)
    if whole.get("partition"):
        raise ValueError(f"{path}: a study of nodes; its table is made by `ftnas nodes evaluate`")
    files = (path / f"{name}.jsonl" for name in ("records", "single", "protection"))
    if not whole or any(map(whole.get, ("campaign", "single_faults", "protections"))) or any(f.exists() for f in files):
        return
    if whole.get("bounds"):
        raise ValueError(f"{path}: this run has only bounds: {path / 'bounds' / 'table.md'}, by ftnas bounds --resume")
    without = "no campaign, single_faults or protections section"
    raise ValueError(f"{path}: this run measures nothing: its config has {without}; measure its models in one that has")


def _section(settings: str, name: str) -> dict[str, Any]:
    """Return one section of a run's config, empty where there is none or the text is no config."""
    section = _config(settings).get(name)
    return section if isinstance(section, dict) else {}


def _config(settings: str) -> dict[str, Any]:
    try:
        whole = yaml.safe_load(settings)
    except yaml.YAMLError:
        return {}
    return whole if isinstance(whole, dict) else {}


def _table(comparison: Comparison, fault: str, differences: list[Difference]) -> list[list[Cell]]:
    rates = comparison.rates[fault]
    clear = {(d.model, d.rate): d.verdict for d in differences if d.fault == fault}
    columns: list[tuple[float | None, list[float]]] = [(0.0, [0.0]), *((r, [r]) for r in rates)]
    columns += [(None, rates)] if rates else []
    grid = []
    for rate, averaged in columns:
        found = [comparison.summary(fault, model.name, averaged) for model in comparison.models]
        intervals = [None if summary is None else summary[0] for summary in found]
        top = max((i.mean for i in intervals if i is not None), default=None)
        grid.append(
            [
                Cell(
                    interval=interval,
                    best=interval is not None and top is not None and interval.mean >= top - ROUNDING,
                    mark=clear.get((model.name, rate), 0),
                )
                for model, interval in zip(comparison.models, intervals, strict=True)
            ]
        )
    return [list(row) for row in zip(*grid, strict=True)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({type(error).__name__}); restore the file") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}; restore the file")
    return data


def make_report(path: str | Path, *, console: Console | None = None) -> Report:
    """Build a run's report, write it to ``report/`` in the run folder, and print result, tables and where it is.

    Args:
        path: The run folder.
        console: Where to print; None takes standard output.

    Raises:
        ValueError: As ``build_report``, or the folder cannot be written.
    """
    report = build_report(path)
    try:
        page = write_report(report)
    except OSError as error:
        raise ValueError(f"{Path(path) / FOLDER} cannot be written ({error.strerror})") from None
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a log has no edge to fit into
    for fault in report.comparison.faults:
        console.print(comparison_table(report, fault))
        console.print(Text(report.headline(fault), style="bold"))
    if report.vulnerabilities:
        console.print(vulnerability_table(report))
    for study in report.protections:
        console.print(Text(study.verdict(), style="bold"))
    for note in report.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"report: {page}"), soft_wrap=True)
    return report


def write_report(report: Report) -> Path:
    """Write tables, pictures and ``report.html`` into ``report/``; return the path of the last."""
    folder = report.path / FOLDER
    pictures = _draw(report, folder)
    texts = {"report.html": _page(report, pictures)}
    if report.comparison.models:
        texts |= {"table.md": to_markdown(report), "table.csv": to_csv(report)}
        texts["differences.csv"] = differences_to_csv(report)
    if report.vulnerabilities:
        texts["single.csv"] = single_to_csv(report.vulnerabilities)
    if report.protections:
        texts["protection.csv"] = protection_to_csv(report.protections)
    for name, text in texts.items():
        atomic_write(folder / name, text.encode())
    return folder / "report.html"


def _draw(report: Report, folder: Path) -> dict[str, Markup]:
    """Save every picture as PNG and SVG; return each SVG ready for the page, by name."""
    figures: dict[str, tuple[plots.Figure, str]] = {}
    comparison, classes = report.comparison, report.info.get("num_classes")
    for fault in comparison.faults:
        curves = [curve for row in range(len(comparison.models)) if (curve := _curve(report, fault, row))]
        if comparison.rates[fault] and curves:
            figure = plots.accuracy_curves(
                curves,
                rate_label=rate_label(comparison.faults[fault]),
                title=f"Accuracy under {report.spelt(fault)} faults",
                chance=1 / classes if isinstance(classes, int) and classes > 0 else None,
            )
            label = f"Accuracy over fault rate under {report.spelt(fault)}; the numbers are in the table"
            figures[f"curves:{fault}"] = figure, label
    for stage, genotype in report.genotypes.items():
        label = f"Cells that the {_STAGES[stage]} found"
        figures[f"cells:{stage}"] = plots.draw_genotype(genotype), label
    for stage, (trials, updates) in report.searches.items():
        if len({trial.get("update") for trial in trials}) < 2:
            continue  # a control that scores its candidates at the end has no history
        label = f"Rewards of the {_STAGES[stage]} over its steps"
        figures[f"search:{stage}"] = plots.search_history(trials, updates=updates, title=_STAGES[stage]), label
    figures |= _vulnerability_figures(report)
    drawn, stems = {}, set[str]()
    for index, (key, (figure, label)) in enumerate(figures.items()):
        name, _, part = key.partition(":")
        plain = len(comparison.faults) == 1 if name == "curves" else part == "search"
        stem = _unused(name if plain else f"{name}-{_slug(part)}", stems)
        stems.add(stem.casefold())
        _, svg = plots.save(figure, folder / stem)
        drawn[key] = _inline(svg.read_text(encoding="utf-8"), prefix=f"p{index}-", label=label)
    return drawn


def _vulnerability_figures(report: Report) -> dict[str, tuple[plots.Figure, str]]:
    figures: dict[str, tuple[plots.Figure, str]] = {}
    for found in report.vulnerabilities:
        key, what = f"{found.name}, {found.fault}", f"{found.name}, {report.spelt(found.fault)}"
        figures[f"map:{key}"] = (
            heatmaps.sensitivity_map(
                found.rows,
                found.columns,
                100 * found.cells,
                title=f"Single faults: {what}",
                value_label="probability (%) that one fault changes the answer, by layer and bit",
            ),
            f"Probability that a fault changes the answer of {what}, by layer and bit; the numbers are in single.csv",
        )
        rankings = {"layers": found.layers, "operators": found.operators}
        for by, parts in ((by, parts) for by, parts in rankings.items() if parts):
            figures[f"{by}:{key}"] = (
                heatmaps.ranking(
                    list(parts), list(parts.values()), title=f"Most vulnerable {by}: {what}", value_label="probability"
                ),
                f"Ranking of the {by} of {what}; the numbers are in single.csv",
            )
    for study in report.protections:
        what = f"{study.name}, {study.protection}"
        names = [f"{len(plan.layers)} layer{'' if len(plan.layers) == 1 else 's'}" for plan in study.plans]
        points = [
            heatmaps.Protection(name=name, overhead=100 * plan.overhead, accuracy=plan.accuracy, chosen=plan.chosen)
            for name, plan in zip(names, study.plans, strict=True)
        ]
        guesses = [
            heatmaps.Protection(name="", overhead=100 * plan.overhead, accuracy=_guess(plan.predicted))
            for plan in study.plans
            if plan.predicted == plan.predicted
        ]
        figures[f"protection:{what}"] = (
            heatmaps.protection_curve(
                points,
                predicted=guesses,
                target=study.target,
                title=f"Protection: {what}",
                overhead_label=f"overhead (% of {'weight bits' if study.method == 'ecc' else 'multiply-accumulates'})",
            ),
            f"Accuracy over the overhead of protecting {what}; the numbers are in protection.csv",
        )
    return figures


def _guess(accuracy: float) -> Interval:
    """Return a predicted accuracy, which has no interval."""
    return Interval(mean=accuracy, low=math.nan, high=math.nan, num=1, method="predicted")


def _curve(report: Report, fault: str, row: int) -> plots.Curve | None:
    rates = [0.0, *report.comparison.rates[fault]]
    cells = zip(rates, report.tables[fault][row], strict=False)  # the table's last column is a mean over rates
    found = [(rate, cell.interval) for rate, cell in cells if cell.interval is not None]
    if not found:
        return None
    return plots.Curve(
        name=report.comparison.models[row].name,
        rates=[rate for rate, _ in found],
        mean=[interval.mean for _, interval in found],
        low=[interval.low for _, interval in found],
        high=[interval.high for _, interval in found],
    )


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text)


def _unused(stem: str, taken: set[str]) -> str:
    """Return a name for a file, with a number where another has it, perhaps in another case."""
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name.casefold() not in taken)


def _settings(path: Path) -> str:
    """Return ``config.yaml`` of a run folder, "" without one; a ValueError if it is not what the run began with."""
    config, info = path / "config.yaml", path / "run.json"
    if not config.exists():
        return ""
    text = config.read_bytes()
    stored = _read_json(info).get("config_sha256") if info.exists() else None
    if stored not in (None, hashlib.sha256(text).hexdigest()):
        raise ValueError(f"{config} was changed since the run began, and the report would follow it; restore it")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: no UTF-8 text ({error.reason} at byte {error.start}); restore it") from None


def _inline(svg: str, *, prefix: str, label: str) -> Markup:
    """Turn an SVG file into an element of a page: names that meet no other's, colours that follow the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for color, name in _INKS.items():
        svg = svg.replace(color, f"var(--{name})")
    size = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', svg)
    width = float(size.group(1)) if size else 600.0
    title = Markup.escape(label)
    head = f'<svg role="img" aria-label="{title}" style="max-width:{1.5 * width:.0f}px;min-width:{0.95 * width:.0f}px"'
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg, count=4)
    return Markup(svg.replace("<svg", head, 1).replace("*{", "svg *{", 1))


def _page(report: Report, pictures: dict[str, Markup]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ftnas", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparison = report.comparison
    seeds = {model.name: ", ".join(map(str, model.seeds)) for model in comparison.models}
    shown: dict[str, Any] = {
        "chance_of": chance_of,
        "big": big,
        "header": header,
        "legend": legend,
    }
    shown["rate_label"] = rate_label
    return environment.get_template("report.html.j2").render(
        report=report,
        comparison=comparison,
        pictures=pictures,
        seeds=seeds,
        stages=_STAGES,
        facts=_facts(report),
        columns=lambda fault: [0.0, *comparison.rates[fault], *([None] if comparison.rates[fault] else [])],
        **shown,
    )


def _facts(report: Report) -> dict[str, str]:
    """Return what ``run.json`` tells, the important first."""
    names = {
        "command": "command",
        "version": "ftnas",
        "commit": "commit",
        "dataset_digest": "training images, digest",
        "test_digest": "test images, digest",
        "config_sha256": "config SHA-256",
        "created": "started",
    }
    info = {key: value for key, value in report.info.items() if key not in ("kind", "schema")}
    order = [*(key for key in names if key in info), *(key for key in info if key not in names)]
    return {
        names.get(key, key.replace("_", " ")): info[key] if isinstance(info[key], str) else json.dumps(info[key])
        for key in order
        if info[key] is not None
    }
