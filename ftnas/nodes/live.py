"""A split network for real: each physical node a process of its own that may die."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ftnas.nodes.network import SplitNetwork
from ftnas.nodes.partition import INPUT, Link
from ftnas.workers import start_ray


@dataclass(frozen=True)
class LiveAnswer:
    """What came back for one batch.

    Attributes:
        logits: float [B, classes]; None if no information reached the top.
        down: The nodes that were down.
        latency_s: From the call to the answer, the detection of a loss and the second attempt included.
    """

    logits: Tensor | None
    down: frozenset[str]
    latency_s: float


class Host:
    """What runs in the process of one physical node: its blocks and the matching of what it receives."""

    def __init__(self, module: nn.Module, matches: list[nn.Module], weights: list[float]) -> None:
        torch.set_num_threads(1)
        self.module = module.eval()
        self.matches = matches
        self.weights = weights

    def pid(self) -> int:
        """Return the id of this process: a sign of life, too."""
        return os.getpid()

    def forward(self, which: list[int], *values: Any) -> Any:
        """Return the node's output of what it received over some of its hyperconnections."""
        received = None
        with torch.no_grad():
            for index, value in zip(which, values, strict=True):
                matched = self.matches[index](torch.tensor(value))
                weight = self.weights[index]
                matched = matched if weight == 1.0 else matched * weight
                received = matched if received is None else received + matched
            return self.module(received).numpy()


class LiveNetwork:
    """Physical nodes as Ray actors on this machine; a context manager.

    A batch that is lost with a node is asked again over the skips. A killed process is noticed by Ray, one that hangs
    by the time limit; a batch takes at most ``2 * num_nodes * time_limit_s`` plus one undisturbed answer.

    Args:
        network: In the mode that is to be run; each process holds its own copy of a node's part.
        time_limit_s: After this long without an answer, each node is asked for a sign of life.
    """

    def __init__(self, network: SplitNetwork, *, time_limit_s: float = 2.0) -> None:
        self.network = network.eval()
        self.time_limit_s = time_limit_s
        self.down: frozenset[str] = frozenset()
        self._hosts: dict[str, Any] = {}
        self._links: dict[str, list[Link]] = {}

    def __enter__(self) -> LiveNetwork:
        network = self.network
        self._stop = start_ray(None, cpus=len(network.order))
        import ray  # costs a second, and only a live network needs it

        try:
            remote: Any = ray.remote(num_cpus=0, max_restarts=0)(Host)
            for name, module in zip(network.order, network.nodes, strict=True):
                mine = [index for index, link in enumerate(network.links) if link.to == name]
                self._links[name] = [network.links[index] for index in mine]
                matches = [network.matches[index] for index in mine]
                self._hosts[name] = remote.remote(module, matches, [network.weights[index] for index in mine])
            self.pids = {name: ray.get(host.pid.remote(), timeout=60) for name, host in self._hosts.items()}
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, inputs: Tensor) -> LiveAnswer:
        """Answer one batch, float [B, *shape]; a node that is lost meanwhile is bypassed from then on.

        Raises:
            RuntimeError: Nodes live, and yet no answer came.
        """
        import ray

        start = time.perf_counter()
        for _ in range(len(self._hosts) + 1):
            if not self.network.carries(self.down):
                return LiveAnswer(None, self.down, time.perf_counter() - start)
            try:
                answer = ray.get(self._send(inputs), timeout=self.time_limit_s)
                return LiveAnswer(torch.tensor(answer), self.down, time.perf_counter() - start)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError) as error:
                lost = self._silent()
                if not lost - self.down:
                    raise RuntimeError(f"no answer, though all nodes live: {error}") from error
                self.down |= lost
        raise RuntimeError("no answer: nodes are lost faster than batches are answered")

    def stream(self, batches: Iterable[Tensor]) -> Iterable[LiveAnswer]:
        """Answer batch after batch."""
        for inputs in batches:
            yield self(inputs)

    def _send(self, inputs: Tensor) -> Any:
        """Send one batch through the nodes that live; return the reference of the top's output."""
        sent: dict[str, Any] = {INPUT: inputs.numpy()}
        for name, links in self._links.items():
            used = [
                index
                for index, link in enumerate(links)
                if link.source in sent and self.network.active(link, self.down)
            ]
            if name not in self.down and used:
                values = [sent[links[index].source] for index in used]
                sent[name] = self._hosts[name].forward.remote(used, *values)
        return sent[self.network.partition.top]

    def _silent(self) -> frozenset[str]:
        """Return the nodes that give no sign of life within the time limit."""
        import ray

        calls = {name: host.pid.remote() for name, host in self._hosts.items() if name not in self.down}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.time_limit_s)
        silent = set()
        for name, call in calls.items():
            try:
                ray.get(call, timeout=0.01)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                silent.add(name)
        return frozenset(silent)
