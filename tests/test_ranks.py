# ruff: noqa: F811 - the fixture of another file
"""Shared weights trained by two ranks: exact averages, equal weights, and a result that a lost rank does not change."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_search import contents
from test_search import space as space  # the fixture

import ftnas.parallel
from ftnas.data import DataConfig, load
from ftnas.faults.hardware import Hardware
from ftnas.parallel import SearchJob, check_ranks, search_on_ranks
from ftnas.pool import PoolConfig
from ftnas.ranks import RankLostError, Ranks
from ftnas.rundir import Folder
from ftnas.search_settings import SearchConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
EPOCHS = 20

TOGETHER = """
import sys
import torch.distributed as dist
import test_ranks
from ftnas.ranks import Ranks
body, rank, store, *rest = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
getattr(test_ranks, body)(Ranks(int(rank), 2), *rest)
dist.destroy_process_group()
"""


def make_job(space, folder, *, ranks=2, epochs=EPOCHS, **changes):
    settings = {
        "space": str(space),
        "epochs": epochs,
        "warmup_epochs": 1,
        "ranks": ranks,
        "weights": {"batch_size": 32, "lr": 0.05, "alpha_l": 0.5, "schedule": {"name": "step", "milestones": [90]}},
        "controller": {"name": "reinforce", "hidden_units": 8, "lr": 0.01},
        "controller_steps": 1,
        "controller_batch": 20,
        "rollouts": 2,
        "derive": {"samples": 4, "finalists": 2, "final_draws": 2},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return SearchJob(
        SearchConfig.model_validate(settings),
        data=DataConfig(name="digits", subset=200),
        hardware=Hardware.model_validate({"fault": {"name": "mibb", "mac_error_rate": 0.003}}),
        pool=PoolConfig(),
        seed=5,
        split_seed=0,
        folder=folder,
        title="search",
        device="cpu",
    )


def together(body, tmp_path, *rest):
    """Run a function of this file on two ranks; ``str`` arguments after the `Ranks`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-W", "error::UserWarning:ftnas", "-c", TOGETHER, body]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / f"{body}.store"), *map(str, rest)], env=environment)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def average_and_search(ranks, space, folder, out):
    torch.set_num_threads(1)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (1,), (2,))]
    gradients = {0: (torch.full((2, 2), 1.0), torch.tensor([1.0, 2.0, 4.0]), None, None)}
    gradients[1] = (torch.full((2, 2), 4.0), None, torch.tensor([7.0]), None)
    for parameter, gradient in zip(parameters, gradients[ranks.rank], strict=True):
        parameter.grad = gradient
    ranks.average_gradients(parameters)
    ranks.average_gradients(parameters[3:])  # that no rank has any is no reason to wait
    assert ranks.share(lambda: {"rank": ranks.rank}) == {"rank": 0}
    assert ranks.total(torch.tensor([1, ranks.rank])).tolist() == [2, 1]
    ranks.check_equal(parameters, where="here")
    with torch.no_grad():
        parameters[1].add_(ranks.rank * 1e-7)
    with pytest.raises(RuntimeError, match="different weights after here"):
        ranks.check_equal(parameters, where="here")

    job = make_job(Path(space), Path(folder))
    search = job.make(load(job.data, "train"), Folder(job.folder), ranks)
    drawn = []
    forward = search._forward
    search._forward = lambda genotype, number: drawn.append((number, genotype.to_dict())) or forward(genotype, number)
    if ranks.first:
        search.run()
    else:
        search.follow()
    result = {"gradients": [parameter.grad for parameter in parameters], "drawn": drawn}
    torch.save(result | {"weights": search.supernet.state_dict()}, f"{out}-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def pair(space, tmp_path_factory):
    """Two ranks without Ray: what each ends with, and the folder of their search."""
    path = tmp_path_factory.mktemp("pair")
    together("average_and_search", path, space, path / "search", path / "out")
    ends = [torch.load(path / f"out-{rank}.pt", weights_only=True) for rank in (0, 1)]
    return SimpleNamespace(ends=ends, folder=path / "search")


def test_gradients_are_averaged_over_the_ranks_that_have_one(pair):
    for end in pair.ends:
        first, second, third, fourth = end["gradients"]
        assert torch.equal(first, torch.full((2, 2), 2.5))
        assert torch.equal(second, torch.tensor([1.0, 2.0, 4.0]))  # not halved: one rank used it
        assert torch.equal(third, torch.tensor([7.0]))
        assert fourth is None


def test_alone_nothing_is_sent():
    parameter = torch.nn.Parameter(torch.zeros(2))
    gradient = parameter.grad = torch.ones(2)
    alone = Ranks()
    alone.average_gradients([parameter])
    alone.check_equal([parameter], where="here")
    assert parameter.grad is gradient and torch.equal(gradient, torch.ones(2))
    assert alone.first and alone.share(lambda: 3) == 3 and alone.total(torch.ones(1)).item() == 1


def test_ranks_end_with_the_same_weights_from_different_genotypes(pair):
    first, second = pair.ends
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    steps = 2  # 160 images of the weights split in batches of 32 on 2 ranks
    assert [number for number, _ in first["drawn"]] == list(range(0, 2 * steps * EPOCHS, 2))
    assert [number for number, _ in second["drawn"]] == list(range(1, 2 * steps * EPOCHS, 2))
    assert [genotype for _, genotype in first["drawn"]] != [genotype for _, genotype in second["drawn"]]
    assert len((pair.folder / "epochs.jsonl").read_text().splitlines()) == EPOCHS


def test_the_batches_of_the_ranks_are_disjoint_and_those_of_one():
    images = load(DataConfig(name="digits", subset=100), "train")
    whole = [x for x, _ in images.batches(16, seed=3, drop_last=True)]
    parts = [[x for x, _ in images.batches(16, seed=3, drop_last=True, share=(rank, 4))] for rank in range(4)]
    assert len(whole) == 6 and [len(part) for part in parts] == [1, 1, 1, 1]
    assert all(torch.equal(part[0], expected) for part, expected in zip(parts, whole, strict=False))


def step_as_by_hand(ranks, space, folder, out):
    torch.set_num_threads(1)
    job = make_job(Path(space), Path(folder), epochs=2)
    search = job.make(load(job.data, "train"), Folder(job.folder), ranks)
    search._num_steps = 1
    batches = search._weights_images.batches
    search._weights_images.batches = lambda *args, **named: [next(iter(batches(*args, **named)))]
    search._weights_epoch(0)
    torch.save(search.supernet.state_dict(), f"{out}-{ranks.rank}.pt")


def test_a_step_of_two_ranks_is_that_of_the_mean_gradient(space, tmp_path):
    """Both halves in one process: gradients of each genotype on its own batch, averaged over their users, one step."""
    together("step_as_by_hand", tmp_path, space, tmp_path / "search", tmp_path / "out")
    found = torch.load(tmp_path / "out-1.pt", weights_only=True)
    torch.set_num_threads(1)
    job = make_job(space, tmp_path / "hand", ranks=1, epochs=2)
    search = job.make(load(job.data, "train"), Folder(job.folder))
    net, config = search.supernet.train(), job.config.weights
    before = {name: value.clone() for name, value in net.state_dict().items()}
    genotypes = search._uniform.ask(1) + search._uniform.ask(1)
    seed = ftnas.search.seed_for(5, "weights")
    sums, users = {}, {}
    with job.hardware.inject(net, seed=seed, errors="soft", mask_gradients=False, draw_on="device") as injection:
        batches = search._weights_images.batches(32, seed=seed, epoch=0, augment=config.augment, drop_last=True)
        for number, (genotype, (x, y)) in enumerate(zip(genotypes, batches, strict=False)):
            injection.draw = number
            net.zero_grad(set_to_none=True)
            search._loss(search._forward(genotype, number), injection, x, y).total.backward()
            for parameter in net.parameters():
                if parameter.grad is not None:
                    sums[parameter] = sums.get(parameter, 0) + parameter.grad
                    users[parameter] = users.get(parameter, 0) + 1
        for parameter in net.parameters():
            parameter.grad = sums[parameter] / users[parameter] if parameter in sums else None
        assert set(users.values()) == {1, 2} and len(users) < len(list(net.parameters()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
        search._optimizer.step()
    changed = 0
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
        changed += not torch.equal(value, before[name])
    assert changed


def kill_one(folder, token, killed):
    """Kill one of the processes that hold the token, a rank, once an epoch is done."""
    while not killed.is_set():
        if (folder / "checkpoint.pt").exists():
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"RayTrainWorker" not in (entry / "cmdline").read_bytes():
                        continue
                    if token.encode() in (entry / "environ").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
                        killed.set()
                        return
        time.sleep(0.005)


@pytest.mark.slow
def test_ray_train_gives_the_same_result_although_a_rank_is_lost(space, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FTNAS_TEST_TOKEN", str(tmp_path))
    job = make_job(space, tmp_path / "search")
    killed = threading.Event()
    watcher = threading.Thread(target=kill_one, args=(job.folder, str(tmp_path), killed))
    watcher.start()
    try:
        winner = search_on_ranks(job, load(job.data, "train"))
        assert killed.is_set()
    finally:
        killed.set()
        watcher.join()
    assert contents(job.folder) == contents(pair.folder)
    assert winner.to_dict() == json.loads((job.folder / "genotype.json").read_text())
    events = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events[:4]] == ["ranks_started", "ranks_lost", "ranks_started", "resumed"]
    assert events[1]["epochs_done"] >= 1 and "was lost" in events[1]["reason"]
    said = capsys.readouterr().err
    assert "all ranks start again from the last checkpoint" in said and "search: derive: 4/4" in said
    assert f"search: {EPOCHS}/{EPOCHS}" in said
    assert not (job.folder / "ranks").exists()


@pytest.fixture
def no_ray(monkeypatch):
    """Let ``attempts`` stand for what Ray Train does."""
    monkeypatch.setattr(ftnas.parallel, "start_ray", lambda *_, **__: lambda: None)
    monkeypatch.setattr(ftnas.parallel, "_check_room", lambda job: None)


def test_ranks_that_are_lost_again_and_again_are_given_up(space, tmp_path, no_ray, monkeypatch):
    attempts = []

    def lost(*_):
        attempts.append(1)
        raise RankLostError("rank 1 was lost")

    monkeypatch.setattr(ftnas.parallel, "_fit", lost)
    job = make_job(space, tmp_path / "search")
    with pytest.raises(RuntimeError, match="rank 1 was lost, 4 times without a new epoch; given up"):
        search_on_ranks(job, load(job.data, "train"))
    assert len(attempts) == 4


def test_what_a_rank_raises_is_told_once_and_not_tried_again(space, tmp_path, no_ray, monkeypatch):
    attempts = []

    class RayError(Exception):
        __module__ = "ray.train"

    def fit(*_):
        attempts.append(1)
        error = RuntimeError("Ray Train's own, of many lines")
        error.worker_failures = {0: RankLostError("gone"), 1: ValueError("data: wrong"), 2: RayError()}
        raise ftnas.parallel._cause(error)

    monkeypatch.setattr(ftnas.parallel, "_fit", fit)
    job = make_job(space, tmp_path / "search")
    with pytest.raises(ValueError, match="^data: wrong$"):
        search_on_ranks(job, load(job.data, "train"))
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("ranks", "device", "threads", "message"),
    [
        (4096, "cpu", 1, "need 4096 CPU cores, and there are"),
        (2, "cpu", 4096, "search.ranks=2 of threads=4096 need 8192 CPU cores"),
        (4096, "cuda", 1, "take a GPU each, and this machine has"),
        (2, "cuda:0", 1, "device=cuda:0 names one"),
    ],
)
def test_more_ranks_than_there_is_room_for_are_refused(space, tmp_path, ranks, device, threads, message):
    config = make_job(space, tmp_path / "search", ranks=ranks).config
    with pytest.raises(ValueError, match=message):
        check_ranks(config, which="search", device=torch.device(device), threads=threads, local=True)


def test_fewer_images_than_a_step_of_all_ranks_are_refused(space, tmp_path, monkeypatch):
    monkeypatch.setattr(ftnas.parallel, "start_ray", lambda *_, **__: pytest.fail("Ray was started"))
    job = make_job(space, tmp_path / "search", ranks=6)
    with pytest.raises(ValueError, match="batch_size=32 times search.ranks=6 is above the 160 images"):
        search_on_ranks(job, load(job.data, "train"))
