"""Tasks done by worker processes of Ray, which is imported only when workers are asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ftnas.heap import keep_memory
from ftnas.pool import Box, Events, InProcess, LostError, Pool, PoolConfig, R, Result, T, attempt
from ftnas.progress import say

IN_FLIGHT = 2
"""Calls per worker: one that runs and one that waits."""
AHEAD = 64
"""Results that wait for an earlier one, at most."""
TASK_RETRIES = 2
"""How often Ray repeats a task whose worker died."""
ATTEMPTS = 3
"""How often a task is given to a fresh worker after Ray has given up on one."""
START_LIMIT_S = 60.0
REACH_LIMIT_S = 5.0
STORE_BYTES = 512 * 2**20
"""Of Ray's object store: a few versions of the weights and the images of one derivation; what is more goes to disk."""
LOOPBACK = "127.0.0.1"


class Worker:
    """What one process of Ray runs: the jobs that it is sent, each pulled once."""

    def __init__(self, threads: int) -> None:
        keep_memory()
        torch.set_num_threads(threads)
        self._threads = threads
        self._number, self._job = -1, None

    def call(self, number: int, job: Box[Any], task: Any) -> Result[Any]:
        """Do a task of the job of that number."""
        if number != self._number:
            self._number, self._job = number, None  # before the next one is there, for the memory
            self._job = job.get()
        assert self._job is not None
        return attempt(self._job, task, threads=self._threads)


class Stored(Box[T]):
    """A value in Ray's object store."""

    def __init__(self, reference: Any) -> None:
        self._boxed = [reference]  # a bare one would be resolved again at every call

    def get(self) -> T:
        """See `Box.get`; what is returned lies in the memory of all workers."""
        import ray

        value: T = ray.get(self._boxed[0])
        return value


@dataclass
class _Call:
    """A task on its way."""

    number: int
    task: Any
    place: int
    actor: Any
    lost: int = 0


class RayPool(Pool):
    """Does tasks in processes of Ray, two calls in flight for each; a lost one is replaced.

    Args:
        config: How many workers, and their threads.
        events: Takes a kind and fields: what happened to the workers.

    Raises:
        ValueError: The cluster at the address cannot be joined.
        RuntimeError: Ray does not start.
    """

    shares_memory = False

    def __init__(self, config: PoolConfig, *, events: Events) -> None:
        self.threads = config.threads or torch.get_num_threads()
        self._events = events
        self._stop = start_ray(config.address, cpus=config.workers * self.threads)
        import ray  # after its environment is set

        self._ray: Any = ray
        remote: Any = ray.remote(num_cpus=self.threads, max_restarts=-1, max_task_retries=TASK_RETRIES)(Worker)
        self._new = lambda: remote.remote(self.threads)
        self._actors = [self._new() for _ in range(config.workers)]
        self._pids = [0] * config.workers
        self._jobs: WeakKeyDictionary[Box[Any], int] = WeakKeyDictionary()
        self._numbers = itertools.count()
        events("pool_started", workers=config.workers, threads=self.threads)

    def put(self, value: T) -> Box[T]:
        """See `Pool.put`."""
        return Stored(self._ray.put(value))

    def map(self, job: Box[Callable[[T], R]], tasks: Iterable[T]) -> Iterator[Result[R]]:
        """See `Pool.map`; a task whose workers died again and again is a failure too."""
        ray, source = self._ray, enumerate(tasks)
        if job not in self._jobs:
            self._jobs[job] = next(self._numbers)
        number = self._jobs[job]
        flying: dict[Any, _Call] = {}
        found: dict[int, Result[R]] = {}
        again: deque[_Call] = deque()
        busy = [0] * len(self._actors)
        due, more = 0, True
        try:
            while more or again or flying or found:
                # what is made again is due before what was found ahead of it
                while len(flying) < IN_FLIGHT * len(self._actors) and (again or more and len(found) < AHEAD):
                    call = again.popleft() if again else self._next(source)
                    if call is None:
                        more = False
                        break
                    call.place = min(range(len(busy)), key=busy.__getitem__)
                    call.actor = self._actors[call.place]
                    busy[call.place] += 1
                    flying[call.actor.call.remote(number, job, call.task)] = call
                if due not in found and flying:
                    ready, _ = ray.wait(list(flying), num_returns=1)
                    call = flying.pop(ready[0])
                    busy[call.place] -= 1
                    result = self._result(ready[0], call)
                    if result is None:
                        again.append(call)
                    else:
                        found[call.number] = result
                while due in found:
                    yield found.pop(due)
                    due += 1
        finally:
            for reference in flying:  # what nobody asked for any more
                ray.cancel(reference)

    def _next(self, source: Iterator[tuple[int, Any]]) -> _Call | None:
        for number, task in source:
            return _Call(number, task, -1, None)
        return None

    def _result(self, reference: Any, call: _Call) -> Result[Any] | None:
        """Return what came of a call; None when it is to be made again, since its worker died."""
        try:
            result: Result[Any] = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._replace(call, error)
            call.lost += 1
            if call.lost < ATTEMPTS:
                return None
            return Result(None, LostError(f"its worker died {ATTEMPTS} times"))
        except self._ray.exceptions.RayTaskError as error:  # e.g. the job cannot be read there
            return Result(None, RuntimeError(f"{type(error.cause).__name__}: {error.cause}"))
        except self._ray.exceptions.RayError as error:  # e.g. what it reads is lost, or the machine has no memory left
            return Result(None, LostError(str(error).splitlines()[0]))
        self._note(call.place, result.pid)
        return result

    def _replace(self, call: _Call, error: Exception) -> None:
        if self._actors[call.place] is call.actor:
            reason = str(error).splitlines()[0]
            say(f"warning: worker {call.place} is lost and replaced: {reason}")
            self._events("worker_lost", worker=call.place, reason=reason)
            self._ray.kill(call.actor)
            self._actors[call.place] = self._new()

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


def open_pool(config: PoolConfig, *, events: Events) -> Pool:
    """Make the pool that the settings ask for.

    Args:
        config: How many workers, and their threads.
        events: Takes a kind and fields: what happened to the pool.

    Raises:
        ValueError: The cluster at the address cannot be joined.
        RuntimeError: Ray does not start.
    """
    if config.workers == 0:
        return InProcess(threads=config.threads)
    return RayPool(config, events=events)


def start_ray(address: str | None, *, cpus: int, without: str = "pool.workers=0 does without") -> Callable[[], None]:
    """Start Ray on this machine alone, or join the cluster that is named; return what ends it again.

    Where this process is part of a running Ray already, nothing is started, and nothing ended.

    Args:
        address: Of a cluster; None starts Ray here.
        cpus: How many CPUs Ray may hand out when it is started here.
        without: The advice when Ray does not start.

    Raises:
        ValueError: One line: the cluster at the address cannot be joined.
        RuntimeError: One line: Ray does not start, or not in time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # Ray reads these when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # else Ray replaces 127.0.0.1 by an address that others reach
        )
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
        _reach(address)
        options = {"address": address}

    def stop() -> None:
        ray.shutdown()
        if folder is not None:
            _end_children(folder)
            shutil.rmtree(folder, ignore_errors=True)

    try:
        with _time_limit(START_LIMIT_S), _own_signal(signal.SIGTERM):
            ray.init(**options, **quiet)
    except BaseException as error:
        stop()
        if isinstance(error, SystemExit):  # Ray's handler, while it starts, leaves with the bare number of SIGTERM
            raise SystemExit(128 + signal.SIGTERM) from None
        if not isinstance(error, Exception | _LateError):
            raise
        reason = " ".join(str(error).split())
        if address is not None:
            raise ValueError(f"pool.address={address} cannot be joined: {reason}; check it, or remove it") from None
        raise RuntimeError(f"Ray did not start: {reason}; {without}") from None
    return stop


def _reach(address: str) -> None:
    """Refuse an address at which nobody answers, for which Ray alone would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"pool.address={address} is not HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_LIMIT_S).close()
    except OSError as error:
        raise ValueError(f"pool.address={address} cannot be joined: {error}; start the cluster, or remove it") from None


class _LateError(BaseException):
    """Not an Exception, which Ray's own attempts to start would take for one of theirs."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _LateError in a body that takes longer; outside the main thread, which alone gets signals, no limit."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _LateError(f"it took more than {seconds:g} s")

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


@contextlib.contextmanager
def _own_signal(number: signal.Signals) -> Iterator[None]:
    """Keep this process's answer to a signal, where Ray would put one that ends it without closing anything."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, before)


def _end_children(folder: str) -> None:
    """Kill what Ray has left behind: processes whose command line names the temporary folder, which is ours alone."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
