"""Physical nodes as processes: one is killed, one hangs, and the answers go on as simulated."""

import os
import time

import pytest
import torch
import yaml
from click.testing import CliRunner
from test_nodes_study import SMALL

from ftnas import rng
from ftnas.cli import cli
from ftnas.nodes import Node, Partition, Skip, SplitNetwork
from ftnas.nodes import stream as stream_module
from ftnas.nodes.live import LiveAnswer, LiveNetwork
from ftnas.nodes.models import SplitModel
from ftnas.nodes.stream import Step, one_thread, summary
from ftnas.nodes.study import LiveConfig
from ftnas.workers import start_ray

NODES = (Node(name="a", blocks=(0,), to="b"), Node(name="b", blocks=(1,), to="c"), Node(name="c", blocks=(2,)))
SKIPS = (Skip(source="input", to="b"), Skip(source="a", to="c"))
INPUTS = torch.randn(16, 1, 8, 8, generator=rng.generator(0, "inputs"))


@pytest.fixture(scope="module")
def ray_started():
    stop = start_ray(None, cpus=2)
    yield
    stop()


def small_network():
    with rng.isolated(0, "live"):
        blocks = SplitModel(name="mlp", hidden=2, units=32).blocks((1, 8, 8), num_classes=10)
        return SplitNetwork(blocks, partition=Partition(nodes=NODES, skips=SKIPS), shape=(1, 8, 8)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "limit_s"), [("kill", 9.0), ("hang", 9.0)])
def test_a_lost_node_is_bypassed_in_time_and_answers_are_those_of_the_simulation(loss, limit_s, ray_started):
    network = small_network()
    with one_thread(), torch.no_grad(), LiveNetwork(network, time_limit_s=limit_s) as live:
        assert len(set(live.pids.values()) | {os.getpid()}) == 4
        for inputs in (INPUTS, INPUTS[:1], INPUTS):
            answer = live(inputs)
            assert answer.down == answer.lost == set() and torch.equal(answer.logits, network(inputs))
        getattr(live, loss)("b")
        takeover = live(INPUTS)
        assert takeover.lost == {"b"} and takeover.latency_s < limit_s
        assert torch.equal(takeover.logits, network(INPUTS, ("b",)))
        for answer in live.stream([INPUTS[:1], INPUTS]):
            assert answer.down == {"b"} and answer.lost == set() and answer.latency_s < limit_s / 3
            assert torch.equal(answer.logits, network(INPUTS[: len(answer.logits)], ("b",)))
        getattr(live, loss)("a")
        blind = live(INPUTS)
        assert blind.logits is None and blind.down == {"a", "b"}
        pids = live.pids.values()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_command_runs_a_trained_network_and_tells_of_the_loss(tmp_path, ray_started):
    path, out = tmp_path / "c.yaml", ["--out", str(tmp_path / "run")]
    path.write_text(yaml.safe_dump(SMALL))
    runner = CliRunner()
    assert runner.invoke(cli, ["nodes", "train", str(path), *out]).exit_code == 0
    result = runner.invoke(cli, ["nodes", "run", str(path), "live.images=20", "--kill", "b@7", *out])
    assert result.exit_code == 0, result.exception
    assert "differ from the simulation's in any bit: 0 of 20" in result.output and "| b | 12 |" in result.output
    assert (tmp_path / "run" / "live" / "steps.json").is_file()


@pytest.mark.parametrize("lost", [frozenset(), frozenset({"a", "c"})])
def test_a_limit_that_living_nodes_cannot_keep_is_an_error(lost, monkeypatch):
    class Late:
        """Stands in for the processes: some seem lost before anything was."""

        def __init__(self, network, *, time_limit_s):
            self.network = network

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, inputs):
            return LiveAnswer(self.network(inputs), lost, lost, 0.01)

    monkeypatch.setattr(stream_module, "LiveNetwork", Late)
    batches = [(INPUTS, torch.zeros(16, dtype=torch.int64))]
    live = LiveConfig(time_limit_s=0.1, images=16, batch_size=16)
    if not lost:
        assert len(stream_module.stream(small_network(), batches, live, num_classes=10)) == 1
        return
    with pytest.raises(RuntimeError, match="a, c gave no answer within a third of live.time_limit_s=0.1 .* give more"):
        stream_module.stream(small_network(), batches, live, num_classes=10)


def test_the_limit_after_the_loss_of_two_nodes_is_told_as_it_is():
    text = summary([Step(0, 1, ["b", "c"], ["b", "c"], 0.5, 1.0, 1.0, True)], title="t", limit_s=3.0)
    assert "loss of b, c took 0.500 s; the limit is 6 s." in text


def test_percentiles_and_accuracy_by_hand():
    steps = [Step(i, 2, [], [], (i + 1) / 1000, 1.0, 1.0, True) for i in range(100)]
    steps += [Step(100, 2, ["b"], ["b"], 0.5, 2.0, 2.0, True), Step(102, 2, ["b"], [], 0.002, 0.0, 2.0, False)]
    text = summary(steps, title="t", limit_s=3.0)
    # numpy's linear rule over 1..100: 1 + 99 * share
    assert "| none | 200 | 50.5 | 95.0 | 99.0 | 100.0 | 50.00 | 50.00 |" in text
    assert "| b: the loss itself | 2 | 500.0 | 500.0 | 500.0 | 500.0 | 100.00 | 100.00 |" in text
    assert "| b | 2 | 2.0 | 2.0 | 2.0 | 2.0 | 0.00 | 100.00 |" in text
    assert "in any bit: 1 of 102." in text and "loss of b took 0.500 s; the limit is 3 s." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill", "b"], "written NODE@IMAGE"),
        (["--kill", "x@1"], "unknown node 'x'"),
        (["--hang", "b@500"], "image 500 is never sent"),
        (["--kill", "b@359", "live.images=null"], "image 359 is never sent, there are images 0 to 358"),
        (["--hang", "b@1", "--kill", "b@2"], "both in kill and in hang"),
        (["live.variant=resilient"], "did you mean 'resilinet'"),
        (["live.images=1000"], "there are 359 test images"),
        ([], "is not trained yet"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path, arguments, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    result = CliRunner().invoke(cli, ["nodes", "run", str(path), *arguments, "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
