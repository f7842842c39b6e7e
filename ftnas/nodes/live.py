"""A split network for real: each physical node a process of its own that may die."""

from __future__ import annotations

import contextlib
import os
import signal
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

THIRDS = 3
"""Parts of the time limit: until a silence is noticed, until each node was asked, until the second answer."""
START_LIMIT_S = 240.0
LEAST_SIGN_S = 0.5
"""A living process may be scheduled late by this much."""
PATIENCE = 100
"""How often nodes that live may keep an answer back, before that is an error."""


@dataclass(frozen=True)
class LiveAnswer:
    """What came back for one batch.

    Attributes:
        logits: float [B, classes]; None if no information reached the top.
        down: The nodes that were down.
        lost: Those of them whose loss this batch met.
        latency_s: From the call to the answer, the detection of a loss and the second attempt included.
    """

    logits: Tensor | None
    down: frozenset[str]
    lost: frozenset[str]
    latency_s: float


class Host:
    """What runs in the process of one physical node: its blocks and the matching of what it receives."""

    def __init__(self, module: nn.Module, matches: list[nn.Module], weights: list[float]) -> None:
        self.module = module.eval()
        self.matches = matches
        self.weights = weights

    def pid(self) -> int:
        """Return the id of this process: a sign of life, too, given while the node computes."""
        return os.getpid()

    def forward(self, which: list[int], *values: Any) -> Any:
        """Return the node's output of what it received over some of its hyperconnections."""
        torch.set_num_threads(1)  # here, for the number belongs to a thread, and Ray chooses which one it is
        received = None
        with torch.no_grad():
            for index, value in zip(which, values, strict=True):
                matched = self.matches[index](torch.tensor(value))
                weight = self.weights[index]
                matched = matched if weight == 1.0 else matched * weight
                received = matched if received is None else received + matched
            return self.module(received).numpy()


class LiveNetwork:
    """Physical nodes as Ray actors, each in a process of its own on this machine; a context manager.

    A batch that is lost with a node is asked again over the skips, and the node is bypassed from then on, even if it
    should come back. A process that dies is noticed by Ray at once; one that hangs is noticed when no answer has come
    for a third of the time limit and it gives no sign of life for another third. A node that is slow and lives is
    waited for. One batch is under way at a time.

    Args:
        network: In the mode that is to be run; each process holds its own copy of a node's part.
        time_limit_s: Within this time of the call the answer is there when one node is lost, provided that an answer
            without a loss takes less than a third of it. Each further loss may take as long again.
    """

    def __init__(self, network: SplitNetwork, *, time_limit_s: float = 3.0) -> None:
        self.network = network.eval()
        self.time_limit_s = time_limit_s
        self.down: frozenset[str] = frozenset()
        self._patience = time_limit_s / THIRDS
        self._hosts: dict[str, Any] = {}
        self._links: dict[str, list[Link]] = {}

    def __enter__(self) -> LiveNetwork:
        network = self.network
        self._stop = start_ray(None, cpus=len(network.order), without="try again when the machine is less busy")
        import ray  # costs a second, and only a live network needs it

        try:
            options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "concurrency_groups": {"life": 1}}
            options["allow_out_of_order_execution"] = True  # else all calls wait behind one that a node that hangs owes
            remote: Any = ray.remote(**options)(Host)
            for name, module in zip(network.order, network.nodes, strict=True):
                mine = [index for index, link in enumerate(network.links) if link.to == name]
                self._links[name] = [network.links[index] for index in mine]
                matches = [network.matches[index] for index in mine]
                self._hosts[name] = remote.remote(module, matches, [network.weights[index] for index in mine])
            self.pids = self._wait_for_processes()
        except BaseException:
            self._stop()
            raise
        return self

    def _wait_for_processes(self) -> dict[str, int]:
        import ray

        calls = {name: host.pid.remote() for name, host in self._hosts.items()}
        try:
            return dict(zip(calls, ray.get(list(calls.values()), timeout=START_LIMIT_S), strict=True))
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"the processes of the nodes did not start within {START_LIMIT_S:g} s: {reason}; try again when the "
                "machine is less busy"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for name, host in self._hosts.items():
            ray.kill(host)
            with contextlib.suppress(ProcessLookupError):  # one that hangs does not obey Ray
                os.kill(self.pids[name], signal.SIGKILL)
        self._stop()

    def kill(self, name: str) -> None:
        """End the process of a node, as a crash would."""
        os.kill(self.pids[name], signal.SIGKILL)

    def hang(self, name: str) -> None:
        """Stop the process of a node: it stays, and answers nothing."""
        os.kill(self.pids[name], signal.SIGSTOP)

    def __call__(self, inputs: Tensor) -> LiveAnswer:
        """Answer one batch, float [B, *shape]; a node that is lost meanwhile is bypassed from then on.

        Raises:
            RuntimeError: All nodes live, and yet no answer comes.
        """
        start, before = time.perf_counter(), self.down
        while self.network.carries(self.down):
            answer = self._ask(inputs)
            if answer is not None:
                break
        else:
            answer = None
        took = time.perf_counter() - start
        return LiveAnswer(None if answer is None else torch.tensor(answer), self.down, self.down - before, took)

    def stream(self, batches: Iterable[Tensor]) -> Iterable[LiveAnswer]:
        """Answer batch after batch."""
        for inputs in batches:
            yield self(inputs)

    def _ask(self, inputs: Tensor) -> Any:
        """Return the top's output, or None when nodes were lost on the way, which are down from now on."""
        import ray

        reference = self._send(inputs)
        for _ in range(PATIENCE):
            try:
                return ray.get(reference, timeout=self._patience)
            except ray.exceptions.GetTimeoutError:
                reason = f"for {PATIENCE * self._patience:g} s"
            except ray.exceptions.RayError as error:  # of the dead node itself, or of one that waited for it
                reason = " ".join(str(error).split())
            lost = self._silent()
            if lost:
                self.down |= lost
                return None
            if not reason.startswith("for"):
                break
        raise RuntimeError(f"no answer, though all nodes live: {reason}")

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
        """Return the nodes that give no sign of life within a third of the time limit, or `LEAST_SIGN_S`."""
        import ray

        living = {name: host for name, host in self._hosts.items() if name not in self.down}
        calls = {name: host.pid.options(concurrency_group="life").remote() for name, host in living.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=max(self._patience, LEAST_SIGN_S))
        silent = set()
        for name, call in calls.items():
            try:
                ray.get(call, timeout=0)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                silent.add(name)
        return frozenset(silent)
