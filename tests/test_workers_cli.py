"""Runs with workers from the command line that are ended from outside: nothing of ours stays, and they go on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import TRAIN
from test_pool import marked
from test_search import contents

pytestmark = pytest.mark.slow
LIMIT_S = 200
SEARCH = [
    "control=null",
    "train=null",
    "campaign=null",
    "data.subset=300",
    "search.epochs=2",
    "search.warmup_epochs=0",
    "search.controller_steps=25",
    "search.controller_batch=32",
    "search.derive={samples: 4, finalists: 2}",
]


def start(*arguments, mark):
    command = [sys.executable, "-m", "ftnas.cli", *map(str, arguments)]
    environment = os.environ | {"FTNAS_MARK": mark}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def succeeds(*arguments, mark):
    process = start(*arguments, mark=mark)
    _, error = process.communicate(timeout=LIMIT_S)
    return process.returncode == 0 or pytest.fail(error)


def wait_for(condition, process):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def ours():
    return set(Path("/tmp").glob("ftnas-*"))


def gone(mark):
    deadline = time.monotonic() + 20
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not marked(mark)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_while_candidates_are_scored_nothing_stays_and_the_search_goes_on(number, code, tmp_path):
    before, mark = ours(), f"ftnas-mark-{number}-{os.getpid()}"
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start("search", "quickstart", *SEARCH, "--workers", 2, "--out", cut, mark=mark)
    trials = cut / "search/trials.jsonl"
    wait_for(lambda: trials.exists() and trials.read_bytes().count(b"\n") > 20, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    if number == signal.SIGINT:
        assert f"interrupted; go on with: ftnas search --resume {cut}" in error
    assert gone(mark) and ours() <= before
    assert not (cut / "search/genotype.json").exists()
    assert succeeds("search", "--resume", cut, mark=mark)  # without workers
    assert succeeds("search", "quickstart", *SEARCH, "--out", whole, mark=mark)
    assert contents(cut / "search") == contents(whole / "search")


def test_a_campaign_whose_driver_is_killed_goes_on_to_the_same_records(tmp_path):
    mark = f"ftnas-mark-campaign-{os.getpid()}"
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    changes = [*TRAIN, "campaign.devices=150"]
    for run in (cut, whole):
        assert succeeds("train", "quickstart", *changes, "--out", run, mark=mark)
    records = cut / "records.jsonl"
    process = start("campaign", "--resume", cut, "--workers", 2, mark=mark)
    wait_for(lambda: records.exists() and records.read_bytes().count(b"\n") > 20, process)
    process.kill()
    process.communicate()
    with contextlib.suppress(AssertionError):
        assert gone(mark)
    done = records.read_bytes().count(b"\n")
    assert 20 < done < 151
    assert succeeds("campaign", "--resume", cut, "--workers", 2, mark=mark)
    assert succeeds("campaign", "--resume", whole, mark=mark)
    assert records.read_bytes() == (whole / "records.jsonl").read_bytes()
