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
from pathlib import Path

import pytest
import torch
import yaml
from test_campaign import SWEEPS, subject
from test_campaign import images as images  # the fixture
from test_search import contents, make_search
from test_search import space as space  # the fixture

from ftnas.campaign import CampaignConfig, run_campaign
from ftnas.candidates import Candidates, FlatWeights, Terms
from ftnas.faults.hardware import Hardware
from ftnas.pool import LostError, PoolConfig
from ftnas.rundir import RunDir
from ftnas.space import Genotype
from ftnas.workers import AHEAD, open_pool, start_ray

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
    flat = FlatWeights(setting.supernet)
    vector = flat.read()
    before = vector.copy()
    expected = {name: value.clone() for name, value in setting.supernet.state_dict().items()}
    with torch.no_grad():
        for value in setting.supernet.parameters():
            value.zero_()
    flat.write(vector)
    for name, value in setting.supernet.state_dict().items():
        assert torch.equal(value, expected[name])
    assert (vector == before).all()
    setting.supernet.load_state_dict({name: value + 1 for name, value in expected.items()})
    assert flat.read() is vector and not (vector == before).all()


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
    if kind == "in process":
        with (
            setting.open(CONFIGS[kind]) as pool,
            pytest.raises(RuntimeError, match="no candidate could be scored, all 1 failed, the last with .*conv_9x9"),
            pool.weights(7),
        ):
            pool.score([bad, bad], setting.batches, terms)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        LostError("its worker died 3 times"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_an_accident_of_the_machine_is_no_score(setting, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("ftnas.candidates.score", broken)
    with (
        setting.open(CONFIGS["in process"]) as pool,
        pytest.raises(RuntimeError, match="a candidate could not be scored, for no fault of its own: .*--resume"),
        pool.weights(7),
    ):
        pool.score(setting.genotypes, setting.batches, Terms(alpha_r=0.5))
    assert [event for event, _ in setting.events if event != "pool_started"] == ["candidate_lost"]


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


@pytest.mark.parametrize("half_width", [None, 0.2])
def test_a_campaign_by_workers_equals_one_in_process(half_width, images, ray_started, tmp_path):
    contents = []
    for kind, config in CONFIGS.items():
        with RunDir.create(tmp_path / kind, {}) as folder, open_pool(config, events=folder.events) as pool:
            run_campaign(
                [subject("a"), subject("b")],
                images,
                config=CampaignConfig(
                    sweeps=SWEEPS[:1],
                    devices=22 if half_width else 3,
                    half_width=half_width,
                    batch_size=50,
                ),
                hardware=Hardware(layers=None),
                seed=0,
                folder=folder,
                pool=pool,
            )
        contents.append((tmp_path / kind / "records.jsonl").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].count(b"\n") == 2 * (1 + 2 * (20 if half_width else 3))


def fail_on_three():
    """Return a job that travels by value: workers do not import the tests."""

    def job(task):
        if task == 3:
            raise ValueError("three is refused")
        return 10 * task

    return job


@pytest.mark.parametrize("kind", CONFIGS)
def test_results_are_in_order_and_errors_keep_their_type(kind, ray_started):
    with open_pool(CONFIGS[kind], events=lambda *_, **__: None) as pool:
        results = list(pool.map(pool.put(fail_on_three()), range(6)))
    assert [result.value for result in results] == [0, 10, 20, None, 40, 50]
    assert results[3].reason == "ValueError: three is refused"
    with pytest.raises(ValueError, match="three is refused"):
        results[3].get()


def test_a_task_whose_worker_dies_is_made_again_though_all_after_it_are_done(ray_started):
    def job(task):
        if task == 0:
            time.sleep(1.0)  # by then all that may be found ahead is found
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with open_pool(CONFIGS["ray"], events=lambda *_, **__: None) as pool:
        results = list(pool.map(pool.put(job), range(3 * AHEAD)))
    assert results[0].reason.endswith("its worker died 3 times") and results[0].accident
    assert [result.value for result in results[1:]] == list(range(1, 3 * AHEAD))


def test_tasks_are_taken_as_there_is_work(ray_started):
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    with open_pool(CONFIGS["ray"], events=lambda *_, **__: None) as pool:
        found = pool.map(pool.put(fail_on_three()), tasks())
        next(found)
        assert len(taken) < 100
        found.close()


def test_nothing_listens_beyond_loopback(ray_started):
    beyond = []
    ours = {inode for pid in descendants(os.getpid()) for inode in sockets(pid)}
    for name, loopback in (("tcp", ("0100007F",)), ("tcp6", ("0" * 16 + "FFFF00000100007F", "0" * 24 + "01000000"))):
        with open(f"/proc/net/{name}") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in ours and fields[1].split(":")[0] not in loopback:
                    beyond.append(line)
    assert ours and not beyond


def descendants(pid):
    """Return a process and all that it started."""
    found = [pid]
    for parent in found:
        for thread in os.listdir(f"/proc/{parent}/task") if os.path.exists(f"/proc/{parent}/task") else ():
            try:
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    found += [int(child) for child in file.read().split()]
            except OSError:
                pass
    return found


def sockets(pid):
    found = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.append(target[8:-1])
    except OSError:
        pass
    return found


def test_a_cluster_that_is_not_there_is_one_line():
    code = "from ftnas.workers import start_ray; start_ray('127.0.0.1:1', cpus=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: pool.address=127.0.0.1:1" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow  # starts a Ray of its own
def test_a_start_that_takes_too_long_is_one_line():
    code = "import ftnas.workers as w; w.START_LIMIT_S = 0.5; w.start_ray(None, cpus=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: Ray did not start" in done.stderr and "more than 0.5 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, 128 + signal.SIGTERM])
def test_ended_while_ray_starts_a_process_has_the_exit_code_of_any_other_time(number, monkeypatch):
    """Ray's own handler holds SIGTERM meanwhile, and leaves with the number of the signal alone."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(number))
    with pytest.raises(SystemExit) as ended:
        start_ray(None, cpus=1)
    assert ended.value.code == 143


NODES = """
import os, signal, sys, time
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
from ray.cluster_utils import Cluster
from ftnas.pool import PoolConfig
from ftnas.workers import open_pool
def slow(task):
    time.sleep(0.2)
    return os.environ.get("RAY_NODE_ID", ""), task * task
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
try:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    events = []
    config = PoolConfig(workers=2, address=cluster.address)
    with open_pool(config, events=lambda kind, **fields: events.append(kind)) as pool:
        found = []
        for result in pool.map(pool.put(slow), range(30)):
            found.append(result.get()[1])
            if len(found) == 8:
                cluster.remove_node(nodes[0], allow_graceful=False)
                cluster.add_node(num_cpus=1)
    assert found == [n * n for n in range(30)], found
    assert {"worker_lost", "worker_restarted"} & set(events), events
finally:
    cluster.shutdown()
print("as expected")
"""


@pytest.mark.slow  # starts a Ray of its own
def test_a_lost_node_changes_no_result():
    done = subprocess.run([sys.executable, "-c", NODES], capture_output=True, text=True, check=False, timeout=120)
    assert "as expected" in done.stdout, done.stderr


FULL = """
import numpy as np
import ftnas.workers as workers
from ftnas.pool import PoolConfig
workers.STORE_BYTES = 80 * 2**20
def total(task):
    return int(task.get().sum())
with workers.open_pool(PoolConfig(workers=1), events=lambda *_, **__: None) as pool:
    boxes = [pool.put(np.full(30 * 2**20, number, dtype=np.uint8)) for number in range(6)]
    found = [result.get() for result in pool.map(pool.put(total), boxes)]
assert found == [number * 30 * 2**20 for number in range(6)], found
print("as expected")
"""


@pytest.mark.slow  # starts a Ray of its own
def test_a_full_object_store_goes_to_disk():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False, timeout=120)
    assert "as expected" in done.stdout, done.stderr


def test_the_cluster_file_of_the_docs_is_one_for_rays_launcher():
    """By Ray's own schema, and every option of `ray start` in it by Ray's own command line."""
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start

    path = Path(__file__).parents[1] / "docs" / "cluster.yaml"
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    options = {name for parameter in start.params for name in parameter.opts + parameter.secondary_opts}
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    used = [word.partition("=")[0] for command in commands for word in command.split() if word.startswith("--")]
    assert len(used) == 6 and set(used) <= options
