"""Single faults: enumeration against brute force, honest intervals, resume."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn

from ftnas.campaign import Subject
from ftnas.data import DataConfig, load
from ftnas.faults import AdSAF, FeatureBitFlip, MiBB, NeuronCrash, PlanSet, WeightBitFlip, Where, inject
from ftnas.faults.hardware import Hardware
from ftnas.models import count
from ftnas.quantize import FixedPoint
from ftnas.report import make_report
from ftnas.rng import isolated
from ftnas.rundir import RunDir
from ftnas.single import RECORDS, SingleFaultConfig, draw_experiments, operator_of, run_single_faults, single_faults
from ftnas.survey import Stratum, stratified_interval
from ftnas.vulnerability import read_single, single_to_csv, unfinished

HARDWARE = Hardware(layers=None)


@pytest.fixture(scope="module")
def images():
    return load(DataConfig(name="digits"), "test").subset(torch.arange(6))


def linear_net():
    with isolated(0, "net"):
        return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 10)).eval()


def conv_net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 10)
        ).eval()


def subject(model, name="net"):
    return Subject(name, 0, "clean", count(model, (1, 8, 8)), lambda: model)


def strata(model, fault, x, **options):
    options.setdefault("quantization", FixedPoint())
    with torch.no_grad(), inject(model, fault.with_rate(0.0), **options) as injection:
        model(x)
    return single_faults(injection, fault)


def run(path, images, model, seed=0, hardware=HARDWARE, **settings):
    config = SingleFaultConfig(**({"fault": {"name": "weight_bit_flip"}, "images": 6} | settings))
    with RunDir.create(path, {}) as folder:
        run_single_faults([subject(model)], images, config=config, hardware=hardware, seed=seed, folder=folder)
        return [dict(record) for record in folder.journal(RECORDS).records()]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (WeightBitFlip(bit_error_rate=0), {"0": (27, 1), "4": (120, 1)}),
        (WeightBitFlip(bit_error_rate=0, dtype="fp16"), {"0": (27, 1), "4": (120, 1)}),
        (FeatureBitFlip(bit_error_rate=0), {"0": (12, 1), "4": (10, 1)}),
        (MiBB(mac_error_rate=0), {"0": (12, 2), "4": (10, 2)}),
        (NeuronCrash(rate=0), {"0": (12, 1), "4": (10, 1)}),
        (NeuronCrash(rate=0, unit="channel"), {"0": (3, 1), "4": (10, 1)}),
        (AdSAF(), {"0": (27, 1), "4": (120, 1)}),
        (AdSAF(cells="differential"), {"0": (54, 1), "4": (240, 1)}),
    ],
)
def test_every_single_fault_is_counted_once(fault, expected, images):
    found = strata(conv_net(), fault, next(images.batches(1))[0])
    bits = 16 if getattr(fault, "dtype", None) else 8
    per_layer = 2 if isinstance(fault, AdSAF) else 1 if isinstance(fault, NeuronCrash) else bits
    assert len(found) == 2 * per_layer
    for stratum in found:
        assert (len(stratum.units), len(stratum.codes)) == expected[stratum.key[1]]
        plans = [stratum.plan(number) for number in range(len(stratum))]
        assert len({(int(plan.sites), int(plan.codes)) for plan in plans}) == len(stratum)
        for plan in plans:
            assert 0 <= int(plan.sites) < plan.population
            if stratum.bit is not None:
                assert int(fault.bits_hit(plan)) == stratum.bit


def test_targets_and_protection_leave_faults_out(images):
    fault = WeightBitFlip(bit_error_rate=0, where=Where(layers="conv2d", bits=(6, 7)))
    found = strata(conv_net(), fault, next(images.batches(1))[0], protect=Where(channels=(0,)))
    assert [(s.key[1], s.bit, len(s)) for s in found] == [("0", 6, 18), ("0", 7, 18)]
    assert all(9 <= int(s.plan(n).sites) % 27 for s in found for n in range(len(s)))


def flipped(weight: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    """Flip one bit of one two's-complement word, the slow way."""
    form = FixedPoint()
    lsb = float(form.grid(weight).lsb)
    words = [round(value / lsb) for value in form.quantize(weight).reshape(-1).tolist()]
    word = (words[index] % 256) ^ (1 << bit)
    words[index] = word - 256 if word >= 128 else word
    return (torch.tensor(words, dtype=torch.float32) * lsb).reshape(weight.shape)


def test_exhaustive_probabilities_are_those_of_brute_force(images, tmp_path):
    model, images = linear_net(), images.subset(torch.arange(2))
    records = run(tmp_path / "run", images, model, exhaustive=True)
    form, weight = FixedPoint(), model[2].weight.detach()
    changed = dict.fromkeys(range(8), 0)
    for image, _ in images.batches(1):
        x = model[1](model[0](image))

        def answer(w, x=x):
            return int(form.quantize(torch.nn.functional.linear(x, w, model[2].bias.detach())).argmax())

        clean = answer(form.quantize(weight))
        for bit in range(8):
            changed[bit] += sum(answer(flipped(weight, index, bit)) != clean for index in range(40))
    assert {record["bit"]: record["changed"] for record in records} == changed
    assert all(record["trials"] == record["population"] == 80 for record in records)
    assert 0 < sum(changed.values())


def test_sampled_intervals_cover_the_exhaustive_truth_as_often_as_they_claim(images):
    model, fault = conv_net(), WeightBitFlip(bit_error_rate=0)
    batches = [image for image, _ in images.batches(1)][:3]
    found = [s for s in strata(model, fault, batches[0]) if s.key[1] == "0"]
    tables = []
    with torch.no_grad(), inject(model, plans=PlanSet((fault,), {}), quantization=FixedPoint()) as injection:
        clean = [int(model(image).argmax()) for image in batches]
        for stratum in found:
            table = torch.zeros(len(stratum), len(batches), dtype=torch.bool)
            for number in range(len(stratum)):
                injection.replay(PlanSet((fault,), {stratum.key: stratum.plan(number)}))
                table[number] = torch.tensor([int(model(x).argmax()) for x in batches]) != torch.tensor(clean)
            tables.append(table)
    truth = float(torch.stack(tables).double().mean())
    assert 0.0 < truth < 1.0
    runs, covered = 300, 0
    for seed in range(runs):
        sampled = []
        for stratum, table in zip(found, tables, strict=True):
            drawn = draw_experiments(stratum, 15, num_images=len(batches), seed=seed)
            assert len(set(drawn)) == 15
            hits = sum(bool(table[number, image]) for number, image in drawn)
            sampled.append(Stratum(name="", population=table.numel(), trials=15, successes=hits))
        interval = stratified_interval(sampled)
        covered += interval.low <= truth <= interval.high
    # at 94% or more, so few would be covered with a probability under 1e-6
    assert covered >= stats.binom.ppf(1e-6, runs, 0.94)


def test_a_cut_campaign_goes_on_to_the_same_records(images, tmp_path):
    model = conv_net()
    whole = run(tmp_path / "whole", images, model, margin=0.2, minimum=3)
    with RunDir.create(tmp_path / "cut", {}) as folder:
        for record in whole[:5]:
            folder.journal(RECORDS).append(record)
        config = SingleFaultConfig(fault={"name": "weight_bit_flip"}, images=6, margin=0.2, minimum=3)
        run_single_faults([subject(model)], images, config=config, hardware=HARDWARE, seed=0, folder=folder)
        assert folder.journal(RECORDS).records() == whole
    assert run(tmp_path / "other", images, model, seed=1, margin=0.2, minimum=3) != whole


def test_what_is_read_back(images, tmp_path):
    records = run(
        tmp_path / "run", images, conv_net(), margin=0.2, minimum=2, fault={"name": "weight_bit_flip", "dtype": "fp32"}
    )
    (found,) = read_single(tmp_path / "run" / RECORDS)
    assert list(found.layers) == ["0", "4"] and list(found.operators) == ["conv 3x3", "linear"]
    assert list(found.bits) == [str(bit) for bit in range(32)] and found.cells.shape == (2, 32)
    assert found.trials == sum(record["trials"] for record in records)
    assert found.whole.low <= found.whole.mean <= found.whole.high
    share = {layer: sum(r["population"] for r in records if r["layer"] == layer) for layer in ("0", "4")}
    mixed = sum(share[layer] * found.layers[layer].mean for layer in share) / sum(share.values())
    assert found.whole.mean == pytest.approx(mixed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fault": {"name": "log_normal_variation", "sigma": 0.1}}, "no single faults to count"),
        ({"fault": {"name": "neuron_byzantine", "capacity": 1.0}}, "no single faults to count"),
        ({"fault": {"name": "mibb", "persistence": 2.0}}, "no rate that persistence could multiply"),
        ({"fault": {"name": "mibb"}, "margin": 0.0}, "greater than 0"),
    ],
)
def test_a_mistake_is_told(settings, message):
    with pytest.raises(ValueError, match=message):
        SingleFaultConfig(**settings)


def test_operators_have_the_fields_names():
    assert operator_of(nn.Conv2d(4, 4, 3, groups=4)) == "depthwise 3x3"
    assert operator_of(nn.Conv2d(4, 8, 1)) == "pointwise"
    assert operator_of(nn.Conv2d(4, 8, (1, 5))) == "conv 1x5"
    assert operator_of(nn.Linear(2, 2)) == "linear"


def test_a_part_of_the_strata_is_not_taken_for_the_whole(images, tmp_path):
    records = run(tmp_path / "run", images, conv_net(), margin=0.2, minimum=2)
    assert {(r["strata"], r["layer_strata"]) for r in records} == {(16, 8)}
    with_codes = run(tmp_path / "codes", images, conv_net(), margin=0.2, minimum=2, fault={"name": "adsaf"})
    assert [(r["strata"], r["layer_strata"]) for r in with_codes] == [(4, 2)] * 4

    def read(lines):
        (tmp_path / "single.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_single(tmp_path / "single.jsonl")[0]

    def rows_by(found):
        return {line.split(",")[2] for line in single_to_csv([found]).splitlines()[1:]}

    (complete,) = read_single(tmp_path / "run" / RECORDS)
    assert complete.missing == "" and unfinished([complete]) == []
    for number, layers in ((3, []), (8, ["0"]), (11, ["0"])):
        found = read(records[:number])
        assert found.whole is None and found.bits == found.operators == {}
        assert list(found.layers) == layers and all(found.layers[name] == complete.layers[name] for name in layers)
        assert len(found.cell_intervals) == number
        assert found.missing == f"unfinished: {number} of 16 strata" and found.missing in unfinished([found])[0]
        assert rows_by(found) == {"cell", *(["layer"] if layers else [])}
    old = [{k: v for k, v in record.items() if not k.endswith("strata")} for record in records]
    assert read(old).whole == complete.whole and read([*old[:4], *records[4:]]).whole == complete.whole
    resumed = read([*old[:4], *records[4:10]])  # begun before the number was written
    assert resumed.strata == (10, 16) and list(resumed.layers) == ["0"]


def test_the_report_of_an_unfinished_run_says_so(images, tmp_path):
    records = run(tmp_path / "run", images, conv_net(), margin=0.2, minimum=2)
    for number in (3, 9):
        (tmp_path / "single.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:number]))
        out = io.StringIO()
        make_report(tmp_path, console=Console(file=out, width=160))
        page = (tmp_path / "report" / "report.html").read_text()
        for shown in (out.getvalue(), page):
            assert f"unfinished: {number} of 16 strata" in shown
        assert "with a probability of" not in page and " all " not in out.getvalue()
        assert ("Ranking of the layers" in page) == (number == 9) and "Ranking of the operators" not in page
