"""Final trainings in turn and side by side: the same models, failures recorded, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_cli import ftnas

from ftnas import tuning
from ftnas.data import load

NETS = """
import os, signal
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        cudnn = torch.backends.cudnn  # as this process would compute on a GPU
        self.register_buffer("how", torch.tensor([cudnn.allow_tf32, cudnn.deterministic]))
    def forward(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))

class Full(Net):
    def forward(self, images):
        raise torch.OutOfMemoryError("no memory\\nleft")

class Killed(Net):
    calls = 0
    def forward(self, images):
        once = Path(os.environ["FTNAS_TEST_ONCE"])
        Killed.calls += 1
        if Killed.calls == 30 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

def good(num_classes, in_channels): return Net(in_channels, num_classes)
def full(num_classes, in_channels): return Full(in_channels, num_classes)
def killed(num_classes, in_channels): return Killed(in_channels, num_classes)

class Lagging(Net):
    def forward(self, images):
        return super().forward(images) * 0 + torch.arange(10.0)
def lagging(num_classes, in_channels): return Lagging(in_channels, num_classes)
"""
EPOCHS = 6  # of 5 steps of 2 forwards


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with networks of a user, and what makes a config of some of them."""
    path = tmp_path_factory.mktemp("tuning")
    (path / "own_nets.py").write_text(NETS)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(path))
    patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [path, *filter(None, [os.environ.get("PYTHONPATH")])])))
    patch.setenv("FTNAS_TEST_ONCE", str(path / "once"))
    yield path
    patch.undo()
    sys.modules.pop("own_nets", None)


def config(path, *names, **changes):
    recipe = {"epochs": EPOCHS, "batch_size": 64, "lr": 0.1} | changes.pop("recipe", {})
    data = {
        "version": 1,
        "name": "tuning",
        "threads": 1,
        "data": {"name": "digits", "subset": 320},
        "hardware": {"fault": {"name": "mibb", "mac_error_rate": 0.01}},
        "train": {"recipe": recipe, "models": {name: {"factory": f"own_nets:{name}"} for name in names}, **changes},
    }
    path.write_text(json.dumps(data))
    return path


def models(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "train").rglob("model.pt"))}


def events(path):
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


def check_failed(run, capsys):
    """The run has one training that failed, with its reason; the two others are done."""
    error = capsys.readouterr().err
    summary = "error: 1 of 3 trainings failed (full/seed-0) with OutOfMemoryError: no memory left"
    assert error.strip().splitlines()[-1].startswith(summary)
    assert "warning: train full failed: OutOfMemoryError: no memory left" in error and "Traceback" not in error
    told = [event for event in events(run / "train/full/seed-0") if event["kind"] == "training_failed"]
    assert told[-1]["reason"] == "OutOfMemoryError: no memory left" and "own_nets.py" in told[-1]["traceback"]


@pytest.fixture(scope="module")
def in_turn(setting):
    """A run of three trainings, one of which fails; nobody is killed."""
    (setting / "once").touch()
    run = setting / "in-turn"
    code = ftnas("train", config(setting / "three.json", "full", "good", "killed"), "--out", run)
    (setting / "once").unlink()
    return run, code


def test_a_training_that_fails_is_recorded_and_the_others_finish(in_turn, capsys):
    run, code = in_turn
    assert code == 1
    assert list(models(run)) == ["train/good/seed-0/model.pt", "train/killed/seed-0/model.pt"]
    before = models(run)
    assert ftnas("train", "--resume", run) == 1  # it is tried again, the others are kept
    check_failed(run, capsys)
    assert models(run) == before


def test_workers_give_the_same_models_although_one_is_killed(in_turn, setting, capsys):
    run = setting / "workers"
    assert ftnas("train", setting / "three.json", "--workers", 2, "--out", run) == 1
    check_failed(run, capsys)
    assert (setting / "once").exists()
    assert models(run) == models(in_turn[0])
    how = torch.load(run / "train/good/seed-0/model.pt", weights_only=True)["state"]["how"]
    assert how.tolist() == [False, True]
    history = (run / "train/killed/seed-0/epochs.jsonl").read_bytes()
    assert history == (in_turn[0] / "train/killed/seed-0/epochs.jsonl").read_bytes()
    started = next(event for event in events(run / "train") if event["kind"] == "trials_started")
    assert (started["trials"], started["workers"], started["threads"]) == (3, 2, 1)
    assert [event["training"] for event in events(run / "train") if event["kind"] == "trial_lost"] == ["killed/seed-0"]
    assert not (run / "train/tune").exists()


@pytest.mark.slow
def test_rates_side_by_side_keep_the_one_that_is_kept_in_turn(setting):
    recipe = {"rate_protocol": [0.5, 0.01, 0.001], "rate_threshold": 0.15, "epochs": 12}
    path = config(setting / "rates.json", "good", recipe=recipe, seeds=[0, 1])
    runs = [setting / "rates-in-turn", setting / "rates-workers"]
    assert ftnas("train", path, "--out", runs[0]) == 0
    assert ftnas("train", path, "--workers", 2, "--out", runs[1]) == 0
    assert models(runs[0]) == models(runs[1]) and len(models(runs[0])) == 3
    kept = [[(e["rate"], e["passed"]) for e in events(run / "train/good/seed-0") if "passed" in e] for run in runs]
    assert kept[0] == kept[1] and kept[0][-1] == (0.01, True)
    assert not (runs[0] / "train/good/seed-0/rate-0.001").exists()  # in turn it is not needed
    assert (runs[1] / "train/good/seed-0/rate-0.001").exists()


@pytest.mark.parametrize("case", ["in turn", "on workers", "with asha"])
def test_a_model_that_is_lost_is_made_again_from_its_checkpoint(case, setting, tmp_path, monkeypatch):
    """Where the books of Tune, of a run that was killed, count its training as finished."""
    changes = {"asha": {"grace_epochs": 2, "reduction": 2}} if case == "with asha" else {}
    workers = ["--workers", 0 if case == "in turn" else 2]
    path, run = config(tmp_path / "two.json", "good", "other", **changes), tmp_path / "run"
    path.write_text(path.read_text().replace("own_nets:other", "own_nets:good"))
    calls = []

    def outcomes(work, pool, *, asha, gpus, folder):
        calls.append(list(work.parts))
        for key, part in work.parts.items():
            if len(calls) == 1:
                part.run(load(part.data, "train"))
            yield SimpleNamespace(config={"training": key}, metrics={"epoch": EPOCHS - 1, "loss": 1.0}, error=None)

    monkeypatch.setattr(tuning, "_tune", lambda *args, **options: list(outcomes(*args, **options)))
    monkeypatch.setattr(tuning, "start_ray", lambda *_, **__: lambda: None)
    monkeypatch.setattr(tuning, "_check_room", lambda *_: None)
    assert ftnas("train", path, *workers, "--out", run) == 0
    before, history = models(run), (run / "train/good/seed-0/epochs.jsonl").read_bytes()
    (run / "train/good/seed-0/model.pt").unlink()
    assert ftnas("train", "--resume", run) == 0
    assert models(run) == before and not list(run.rglob("stopped.json"))
    assert (run / "train/good/seed-0/epochs.jsonl").read_bytes() == history
    assert calls == ([] if case == "in turn" else [["good/seed-0", "other/seed-0"], ["good/seed-0"]])


def test_a_rate_that_is_not_needed_may_fail(setting, tmp_path, monkeypatch):
    """In turn it is not tried; side by side it is, and another one is kept all the same."""
    recipe = {"rate_protocol": [0.001, 0.0001], "rate_threshold": 0.05, "epochs": 1}
    path = config(tmp_path / "rates.json", "good", recipe=recipe)

    def outcomes(work, pool, *, asha, gpus, folder):
        for key, part in work.parts.items():
            failed = part.rate == 0.0001
            if not failed:
                part.run(load(part.data, "train"))
            metrics = (
                {"failed": "RuntimeError: the loss is NaN", "mistake": False, "trace": ""} if failed else {"epoch": 1}
            )
            yield SimpleNamespace(config={"training": key}, metrics=metrics, error=None)

    monkeypatch.setattr(tuning, "_tune", lambda *args, **options: list(outcomes(*args, **options)))
    monkeypatch.setattr(tuning, "start_ray", lambda *_, **__: lambda: None)
    monkeypatch.setattr(tuning, "_check_room", lambda *_: None)
    assert ftnas("train", path, "--workers", 2, "--out", tmp_path / "side") == 0
    assert ftnas("train", path, "--out", tmp_path / "turn") == 0
    assert models(tmp_path / "side") == models(tmp_path / "turn") != []


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_its_trials(setting):
    path = config(setting / "long.json", "good", seeds=[0, 1, 2], recipe={"epochs": 60})
    whole, cut = setting / "whole", setting / "cut"
    assert ftnas("train", path, "--out", whole) == 0
    command = [sys.executable, "-m", "ftnas.cli", "train", str(path), "--workers", "2", "--out", str(cut)]
    driver = subprocess.Popen(command)
    deadline = time.monotonic() + 200
    while not list(cut.glob("train/good/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (cut / "train/model.pt").exists()
    done = subprocess.run(
        [*command[:4], "--resume", str(cut), "--workers", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "going on with the trials of an earlier run" in done.stderr
    assert models(cut) == models(whole)


@pytest.mark.slow
def test_asha_stops_what_lags_behind(setting, capsys):
    """With one worker the order is known, and the second has a loss that does not fall."""
    path = config(
        setting / "asha.json", "good", "lagging", asha={"grace_epochs": 2, "reduction": 2}, recipe={"epochs": 8}
    )
    run = setting / "asha"
    assert ftnas("train", path, "--workers", 1, "--out", run) == 0
    assert list(models(run)) == ["train/good/seed-0/model.pt", "train/model.pt"]
    assert json.loads((run / "train/lagging/seed-0/stopped.json").read_text())["epoch"] == 2
    assert "train lagging was stopped after 2 of 8 epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "train.asha works with workers alone"),
        ({"seeds": [0, 1]}, "it takes one seed and no rate_protocol"),
        ({"recipe": {"epochs": 2}}, "asha has no effect on one model, or with grace_epochs as long as the training"),
    ],
)
def test_asha_that_makes_no_sense_is_refused(setting, tmp_path, capsys, changes, message):
    path = config(tmp_path / "refused.json", "good", "killed", asha={"grace_epochs": 2}, **changes)
    assert ftnas("train", path, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
