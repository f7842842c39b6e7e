"""Candidates scored by worker processes of Ray, which is imported here alone and only when workers are asked for."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from ftnas.faults.hardware import Hardware
from ftnas.pool import Batches, Events, InProcess, Pool, PoolConfig, Result, Scorer, Task, Terms, num_threads
from ftnas.space import Space, Supernet

IN_FLIGHT = 2
"""Calls per worker: one that runs and one that waits."""
TASK_RETRIES = 2
"""How often Ray repeats a candidate whose worker died."""
ATTEMPTS = 3
"""How often a candidate is given to a fresh worker after Ray has given up on one."""
START_LIMIT_S = 60.0
STORE_BYTES = 512 * 2**20
"""Of Ray's object store: a few versions of the weights and the images of one derivation."""
LOOPBACK = "127.0.0.1"


class Worker:
    """What one process of Ray runs: a supernet of its own, filled once per version of the weights."""

    def __init__(self, supernet: Mapping[str, Any], hardware: Mapping[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        space = Space.model_validate(supernet["space"])
        self._supernet = Supernet(space, num_classes=supernet["num_classes"], in_channels=supernet["in_channels"])
        self._scorer = Scorer(self._supernet, Hardware.model_validate(hardware), threads)
        self._version = self._batch = -1
        self._batches: Batches = ()

    def score(
        self, task: Task, terms: Terms, weights: tuple[int, int, list[Any]], images: tuple[int, list[Any]]
    ) -> Any:
        """Score a candidate; weights (version, seed, [reference]) and images (number, [reference]) are pulled once."""
        import ray

        version, seed, (vector,) = weights
        if version != self._version:
            self._scorer.close()
            unflatten(ray.get(vector), self._supernet)
            self._scorer.open(seed)
            self._version = version
        number, (arrays,) = images
        if number != self._batch:  # copied: what lies in the object store belongs to every worker
            self._batches = [(torch.tensor(x), torch.tensor(y)) for x, y in ray.get(arrays)]
            self._batch = number
        return self._scorer.score(task, self._batches, terms)


class RayPool(Pool):
    """Scores candidates in processes of Ray, two calls in flight for each; a lost one is replaced."""

    def __init__(self, supernet: Supernet, hardware: Hardware, *, config: PoolConfig, events: Events) -> None:
        super().__init__(events)
        self._supernet = supernet
        threads = num_threads(config)
        self._stop = start_ray(config.address, cpus=config.workers * threads)
        import ray  # after its environment is set

        self._ray: Any = ray
        actor: Any = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=TASK_RETRIES)(Worker)
        size = {"num_classes": supernet.num_classes, "in_channels": supernet.in_channels}
        recipe = {"space": supernet.space.model_dump(mode="json"), **size}
        self._new = lambda: actor.remote(recipe, hardware.model_dump(mode="json"), threads)
        self._actors = [self._new() for _ in range(config.workers)]
        self._pids = [0] * config.workers
        self._version = self._batch = 0
        self._weights: tuple[int, int, list[Any]] | None = None
        events("pool_started", workers=config.workers, threads=threads)

    @contextlib.contextmanager
    def weights(self, seed: int) -> Iterator[None]:
        """See `Pool.weights`."""
        self._version += 1
        self._weights = (self._version, seed, [self._ray.put(flatten(self._supernet))])
        try:
            yield
        finally:
            self._weights = None

    def _map(self, tasks: Sequence[Task], batches: Batches, terms: Terms) -> Iterator[Result]:
        ray = self._ray
        self._batch += 1
        images = (self._batch, [ray.put([(x.contiguous().numpy(), y.numpy()) for x, y in batches])])
        waiting, lost = deque(tasks), dict.fromkeys((task.id for task in tasks), 0)
        flying: dict[Any, tuple[Task, int, Any]] = {}
        while waiting or flying:
            for _ in range(IN_FLIGHT):
                for place, actor in enumerate(self._actors):
                    if waiting and sum(entry[1] == place for entry in flying.values()) < IN_FLIGHT:
                        task = waiting.popleft()
                        flying[actor.score.remote(task, terms, self._weights, images)] = (task, place, actor)
            ready, _ = ray.wait(list(flying), num_returns=1)
            task, place, actor = flying.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayActorError as error:
                self._replace(place, actor, error)
                lost[task.id] += 1
                if lost[task.id] < ATTEMPTS:
                    waiting.appendleft(task)
                    continue
                result = Result(task.id, False, (0.0, 0.0, 0.0), f"its worker died {ATTEMPTS} times")
            self._note(place, result.pid)
            yield result

    def _replace(self, place: int, actor: Any, error: Exception) -> None:
        if self._actors[place] is actor:
            self._events("worker_lost", worker=place, reason=str(error).splitlines()[0])
            self._ray.kill(actor)
            self._actors[place] = self._new()

    def _note(self, place: int, pid: int) -> None:
        """Tell of a worker that Ray has restarted, which shows by its process."""
        if pid and self._pids[place] and pid != self._pids[place]:
            self._events("worker_restarted", worker=place, lost_pid=self._pids[place], pid=pid)
        self._pids[place] = pid or self._pids[place]

    def close(self) -> None:
        """End the workers, and Ray where this pool started it."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        self._actors = []
        self._stop()


def open_pool(config: PoolConfig, supernet: Supernet, hardware: Hardware, *, events: Events) -> Pool:
    """Make the pool that the settings ask for.

    Args:
        config: How many workers, and their threads.
        supernet: Shared weights; they are read at each `Pool.weights`.
        hardware: Faults and number formats.
        events: Takes a kind and fields: what happened to the pool.

    Raises:
        ValueError: Workers are asked for and the supernet is not on the CPU.
        RuntimeError: Ray does not start.
    """
    if config.workers == 0:
        return InProcess(supernet, hardware, threads=num_threads(config), events=events)
    device = next(supernet.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"pool.workers={config.workers} score on the CPU, and the run is on {device}; use workers=0")
    return RayPool(supernet, hardware, config=config, events=events)


def start_ray(address: str | None, *, cpus: int) -> Callable[[], None]:
    """Start Ray on this machine alone, or join the cluster that is named; return what ends it again.

    Where this process is part of a running Ray already, nothing is started, and nothing ended.

    Args:
        address: Of a cluster; None starts Ray here.
        cpus: How many CPUs Ray may hand out when it is started here.

    Raises:
        RuntimeError: One line: it does not start, or not in time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # Ray reads these when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray replaces 127.0.0.1 by an address that others reach
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return lambda: None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    folder: str | None = None
    if address is None:
        folder = tempfile.mkdtemp(prefix="ftnas-", dir="/tmp" if Path("/tmp").is_dir() else None)
        own = {
            "num_cpus": cpus,
            "object_store_memory": STORE_BYTES,
            "_temp_dir": folder,
        }
        options: dict[str, Any] = {"address": "local", "include_dashboard": False, "_node_ip_address": LOOPBACK} | own
    else:
        options = {"address": address}

    def stop() -> None:
        ray.shutdown()
        if folder is not None:
            _end_children(folder)
            shutil.rmtree(folder, ignore_errors=True)

    try:
        with _time_limit(START_LIMIT_S):
            ray.init(**options, **quiet)
    except BaseException as error:
        stop()
        if not isinstance(error, Exception):
            raise
        raise RuntimeError(f"Ray did not start: {' '.join(str(error).split())}; pool.workers=0 does without") from None
    return stop


def flatten(module: nn.Module) -> np.ndarray[Any, Any]:
    """Return all parameters and buffers as one vector of bytes, uint8 [bytes], in the order of ``state_dict``."""
    state = module.state_dict().values()
    return np.concatenate([value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for value in state])


@torch.no_grad()
def unflatten(vector: np.ndarray[Any, Any], module: nn.Module) -> None:
    """Copy such a vector into a module of the same architecture; the vector itself is left alone."""
    own, start = torch.tensor(vector), 0
    for value in module.state_dict().values():
        size = value.numel() * value.element_size()
        value.copy_(own[start : start + size].clone().view(value.dtype).reshape(value.shape))
        start += size
    assert start == len(own)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a body that takes longer; outside the main thread, which alone gets signals, no limit."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end_children(folder: str) -> None:
    """Kill what Ray has left behind: processes whose command line names the temporary folder, which is ours alone."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
