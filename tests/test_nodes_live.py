"""Physical nodes as processes: one is killed, and the answers go on as simulated."""

import os
import signal
import statistics

import pytest
import torch

from ftnas import rng
from ftnas.nodes import Node, Partition, Skip, SplitNetwork
from ftnas.nodes.live import LiveNetwork
from ftnas.nodes.models import SplitModel


@pytest.mark.slow
def test_a_killed_node_is_bypassed_and_answers_are_those_of_the_simulation():
    nodes = (Node(name="a", blocks=(0,), to="b"), Node(name="b", blocks=(1,), to="c"), Node(name="c", blocks=(2,)))
    skips = (Skip(source="input", to="b"), Skip(source="a", to="c"))
    with rng.isolated(0, "live"):
        blocks = SplitModel(name="mlp", hidden=2, units=32).blocks((1, 8, 8), num_classes=10)
        network = SplitNetwork(blocks, partition=Partition(nodes=nodes, skips=skips), shape=(1, 8, 8)).eval()
    inputs = torch.randn(16, 1, 8, 8, generator=rng.generator(0, "inputs"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), LiveNetwork(network, time_limit_s=5.0) as live:
            before = [live(inputs) for _ in range(20)]
            assert len(set(live.pids.values()) | {os.getpid()}) == 4
            assert all(torch.equal(answer.logits, network(inputs)) for answer in before)
            os.kill(live.pids["b"], signal.SIGKILL)
            takeover = live(inputs)
            assert takeover.down == {"b"} and torch.equal(takeover.logits, network(inputs, ("b",)))
            assert takeover.latency_s < 2 * 3 * live.time_limit_s + 1
            after = [live(inputs) for _ in range(20)]
            assert all(torch.equal(answer.logits, network(inputs, ("b",))) for answer in after)
            os.kill(live.pids["a"], signal.SIGKILL)
            assert live(inputs).logits is None
    finally:
        torch.set_num_threads(threads)
    medians = [1000 * statistics.median(answer.latency_s for answer in answers[1:]) for answers in (before, after)]
    print(f"median ms with all nodes {medians[0]:.2f}, b down {medians[1]:.2f}; takeover {takeover.latency_s:.3f} s")
