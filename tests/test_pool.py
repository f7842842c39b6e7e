# ruff: noqa: F811 - the fixture of another file
"""Pools: in order, equal bit for bit, and a lost worker or a failing candidate loses nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_search import contents, make_search
from test_search import space as space  # the fixture

from ftnas.candidates import Candidates, Terms, flatten, unflatten
from ftnas.pool import PoolConfig
from ftnas.rundir import RunDir
from ftnas.space import Genotype
from ftnas.workers import open_pool, start_ray

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:ray.*", "ignore::DeprecationWarning:ray.*")
CONFIGS = {"in process": PoolConfig(threads=1), "ray": PoolConfig(workers=2)}


@pytest.fixture(scope="module")
def ray_started():
    stop = start_ray(None, cpus=2)
    yield
    stop()


class Setting:
    """A small supernet, candidates and images."""

    def __init__(self, space, path):
        with RunDir.create(path, {}) as run:
            search = make_search(space, run.stage("search"))
        self.supernet, self.hardware, self.space = search.supernet, search.hardware, search.space
        stream = torch.Generator().manual_seed(3)
        self.genotypes = [Genotype.random(search.space, generator=stream) for _ in range(6)]
        self.batches = list(search._controller_images.batches(16))
        self.events = []

    @contextlib.contextmanager
    def open(self, config):
        def event(kind, **fields):
            self.events.append((kind, fields))

        with open_pool(config, events=event) as pool:
            yield Candidates(pool, self.supernet, self.hardware, events=event)


@pytest.fixture
def setting(space, tmp_path):
    return Setting(space, tmp_path / "setting")


def test_weights_travel_as_one_vector(setting):
    vector = flatten(setting.supernet)
    before = vector.copy()
    expected = {name: value.clone() for name, value in setting.supernet.state_dict().items()}
    with torch.no_grad():
        for value in setting.supernet.parameters():
            value.zero_()
    unflatten(vector, setting.supernet)
    for name, value in setting.supernet.state_dict().items():
        assert torch.equal(value, expected[name])
    assert (vector == before).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_contract(setting, ray_started, kind):
    terms = Terms(alpha_r=0.5, draws=2, first_draw=4)
    with setting.open(CONFIGS["in process"]) as reference, reference.weights(7):
        expected = [reference.score([genotype], setting.batches, terms)[0] for genotype in setting.genotypes]
    assert len(set(expected)) > 1
    calls = []
    with setting.open(CONFIGS[kind]) as pool:
        with pool.weights(7):
            assert pool.score([], setting.batches, terms) == []
            assert pool.score(setting.genotypes, setting.batches, terms) == expected
            twice = [*setting.genotypes[::-1], *setting.genotypes]  # in the order asked, each once
            assert pool.score(twice, setting.batches, terms, done=lambda: calls.append(1)) == [
                *expected[::-1],
                *expected,
            ]
        assert len(calls) == len(set(setting.genotypes))
        with torch.no_grad():
            for value in setting.supernet.parameters():
                value.mul_(-1.5)
        with pool.weights(7):  # a new version
            assert pool.score(setting.genotypes, setting.batches, terms) != expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_candidate_that_raises_is_a_recorded_failure(setting, ray_started, kind):
    foreign = {"2": [["conv_1x1", 0], ["conv_9x9", 0]]}
    bad = Genotype.from_dict({"version": 1, "space": "tiny", "normal": foreign, "reduce": foreign})
    terms = Terms(alpha_r=0.5)
    with setting.open(CONFIGS[kind]) as pool, pool.weights(7):
        expected = pool.score(setting.genotypes, setting.batches, terms)
        found = pool.score([setting.genotypes[0], bad, *setting.genotypes[1:]], setting.batches, terms)
    assert (found[1].clean, found[1].faulty, found[1].reward) == (0.0, 0.0, 0.0)
    assert [found[0], *found[2:]] == expected
    failures = [fields for event, fields in setting.events if event == "candidate_failed"]
    assert len(failures) == 1 and "conv_9x9" in failures[0]["reason"]
    assert failures[0]["genotype"] == bad.to_dict()


def run_search(space, path, pool, **changes):
    with RunDir.create(path, {}) as run:
        search = make_search(space, run.stage("search"), **changes)
        search._pool = pool
        search.run()
    return contents(path / "search")


@pytest.fixture(scope="module")
def serial(space, tmp_path_factory):
    return run_search(space, tmp_path_factory.mktemp("serial") / "run", CONFIGS["in process"])


def test_ray_equals_serial_bit_for_bit(space, serial, ray_started, tmp_path):
    assert run_search(space, tmp_path / "run", CONFIGS["ray"]) == serial
    events = [json.loads(line) for line in (tmp_path / "run" / "search" / "events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["kind"] == "pool_started"]
    assert [(event["workers"], event["threads"]) for event in started] == [(2, 1)]


def test_resumed_with_other_workers_equals_uninterrupted(space, serial, ray_started, tmp_path):
    class StopError(Exception):
        pass

    with RunDir.create(tmp_path / "run", {}) as run:
        search = make_search(space, run.stage("search"))
        save = search._save

        def save_and_stop(done):
            save(done)
            if done == 2:
                raise StopError

        search._save = save_and_stop
        with pytest.raises(StopError):
            search.run()
    with RunDir.open(tmp_path / "run") as run:
        search = make_search(space, run.stage("search"))
        search._pool = CONFIGS["ray"]
        search.run()
    assert contents(tmp_path / "run" / "search") == serial


def test_a_killed_worker_changes_no_result(setting, ray_started):
    terms = Terms(alpha_r=0.5, draws=100)
    with setting.open(CONFIGS["in process"]) as pool, pool.weights(7):
        expected = pool.score(setting.genotypes, setting.batches, terms)
    with setting.open(CONFIGS["ray"]) as pool, pool.weights(7):
        pool.score(setting.genotypes, setting.batches, Terms(alpha_r=0.5))
        victim = next(pid for pid in pool._pool._pids if pid)
        killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        killer.start()
        found = pool.score(setting.genotypes, setting.batches, terms)
        assert killer.finished.is_set()
    assert found == expected
    assert {event for event, _ in setting.events} & {"worker_restarted", "worker_lost"}


def test_settings_that_do_not_fit_are_refused():
    assert PoolConfig(workers=2).threads == 1 and PoolConfig().threads is None
    with pytest.raises(ValueError, match="workers=0 does not use"):
        PoolConfig(address="10.0.0.1:6379")


def test_without_workers_ray_is_never_imported(tmp_path):
    code = (
        "import sys; from ftnas.cli import cli\n"
        f"cli(['search', 'quickstart', 'search.epochs=1', 'search.warmup_epochs=0', 'data.subset=200',\n"
        f"  'search.controller_steps=1', 'search.controller_batch=16', 'search.derive={{samples: 1, finalists: 1}}',\n"
        f"  'control=null', 'train=null', 'campaign=null',\n"
        f"  '--out', {str(tmp_path / 'run')!r}], standalone_mode=False)\n"
        "sys.exit('imported ray' if 'ray' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("end", ["", "raise RuntimeError", "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"])
def test_no_process_is_left_behind(end, tmp_path):
    mark = f"ftnas-mark-{tmp_path.name}-{os.getpid()}"
    code = (
        "import os, signal, time\n"
        "from ftnas.workers import start_ray\n"
        "stop = start_ray(None, cpus=1)\n"
        f"try:\n    pass\n    {end}\nfinally:\n    stop()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FTNAS_MARK": mark}, capture_output=True, check=False
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and marked(mark):
        time.sleep(0.1)
    assert not marked(mark)


def marked(mark):
    """Return the processes whose environment holds the mark."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit():
                with open(f"/proc/{entry}/environ", "rb") as file:
                    found += [entry] if mark.encode() in file.read() else []
        except OSError:
            pass
    return found
