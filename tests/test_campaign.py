"""The campaign's grid: keys, common devices, resume."""

import base64

import numpy as np
import pytest
import torch
from torch import nn

import ftnas
from ftnas import FeatureBound
from ftnas.campaign import RECORDS, CampaignConfig, Subject, run_campaign
from ftnas.data import DataConfig, load
from ftnas.faults.hardware import Hardware
from ftnas.models import count
from ftnas.protection import ProtectionConfig, run_protection
from ftnas.records import read_comparison
from ftnas.rng import isolated
from ftnas.rundir import RunDir
from ftnas.single import SingleFaultConfig, run_single_faults
from ftnas.survey import MIN_DEVICES

SWEEPS = [
    {"fault": {"name": "mibb", "mac_error_rate": 1e-3}, "rates": [0.01, 0.05]},
    {"fault": {"name": "adsaf"}, "rates": [0.08]},
]


@pytest.fixture(scope="module")
def images():
    return load(DataConfig(name="digits"), "test").subset(torch.arange(50))


def subject(name, seed=0):
    with isolated(seed, name):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    return Subject(name, seed, "clean", count(model, (1, 8, 8)), lambda: model)


def run(folder, images, subjects, seed=0):
    config = CampaignConfig(sweeps=SWEEPS, devices=3, batch_size=20)
    return run_campaign(subjects, images, config=config, hardware=Hardware(layers=None), seed=seed, folder=folder)


def test_one_record_for_every_point(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run(folder, images, [subject("a"), subject("b")])
    keys = {(r["model"], r["fault"], r["rate"], r["device"]) for r in records}
    assert len(keys) == len(records) == 2 * ((1 + 2 * 3) + (1 + 3))
    for record in records:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(record["correct"]), dtype=np.uint8))[: record["num_images"]]
        assert bits.mean() == pytest.approx(record["accuracy"])
        assert (record["hits"] == 0) == (record["rate"] == 0.0)
        assert record["params"] > 0 and record["flops"] > 0
    stuck = [r for r in records if r["fault"] == "adsaf" and r["rate"]]
    # weights of conv (36) and linear (1440): hits are binomial, 8% of 1476 is 118; 6 sigma is 62
    assert all(abs(r["hits"] - 118) < 62 and r["sites"] == 1476 for r in stuck)


def test_models_of_one_shape_meet_the_same_devices(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run(folder, images, [subject("a"), subject("b")])
    hits = {(r["model"], r["fault"], r["rate"], r["device"]): r["hits"] for r in records}
    assert all(hits[("a", *key[1:])] == value for key, value in hits.items())
    assert len({value for key, value in hits.items() if key[:3] == ("a", "mibb", 0.05)}) > 1


def test_a_cut_campaign_goes_on_to_the_same_records(images, tmp_path):
    with RunDir.create(tmp_path / "a", {}) as folder:
        whole = run(folder, images, [subject("a")])
    with RunDir.create(tmp_path / "b", {}) as folder:
        journal = folder.journal(RECORDS)
        for record in whole[:4]:
            journal.append(record)
    with RunDir.open(tmp_path / "b") as folder:
        assert run(folder, images, [subject("a")]) == whole


def test_names_must_tell_models_apart(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as folder, pytest.raises(ValueError, match="two models are called 'a'"):
        run(folder, images, [subject("a"), subject("a")])


def test_the_model_that_a_mistake_is_about_is_named(images, tmp_path):
    hardware = Hardware(layers=("name:10",))
    settings = {"fault": {"name": "adsaf"}, "images": 4}
    single, protection = SingleFaultConfig(**settings), ProtectionConfig(**settings, method="ecc", budget=1.0)
    campaign = CampaignConfig(sweeps=SWEEPS, devices=3)
    common = {"hardware": hardware, "seed": 0}
    with RunDir.create(tmp_path / "run", {}) as folder:
        for call in (
            lambda model: run_campaign([model], images, config=campaign, folder=folder, **common),
            lambda model: run_single_faults([model], images, config=single, folder=folder, **common),
            lambda model: run_protection([model], images, images, config=protection, folder=folder, **common),
        ):
            with pytest.raises(ValueError, match="^second: layers='name:10' matches no layer"):
                call(subject("second"))


def test_records_that_cannot_be_read_are_named(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as folder:
        for record in ({"model": "a"}, {"model": "b"}):
            folder.journal(RECORDS).append(record)
        with pytest.raises(ValueError, match="record 1 has no 'train_seed'"):
            run(folder, images, [subject("a")])
        folder.file(RECORDS).unlink()
        folder.file(RECORDS).mkdir()
        with pytest.raises(ValueError, match=r"records.jsonl: cannot be read \(Is a directory\)"):
            run(folder, images, [subject("a")])


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        ([SWEEPS[0], SWEEPS[1], SWEEPS[0] | {"rates": [0.2]}], "two sweeps are called 'mibb'"),
        ([SWEEPS[0] | {"rates": [0.2, 0.2]}], "rates: each is given once, got 0.2 twice"),
        ([SWEEPS[0] | {"rates": [0.2, 1.5]}], "less than or equal to 1, got 1.5"),
        ([{"fault": {"name": "adsaf", "sa0_rate": 0, "sa1_rate": 0}, "rates": [0.1]}], "both are 0 here"),
    ],
)
def test_sweeps_are_checked_before_anything_runs(sweeps, message):
    with pytest.raises(ValueError, match=message):
        CampaignConfig(sweeps=sweeps)


def precise(folder, images, half_width, devices=30):
    config = CampaignConfig(sweeps=SWEEPS[:1], devices=devices, half_width=half_width, batch_size=50)
    return run_campaign([subject("a")], images, config=config, hardware=Hardware(layers=None), seed=0, folder=folder)


def test_points_stop_once_their_interval_is_narrow_enough(images, tmp_path):
    with RunDir.create(tmp_path / "wide", {}) as folder:
        loose = precise(folder, images, 0.5)
    with RunDir.create(tmp_path / "narrow", {}) as folder:
        strict = precise(folder, images, 1e-4)
    for rate in (0.01, 0.05):
        assert sum(record["rate"] == rate for record in loose) == MIN_DEVICES
        assert sum(record["rate"] == rate for record in strict) == 30
    assert [r for r in strict if r["device"] is None or r["device"] < MIN_DEVICES] == loose
    with RunDir.create(tmp_path / "cut", {}) as folder:
        for record in loose[:-3]:
            folder.journal(RECORDS).append(record)
        assert precise(folder, images, 0.5) == loose
    with pytest.raises(ValueError, match="has no effect; allow more devices"):
        CampaignConfig(sweeps=SWEEPS, devices=MIN_DEVICES, half_width=0.1)


def test_a_sweep_may_hold_several_faults_and_have_a_name(images, tmp_path):
    flips = {"name": "weight_bit_flip", "bit_error_rate": 0.1}
    sweeps = [SWEEPS[0], SWEEPS[0] | {"name": "both", "also": [flips]}]
    config = CampaignConfig(sweeps=sweeps, devices=2, batch_size=50)
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run_campaign(
            [subject("a")], images, config=config, hardware=Hardware(layers=None), seed=0, folder=folder
        )
    hits = {(r["fault"], r["rate"], r["device"]): r["hits"] for r in records}
    assert hits[("both", 0.0, None)] == 0
    assert all(hits[("both", *key[1:])] > value for key, value in hits.items() if key[0] == "mibb" and key[1])


def test_formats_of_further_faults_stay_at_rate_0(images, tmp_path):
    """What a fault's words cost is no loss under faults: q1.1 holds -2 to 1.5 in steps of a half."""
    words = {"name": "weight_bit_flip", "bit_error_rate": 0.0, "dtype": "q1.1"}
    sweeps = [{"fault": {"name": "mibb", "mac_error_rate": 1e-9}, "rates": [1e-12], "name": "both", "also": [words]}]
    config = CampaignConfig(sweeps=sweeps, devices=1, batch_size=50)
    with RunDir.create(tmp_path / "run", {}) as folder:
        without, under = run_campaign(
            [subject("a")], images, config=config, hardware=Hardware(layers=None), seed=0, folder=folder
        )
    assert (without["rate"], under["hits"]) == (0.0, 0)
    assert without["correct"] == under["correct"]


def test_rate_0_differs_in_its_rate_alone(images, tmp_path):
    config = CampaignConfig(sweeps=[SWEEPS[0]], devices=1, batch_size=50)
    hardware = Hardware(layers=None, protect=("conv2d",))
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run_campaign([subject("a")], images, config=config, hardware=hardware, seed=0, folder=folder)
    assert len({record["sites"] for record in records}) == 1


def test_nan_that_a_model_reads_as_zero_are_counted(images, tmp_path):
    sweeps = [{"fault": {"name": "weight_bit_flip", "bit_error_rate": 0, "dtype": "fp16"}, "rates": [0.4]}]
    config = CampaignConfig(sweeps=sweeps, devices=5, batch_size=50)
    saturated = subject("weights")
    ftnas.saturate(saturated.load(), "tanh")
    bounded = subject("features")
    ftnas.bound(bounded.load(), features=FeatureBound(value=1.0, nan="zero"))
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run_campaign(
            [saturated, bounded], images, config=config, hardware=Hardware(layers=None), seed=0, folder=folder
        )
    zeroed = {(r["model"], r["rate"]): (0, 0) for r in records}
    for r in records:
        before = zeroed[r["model"], r["rate"]]
        zeroed[r["model"], r["rate"]] = (before[0] + r["nan_zeroed"], before[1] + r["features_zeroed"])
        assert r["nan_zeroed"] <= r["nonfinite_weights"]
        assert r["nonfinite"] == 0 or r["model"] == "features"  # its classifier is not bounded
    assert zeroed["weights", 0.0] == zeroed["features", 0.0] == (0, 0)
    (weights, none), (nothing, features) = zeroed["weights", 0.4], zeroed["features", 0.4]
    assert weights > 0 and features > 0 and none == nothing == 0
    notes = read_comparison(tmp_path / "run" / RECORDS).notes
    assert any(f"weights: {weights} weights that were NaN" in note for note in notes)
    assert any(f"features: {features} features that were NaN" in note for note in notes)


def test_answers_that_are_not_numbers_are_counted_apart(images, tmp_path):
    sweeps = [{"fault": {"name": "weight_bit_flip", "bit_error_rate": 0, "dtype": "fp16"}, "rates": [0.2]}]
    config = CampaignConfig(sweeps=sweeps, devices=2, batch_size=50)
    with RunDir.create(tmp_path / "run", {}) as folder:
        records = run_campaign(
            [subject("a")], images, config=config, hardware=Hardware(layers=None), seed=0, folder=folder
        )
    faulty = [record for record in records if record["rate"]]
    assert all(record["nonfinite_weights"] > 0 and record["nonfinite"] > 0 for record in faulty)
    assert all(record["nan_zeroed"] == record["features_zeroed"] == 0 for record in records)
    comparison = read_comparison(tmp_path / "run" / RECORDS, interval="bootstrap")
    assert any("NaN or infinite" in note for note in comparison.notes)
    found = comparison.summary("weight_bit_flip", "a", [0.2])
    assert found is not None and found[0].method == "bootstrap over devices and images"
