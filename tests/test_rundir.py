import contextlib
import json
import math
import os
import re
import signal
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ftnas import rundir
from ftnas.rundir import RunDir, _commit, code_version
from ftnas.storage import (
    LARGE,
    Checkpoints,
    Journal,
    Lock,
    atomic_write,
    load_checkpoint,
    read_journal,
    save_checkpoint,
)

CONFIG = {"seed": 3, "search": {"epochs": 2, "lr": 0.1}, "name": "läuft"}


@pytest.mark.parametrize(("large", "expected"), [(True, [0, 2, 4, 6, 8]), (False, list(range(10)))])
def test_large_checkpoints_take_a_twentieth_of_the_time(large, expected, tmp_path):
    now, written = [100.0], []

    def write(state):
        now[0] += 1.0
        written.append(state["epoch"])
        path = tmp_path / "checkpoint.pt"
        with open(path, "wb") as file:
            file.truncate(LARGE if large else LARGE - 1)
        return path

    checkpoints = Checkpoints(write, clock=lambda: now[0])
    for epoch in range(10):
        now[0] += 9.5
        if checkpoints.due:
            checkpoints.write({"epoch": epoch})
    assert written == expected


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_create_writes_config_and_facts(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "a" / "run", CONFIG) as run:
        assert run.config == CONFIG
        assert yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")) == CONFIG
        info = json.loads((run.path / "run.json").read_text())
        digest = subprocess.run(["sha256sum", run.path / "config.yaml"], capture_output=True, text=True).stdout
        assert digest.split()[0] == info["config_sha256"]
        assert info["version"] == code_version()["version"]
        run.describe(dataset_digest="abc", version_note=None)
        assert run.info == {**info, "dataset_digest": "abc", "version_note": None}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
    with RunDir.open(tmp_path / "a" / "run") as run:
        assert run.journal("events.jsonl").records()[-1]["kind"] == "opened"


def test_commit_of_the_checkout_only(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    package = tmp_path / "lib" / "ftnas"
    package.mkdir(parents=True)
    assert _commit(package) is None
    (package / "rundir.py").write_text("")
    (tmp_path / "own.txt").write_text("a repository that does not hold the package")
    for command in (["init", "-q"], ["add", "own.txt"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    assert _commit(package) is None
    for command in (["add", "lib"], ["commit", "-qm", "y"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert _commit(package) == head
    (package / "rundir.py").write_text("# changed")
    assert _commit(package) == f"{head}-dirty"


def test_existing_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    RunDir.create(path, CONFIG).close()  # an empty folder may be used
    (path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; continue it with --resume .* or replace") as error:
        RunDir.create(path, {"seed": 4})
    one_line(error)
    assert (path / "note.txt").read_text() == "mine"
    with RunDir.create(path, {"seed": 4}, overwrite=True) as run:
        assert run.config == {"seed": 4}
        assert not (path / "note.txt").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"kind": "another program"}'])
def test_overwrite_refuses_what_is_no_run(tmp_path: Path, content: str | None) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    rule = "it has no run.json" if content is None else "run.json is torn or of another program"
    if content is not None:
        (home / "run.json").write_text(content)
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="no run of ours, so it is left alone; choose another place") as error:
            RunDir.create(home, CONFIG, overwrite=overwrite)
        one_line(error)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    with pytest.raises(ValueError, match=rule) as error:
        RunDir.open(home)
    one_line(error)


def test_overwrite_keeps_the_old_run_when_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDir.create(tmp_path / "run", CONFIG).close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftnas.rundir.atomic_write", full)
    with pytest.raises(ValueError, match="cannot be written .No space left"):
        RunDir.create(tmp_path / "run", {"seed": 4}, overwrite=True)
    with pytest.raises(ValueError, match="cannot be written"):
        RunDir.create(tmp_path / "other", CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        RunDir.create(tmp_path / "empty", CONFIG)
    monkeypatch.undo()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["empty", "run"]
    assert not list((tmp_path / "empty").iterdir())
    with RunDir.open(tmp_path / "run") as run:
        assert run.config == CONFIG


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(ValueError, match=str(path)) as error:
            RunDir.create(path, CONFIG)
        assert "choose another place" in one_line(error)
    with RunDir.create(tmp_path / "run", CONFIG) as run:
        (run.path / "search").write_text("a file in the way")
        with pytest.raises(ValueError, match="cannot be written"):
            run.stage("search")


def test_changed_config_is_noticed(tmp_path: Path) -> None:
    RunDir.create(tmp_path, CONFIG).close()
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(ValueError, match="was changed since the run began") as error:
        RunDir.open(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["../out.pt", "/tmp/out.pt", "a/../../b", ""])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with RunDir.create(tmp_path / "run", CONFIG) as run, pytest.raises(ValueError, match="relative"):
        run.save(name, {})


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "weights": OrderedDict(w=torch.randn(3, 4, generator=generator), h=torch.zeros(2, dtype=torch.bfloat16)),
        "generator": generator.get_state(),
        "step": 7,
        "nested": [("a", None), {"x": {1, 2}}, float("nan"), b"raw", torch.Size([2])],
    }
    with RunDir.create(tmp_path, CONFIG) as run:
        stage = run.stage("search")
        assert stage is run.stage("search")
        stage.save("checkpoint.pt", state)
        loaded = stage.load("checkpoint.pt")
        assert torch.equal(loaded["weights"]["w"], state["weights"]["w"])
        assert torch.equal(loaded["generator"], state["generator"])
        assert loaded["nested"][:2] == state["nested"][:2] and math.isnan(loaded["nested"][2])
        first = (tmp_path / "search" / "checkpoint.pt").read_bytes()
        stage.save("checkpoint.pt", loaded)
        assert (tmp_path / "search" / "checkpoint.pt").read_bytes() == first
        assert sorted(path.name for path in (tmp_path / "search").iterdir()) == ["checkpoint.pt"]


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Path("x"), object()])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: object) -> None:
    with RunDir.create(tmp_path, CONFIG) as run:
        run.save("a.pt", {"step": 1})
        with pytest.raises(TypeError, match=r"a.pt\['deep'\]\[0\]: .* got " + type(value).__name__):
            run.save("a.pt", {"deep": [value]})
        assert run.load("a.pt") == {"step": 1}


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG) as run:
        whole = run.save("a.pt", {"w": torch.arange(1000)}).read_bytes()
        broken = {
            "empty.pt": b"",
            "half.pt": whole[: len(whole) // 2],
            "short.pt": whole[:-1],
            "text.pt": b"hello, world\n",
            "code.pt": b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR.",
        }
        for name, data in broken.items():
            atomic_write(tmp_path / name, data)
            with pytest.raises(ValueError, match=name) as error:
                run.load(name)
            one_line(error)
        assert not (tmp_path / "hacked").exists()
        with pytest.raises(ValueError, match="missing.pt: no such"):
            run.load("missing.pt")


def in_child(body: Callable[[], object]) -> int:
    """Fork, as importing torch anew takes seconds; return the child's id. It ends with code 0, or 1 for an error."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the other threads of the parent's pool are not here: waiting for them hangs
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def save_forever(path: Path) -> None:
    with RunDir.open(path) as run:
        step = run.load("a.pt")["step"] if run.file("a.pt").exists() else 0
        while True:
            step += 1
            run.journal("steps.jsonl").append({"step": step})
            offset = run.journal("steps.jsonl").offset
            run.save("a.pt", {"step": step, "offset": offset, "w": torch.full((200_000,), step)})


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    RunDir.create(tmp_path, CONFIG).close()
    last = written = 0
    for attempt in range(12):
        child = in_child(lambda: save_forever(tmp_path))
        deadline = time.monotonic() + 60
        while not (tmp_path / "a.pt").exists() or (tmp_path / "a.pt").stat().st_mtime_ns == written:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child failed"
            assert time.monotonic() < deadline, "the child hangs"
            time.sleep(0.001)
        time.sleep(0.0037 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with RunDir.open(tmp_path) as run:  # the lock went with the process
            state = run.load("a.pt")
            assert state["step"] >= last and torch.equal(state["w"], torch.full((200_000,), state["step"]))
            last = state["step"]
            written = (tmp_path / "a.pt").stat().st_mtime_ns
            run.journal("steps.jsonl").truncate(state["offset"])
            assert run.journal("steps.jsonl").records() == [{"step": step + 1} for step in range(last)]
    assert last >= 12


def test_journal_offsets_and_truncate(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sub" / "a.jsonl")
    assert journal.offset == 0 and journal.records() == []
    offsets = []
    for step in range(4):
        journal.append({"step": step, "text": "naïve\n\x00"})
        offsets.append(journal.offset)
    assert offsets[-1] == journal.path.stat().st_size == Journal(journal.path).offset
    journal.truncate(offsets[1])
    assert [record["step"] for record in Journal(journal.path).records()] == [0, 1]
    journal.append({"step": 9})
    assert [record["step"] for record in journal.records()] == [0, 1, 9]
    with pytest.raises(ValueError, match="not the end of a line"):
        journal.truncate(offsets[0] - 3)
    with pytest.raises(ValueError, match=r"counts 100000 bytes, the file has \d+") as error:
        journal.truncate(100_000)
    one_line(error)
    assert len(journal.records()) == 3
    journal.truncate(0)
    assert journal.path.read_bytes() == b""


def test_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = b'{"step":0}\n{"step":1}\n'
    for torn in (b"{", b'{"step":2', b'{"step":2}', b"\xff\xc3"):
        path.write_bytes(whole + torn)
        journal = Journal(path)
        assert journal.records() == [{"step": 0}, {"step": 1}]
        assert read_journal(path)[1] is True
        assert journal.offset == len(whole)
        journal.append({"step": 5})
        assert path.read_bytes() == whole + b'{"step":5}\n'
        assert read_journal(path) == ([{"step": 0}, {"step": 1}, {"step": 5}], False)
    path.write_bytes(b'{"step":0}\ngarbage\n{"step":1}\n')
    with pytest.raises(ValueError, match="a.jsonl: line 2 is not a JSON object") as error:
        journal.records()
    one_line(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_journal_refuses_what_json_does_not_know(tmp_path: Path, value: object) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"x": 1})
    with pytest.raises(ValueError, match="must be finite JSON") as error:
        journal.append({"x": value})
    one_line(error)
    assert journal.records() == [{"x": 1}]


def test_events_carry_wall_time_and_survive_nan(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG) as run:
        before = time.time()
        run.events("stopped", loss=math.nan, epoch=3)
        event = run.journal("events.jsonl").records()[-1]
        assert before - 0.01 <= event.pop("time_s") <= time.time() + 0.01
        assert event == {"kind": "stopped", "loss": "nan", "epoch": 3}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", CONFIG)

    def refused() -> None:
        with pytest.raises(ValueError, match="is in use by another process") as error:
            RunDir.open(run.path)
        one_line(error)
        with pytest.raises(ValueError, match="is in use by another process"):
            RunDir.create(run.path, {}, overwrite=True)

    assert os.waitpid(in_child(refused), 0)[1] == 0
    assert run.config == CONFIG
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
    run.close()
    assert os.waitpid(in_child(lambda: RunDir.open(run.path).close()), 0)[1] == 0


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("moment", ["code_version", "_sibling", "_take_lock", "_describe"])
def test_a_run_that_another_process_makes_meanwhile_stays_whole(
    moment: str, empty: bool, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "run", getattr(rundir, moment)
    others: list[RunDir] = []
    if empty:
        path.mkdir()

    def meanwhile(*args: object) -> object:
        monkeypatch.undo()
        with contextlib.suppress(ValueError):  # ours may hold the empty folder already
            others.append(RunDir.create(path, {"seed": 7}))
            if not held:
                others[0].close()
        return real(*args)

    monkeypatch.setattr(rundir, moment, meanwhile)
    try:
        run = RunDir.create(path, CONFIG)
    except ValueError as error:
        assert re.search("exists already|by another process", str(error)) and "\n" not in str(error)
        assert others and others[0].config == {"seed": 7} and others[0].info
    else:
        assert not others and run.config == CONFIG
        run.close()
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
    for other in others:
        other.close()
    RunDir.open(path).close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    read, write = os.pipe()
    child = in_child(lambda: os.read(read, 1))
    try:
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / ".lock")
        lock.release()
        deadline = time.monotonic() + 10
        while True:  # the child lets go as soon as it runs
            try:
                Lock(tmp_path / ".lock").release()
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child must still live, for this to show anything"
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_write_text_and_json(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, CONFIG) as run:
        assert run.write_text("report/a.md", "größer\n").read_bytes() == "größer\n".encode()
        assert json.loads(run.write_json("a.json", {"x": [1, None]}).read_text()) == {"x": [1, None]}
        with pytest.raises(ValueError, match="JSON"):
            run.write_json("a.json", {"x": math.nan})
        assert json.loads(run.file("a.json").read_text()) == {"x": [1, None]}


def test_tensorboard_resumes_without_warnings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDir.create(tmp_path, CONFIG) as run:
        writer = run.stage("search").tensorboard()
        for step in range(4):
            writer.add_scalar("reward", step, step)
    with RunDir.open(tmp_path) as run:
        run.stage("search").tensorboard(purge_step=2).add_scalar("reward", 10, 2)
    events = EventAccumulator(str(tmp_path / "search" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0), (1, 1), (2, 10)]


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weight": torch.zeros(1000), "epoch": 3})
    whole = path.read_bytes()
    place = whole.index(bytes(4000)) + 100  # within the values
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(ValueError, match=rf"{path}: damaged: '\S*data/0' in it has another checksum"):
        load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["epoch"] == 3
    torch.save({"epoch": 4}, path, _use_new_zipfile_serialization=False)  # the format of before, without checksums
    assert load_checkpoint(path) == {"epoch": 4}
