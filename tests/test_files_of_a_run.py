"""A run and the files that its config names: spaces, weights, devices; mistakes that are found before the work."""

import hashlib
import json
import sys

import pytest
import torch
import yaml
from test_cli import TRAIN, ftnas

from ftnas.data import DataConfig, load, stratified_split
from ftnas.faults import AdSAF, PlanSet, inject
from ftnas.models import ModelConfig, build, describe, load_model, save_model
from ftnas.quantize import FixedPoint
from ftnas.space import load_space

SEARCH = [
    "control=null",
    "threads=1",
    "data.subset=200",
    "search.epochs=1",
    "search.warmup_epochs=0",
    "search.weights.batch_size=64",
    "search.controller_steps=1",
    "search.rollouts=2",
    "search.derive.samples=2",
    "search.derive.finalists=1",
    "train.models={searched: {genotype: search}}",
    "train.recipe.epochs=1",
    "campaign=null",
]
ONE = [*TRAIN, "data.subset=200", "train.recipe.batch_size=64", "campaign.devices=1", "campaign.images=20"]


@pytest.mark.parametrize("name", ["small-8x8", "my-space"])
def test_what_a_search_found_is_trained_in_its_own_space(name, tmp_path):
    """A space of one's own may bear the name of a shipped one, or one that nothing else knows."""
    data = load_space("small-8x8").model_dump(mode="json")
    path = tmp_path / "bigger.yaml"
    path.write_text(yaml.safe_dump(data | {"name": name, "channels": 6, "cells": 4}))
    assert ftnas("run", "quickstart", *SEARCH, f"search.space={path}", "--out", tmp_path / "run") == 0
    spec = torch.load(tmp_path / "run" / "train" / "model.pt", weights_only=True)["spec"]
    assert (spec["space"]["channels"], spec["space"]["cells"]) == (6, 4)


def test_the_three_jobs_do_all_of_a_config_with_a_control(tmp_path, capsys):
    run = tmp_path / "run"
    shorter = [text.replace("search.", "control.") for text in SEARCH if text.startswith("search.")]
    models = "train.models={searched: {genotype: search}, random: {genotype: control}}"
    campaign = ["campaign.devices=1", "campaign.images=20", "campaign.sweeps.0.rates=[0.01]"]
    overrides = [*SEARCH[1:-1], *shorter, models, *campaign]
    assert ftnas("search", "quickstart", *overrides, "--out", run) == 0
    said = capsys.readouterr().out
    assert all(f"written to {run / which / 'genotype.json'}" in said for which in ("search", "control"))
    assert ftnas("train", "--resume", run) == 0
    assert ftnas("campaign", "--resume", run) == 0
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {record["model"] for record in records} == {"searched", "random"}


NET = ModelConfig(baseline="resnet20", width=0.25)
SIZES = {"num_classes": 10, "in_channels": 1, "image_size": 8}


def write_weights(path, seed):
    save_model(path, build(NET, **SIZES, seed=seed), describe(NET, **SIZES), {})


def write_device(path, seed):
    model = build(NET, **SIZES, seed=0)
    with torch.no_grad(), inject(model, AdSAF(), quantization=FixedPoint(), seed=seed, layers="conv2d") as injection:
        model.eval()(torch.zeros(1, 1, 8, 8))
    injection.plans().save(path)


def write_space(path, seed):
    data = load_space("small-8x8").model_dump(mode="json")
    path.write_text(yaml.safe_dump(data | {"channels": 6 + 2 * seed}))


FILES = {
    "campaign.defects.0": ("campaign", write_device,
                           ["control=null", "search=null", "train=null", "models={given: {file: 'MODEL'}}",
                            "campaign={defects: ['FILE'], images: 20}"]),
    "models.given": ("campaign", write_weights, [*ONE, "train=null", "models={given: {file: 'FILE'}}"]),
    "train.models.net.start": ("train", write_weights,
                               [*ONE, "train.models={net: {baseline: resnet20, width: 0.25, start: 'FILE'}}"]),
    "hardware.defects": ("train", write_device, [*ONE, "campaign=null", "hardware={defects: 'FILE'}"]),
    "search.space": ("search", write_space, [*SEARCH, "search.space=FILE"]),
}  # fmt: skip


@pytest.mark.parametrize("setting", FILES)
def test_a_run_does_not_go_on_with_a_file_that_was_changed(setting, tmp_path, capsys):
    command, write, overrides = FILES[setting]
    path, run = tmp_path / "file.pt", tmp_path / "run"
    write(path, 0)
    write_weights(tmp_path / "model.pt", 0)
    before = path.read_bytes()
    overrides = [text.replace("FILE", str(path)).replace("MODEL", str(tmp_path / "model.pt")) for text in overrides]
    assert ftnas(command, "quickstart", *overrides, "--out", run) == 0
    assert setting in json.loads((run / "run.json").read_text())["files"]
    for made in (*run.rglob("genotype.json"), *run.rglob("records.jsonl"), *run.rglob("model.pt")):
        made.unlink()  # as in a run that was cut
    write(path, 1)
    assert path.read_bytes() != before
    capsys.readouterr()
    assert ftnas(command, "--resume", run) == 2
    said = capsys.readouterr().err
    assert f"error: {setting}: {path} was changed since {run} began with it" in said and "Traceback" not in said
    path.write_bytes(before)
    assert ftnas(command, "--resume", run) == 0


@pytest.mark.parametrize("which", ["search", "control"])
def test_what_a_search_found_is_not_trained_in_a_space_that_was_changed(which, tmp_path, capsys):
    path, run = tmp_path / "space.yaml", tmp_path / "run"
    write_space(path, 0)
    before = path.read_bytes()
    overrides = [*SEARCH, f"search.space={path}"]
    if which == "control":
        second = (
            "control={space: 'FILE', epochs: 1, weights: {batch_size: 64, lr: 0.1, alpha_l: 0.5}, "
            "controller: {name: random}, controller_steps: 1, derive: {samples: 2, finalists: 1}}"
        )
        overrides = [*SEARCH[1:], second.replace("FILE", str(path)), "train.models={searched: {genotype: control}}"]
    assert ftnas("search", "quickstart", *overrides, "--out", run) == 0
    for made in run.rglob("model.pt"):
        made.unlink()  # as in a run that was cut
    write_space(path, 1)
    capsys.readouterr()
    assert ftnas("train", "--resume", run) == 2
    assert f"error: {which}.space: {path} was changed since {run} began with it" in capsys.readouterr().err
    path.write_text("{}")  # what is no space any more is told in the same words
    assert ftnas("train", "--resume", run) == 2
    assert f"error: {which}.space: {path} was changed since {run} began with it" in capsys.readouterr().err
    path.write_bytes(before)
    assert ftnas("train", "--resume", run) == 0
    spec = torch.load(run / "train" / "model.pt", weights_only=True)["spec"]
    assert spec["space"]["channels"] == 6


@pytest.mark.parametrize("stage", ["train", "campaign"])
def test_code_of_a_network_that_was_changed_is_told(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "changed_nets.py"
    source.write_text(
        "from torch import nn\n\n\ndef make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    run, own = tmp_path / "run", "train.models={own: {factory: 'changed_nets:make'}}"
    command = "train" if stage == "train" else "run"
    seeds = "train.seeds=[0, 1]" if stage == "train" else "train.seeds=[0]"
    assert ftnas(command, "quickstart", *ONE, own, seeds, "--out", run) == 0
    assert "was changed since" not in capsys.readouterr().err
    for made in (run / "train/own/seed-1/model.pt", run / "records.jsonl"):
        made.unlink(missing_ok=True)  # as in a run that was cut
    source.write_text(source.read_text().replace("nn.ReLU", "nn.Tanh"))
    assert ftnas(stage, "--resume", run) == 0
    error = capsys.readouterr().err
    assert f"warning: train.models.own.factory: {source} was changed since {run} began with it" in error
    sys.modules.pop("changed_nets", None)


def test_what_plays_no_part_is_said(tmp_path, capsys):
    write_device(tmp_path / "chip.npz", 0)
    hardware = f"hardware={{defects: '{tmp_path / 'chip.npz'}', layers: linear}}"
    protection = "protections=[{fault: {name: mibb, mac_error_rate: 0.0}, method: triplicate, budget: 1.0}]"
    assert ftnas("train", "quickstart", *ONE, hardware, protection, "--out", tmp_path / "run") == 0
    error = capsys.readouterr().err
    assert "note: hardware.layers plays no part in the training" in error
    assert "protections: mibb, triplicate: at rate 0 nothing fails" in error


AHEAD = {
    "bits": (["campaign.sweeps.0.fault.where={bits: [9]}"], "campaign: mibb on net: "),
    "layers": (
        ["campaign.sweeps.0.fault.where={layers: ['nothing*']}"],
        "campaign: mibb on net: layers='nothing*' matches no layer",
    ),
    "file": (["models={given: {file: gone.pt}}"], "models.given: no file gone.pt, which is needed once"),
    "name": (["models={net: {file: 'FILE'}}"], "models.net: train.models has one of that name and seed 0"),
    "interval": (["train.seeds=[0, 1]", "campaign.interval=bootstrap"], "is for one training seed"),
    "experiments": (
        ["single_faults=[{fault: {name: mibb}, exhaustive: true, margin: 0.1}]"],
        "margin chooses a number of experiments",
    ),
    "a rate of one fault": (
        ["single_faults=[{fault: {name: adsaf, sa1_rate: 0.1}}]"],
        "single_faults: adsaf: one fault at a time has no rate; remove sa1_rate",
    ),
    "unreadable": (["data.unreadable=skip"], "concerns files of image_folder only"),
    "single faults": (
        ["single_faults=[{fault: {name: adsaf, where: {layers: gone}}}]"],
        "single_faults: adsaf on net: layers='gone' matches no layer",
    ),
    "single faults elsewhere": (
        ["single_faults=[{fault: {name: mibb, where: {layers: conv1, channels: [99]}}}]"],
        "single_faults: mibb on net: 'conv1': where.channels must be in 0..3, got 99",
    ),
    "protections": (
        ["protections=[{fault: {name: adsaf, where: {layers: gone}}, method: triplicate, budget: 1.0}]"],
        "protections: adsaf, triplicate on net: ",
    ),
    "given": (["models={other: {file: 'WRONG'}}"], "not a"),
    "factory": (["models={own: {factory: 'no_such_module:make', checkpoint: 'FILE'}}"], "no_such_module"),
    "start": (["train.models={net: {baseline: resnet20, start: gone.pt}}"], "train.models.net.start: no file gone.pt"),
    "batch": (["train.recipe.batch_size=500"], "train: batch_size=500 is above the 200 images"),
    "cutout": (
        ["train.recipe.augment={cutout: 9}"],
        "train: augment.cutout: must be less than",
    ),
    "graph": (["train.recipe.compute={cuda_graph: true}", "device=cpu"], "cuda_graph replays steps, but there are 3"),
    "regularizer": (
        ["train.recipe.regularizers=[{name: dropout, rate: 0.1, layers: [gone]}]"],
        "train: net: ",
    ),
    "rates": (
        ["hardware={defects: 'DEVICE'}", "train.recipe.rate_protocol=[0.1]", "train.recipe.rate_threshold=0.1"],
        "has no rate to set",
    ),
    "device": (["campaign={defects: [gone.npz]}"], "campaign.defects: gone.npz: no such file"),
    "device of others": (["campaign={defects: ['DEVICE']}", "train.models={net: {baseline: vgg16}}"], "campaign: "),
    "devices of one name": (["campaign={defects: [a/x.npz, b/x.npz]}"], "two files of defects are called 'device x'"),
    "nothing": (["campaign={sweeps: []}"], "measures sweeps or defects (known devices), and there is neither"),
}
LATER = {
    "control.space": (["control.space=gone.yaml"], "gone.yaml"),
    "control batch": (["control.weights.batch_size=400"], "control.weights.batch_size=400 is above the"),
    "control joint": (["control.joint_forwards=true", "device=cpu"], "control.joint_forwards is for GPUs"),
    "train batch": (["train.recipe.batch_size=500"], "train: batch_size=500 is above the 200 images"),
}


@pytest.mark.parametrize("mistake", LATER)
def test_a_mistake_in_a_later_stage_is_told_before_the_search(mistake, tmp_path, capsys):
    changes, message = LATER[mistake]
    run = tmp_path / "run"
    assert ftnas("run", "quickstart", *SEARCH[1:], *changes, "--out", run) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not run.exists()


@pytest.mark.parametrize("mistake", AHEAD)
def test_a_mistake_in_what_is_measured_is_told_before_the_training(mistake, tmp_path, capsys):
    changes, message = AHEAD[mistake]
    run = tmp_path / "run"
    write_weights(tmp_path / "file.pt", 0)
    write_device(tmp_path / "device.npz", 0)
    (tmp_path / "wrong.pt").write_text("no model")
    for word, name in (("FILE", "file.pt"), ("DEVICE", "device.npz"), ("WRONG", "wrong.pt")):
        changes = [change.replace(word, str(tmp_path / name)) for change in changes]
    assert ftnas("run", "quickstart", *ONE, *changes, "--out", run) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not run.exists()


def test_a_network_that_is_trained_for_a_chip_is_measured_on_it(tmp_path, capsys):
    write_device(tmp_path / "chip.npz", 3)
    chip, run = tmp_path / "chip.npz", tmp_path / "run"
    for_chip = [*ONE, "train.recipe.alpha_l=1.0", f"hardware={{defects: '{chip}'}}"]
    assert ftnas("run", "quickstart", *for_chip, "--out", run) == 0
    assert f"campaign.defects=[{chip}] does" in capsys.readouterr().err  # the note
    changes = [*for_chip, f"campaign.defects=['{chip}']"]
    assert ftnas("run", "quickstart", *changes, "--out", tmp_path / "both") == 0
    assert "does" not in capsys.readouterr().err.replace("campaign", "")
    records = [json.loads(line) for line in (tmp_path / "both" / "records.jsonl").read_text().splitlines()]
    clean, found = [record for record in records if record["fault"] == "device chip"]
    plans = PlanSet.load(chip)
    units = sum(plan.population for plan in plans.plans.values())
    assert (clean["rate"], clean["device"], clean["hits"]) == (0.0, None, 0)
    assert (found["rate"], found["device"], found["hits"]) == (plans.hits() / units, 0, plans.hits())
    network, _ = load_model(tmp_path / "both" / "train" / "model.pt")
    images = load(DataConfig(name="digits", subset=200), "test")
    chosen, _ = stratified_split(images.labels, 20 / images.num_images, seed=0)
    with torch.no_grad(), inject(network.eval(), plans=plans, quantization=FixedPoint()):
        (x, y), *_ = images.subset(chosen).batches(len(chosen))
        assert found["accuracy"] == pytest.approx(float((network(x).argmax(1) == y).double().mean()))
    mibb = [record for record in records if record["fault"] == "mibb"]
    assert mibb == [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert "device chip" in (tmp_path / "both" / "report" / "report.html").read_text()


def test_one_name_for_several_training_seeds_from_two_runs(tmp_path):
    write_weights(tmp_path / "file.pt", 0)
    changes = ["train.seeds=[1, 2]", f"models={{net: {{file: '{tmp_path / 'file.pt'}'}}}}"]
    assert ftnas("run", "quickstart", *ONE, *changes, "--out", tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {(record["model"], record["train_seed"]) for record in records} == {("net", seed) for seed in range(3)}


def test_a_run_may_name_what_it_has_still_to_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "train.models={searched: {genotype: run/search/genotype.json}}"
    campaign = ["campaign.sweeps=[{fault: {name: mibb, mac_error_rate: 0.01}, rates: [0.01]}]", "campaign.images=10"]
    assert ftnas("run", "quickstart", *SEARCH[:-1], given, *campaign, "campaign.devices=1", "--out", "run") == 0


def test_a_run_of_an_older_config_goes_on(tmp_path, capsys):
    """What a new config is refused for stays as it is in one that cannot be changed any more."""
    run = tmp_path / "run"
    assert ftnas("train", "quickstart", *ONE, "train.seeds=[0, 1]", "--out", run) == 0
    data = yaml.safe_load((run / "config.yaml").read_text())
    data["campaign"]["interval"], data["data"]["unreadable"] = "bootstrap", "skip"
    text = yaml.safe_dump(data, sort_keys=False).encode()
    (run / "config.yaml").write_bytes(text)
    info = json.loads((run / "run.json").read_text()) | {"config_sha256": hashlib.sha256(text).hexdigest()}
    (run / "run.json").write_text(json.dumps(info))
    assert ftnas("campaign", "--resume", run) == 0
    assert ftnas("campaign", run / "config.yaml", "--out", tmp_path / "new") == 2
    assert "campaign.interval is for one training seed" in capsys.readouterr().err
