"""Run folders from the command line: nothing is lost by a mistake, a full disk, a damaged file or a signal."""

import errno
import hashlib
import io
import json
import os
import resource
import shlex
import signal
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_cli import TRAIN, ftnas

from ftnas import cli, storage
from ftnas.config import read_config
from ftnas.report import _slug, _unused, build_report
from ftnas.rundir import RunDir
from ftnas.storage import save_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    assert ftnas("run", "quickstart", *TRAIN, "--out", path) == 0
    return path


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_milestones_that_no_epoch_comes_after_are_told(tmp_path, capsys):
    schedule = "train.recipe.schedule={name: step, milestones: [1, 2, 40]}"
    command = ["train", "quickstart", *TRAIN, schedule, "--out"]
    assert ftnas(*command, tmp_path / "short", "train.recipe.epochs=2") == 0
    warning = "train.recipe.schedule.milestones: epochs=2 ends before 2, 40 can have an effect"
    assert capsys.readouterr().err.count(warning) == 1
    assert ftnas(*command, tmp_path / "long", "train.recipe.schedule.milestones=[1]", "train.recipe.epochs=2") == 0
    assert "milestones" not in capsys.readouterr().err


def test_a_search_tells_such_milestones_too(tmp_path, capsys):
    schedule = "search.weights.schedule={name: step, milestones: [1, 2]}"
    small = ["control=null", "train=null", "campaign=null", "search.epochs=2", "search.warmup_epochs=1", "threads=1"]
    assert ftnas("search", "quickstart", *small, schedule, "search.derive.samples=5", "--out", tmp_path / "run") == 0
    warning = "search.weights.schedule.milestones: epochs=2 ends before 2 can have an effect"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_search_tells_what_has_no_effect_on_its_candidates(tmp_path, capsys):
    schedule = "search.weights.schedule={name: step, milestones: [1, 2]}"
    small = ["control=null", "train=null", "campaign=null", "search.epochs=3", "search.warmup_epochs=2", "threads=1"]
    small += ["data.subset=200", "search.controller_batch=40", "search.derive.samples=2", "search.derive.finalists=1"]
    draws = ["search.derive.draws=1", "search.derive.final_draws=5"]  # as they are when left out
    command = ["search", "quickstart", *small, "search.alpha_r=0", *draws]
    assert ftnas(*command, schedule, "search.derive.train_epochs=1", "--out", tmp_path / "trained") == 0
    error = capsys.readouterr().err
    warning = "search.weights.schedule.milestones: search.derive.train_epochs=1 ends before 1, 2 can have an effect"
    assert error.count(warning) == 1 and error.count("milestones") == 1 and "alpha_r" not in error
    assert ftnas(*command, "search.derive.draws=2", "search.derive.final_draws=3", "--out", tmp_path / "draws") == 0
    error = capsys.readouterr().err
    assert "note: search.alpha_r=0 scores without faults; search.derive.draws=2 plays no part in it" in error
    assert "note: search.alpha_r=0 scores without faults; search.derive.final_draws=3 plays no part in it" in error
    assert "milestones" not in error
    assert ftnas(*command[:-3], "search.alpha_r=0.5", "search.derive.draws=2", "--out", tmp_path / "faulty") == 0
    assert "alpha_r" not in capsys.readouterr().err


MISTAKES = {
    "device": ["device=cuda:9"],
    "space": ["search={space: nope, epochs: 1, weights: {batch_size: 8, lr: 0.1}}"],
    "data": ["data={name: cifar10, root: /nonexistent}"],
    "model": ["train=null", "models={m: {file: /nonexistent.pt}}"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_replaces_no_run_and_leaves_none(mistake, finished, tmp_path, capsys):
    if mistake == "device" and torch.cuda.device_count() > 9:
        pytest.skip("the device is there")
    before = snapshot(finished)
    command = ["run", "quickstart", *TRAIN, *MISTAKES[mistake]]
    assert ftnas(*command, "--out", finished, "--overwrite") == 2
    assert snapshot(finished) == before
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
    assert ftnas(*command, "--out", tmp_path / "new") == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    assert ftnas(*command, "--out", tmp_path / "empty") == 2
    assert not list((tmp_path / "empty").iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_what_was_replaced_is_removed_in_the_end(tmp_path):
    one = [*TRAIN, "campaign=null", "train.recipe.epochs=1", "data.subset=300"]
    assert ftnas("train", "quickstart", *one, "--out", tmp_path / "run") == 0
    (tmp_path / "run" / "note.txt").write_text("of the old run")
    assert ftnas("train", "quickstart", *one, "seed=1", "--out", tmp_path / "run", "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (tmp_path / "run" / "note.txt").exists()
    RunDir.create(tmp_path / "other", {}).close()
    RunDir.create(tmp_path / "other", {}, overwrite=True).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
    left = tmp_path / ".run.old-0123abcd"  # by a process that was killed before
    left.mkdir()
    assert ftnas("train", "--resume", tmp_path / "run") == 0 and not left.exists()


class Dies:
    """What a weak reference can see die."""


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_in_the_callback_of_a_weak_reference_is_not_lost(monkeypatch, number, kind):
    monkeypatch.setattr(sys, "unraisablehook", cli._interrupt_again)
    handlers = {signal.SIGTERM: lambda *_: sys.exit(143), signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with pytest.raises(kind):
            thing = Dies()
            reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
            del thing
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.001)
        assert reference() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    others = []
    monkeypatch.setattr(sys, "__unraisablehook__", others.append)
    cli._interrupt_again(thing := SimpleNamespace(exc_value=ValueError("x")))
    assert others == [thing]


def test_the_command_line_installs_it(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", None)
    assert ftnas("spaces") == 0
    assert sys.unraisablehook is cli._interrupt_again


def test_a_full_disk_is_told_as_one(tmp_path):
    """A limit of the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save_checkpoint(tmp_path / "a.pt", {"x": 1})
    whole = (tmp_path / "a.pt").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match="File too large: .*a.pt"):
            save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == whole


def test_a_disk_that_is_full_in_a_campaign_is_told_in_one_line_and_resumed(finished, tmp_path, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode):
        return (Full if path.name == "records.jsonl" else open)(path, mode)

    run = tmp_path / "run"
    assert ftnas("train", "quickstart", *TRAIN, "--out", run) == 0
    monkeypatch.setattr(storage, "open", opened, raising=False)
    capsys.readouterr()
    assert ftnas("campaign", "--resume", run) == 1
    error = capsys.readouterr().err
    how = f"mend that, then go on with: ftnas campaign --resume {run}"
    last = f"error: {run}/records.jsonl: No space left on device; {how}"
    assert error.strip().splitlines()[-1] == last and "Traceback" not in error
    monkeypatch.undo()
    assert ftnas("campaign", "--resume", run) == 0
    assert (run / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()


def test_pictures_of_sweeps_do_not_share_a_file():
    taken = set()
    for text in ("a b", "a/b", "A b", "режим А", "режим Б"):
        stem = _unused(_slug(text), taken)
        assert stem.lower() not in taken
        taken.add(stem.lower())
    assert taken == {"a-b", "a-b-2", "a-b-3", "режим-а", "режим-б"}


@pytest.mark.parametrize("damage", ["zeros", "edited", "bytes"])
def test_a_report_follows_no_config_that_was_changed(damage, tmp_path, finished, capsys):
    for name in ("config.yaml", "run.json", "records.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = tmp_path / "config.yaml"
    whole = config.read_bytes()
    build_report(tmp_path)
    config.write_bytes({"zeros": bytes(40), "edited": whole + b"\n", "bytes": b"\xad\xff"}[damage])
    assert ftnas("report", tmp_path) == 2
    assert f"{config} was changed since the run began" in capsys.readouterr().err
    if damage == "bytes":  # of a folder that never had a checksum
        (tmp_path / "run.json").unlink()
        assert ftnas("report", tmp_path) == 2
        assert "no UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"accuracy": None}, "accuracy"), ({"rate": [1]}, "rate"), ({"accuracy": "x"}, "accuracy"), (None, "accuracy")],
)
def test_a_damaged_record_is_named_on_resume(tmp_path, capsys, change, message):
    run = tmp_path / "run"
    assert ftnas("run", "quickstart", *TRAIN, "data.subset=300", "--out", run) == 0
    records = run / "records.jsonl"
    lines = records.read_text().splitlines()
    record = json.loads(lines[1])
    record = {k: v for k, v in record.items() if k != "accuracy"} if change is None else record | change
    records.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    with open(run / "events.jsonl", "a", encoding="utf-8") as events:
        events.write("{}\n")
    capsys.readouterr()
    assert ftnas("campaign", "--resume", run) == 2
    error = capsys.readouterr().err
    assert "records.jsonl: record 2" in error and message in error and "Traceback" not in error


def test_examples_of_the_help_name_configs_with_that_section(capsys, monkeypatch):
    for command, needs in (("run", "search"), ("search", "search"), ("train", "train")):
        for example in cli.EXAMPLES[command]:
            name, *rest = shlex.split(example.split(" --out")[0])
            config = read_config(name, rest)
            assert getattr(config, needs) is not None
            if command == "train":
                assert all(model.genotype is None for model in config.train.models.values())
    assert cli.EXAMPLES["bounds"][0] == "--resume runs/tolerance"  # a config whose networks are still to be trained
    assert read_config("tolerance").bounds is not None
    monkeypatch.setenv("COLUMNS", "80")
    ftnas("configs")
    assert "train-resnet20-saturated-cifar100" in capsys.readouterr().out.split()  # to be copied, not folded
    monkeypatch.setenv("COLUMNS", "200")
    ftnas("configs")
    listed = capsys.readouterr().out
    assert "single faults" in listed and "protections" in listed and "bounds" in listed
    monkeypatch.delenv("COLUMNS")
    ftnas("configs")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "train-resnet20-saturated-cifar100" in line)
    assert read_config("train-resnet20-saturated-cifar100").description in line  # a row is a line where it is piped


def test_commands_that_are_told_can_be_pasted(tmp_path, finished, capsys):
    run = tmp_path / "with space"
    RunDir.create(run, read_config("quickstart").model_dump(mode="json")).close()
    assert ftnas("train", "--resume", run) == 2
    assert f"run `ftnas search --resume '{run}'` first" in capsys.readouterr().err
    assert ftnas("campaign", "--resume", run) == 2
    assert f"run `ftnas train --resume '{run}'` first" in capsys.readouterr().err


def test_a_run_that_a_mistake_leaves_nothing_of_is_not_to_be_resumed(tmp_path, capsys):
    run = tmp_path / "run"
    for command, before in (("train", "search"), ("campaign", "train")):
        assert ftnas(command, "quickstart", "--out", run) == 2
        error = capsys.readouterr().err
        advice = f"a new run begins with `ftnas {before}`, or does all by `ftnas run`, with the same arguments"
        assert error.strip().endswith(advice) and "--resume" not in error
        assert not run.exists()


def test_config_of_the_run_is_what_the_checksum_says(finished):
    stored = json.loads((finished / "run.json").read_text())["config_sha256"]
    text = (finished / "config.yaml").read_bytes()
    assert hashlib.sha256(text).hexdigest() == stored and yaml.safe_load(text)["name"] == "quickstart"


@pytest.mark.parametrize(
    ("change", "message"),
    [("threads=100000", "less than or equal to 512"), ("campaign.sweeps.0.rates=[0.0]", "greater than 0")],
)
def test_numbers_out_of_range(tmp_path, capsys, change, message):
    assert ftnas("run", "quickstart", *TRAIN, change, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_trainings_take_the_threads_of_a_task(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("ftnas.pipeline.train_in_turn", lambda *_: seen.append(torch.get_num_threads()) or [])
    before = torch.get_num_threads()
    for number, threads in enumerate((["threads=1", "pool.threads=2"], ["threads=1"])):
        assert ftnas("train", "quickstart", *TRAIN, "campaign=null", *threads, "--out", tmp_path / str(number)) == 0
        assert torch.get_num_threads() == 1
    assert seen == [2, 1]
    torch.set_num_threads(before)
