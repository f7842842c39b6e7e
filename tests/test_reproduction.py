"""Reproduction of tables: claims on made records, published figures, and one tiny table from end to end."""

import fnmatch
import json
import runpy
import shlex
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from test_report import make_records, write

from ftnas import FixedPoint, inject
from ftnas.records import read_comparison
from ftnas.reproduction import jobs, ranges, runner, stacks
from ftnas.reproduction.orderings import Pair, check
from ftnas.reproduction.result import Outcome, collect, to_markdown
from ftnas.reproduction.result import write as write_result
from ftnas.reproduction.runner import run
from ftnas.reproduction.runs import earlier_results
from ftnas.reproduction.study import Ordering, Scale, Study, plan, read_published, read_scale, read_study, study_names
from ftnas.settings import parse
from ftnas.shipped import find_file
from ftnas.stats import Interval
from ftnas.storage import read_journal

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "reproduce.py"
RESULTS = sorted((ROOT / "docs" / "results" / "reproduction").glob("*/runs*.jsonl"))
FAULT = {"name": "mibb", "mac_error_rate": 1e-3}
ROW = {"config": "quickstart", "model": "resnet20"}


def study_of(names, orderings, *, rates=(1e-4, 1e-3), published=None, **sweep):
    sweeps = [{"fault": FAULT, "rates": list(rates), "published": published, **sweep}]
    rows = [{"name": name, **ROW} for name in names]
    data = {"version": 1, "name": "made", "title": "Made", "sweeps": sweeps, "rows": rows, "orderings": orderings}
    return parse(Study, data)


def claim(better, worse, **more):
    return {"claim": "c", "better": better, "worse": worse, **more}


# Claims


def write_lines(path, accuracies):
    """Write records of accuracies {model: {rate: [seed, device]}}, without images."""
    accuracies = complete(accuracies)
    template = make_records(seeds=1, devices=1, names=("a",), images=40)[0]
    lines = []
    for model, rates in accuracies.items():
        for rate, values in rates.items():
            for seed, row in enumerate(values):
                for device, value in enumerate(row):
                    line = {**template, "model": model, "train_seed": seed, "fault": "mibb", "rate": rate}
                    line |= {"device": device if rate else None, "accuracy": value, "correct": None}
                    lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_comparison(path)


def complete(accuracies):
    """Add what is measured without faults."""
    return {name: {0.0: [[0.9]] * len(next(iter(rates.values()))), **rates} for name, rates in accuracies.items()}


def made(base, *, seeds=3, devices=4, spread=0.01):
    """Return [seed, device] accuracies around a base, with a known spread over the seeds."""
    return [
        [base + spread * (seed - (seeds - 1) / 2) + 0.001 * device for device in range(devices)]
        for seed in range(seeds)
    ]


def verdicts(study, comparison, scale="full"):
    return [result.verdict for result in check(study, comparison, scale=scale, published={})]


def test_claims_hold_are_reversed_or_undecided_as_the_records_were_made(tmp_path):
    accuracies = {
        name: {rate: made(base) for rate in (1e-4, 1e-3)} for name, base in (("a", 0.6), ("b", 0.4), ("c", 0.601))
    }
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    claims = [claim("a", "b"), claim("b", "a"), claim("a", "c"), claim("a", "d"), claim("a", ["b", "c"])]
    claims += [claim(["a", "c"], "b"), claim("a", "c", measure="same"), claim("a", "b", measure="same")]
    study = study_of("abcd", claims)
    expected = ["holds", "reversed", "undecided", "not run", "undecided", "holds", "undecided", "reversed"]
    assert verdicts(study, comparison) == expected


def test_a_claim_needs_the_interval_over_seeds_and_not_devices_alone(tmp_path):
    # a is above b on every device of every seed pair on average, but seeds spread by more than the gap
    wide = {"a": {1e-4: made(0.50, spread=0.2)}, "b": {1e-4: made(0.45, spread=0.2)}}
    comparison = write_lines(tmp_path / "records.jsonl", wide)
    result = check(study_of("ab", [claim("a", "b")], rates=(1e-4,)), comparison, scale="full", published={})[0]
    pair = result.pairs[0]
    means = [np.mean(wide[name][1e-4], axis=1) for name in "ab"]
    welch = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    assert result.verdict == "undecided"
    assert (pair.shown.low, pair.shown.high) == pytest.approx((welch.low, welch.high))
    one = {name: {1e-4: rows[1e-4][:1]} for name, rows in wide.items()}
    comparison = write_lines(tmp_path / "one.jsonl", one)
    pair = check(study_of("ab", [claim("b", "a")], rates=(1e-4,)), comparison, scale="full", published={})[0].pairs[0]
    assert pair.over_seeds is None and pair.interval.method == "paired Student t"
    assert pair.interval.mean == pytest.approx(-0.05)


def test_a_table_gives_the_interval_that_leaves_a_claim_undecided():
    found = Interval(mean=0.02, low=0.01, high=0.03, num=3, method="Welch's t")
    other = Interval(mean=0.02, low=-0.01, high=0.05, num=3, method="bootstrap")
    pair = partial(Pair, better="a", worse="b", verdict="undecided", published=None)
    assert pair(interval=other, over_seeds=found).shown is other
    assert pair(interval=found, over_seeds=other).shown is other
    assert pair(interval=found, over_seeds=found).shown is found
    assert pair(interval=found, over_seeds=None).shown is found
    assert pair(interval=None, over_seeds=None).shown is None


def test_one_training_of_each_decides_no_claim_of_sameness(tmp_path):
    accuracies = {"a": {1e-4: made(0.6, seeds=1)}, "b": {1e-4: made(0.4, seeds=1)}}
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    study = study_of("ab", [claim("a", "b"), claim("a", "b", measure="same")], rates=(1e-4,))
    assert verdicts(study, comparison) == ["holds", "undecided"]


def test_one_training_beside_several_decides_nothing(tmp_path):
    # b's only training is below each of a's
    accuracies = {"a": {1e-4: made(0.6)}, "b": {1e-4: made(0.4, seeds=1)}}
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    claims = [claim("a", "b"), claim("b", "a"), claim("a", "b", measure="same")]
    results = check(study_of("ab", claims, rates=(1e-4,)), comparison, scale="full", published={})
    assert [result.verdict for result in results] == ["undecided"] * 3
    pair = results[0].pairs[0]
    assert pair.interval.low > 0 and np.isnan(pair.shown.low)
    assert comparison.difference("mibb", "a", "b", 1e-4).verdict == 0


def test_loss_compares_what_faults_take_away(tmp_path):
    # b is less accurate at every rate and loses less
    accuracies = {
        "a": {0.0: made(0.9, devices=1), 1e-4: made(0.6)},
        "b": {0.0: made(0.5, devices=1), 1e-4: made(0.45)},
    }
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    study = study_of("ab", [claim("a", "b"), claim("b", "a", measure="loss")], rates=(1e-4,))
    results = check(study, comparison, scale="full", published={})
    assert [result.verdict for result in results] == ["holds", "holds"]
    assert results[1].pairs[0].interval.mean == pytest.approx(0.25)


def test_a_loss_is_that_of_the_same_trainings(tmp_path):
    # seed 2 of a and seed 1 of b are measured without faults alone, so far
    accuracies = {
        "a": {0.0: [[0.9], [0.8], [0.1]], 1e-4: made(0.6, seeds=2, spread=0.1)},
        "b": {0.0: [[0.9], [0.1]], 1e-4: made(0.5, seeds=1)},
    }
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    study = study_of("ab", [claim("a", "b", measure="loss")], rates=(1e-4,))
    pair = check(study, comparison, scale="full", published={})[0].pairs[0]
    assert pair.interval.mean == pytest.approx((0.6 - 0.85) - (0.5 - 0.9))
    clean = {"a": {0.0: [[0.9]]}, "b": {0.0: [[0.9]], 1e-4: made(0.5, seeds=1)}}
    assert verdicts(study, write_lines(tmp_path / "clean.jsonl", clean)) == ["not run"]


def test_rows_that_are_not_measured_to_the_end_are_compared_on_the_devices_of_both(tmp_path):
    clean = {0.0: made(0.9, devices=1, seeds=1)}
    accuracies = {
        "a": {**clean, 1e-4: made(0.6, devices=6, seeds=1)},
        "b": {**clean, 1e-4: made(0.4, devices=3, seeds=1)},
    }
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    pair = check(study_of("ab", [claim("a", "b")], rates=(1e-4,)), comparison, scale="full", published={})[0].pairs[0]
    assert pair.interval.num == 3 and pair.interval.mean == pytest.approx(0.2)


def test_rates_of_the_small_scale_are_multiples_of_the_published_ones(tmp_path):
    accuracies = {"a": {8e-4: made(0.6)}, "b": {8e-4: made(0.4)}}
    comparison = write_lines(tmp_path / "records.jsonl", accuracies)
    study = study_of("ab", [claim("a", "b", rates=[1e-4])], rates=(1e-4,), small_factor=8)
    assert verdicts(study, comparison, scale="small") == ["holds"]
    assert verdicts(study, comparison, scale="full") == ["not run"]


def test_images_are_paired(tmp_path):
    path = write(tmp_path, make_records(seeds=3, devices=4, gap=0.3, names=("a", "b"), images=40))
    comparison = read_comparison(path / "records.jsonl")
    rates = comparison.rates["mibb"]
    assert verdicts(study_of("ab", [claim("a", "b")], rates=rates), comparison) == ["holds"]


# Data


@pytest.mark.parametrize("name", study_names())
def test_studies_are_whole(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FTNAS_CIFAR10_FOLDERS", str(tmp_path))
    study, published = read_study(name), read_published()
    for sweep in study.sweeps:
        if sweep.published is not None:
            assert set(sweep.rates) <= set(published[sweep.published].rates)
            for row in study.rows:
                assert row.published is None or published[sweep.published].row(row.published) is not None
    for scale in ("small", "full"):
        planned = plan(study, scale=scale, settings=read_scale(scale), cache=tmp_path)
        keys = [job.key for entry in planned for job in entry.jobs]
        assert len(set(keys)) == len(keys), "two rows are the same training"


def test_published_figures_say_what_the_paper_says_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FTNAS_CIFAR10_FOLDERS", str(tmp_path))
    empty = write_lines(tmp_path / "r.jsonl", {"nobody": {0.0: made(0.5, devices=1)}})
    checked = 0
    for name in study_names():
        for result in check(read_study(name), empty, scale="full", published=read_published()):
            gaps = [pair.published for pair in result.pairs if pair.published is not None]
            checked += len(gaps)
            assert all(gap > 0 for gap in gaps), (name, result.ordering.claim, gaps)
    assert checked > 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"better": "z"}, "no row is called 'z'"),
        ({"sweep": "x"}, "no sweep is"),
        ({"rates": [0.0, 1e-3]}, "rate 0 has one measurement and no devices, and is compared alone"),
    ],
)
def test_orderings_name_what_is_there_and_can_be_compared(wrong, message):
    with pytest.raises(ValueError, match=message):
        study_of("ab", [{**claim("a", "b"), **wrong}])


def test_stacks_have_five_layers_of_their_primitive():
    for name, kernel, depthwise in (("sep_conv_5x5", 5, 10), ("dil_conv_3x3", 3, 5)):
        model = getattr(stacks, name)(num_classes=7, in_channels=3)
        assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
        assert [m.kernel_size for m in convolutions] == [(kernel, kernel)] * depthwise


def test_magnitudes_are_told_apart_by_kind():
    model = ranges.mixed(num_classes=10, in_channels=3)
    values = {"conv 3x3": 0.5, "conv 1x1": 2.0, "depthwise 3x3": 3.0}
    for block in model.modules():
        if isinstance(block, ranges.OneOfThree):
            for layer in block.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    kind = (
                        "depthwise 3x3" if layer.groups > 1 else f"conv {layer.kernel_size[0]}x{layer.kernel_size[0]}"
                    )
                    torch.nn.init.constant_(layer.weight, -values[kind])
                    layer.weight.data.view(-1)[0] = 0.0
    found = ranges.magnitudes(model)
    assert {kind: value.max for kind, value in found.items()} == values
    assert all(found[kind].mean < value < found[kind].mean * 1.1 for kind, value in values.items())


def test_the_network_of_changing_paths_trains_under_fixed_point():
    model = ranges.mixed(num_classes=10, in_channels=3)
    with inject(model, quantization=FixedPoint(bits=8), layers="conv2d"):
        for _ in range(6):
            model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(int(block.steps) == 6 for block in model.modules() if isinstance(block, ranges.OneOfThree))


def test_each_training_step_draws_one_of_three_and_a_copy_goes_on_the_same():
    block = ranges.OneOfThree(4, 4, stride=1, index=0)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    counts = [0, 0, 0]
    for number, choice in enumerate(block.choices):
        choice.register_forward_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    for _ in range(60):
        block(x)
    # each is missed with probability (2/3)^60 < 3e-11
    assert sum(counts) == 60 and all(counts)
    other = ranges.OneOfThree(4, 4, stride=1, index=0)
    other.load_state_dict(block.state_dict())
    for _ in range(10):
        assert torch.equal(block(x), other(x))


# Runs

CONFIG = {
    "version": 1,
    "name": "tiny",
    "device": "cpu",
    "threads": 1,
    "data": {"name": "digits", "subset": 64},
    "hardware": {"fault": FAULT, "layers": "conv2d"},
    "train": {
        "recipe": {"epochs": 1, "batch_size": 32, "lr": 0.05},
        "models": {"a": {"baseline": "resnet20", "width": 0.25}, "b": {"baseline": "resnet20", "width": 0.375}},
    },
    "campaign": {"sweeps": [{"fault": FAULT, "rates": [1e-3]}]},
}
TINY = Scale(seeds=(0, 1), devices=2, images=50, batch_size=50)


def tiny_study(folder, rates=(1e-3,)):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    study = {
        "version": 1,
        "name": "tiny",
        "title": "Tiny",
        "sweeps": [{"fault": FAULT, "rates": list(rates)}],
        "rows": [{"name": name, "config": str(folder / "tiny.yaml"), "model": name} for name in "ab"],
        "orderings": [claim("a", "b")],
    }
    return parse(Study, study)


def test_a_tiny_table_from_end_to_end_and_nothing_is_done_twice(tmp_path):
    study, cache, out = tiny_study(tmp_path), tmp_path / "cache", tmp_path / "out"
    common = {"scale": "full", "settings": TINY}
    planned = plan(study, **common, cache=cache)
    run(planned)
    outcome = collect(study, planned, **common, published={}, out=out)
    text = write_result(outcome, out)
    assert text == to_markdown(outcome) and "| a | ours |" in text and "not run" not in text
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert all(line["training"] and len(line["accuracy"]["mibb"]["0.001"]) == 2 for line in lines)
    assert {line["trained_for"] for line in lines} == {"mibb 0.001"}
    result = json.loads((out / "result.json").read_text())
    assert result["orderings"][0]["verdict"] in ("holds", "reversed", "undecided") and result["cpu_s"] > 0
    assert (out / "table.csv").read_text().count("\n") == 1 + 2 * 2
    assert "png" not in text and not list(out.glob("*.png"))  # one rate is no curve

    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    run(plan(study, **common, cache=cache))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before

    # one rate and one device more are measured on the trained networks, in the same folders
    common["settings"] = TINY.model_copy(update={"devices": 3})
    wider = tiny_study(tmp_path, rates=(1e-3, 2e-3))
    more = plan(wider, **common, cache=cache)
    run(more)
    assert [len(jobs.records(entry.jobs[0], entry.measurements[0])) for entry in (*planned, *more)] == [3, 3, 7, 7]
    text = write_result(collect(wider, more, **common, published={}, out=out), out)
    assert "(mibb.png)" in text and (out / "mibb.png").stat().st_size > 0
    models = [path for path in before if path.name == "model.pt"]
    assert models and all(path.stat().st_mtime_ns == before[path] for path in models)
    assert [jobs.missing(e.jobs[0], e.measurements[0]) for e in more] == [0, 0]
    assert len(list(cache.iterdir())) == 8


@pytest.mark.parametrize("seeds", [{"a": 3, "b": 3}, {"a": 3, "b": 1}, {"a": 1, "b": 1}])
def test_a_table_says_what_its_intervals_are_over(tmp_path, seeds):
    study = tiny_study(tmp_path).model_copy(update={"orderings": (Ordering(**claim("a", "b", measure="same")),)})
    comparison = write_lines(
        tmp_path / "records.jsonl", {name: {1e-3: made(0.5, seeds=number)} for name, number in seeds.items()}
    )
    outcome = Outcome(
        study=study,
        scale="full",
        settings=TINY,
        planned=plan(study, scale="full", settings=TINY, cache=tmp_path / "cache"),
        comparison=comparison,
        results=check(study, comparison, scale="full", published={}),
        published={},
    )
    text = to_markdown(outcome)
    over_devices = "over devices, which tells nothing of new trainings"
    expected = {
        (3, 3): "Intervals: Student's t over training seeds. A claim",
        (3, 1): f"Intervals: Student's t over training seeds (rows of one seed, b: {over_devices}). A claim",
        (1, 1): f"Intervals: Student's t {over_devices}. A claim",
    }
    assert expected[seeds["a"], seeds["b"]] in text
    assert ("with one of several is undecided" in text) == (seeds["a"] != seeds["b"])
    assert ("one training of a net" in text) == (seeds["b"] == 1)


def test_a_table_says_which_training_rate_the_protocol_kept(tmp_path):
    study, settings = tiny_study(tmp_path), TINY.model_copy(update={"seeds": (0,)})
    overrides = ["train.recipe.rate_protocol=[1.0e-2, 1.0e-3]", "train.recipe.rate_threshold=0.99"]
    common = {"scale": "full", "settings": settings}
    planned = plan(study, **common, cache=tmp_path / "cache", overrides=overrides)[:1]
    run(planned)
    text = to_markdown(collect(study, planned, **common, published={}, out=tmp_path / "out"))
    assert "- a: the rate protocol kept mibb 0.001 (seed 0)." in text  # none passes, and the smallest is kept


def one_key(tmp_path, *overrides):
    return plan(tiny_study(tmp_path), scale="full", settings=TINY, cache=tmp_path, overrides=overrides)[0].jobs[0].key


def test_what_decides_the_result_decides_the_hash(tmp_path):
    key = partial(one_key, tmp_path)
    same = [
        "name=other",
        "train.recipe.compute.fused_rounding=true",
        "train.recipe.compute.cudnn_benchmark=true",
        "data.root=null",
        "campaign.devices=3",
        "train.models.c={baseline: vgg16}",
        "pool.workers=0",
    ]
    # a set that is too large to hold is normalised by the mean of fewer images
    other = [
        "data.memory_limit_mb=1",
        "seed=1",
        "train.recipe.epochs=2",
        "hardware.fault.mac_error_rate=0.1",
        "data.subset=100",
        "threads=2",
    ]
    assert {key(change) for change in same} == {key()}
    assert len({key(change) for change in [*other, "train.models.a.width=0.5"]} | {key()}) == len(other) + 2
    clean = ["train.recipe.alpha_l=0"]
    assert key(*clean) == key(*clean, "hardware.fault=null") != key()


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_results_that_ship_are_those_of_the_runs_that_ship(file, tmp_path, monkeypatch):
    monkeypatch.setenv("FTNAS_CIFAR10_FOLDERS", str(tmp_path))
    study, scale = file.parent.name.rsplit("-", 1) if "-" in file.parent.name else (None, "small")
    own = file.with_name(file.name.replace("runs", "study")).with_suffix(".yaml")
    at_full = ["data={name: image_folder, root: x}", "train.recipe.compute={channels_last: true, autocast: bf16}"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    settings = read_scale(scale).model_copy(update={"seeds": tuple(sorted({line["seed"] for line in lines}))})
    planned = plan(
        read_study(study or own),
        scale=scale,
        settings=settings,
        cache=tmp_path,
        overrides=at_full if scale == "full" else (),
    )
    keys = {
        (entry.row.name, job.seed): (
            job.key,
            job.search_key if job.searches else None,
            {found.sweep.label: job.measure_key(found) for found in entry.measurements},
        )
        for entry in planned
        for job in entry.jobs
    }
    assert lines
    for line in lines:
        found = line["training"], line.get("search"), line.get("measurements", {})
        assert found == keys[line["row"], line["seed"]], "what decides a result has changed since: measure it again"


def test_weights_to_start_from_decide_the_hash_by_their_content(tmp_path):
    first, same, other = (tmp_path / f"{name}.pt" for name in ("first", "same", "other"))
    for path, content in ((first, b"one"), (same, b"one"), (other, b"two")):
        path.write_bytes(content)
    keys = [one_key(tmp_path, f"train.models.a.start={path}") for path in (first, same, other)]
    assert keys[0] == keys[1] and len({*keys, one_key(tmp_path)}) == 3
    with pytest.raises(ValueError, match=r"train\.models\.a\.start: not readable, got '.*gone\.pt'"):
        one_key(tmp_path, f"train.models.a.start={tmp_path / 'gone.pt'}")


def test_a_space_given_as_a_file_decides_the_hash_by_what_it_says(tmp_path):
    text = find_file("small-8x8", "search_spaces", ".yaml", kind="space").read_text()
    files = {"same": "# again\n" + text, "other": text.replace("  - skip\n", "")}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    (tmp_path / "space.yaml").write_text(text)

    def keys(space, *more):
        search = f"search={{space: '{space}', epochs: 1, weights: {{batch_size: 32, lr: 0.05}}}}"
        overrides = [search, "train.models.a={genotype: search}", *more]
        settings = {"settings": TINY, "cache": tmp_path, "overrides": overrides}
        study = tiny_study(tmp_path)
        job = plan(study.model_copy(update={"rows": study.rows[:1]}), scale="full", **settings)[0].jobs[0]
        return job.search_key, job.key

    space = tmp_path / "space.yaml"
    first, shipped = keys(space), keys("small-8x8")
    assert keys(tmp_path / "same.yaml") == first
    space.write_text(files["other"])
    assert all(len({*several}) == 3 for several in zip(first, keys(space), shipped, strict=True))
    retrained = [f"train.models.a.space={tmp_path / name}.yaml" for name in files]
    assert len({keys("small-8x8", change)[1] for change in retrained} | {shipped[1]}) == 3


def test_a_device_that_is_trained_for_decides_the_hash_by_its_content(tmp_path):
    keys = []
    for content in (b"one", b"two"):
        (tmp_path / "device.npz").write_bytes(content)
        keys.append(one_key(tmp_path, f"hardware={{defects: '{tmp_path / 'device.npz'}'}}"))
    assert keys[0] != keys[1]


def image_folders(root, base, *, classes=2, images=20):
    """Write random images of two classes, grey values from ``base`` on."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = random.integers(base, base + 50, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_runs_of_other_images_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ftnas.reproduction.study.read_scale", lambda _: TINY.model_copy(update={"images": 8}))
    folders = {name: image_folders(tmp_path / name, base) for name, base in (("dark", 0), ("light", 200))}
    shutil.copytree(folders["dark"], tmp_path / "moved")
    shutil.copytree(folders["dark"], tmp_path / "new tests")
    shutil.rmtree(tmp_path / "new tests" / "test")
    shutil.copytree(folders["light"] / "test", tmp_path / "new tests" / "test")
    study, cache = tiny_study(tmp_path), tmp_path / "cache"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))

    def reproduce(root, *arguments, seeds=(0,)):
        data = f"data={{name: image_folder, root: '{tmp_path / root}'}}"
        common = ("--cache", cache, "--scale", "full", "--seeds", *seeds)
        code, out, err = script(capsys, tmp_path / "study.yaml", data, *common, *arguments)
        return code, err.splitlines()[-1] if code else out

    code, table = reproduce("dark")
    assert code == 0 and "| a | ours |" in table, table
    assert reproduce("moved") == (0, table)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and "study" not in str(path)}
    for root, kind, name in (("light", "training", "train-"), ("new tests", "test", "measure-")):
        for seeds in ((0,), (1, 0)):  # before a new seed is trained
            code, error = reproduce(root, seeds=seeds)
            assert code == 2 and error.startswith(f"error: {cache / name}")
            assert f"(a, seed 0) was made with other {kind} images" in error and error.endswith("give another --cache")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    # what only reads the cache needs no images; a table of two data sets is refused all the same
    assert reproduce("nowhere", "--dry-run")[0] == 0
    assert reproduce("nowhere", "--report") == (0, table)
    assert reproduce("light", seeds=(1,))[0] == 0
    code, error = reproduce("nowhere", "--report", seeds=(0, 1))
    assert code == 2 and error.startswith("error: ") and "(a, seed 1)" in error and "different training images" in error


def study_script(folder, capsys):
    """Return a function that runs the script on the tiny study: (exit code, last line of a mistake, or the output)."""
    (folder / "study.yaml").write_text(yaml.safe_dump(tiny_study(folder).model_dump(mode="json")))

    def reproduce(cache, *arguments):
        common = ("--seeds", 0, 1, "--scale", "full", "--cache", cache)
        code, out, err = script(capsys, folder / "study.yaml", *common, *arguments)
        reproduce.told = err
        return code, err.splitlines()[-1] if code else out

    return reproduce


def test_a_table_joins_what_was_run_in_several_places(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ftnas.reproduction.study.read_scale", lambda _: TINY)
    reproduce = study_script(tmp_path, capsys)
    here, there, one = (tmp_path / name for name in ("here", "there", "one"))
    code, table = reproduce(there, "--row", "a*")
    assert code == 0 and "| b | ours |  |  | not run | not run |" in table, table
    earlier = ("--earlier", there / "tiny-full")

    code, listed = reproduce(here, "--dry-run", *earlier)
    assert code == 0
    assert ["known from an earlier result" in line for line in listed.splitlines()] == [True, True, False, False]
    code, joined = reproduce(here, *earlier)
    assert code == 0 and sum(path.name.startswith("train-") for path in here.iterdir()) == 2  # of b alone
    assert "- From an earlier result, by the hashes of its runs: a (seed 0, 1)." in joined
    assert "Not checked" not in joined
    code, whole = reproduce(one)
    cells = [
        [line for line in text.splitlines() if "| ours | " in line and "claim" not in line] for text in (joined, whole)
    ]
    assert code == 0 and len(cells[0]) == 2 and cells[0] == cells[1]
    claims = [json.loads((cache / "tiny-full" / "result.json").read_text())["orderings"] for cache in (here, one)]
    welch = [claim[0]["pairs"][0]["over_seeds"] for claim in claims]
    assert welch[0] == welch[1] and welch[0]["low"] is not None
    lines = [read_journal(cache / "tiny-full" / "runs.jsonl")[0] for cache in (here, one, there)]
    for key in ("row", "training", "measurements", "params", "flops", "num_images", "test_digest", "accuracy"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert lines[0][:2] == lines[2]
    unknown = [{**line, "test_digest": None} for line in lines[2]]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unknown))
    code, text = reproduce(tmp_path / "empty", "--report", "--earlier", tmp_path / "old")
    assert code == 0 and "that these were measured on the same images, a (seed 0, 1)." in text
    spent = json.loads((here / "tiny-full" / "result.json").read_text())
    total = sum(line["train_cpu_s"] + line["measure_cpu_s"] for line in lines[0])
    assert spent["cpu_s_is_all"] and spent["cpu_s"] == pytest.approx(total, abs=0.3)

    # a joint result is one to join, too; the cache has what it did not have, and what it has itself comes first
    code, again = reproduce(tmp_path / "empty", "--report", "--earlier", here / "tiny-full")
    assert code == 0 and all(line in again.splitlines() for line in cells[0])
    assert reproduce(one, *earlier) == (0, whole)

    # a search may find another network on another machine
    grown = [{**line, "params": line["params"] + line["seed"]} for line in lines[2]]
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in grown))
    code, text = reproduce(tmp_path / "empty", "--report", "--earlier", tmp_path / "grown")
    params = lines[2][0]["params"]
    assert f"different networks**, which a mean mixes: {params} parameters (seed 0); {params + 1} parameters" in text
    assert "different networks" not in again

    # what contradicts is told, and the last one taken, unless the cache has its own
    other = [{**line, "accuracy": {"mibb": {"0": [0.25], "0.001": [0.25, 0.25]}}} for line in lines[2]]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
    both = ("--earlier", there / "tiny-full", "--earlier", tmp_path / "other")
    for cache, shown in ((tmp_path / "empty", "| 25.0 | 25.0 |"), (one, cells[0][0])):
        code, text = reproduce(cache, "--report", *both)
        assert code == 0 and any(line.startswith("| a | ours") and line.endswith(shown) for line in text.splitlines())
        told = reproduce.told
        assert f"a, seed 1 (train {lines[2][1]['training']}): results differ; " in told
        assert ("that of the cache is taken" in told) == (cache == one)
        assert ("the cache has all of its runs" in told) == (cache == one)


def test_earlier_results_that_do_not_fit_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ftnas.reproduction.study.read_scale", lambda _: TINY.model_copy(update={"images": 8}))
    roots = {name: image_folders(tmp_path / name, base) for name, base in (("dark", 0), ("light", 200))}
    data = {name: f"data={{name: image_folder, root: '{root}'}}" for name, root in roots.items()}
    reproduce = study_script(tmp_path, capsys)
    there, here = tmp_path / "there", tmp_path / "here"
    assert reproduce(there, "--row", "a", data["dark"])[0] == 0
    result = there / "tiny-full"

    def refused(*arguments, cache=here, images="dark"):
        code, error = reproduce(cache, *arguments, data[images])
        assert code == 2 and error.startswith("error: "), error
        return error

    assert "no row is called 'c'; there is: a; b" in refused("--row", "c")
    assert "--report runs nothing" in refused("--row", "a", "--report")
    assert "none of its runs is one of this study" in refused("--earlier", result, "train.recipe.lr=0.01")
    assert "no result is there" in refused("--earlier", there)
    assert "give another --out" in refused("--earlier", result, cache=there)
    assert "campaign.devices: has no effect on the runs of a study" in refused("campaign.devices=3")
    assert "train.seeds: has no effect" in refused("train.seeds=[4]")
    (tmp_path / "file").write_text("")
    assert "cannot be made (File exists); give another folder" in refused("--out", tmp_path / "file")
    assert not here.exists()

    for part, digest in (("training", "train_digest"), ("test", "test_digest")):
        error = refused("--earlier", result, "--row", "b", images="light")
        assert f"the earlier result of a, seed 0 was made with other {part} images" in error
        assert not list(here.glob("train-*"))  # told before anything runs
        # a result of before these were kept: then only the other one can tell
        lines = [{**line, digest: None} for line in read_journal(result / "runs.jsonl")[0]]
        (result / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    runs = (result / "runs.jsonl").read_text()
    (result / "runs.jsonl").write_text(runs.replace('"num_images": 8', '"num_images": 0'))
    assert "runs.jsonl: line 1.num_images: input should be greater" in refused("--earlier", result)
    (result / "runs.jsonl").write_text(runs[:-5])
    assert "last line is torn" in refused("--earlier", result)


def test_an_earlier_result_is_taken_only_where_it_has_all_that_is_measured(tmp_path):
    study, settings = tiny_study(tmp_path), TINY.model_copy(update={"seeds": (0,)})
    common = {"scale": "full", "settings": settings, "cache": tmp_path / "cache"}
    planned = plan(study, **common)
    run(planned[:1])
    out = tmp_path / "out"
    write_result(collect(study, planned, scale="full", settings=settings, published={}, out=out), out)
    elsewhere = {**common, "cache": tmp_path / "elsewhere"}
    assert list(earlier_results([out], plan(study, **elsewhere))) == [planned[0].jobs[0].key]
    assert earlier_results([out], planned) == {}  # the cache has it
    assert earlier_results([], planned) == {}
    fewer = settings.model_copy(update={"devices": 1})
    known = earlier_results([out], plan(study, **{**elsewhere, "settings": fewer}))
    assert [len(found.records(planned[0].measurements[0])) for found in known.values()] == [3]
    for wider in (
        plan(study, **{**elsewhere, "settings": settings.model_copy(update={"devices": 3})}),
        plan(tiny_study(tmp_path, rates=(1e-3, 2e-3)), **elsewhere),
    ):
        with pytest.raises(ValueError, match="measured to the end"):
            earlier_results([out], wider)


def test_a_measurement_that_noted_no_digest_is_taken(tmp_path):
    study, cache = tiny_study(tmp_path), tmp_path / "cache"
    planned = plan(study, scale="full", settings=TINY.model_copy(update={"seeds": (0,)}), cache=cache)[:1]
    run(planned)
    info = planned[0].jobs[0].measure_folder(planned[0].measurements[0]) / "run.json"
    facts = json.loads(info.read_text())
    assert len(facts.pop(jobs.TEST_DIGEST)) == 64
    info.write_text(json.dumps(facts))
    run(planned)
    assert json.loads(info.read_text()) == facts


def test_another_process_at_a_run_is_waited_for(tmp_path, monkeypatch):
    study = tiny_study(tmp_path)
    planned = plan(study, scale="full", settings=TINY, cache=tmp_path / "cache")
    tries = []

    def busy_once(job):
        tries.append(job.key)
        if len(tries) <= 4:
            raise jobs_in_use
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / jobs.DONE).write_text("{}")

    jobs_in_use = runner.InUseError("in use")
    monkeypatch.setattr(runner, "train", busy_once)
    monkeypatch.setattr(runner, "measure", lambda *_: None)
    monkeypatch.setattr(jobs, "missing", lambda *_: 0)
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.0)
    run(planned)
    assert len(tries) == 8


def test_a_training_that_fails_leaves_the_others_to_finish(tmp_path, monkeypatch):
    planned = plan(tiny_study(tmp_path), scale="full", settings=TINY, cache=tmp_path / "cache")
    done = []

    def fails_for_a(job):
        if job.model == "a":
            raise RuntimeError("the loss became NaN")
        done.append((job.model, job.seed))

    monkeypatch.setattr(runner, "train", fails_for_a)
    monkeypatch.setattr(runner, "measure", lambda *_: None)
    with pytest.raises(RuntimeError, match="2 trainings failed, the others are done; the last: a, seed 1: the loss"):
        run(planned)
    assert done == [("b", 0), ("b", 1)]


def script(capsys, *arguments):
    """Run the script in this process: (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            code = error.code
    return code, *capsys.readouterr()


def test_the_script_explains_a_mistake_in_one_line(capsys):
    code, out, err = script(capsys, "table55")
    assert code == 2 and out == ""
    assert err == "error: unknown study 'table55'; did you mean 'table5'?; a file is given as PATH.yaml\n"
    code, out, err = script(capsys, "scales")
    assert code == 2 and "there is: channels, figure9" in err and "published" not in err
    code, out, err = script(capsys, "table5", "--seeds", 0, 1, 0, "--dry-run")
    assert (code, err) == (2, "error: --seeds: numbers from 0 on, each once, got 0 1 0\n")


def documented_lines():
    lines = (SCRIPT.parent.parent / "docs" / "reproduction.md").read_text().splitlines()
    start = "python scripts/reproduce.py "
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("arguments", documented_lines(), ids=" ".join)
def test_documented_lines_are_understood(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FTNAS_CIFAR10_FOLDERS", str(tmp_path))
    arguments = [part for part in arguments if part not in ("--dry-run", "--report")]
    if "--earlier" in arguments:  # a folder of the reader
        del arguments[(place := arguments.index("--earlier")) : place + 2]
    code, out, err = script(capsys, *arguments, "--dry-run", "--cache", tmp_path)
    assert code == 0, err
    seeds = len(read_scale("full" if "full" in arguments else "small").seeds)
    pattern = arguments[arguments.index("--row") + 1] if "--row" in arguments else "*"
    rows = fnmatch.filter([row.name for row in read_study(arguments[0]).rows], pattern)
    assert rows and len(out.splitlines()) == seeds * len(rows)


def test_dry_run_prints_runs_of_the_papers_size_and_runs_nothing(capsys, tmp_path):
    code, out, err = script(capsys, "table5", "--scale", "full", "--dry-run", "--cache", tmp_path)
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == len(read_study("table5").rows) and all("to be trained" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_has_just_made_is_opened(tmp_path, monkeypatch):
    create = jobs.RunDir.create

    def late(path, plain):
        create(path, {"seed": 1}).close()
        raise ValueError("run folder exists already")

    monkeypatch.setattr(jobs.RunDir, "create", late)
    with jobs._opened(tmp_path / "run", {"seed": 2}) as run:
        assert run.config == {"seed": 1}
    monkeypatch.setattr(jobs.RunDir, "create", lambda *_: (_ for _ in ()).throw(ValueError("no room")))
    with pytest.raises(ValueError, match="no room"), jobs._opened(tmp_path / "other", {}):
        pass


def test_costs_of_a_run_that_was_cut_and_of_one_with_workers(tmp_path):
    (tmp_path / "run.json").write_text('{"commit": "abc"}')
    spent = [{"kind": "spent", "cpu_s": 1.5, "wall_s": 2.0, "machine": "x"}, {"kind": "started"}]
    lines = "".join(json.dumps(line) + "\n" for line in spent)
    (tmp_path / "events.jsonl").write_text(lines + '{"kind": "spe')
    assert jobs.cost(tmp_path) == {"cpu_s": 1.5, "wall_s": 2.0, "is_all": True, "machines": ["x"], "commit": "abc"}
    (tmp_path / "events.jsonl").write_text(lines + json.dumps({**spent[0], "workers": 2}) + "\n")
    assert jobs.cost(tmp_path)["cpu_s"] == 3.0 and not jobs.cost(tmp_path)["is_all"]
