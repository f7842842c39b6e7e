import base64
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from ftnas.records import Comparison, read_comparison
from ftnas.report import build_report, make_report
from ftnas.tables import comparison_table, differences_to_csv, to_csv, to_markdown

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NAMES = ("found", "random", "resnet20", "<b>evil</b> & | *x* $y$")
GENOTYPE = {
    "version": 1,
    "name": "found",
    "normal": {
        "2": [["relu_conv_bn_3x3", 0], ["skip", 1]],
        "3": [["sep_conv_3x3", 2], ["none", 0]],
        "4": [["dil_conv_3x3", 3], ["conv_1x1", 1]],
        "5": [["max_pool_3x3", 4], ["sep_conv_5x5", 2]],
    },
    "reduce": {
        "2": [["skip", 0], ["relu_conv_bn_5x5", 1]],
        "3": [["dil_conv_3x3", 2], ["sep_conv_3x3", 0]],
        "4": [["max_pool_3x3", 1], ["conv_1x1", 3]],
        "5": [["dil_conv_3x3", 4], ["skip", 2]],
    },
}


def record(name: str, correct: np.ndarray, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": name,
        "train_seed": 0,
        "training": "mibb 0.003",
        "fault": "mibb",
        "rate_name": "mac_error_rate",
        "rate": 1e-3,
        "device": 0,
        "accuracy": float(correct.mean()),
        "num_images": len(correct),
        "hits": 10,
        "sites": 100_000,
        "flops": 1_234_567,
        "params": 24_300,
        "correct": base64.b64encode(np.packbits(correct.astype(bool)).tobytes()).decode(),
        **changes,
    }


def make_records(
    *, seeds: int = 1, devices: int = 10, gap: float = 0.05, names: tuple[str, ...] = NAMES, images: int = 359
) -> list[dict[str, Any]]:
    """Return plausible records: each further model loses ``gap`` more, in proportion to the damage of the rate."""
    random = np.random.default_rng(5)
    difficulty = random.uniform(size=images)
    lines = []
    for index, name in enumerate(names):
        for seed in range(seeds):
            skill = 0.97 + random.normal() * 0.004
            for step, rate in enumerate((0.0, *RATES)):
                for device in range(devices) if rate else (None,):
                    damage = 0.03 * step**2 + index * gap * min(1.0, step / 2)
                    level = skill - damage + (0.01 + 0.1 * damage) * random.normal()
                    correct = difficulty < np.clip(level, 0.1, 1) if rate else difficulty < skill
                    lines.append(
                        record(name, correct, train_seed=seed, rate=rate, device=device, params=24_300 + index)
                    )
    return lines


def write(run: Path, lines: list[dict[str, Any]]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def whole_run(run: Path, **options: Any) -> Path:
    """Write a run folder with everything in it."""
    write(run, make_records(**options))
    random = np.random.default_rng(1)
    for stage in ("search", "control"):
        (run / stage).mkdir()
        (run / stage / "genotype.json").write_text(json.dumps(GENOTYPE))
        reward = [0.6 - 0.3 * math.exp(-u / 40) + 0.05 * random.normal() for u in range(120)]
        trials = [{"update": u // 2, "reward": r, "genotype": GENOTYPE} for u, r in enumerate(reward)]
        (run / stage / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    updates = [{"update": u, "entropy": 1 - u / 100} for u in range(60)]
    (run / "search" / "updates.jsonl").write_text("".join(json.dumps(update) + "\n" for update in updates))
    config = "name: quickstart\nseed: 0\ncampaign:\n  devices: 10\n  note: <script>\n"
    (run / "config.yaml").write_text(config)
    digest = hashlib.sha256(config.encode()).hexdigest()
    info = {"kind": "ftnas run", "schema": 1, "version": "0.1.0", "commit": "1f" * 20, "config_sha256": digest}
    info |= {"command": "ftnas run quickstart", "dataset_digest": "d1" * 16, "num_classes": 10, "created": "now"}
    (run / "run.json").write_text(json.dumps(info))
    return run


class Page(HTMLParser):
    """Collects what a test asks of the page, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value is not None]
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = whole_run(tmp_path_factory.mktemp("runs") / "quickstart")
    make_report(path, console=Console(file=io.StringIO()))
    return path


def test_all_outputs(run: Path) -> None:
    names = {path.name for path in (run / "report").iterdir()}
    pictures = {
        f"{n}.{s}" for n in ("curves", "cells", "cells-control", "search", "search-control") for s in ("png", "svg")
    }
    assert names == pictures | {"table.md", "table.csv", "differences.csv", "report.html"}


def test_page_is_self_contained(run: Path) -> None:
    text = (run / "report" / "report.html").read_text()
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value is not None and value.startswith(("#", "data:")), (tag, key, value)
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text))
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def test_page_references_meet_their_own_picture(run: Path) -> None:
    text = (run / "report" / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert wanted and wanted <= set(page.ids)


def test_page_says_everything(run: Path) -> None:
    text = (run / "report" / "report.html").read_text()
    said = " ".join(Page(text).texts)
    for name in NAMES:
        assert said.count(name) >= 3
    assert "<b>evil" not in text and "<script" not in text
    digest = json.loads((run / "run.json").read_text())["config_sha256"]
    for fact in ("ftnas run quickstart", "1f" * 20, "d1" * 16, digest, "devices: 10", "one training seed"):
        assert fact in said
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_numbers_are_the_records(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(io.StringIO((run / "report" / "table.csv").read_text())))
    assert len(rows) == len(NAMES) * (len(RATES) + 2)
    for row in rows:
        if row["rate"] in ("", "0.0"):
            continue
        mine = [x["accuracy"] for x in lines if x["model"] == row["model"] and x["rate"] == float(row["rate"])]
        low, high = stats.t.interval(0.95, 9, np.mean(mine), stats.sem(mine))
        shown = [float(row[key]) for key in ("mean", "low", "high")]
        assert shown == pytest.approx([np.mean(mine), low, high], abs=1e-6)
    rows = list(csv.DictReader(io.StringIO((run / "report" / "differences.csv").read_text())))
    assert len(rows) == (len(NAMES) - 1) * (len(RATES) + 2)
    for row in rows:
        if row["rate"] in ("", "0.0"):
            continue
        a, b = (
            [x["accuracy"] for x in lines if x["model"] == row[key] and x["rate"] == float(row["rate"])]
            for key in ("model", "reference")
        )
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert [float(row["low"]), float(row["high"])] == pytest.approx([low, high], abs=1e-6)
        assert row["clear"] == str(int(low > 0) - int(high < 0))


def test_mean_over_rates_pairs_by_device(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path, make_records()) / "records.jsonl")
    lines = make_records()
    sums = {
        (name, device): np.mean([x["accuracy"] for x in lines if (x["model"], x["device"]) == (name, device)])
        for name in NAMES
        for device in range(10)
    }
    found = comparison.difference("mibb", "resnet20", "found", None)
    assert found is not None and found.rate is None
    expected = stats.ttest_rel(*([sums[name, d] for d in range(10)] for name in ("resnet20", "found")))
    assert (found.interval.low, found.interval.high) == pytest.approx(expected.confidence_interval(0.95))


def test_headline_names_a_winner_only_with_proof(tmp_path: Path) -> None:
    clear = build_report(write(tmp_path / "a", make_records(gap=0.05)))
    assert re.search(
        r"found is the most accurate: .* above random, the next best .*: zero is excluded", clear.headline("mibb")
    )
    same = build_report(write(tmp_path / "b", make_records(gap=0.0)))
    assert re.search(r"No clear winner .* differ by .*: zero is not excluded", same.headline("mibb"))
    behind = build_report(write(tmp_path / "c", make_records(gap=0.05, names=tuple(reversed(("a", "b", "c"))))))
    assert behind.reference == "c" and "c is the most accurate" in behind.headline("mibb")
    worse = build_report(write(tmp_path / "d", make_records(gap=-0.04, names=("a", "b", "c"))))
    assert "c is the most accurate" in worse.headline("mibb") and "a is " in worse.headline("mibb")
    alone = build_report(write(tmp_path / "e", make_records(names=("only",))))
    assert "compared with nothing" in alone.headline("mibb")


def test_few_seeds_need_both_intervals(tmp_path: Path) -> None:
    report = build_report(write(tmp_path, make_records(seeds=3, devices=4, images=50)))
    assert "hierarchical bootstrap" in report.method() and "3 training seeds" in report.method()
    for difference in report.differences:
        assert difference.over_seeds is not None
        both = difference.interval.low > 0 and difference.over_seeds.low > 0
        assert (difference.verdict == 1) == both
    make_report(tmp_path, console=Console(file=io.StringIO()))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Coloured: zero is excluded, by the hierarchical bootstrap too" in page and "Intervals: Welch t" in page
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert all(row["method"] == "hierarchical bootstrap" and row["seed_low"] for row in rows)
    # Seeds that scatter more than the models differ prove nothing, however many devices and images there are.
    lines = [
        record(name, np.arange(100) < 60 + 8 * seed + 2 * (name == "b") + device % 2, train_seed=seed, device=device)
        for name in ("a", "b")
        for seed in range(3)
        for device in range(10)
    ]
    noisy = build_report(write(tmp_path / "noisy", lines))
    assert [difference.verdict for difference in noisy.differences] == [0, 0]


def test_table_for_terminal_and_markdown(tmp_path: Path) -> None:
    report = build_report(write(tmp_path, make_records()))
    out = io.StringIO()
    Console(file=out, width=160).print(comparison_table(report, "mibb"))
    assert "<b>evil</b>" in out.getvalue() and "24.3k" in out.getvalue() and "1.23M" in out.getvalue()
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(comparison_table(report, "mibb"))
    marks = sum(cell.mark != 0 for row in report.tables["mibb"] for cell in row)
    body = narrow.getvalue()[: narrow.getvalue().index("Accuracy in percent")]
    assert marks and body.count("▼") + body.count("▲") == marks
    assert "found" in body and "resnet20" in body and max(map(len, body.splitlines())) <= 80
    markdown = to_markdown(report)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(RATES) + 6}
    best = [line for line in table if "**" in line]
    assert any(line.startswith("| found |") and line.count("**") >= 2 * len(RATES) for line in best)
    assert r"\<b\>evil\</b\> & \| \*x\*" in markdown
    assert "▼" in markdown and "no config.yaml" in markdown and "no search/genotype.json" in markdown


def test_missing_parts_are_said(tmp_path: Path) -> None:
    lines = [line for line in make_records() if not (line["model"] == "random" and line["device"] in (3, 4))]
    write(tmp_path, lines)
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:50])
    out = io.StringIO()
    report = make_report(tmp_path, console=Console(file=out, width=200))
    said = out.getvalue()
    for text in ("is torn", "1 measurements occur twice", "fewer devices were measured for random", "no run.json"):
        assert text in said
    page = " ".join(Page((tmp_path / "report" / "report.html").read_text()).texts)
    assert "holds no search" in page and "is torn" in page
    pairs = {d.interval.num for d in report.differences if d.model == "random" and d.rate == 1e-3}
    assert pairs == {8}


def test_two_faults_and_two_trainings(tmp_path: Path) -> None:
    lines = make_records(names=("found", "resnet20"), devices=3)
    lines += [line | {"fault": "adsaf", "rate_name": "sa_rate"} for line in lines]
    lines += [line | {"training": "clean"} for line in lines if line["model"] == "resnet20"]
    report = make_report(write(tmp_path, lines), console=Console(file=io.StringIO()))
    assert [model.name for model in report.comparison.models] == ["found", "resnet20 (mibb 0.003)", "resnet20 (clean)"]
    assert {"curves-mibb.png", "curves-adsaf.svg"} <= {path.name for path in (tmp_path / "report").iterdir()}
    assert "adSAF" in (tmp_path / "report" / "report.html").read_text()


def test_accuracies_alone_do(tmp_path: Path) -> None:
    lines = make_records(names=("a", "b"), seeds=2, devices=3)
    for line in lines:
        del line["correct"]
    comparison = read_comparison(write(tmp_path, lines) / "records.jsonl")
    found = comparison.values("mibb", "a", [1e-3])
    assert found is not None and found[0].shape == (2, 3)
    assert isinstance(comparison, Comparison) and comparison.difference("mibb", "b", "a", 1e-3) is not None


def test_clean_only(tmp_path: Path) -> None:
    lines = [line for line in make_records() if line["rate"] == 0]
    report = make_report(write(tmp_path, lines), console=Console(file=io.StringIO()))
    assert "nothing to rank" in report.headline("mibb")
    assert not (tmp_path / "report" / "curves.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "record 2: schema 1 is what this version reads, got 2"),
        ({"accuracy": 1.5}, "record 2.accuracy"),
        ({"rate": "many"}, "record 2.rate"),
        ({"model": None}, "record 2.model"),
        ({"correct": "!!"}, "'correct' does not give the accuracy"),
        ({"accuracy": 0.123}, "'correct' does not give the accuracy"),
        ({"num_images": 4000}, "'correct' does not give the accuracy"),
    ],
)
def test_wrong_records(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = make_records(devices=1)[:3]
    lines[1] |= change
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build_report(write(tmp_path, lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ("bounds: {images: 5}", {"bounds/table.md": ""}, "only bounds: .*table.md, by ftnas bounds --resume"),
        ("bounds: {images: 5}", {}, "only bounds: .*table.md, by ftnas bounds --resume"),
        ("train: {models: {}}", {}, "no campaign, single_faults or protections section"),
        ("partition: {nodes: {}}", {"records.jsonl": '{"variant": "a"}'}, "a study of nodes; .*`ftnas nodes evaluate`"),
        ("single_faults: [{fault: adsaf}]", {}, "no records; measure models first"),
        ("campaign: {devices: 3}", {"bounds/table.md": ""}, "no records; measure models first"),
    ],
)
def test_a_run_of_another_kind_is_told_by_what_it_is(
    tmp_path: Path, config: str, files: dict[str, str], message: str
) -> None:
    for name, text in {"config.yaml": config, **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    with pytest.raises(ValueError, match=message) as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_nothing_to_report(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such run folder"), (tmp_path, "no records; measure")):
        with pytest.raises(ValueError, match=message) as error:
            make_report(path)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    write(tmp_path, make_records(devices=2))
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "genotype.json").write_text("{")
    with pytest.raises(ValueError, match="genotype.json: not readable"):
        build_report(tmp_path)
    (tmp_path / "search" / "genotype.json").unlink()
    (tmp_path / "report").write_text("a file in the way")
    with pytest.raises(ValueError, match="report cannot be written"):
        make_report(tmp_path)


def test_same_records_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "run", make_records(devices=2, names=("found", "other")))
        make_report(path, console=Console(file=io.StringIO()))
        files.append({file.name: file.read_bytes() for file in (path / "report").iterdir()})
    assert files[0] == files[1]
    assert differences_to_csv(build_report(tmp_path / "a" / "run")).encode() == files[0]["differences.csv"]


def test_a_search_of_one_step_has_no_history_picture(tmp_path):
    run = whole_run(tmp_path / "run")
    trials = run / "control" / "trials.jsonl"
    trials.write_text(trials.read_text().splitlines(keepends=True)[0])
    page = make_report(run, console=Console(file=io.StringIO())).path / "report" / "report.html"
    assert "The random control scored its candidates at the end" in page.read_text()
    assert not (run / "report" / "search-control.png").exists() and (run / "report" / "search.png").exists()


def test_rates_at_which_nothing_was_hit_are_noted(tmp_path):
    lines = [{**line, "hits": 0 if line["rate"] in (0.0, RATES[0]) else 7} for line in make_records(names=("a", "b"))]
    comparison = read_comparison(write(tmp_path, lines) / "records.jsonl")
    wanted = [f"mibb, rate 0.0003: no fault hit anything in {name}; the rate is too low to tell more." for name in "ab"]
    assert comparison.notes == wanted
    unknown = [{key: value for key, value in line.items() if key != "hits"} for line in lines]
    assert read_comparison(write(tmp_path, unknown) / "records.jsonl").notes == []
