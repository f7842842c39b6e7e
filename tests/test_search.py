"""Algorithm 1 at a tiny scale: what it writes, that it is deterministic, and that a kill does not change it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftnas import derive as derive_module
from ftnas import devices
from ftnas import search as search_module
from ftnas.branches import Overlapped
from ftnas.controllers import RandomConfig, RandomController
from ftnas.data import DataConfig, load, stratified_split
from ftnas.faults.hardware import Hardware
from ftnas.rundir import RunDir
from ftnas.search import Search
from ftnas.search_settings import SearchConfig
from ftnas.space import Genotype

SPACE = {
    "version": 1,
    "name": "tiny",
    "nodes": 3,
    "primitives": ["none", "skip", "conv_1x1", "relu_conv_bn_3x3"],
    "cells": 2,
    "reductions": [1],
    "channels": 4,
    "preprocess": "relu_conv_bn_1x1",
}
FILES = ("trials.jsonl", "updates.jsonl", "epochs.jsonl", "genotype.json", "ranking.json")

KILLED = """
import sys
from test_search import make_search
from ftnas.rundir import RunDir
with RunDir.create(sys.argv[2], {}) as run:
    make_search(sys.argv[1], run.stage("search"), epochs=40).run()
"""


MIBB = {"name": "mibb", "mac_error_rate": 0.003}
ADSAF = {"name": "adsaf", "cells": "differential", "stuck_at": "max"}


def make_search(space, folder, *, epochs=3, fault=MIBB, images=None, **changes):
    torch.set_num_threads(1)
    images = images or load(DataConfig(name="digits"), "train").subset(torch.arange(160))
    first, second = stratified_split(images.labels, 0.8, seed=0)
    settings = {
        "space": str(space),
        "epochs": epochs,
        "warmup_epochs": 1,
        "weights": {"batch_size": 32, "lr": 0.05, "alpha_l": 0.5, "schedule": {"name": "step", "milestones": [90]}},
        "controller": {"name": "reinforce", "hidden_units": 8, "lr": 0.01},
        "controller_steps": 2,
        "controller_batch": 20,
        "rollouts": 3,
        "derive": {"samples": 4, "finalists": 2, "final_draws": 2},
        **changes,
    }
    return Search(
        SearchConfig.model_validate(settings),
        hardware=Hardware.model_validate({"fault": fault}),
        weights_images=images.subset(first),
        controller_images=images.subset(second),
        seed=5,
        folder=folder,
    )


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "tiny.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    return path


@pytest.fixture(scope="module")
def whole(space, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    with RunDir.create(path, {}) as run:
        search = make_search(space, run.stage("search"))
        winner = search.run()
    return search, winner, path / "search"


def test_a_search_leaves_what_it_found(whole):
    search, winner, folder = whole
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [(t["epoch"], t["update"], t["rollout"]) for t in trials] == [
        (epoch, epoch * 2 + update, rollout) for epoch in (1, 2) for update in range(2) for rollout in range(3)
    ]
    for trial in trials:
        assert trial["reward"] == pytest.approx(0.5 * trial["clean"] + 0.5 * trial["faulty"])
        Genotype.from_dict(trial["genotype"]).validate(search.space)
    ranking = json.loads((folder / "ranking.json").read_text())
    assert Genotype.load(folder / "genotype.json") == winner == Genotype.from_dict(ranking[0]["genotype"])
    finals = [entry["final"]["reward"] for entry in ranking if entry["final"]]
    assert finals == sorted(finals, reverse=True) and len(finals) == 2


def test_tensorboard_shows_losses_rewards_and_genotypes(whole):
    events = EventAccumulator(str(whole[2] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"weights/loss", "weights/faulty_loss", "controller/reward", "controller/entropy"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"genotype/best of the epoch", "genotype/winner"}
    assert [image.step for image in events.Images("genotype/best of the epoch")] == [1, 2]  # epoch 0 is the warm-up
    picture = events.Images("genotype/winner")[0]
    assert picture.width > 200 and picture.height > 80


def test_the_same_seed_gives_the_same_search(space, whole, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(space, run.stage("search")).run()
    assert contents(tmp_path / "run" / "search") == contents(whole[2])


@pytest.mark.parametrize("controller", ["random", "evolution"])
def test_other_controllers_share_the_loop(space, tmp_path, controller):
    config = {"name": controller} | ({"population_size": 4, "sample_size": 2} if controller == "evolution" else {})
    with RunDir.create(tmp_path / "run", {}) as run:
        winner = make_search(space, run.stage("search"), epochs=2, controller=config).run()
    winner.validate(make_search(space, run.stage("other")).space)


def test_finalists_can_be_trained_before_the_choice(space, tmp_path):
    derive = {"samples": 2, "finalists": 2, "final_draws": 1, "train_epochs": 1}
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(space, run.stage("search"), epochs=2, derive=derive).run()
    assert (tmp_path / "run" / "search" / "finalists" / "1" / "checkpoint.pt").exists()


def test_a_finalist_whose_training_fails_scores_0_and_the_others_stay(space, tmp_path, monkeypatch):
    derive = {"samples": 3, "finalists": 2, "final_draws": 1, "train_epochs": 1}
    real = derive_module.fit

    def fit(model, *args, folder, **options):
        if folder.path.name == "0":
            raise RuntimeError("the loss is nan in epoch 1")
        return real(model, *args, folder=folder, **options)

    monkeypatch.setattr(derive_module, "fit", fit)
    with RunDir.create(tmp_path / "run", {}) as run:
        winner = make_search(space, run.stage("search"), epochs=2, derive=derive).run()
        events = [event for event in run.stage("search").journal("events.jsonl").records()]
    events = [event for event in events if event["kind"] == "finalist_failed"]
    ranking = json.loads((tmp_path / "run" / "search" / "ranking.json").read_text())
    assert [entry["final"] and entry["final"]["reward"] > 0 for entry in ranking] == [True, False, None]
    assert ranking[0]["genotype"] == winner.to_dict()
    (event,) = events
    assert event["reason"] == "the loss is nan in epoch 1" and event["genotype"] == ranking[1]["genotype"]


def test_killed_and_resumed_equals_uninterrupted(space, tmp_path):
    epochs = 40
    script = [sys.executable, "-c", KILLED, str(space), str(tmp_path / "cut")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(script, env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut" / "search" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # into a later epoch, between two checkpoints
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "cut" / "search" / "genotype.json").exists(), "it was over before the kill"
    with RunDir.open(tmp_path / "cut") as run:
        make_search(space, run.stage("search"), epochs=epochs).run()
    with RunDir.create(tmp_path / "whole", {}) as run:
        make_search(space, run.stage("search"), epochs=epochs).run()
    assert contents(tmp_path / "cut" / "search") == contents(tmp_path / "whole" / "search")


@pytest.mark.parametrize("fault", [MIBB, ADSAF], ids=["mibb", "adsaf"])
def test_by_the_way_of_a_gpu_a_resumed_search_is_the_whole_one(fault, space, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)
    with RunDir.create(tmp_path / "whole", {}) as run:
        make_search(space, run.stage("search"), epochs=4, fault=fault).run()
    # the one in two pieces also overlaps the parts of its steps
    made = []
    monkeypatch.setattr(
        "ftnas.search.parts_of_a_step", lambda *_, **__: made.append(Overlapped(torch.device("cpu"))) or made[-1]
    )
    with RunDir.create(tmp_path / "cut", {}) as run:
        search = make_search(space, run.stage("search"), epochs=4, fault=fault)
        step, done = search._weights_epoch, []

        def cut(epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            done.append(epoch)
            return step(epoch)

        search._weights_epoch = cut
        with pytest.raises(KeyboardInterrupt):
            search.run()
    assert done == [0, 1]
    with RunDir.open(tmp_path / "cut") as run:
        make_search(space, run.stage("search"), epochs=4, fault=fault).run()
    assert len(made) == 4
    assert contents(tmp_path / "cut" / "search") == contents(tmp_path / "whole" / "search")
    epochs = [json.loads(line) for line in (tmp_path / "whole" / "search" / "epochs.jsonl").read_text().splitlines()]
    assert len(epochs) == 4 and all(epoch["hits"] > 0 for epoch in epochs)


def test_a_checkpoint_that_does_not_fit_is_named(space, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as run:
        stage = run.stage("search")
        make_search(space, stage, epochs=2).run()
        state, trials = stage.load("checkpoint.pt"), stage.file("trials.jsonl").read_bytes()
        shared = state["supernet"]
        weight = shared["stem.0.weight"]
        for changes, message in (
            ({"supernet": {**shared, "stem.0.weight": weight[:2]}}, "another architecture: 'stem.0.weight'"),
            ({"supernet": {**shared, "stem.0.weight": weight * float("nan")}}, "'stem.0.weight' holds NaN"),
        ):
            stage.save("checkpoint.pt", state | changes)
            with pytest.raises(ValueError, match=message):
                make_search(space, stage, epochs=2).run()
        stage.save("checkpoint.pt", {key: value for key, value in state.items() if key != "offsets"})
        with pytest.raises(ValueError, match="it has no 'offsets'"):
            make_search(space, stage, epochs=2).run()
        assert stage.file("trials.jsonl").read_bytes() == trials


def test_weights_that_diverge_are_an_error(space, tmp_path):
    weights = {"batch_size": 32, "lr": 1e30, "alpha_l": 0.5, "grad_clip": None}
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(RuntimeError, match="NaN or infinite in search"):
        make_search(space, run.stage("search"), weights=weights).run()


def test_weights_that_the_last_step_of_an_epoch_breaks_reach_no_checkpoint(space, tmp_path, monkeypatch):
    steps, move = [], search_module.move

    def breaks(parameters, *args):
        move(parameters, *args)
        steps.append(None)
        if len(steps) == 2 * (128 // 32):
            parameters[0].data.fill_(math.nan)

    monkeypatch.setattr(search_module, "move", breaks)
    with RunDir.create(tmp_path / "run", {}) as run:
        stage = run.stage("search")
        with pytest.raises(RuntimeError, match="became NaN or infinite in the last step of search epoch 1"):
            make_search(space, stage, epochs=3).run()
        assert stage.load("checkpoint.pt")["epoch"] == 1


def test_a_collapsed_controller_is_reported(space, tmp_path, capsys):
    controller = {"name": "reinforce", "hidden_units": 8, "softmax_temperature": 1e-4}
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(space, run.stage("search"), epochs=2, controller=controller).run()
    events = (tmp_path / "run" / "search" / "events.jsonl").read_text()
    assert "entropy_collapse" in events
    assert "stopped exploring" in capsys.readouterr().err


def test_cells_that_nothing_reads_are_reported(space, tmp_path, capsys):
    class FirstInputOnly(RandomController):
        def ask(self, num):
            cell = {"2": [["conv_1x1", 0], ["skip", 0]]}
            return [Genotype.from_dict({"version": 1, "space": "tiny", "normal": cell, "reduce": cell})] * num

    with RunDir.create(tmp_path / "run", {}) as run:
        search = make_search(space, run.stage("search"), epochs=2)
        search.controller = FirstInputOnly(RandomConfig(), search.space, seed=0)
        search.run()
    assert "nothing reads cell 0 of the winner" in capsys.readouterr().err
    assert '"kind":"unread_cells","cells":[0]' in (tmp_path / "run" / "search" / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 3}, "warmup_epochs must be in 0..epochs-1"),
        ({"derive": {"train_epochs": -1}}, "greater than or equal to 0"),
        ({"split": 1.0}, "split must be above 0 and below 1"),
        ({"controller": {"name": "reinforced"}}, "did you mean 'reinforce'"),
        ({"weights": {"batch_size": 4096, "lr": 0.1}}, "is above the 128 images"),
    ],
)
def test_wrong_settings_are_refused(space, tmp_path, changes, message):
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match=message):
        make_search(space, run.stage("search"), **changes)


def test_a_search_in_which_nothing_can_be_scored_names_no_winner(space, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("too small for its kernel")

    monkeypatch.setattr("ftnas.candidates.score", broken)
    with RunDir.create(tmp_path / "run", {}) as run:
        with pytest.raises(RuntimeError, match="no candidate could be scored"):
            make_search(space, run.stage("search"), epochs=2).run()
        assert not run.stage("search").file("genotype.json").exists()


def test_what_was_not_measured_is_null(space, tmp_path):
    weights = {"batch_size": 32, "lr": 0.05, "alpha_l": 0.0}
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(space, run.stage("search"), epochs=2, alpha_r=0.0, weights=weights).run()
    folder = tmp_path / "run" / "search"
    trials, epochs = (
        [json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("trials", "epochs")
    )
    assert all(trial["faulty"] is None and trial["reward"] == trial["clean"] for trial in trials) and trials
    assert all(epoch["faulty_loss"] is None and epoch["clean_loss"] == epoch["loss"] for epoch in epochs) and epochs
    assert json.loads((folder / "ranking.json").read_text())[0]["final"]["faulty"] is None


def test_a_last_batch_of_one_image_is_left_out(space, tmp_path):
    """The shared weights normalise by the batch, and a last map of one pixel has no deviation in one image."""
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SPACE | {"cells": 4, "reductions": [1, 2, 3]}))  # 8x8 to 1x1
    with RunDir.create(tmp_path / "run", {}) as run:
        search = make_search(small, run.stage("search"), epochs=2, controller_batch=31, controller_steps=None)
        images = search._controller_images
        assert images.num_images % 31 == 1
        search.run()
    assert not (tmp_path / "run" / "events.jsonl").exists()  # where candidates that fail are told
    updates = (tmp_path / "run" / "search" / "updates.jsonl").read_text().splitlines()
    assert len(updates) == images.num_images // 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_r": 0.0, "reward_draws": 3}, "alpha_r=0 rewards without faults, so reward_draws has no effect"),
        (
            {"weights": {"batch_size": 32, "lr": 0.05, "alpha_l": 0.0, "mask_gradients": True}},
            "alpha_l=0 trains without faults, so mask_gradients has no effect",
        ),
    ],
)
def test_settings_without_effect_are_refused_at_the_start(space, tmp_path, changes, message):
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match=message):
        make_search(space, run.stage("search"), **changes)


def test_a_primitive_that_draws_by_itself_draws_the_same_in_every_run(tmp_path, monkeypatch):
    (tmp_path / "drawing_primitives.py").write_text(
        "from torch import nn\n\n\ndef drop(*, in_channels, out_channels, stride, affine):\n"
        "    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)\n"
        "    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, affine=affine), nn.Dropout(0.3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "drawing.yaml"
    path.write_text(yaml.safe_dump({**SPACE, "primitives": ["drawing_primitives:drop", "skip"]}))
    found = []
    for name in ("one", "two"):
        torch.rand(len(found) + 1)  # whatever was drawn before
        with RunDir.create(tmp_path / name, {}) as run:
            make_search(path, run.stage("search")).run()
        found.append(contents(tmp_path / name / "search"))
    with RunDir.create(tmp_path / "cut", {}) as run:
        search = make_search(path, run.stage("search"))
        monkeypatch.setattr(search, "_controller_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search.run()
        make_search(path, run.stage("search")).run()
    assert found[0] == found[1] == contents(tmp_path / "cut" / "search")
    sys.modules.pop("drawing_primitives", None)


@pytest.mark.parametrize("size", [12, 11])  # two epochs of two updates of three rollouts
def test_a_population_that_never_fills_is_told(size, space, tmp_path, capsys):
    evolution = {"name": "evolution", "population_size": size, "sample_size": 2}
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(space, run.stage("search"), controller=evolution).run()
    told = f"search.controller.population_size={size}, and 12 candidates are scored in all"
    assert (told in capsys.readouterr().err) == (size == 12)
