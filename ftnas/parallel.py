"""One search in one process or on several ranks, which Ray Train runs; Ray is imported only for more than one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftnas.data import DataConfig, ImageSet, load, stratified_split
from ftnas.derive import WINNER
from ftnas.devices import compute_exactly
from ftnas.faults.hardware import Hardware
from ftnas.heap import keep_memory
from ftnas.images import usable_cores
from ftnas.pool import PoolConfig
from ftnas.progress import Tracker, redirect, say, track
from ftnas.ranks import RankLostError, Ranks
from ftnas.rundir import Folder
from ftnas.search import EPOCHS, Search
from ftnas.search_settings import SearchConfig
from ftnas.space import Genotype
from ftnas.storage import Lock, read_journal
from ftnas.workers import start_ray

SCRATCH = "ranks"
"""Sub-folder of a search while its ranks run: what they say, and what Ray Train writes."""
MESSAGES = "messages.txt"
LOCK = "ranks.lock"
RESTARTS = 3
"""How often lost ranks are started again without an epoch done in between."""
COLLECTIVE_LIMIT_S = 30 * 24 * 3600
"""How long a rank waits for the others: a controller epoch, in which rank 0 works alone, has no bound of its own."""
LOCK_PATIENCE_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True)
class SearchJob:
    """Everything that a search is made of, as values, so that each rank makes the same one.

    Attributes:
        config: The search's settings.
        data: Where the images come from; a rank reads them itself.
        hardware: Faults and number formats.
        pool: Who scores the candidates, on rank 0.
        seed: Of everything random in the search.
        split_seed: Of the split into images for weights and controller.
        folder: Absolute path of the search's folder.
        title: Name on the progress bar.
        device: Type of the device, ``cpu`` or ``cuda``.
        threads: CPU threads per rank; None takes 1.
    """

    config: SearchConfig
    data: DataConfig
    hardware: Hardware
    pool: PoolConfig
    seed: int
    split_seed: int
    folder: Path
    title: str
    device: str
    threads: int | None = None

    def make(self, images: ImageSet, folder: Folder, ranks: Ranks | None = None) -> Search:
        """Return the search on these training images, for one rank."""
        first, second = stratified_split(images.labels, self.config.split, seed=self.split_seed)
        return Search(
            self.config,
            hardware=self.hardware,
            weights_images=images.subset(first),
            controller_images=images.subset(second),
            seed=self.seed,
            folder=folder,
            pool=self.pool,
            title=self.title,
            ranks=ranks,
        )

    @property
    def num_threads(self) -> int:
        """CPU threads per rank: results must not depend on how many cores there are."""
        return self.threads or 1


def check_ranks(config: SearchConfig, *, which: str, device: torch.device, threads: int, local: bool) -> None:
    """Refuse more ranks than there is room for.

    Args:
        config: Of the search.
        which: Name of its section.
        device: Of the run.
        threads: CPU threads per rank.
        local: Whether all ranks run on this machine, and not on a Ray cluster.

    Raises:
        ValueError: More ranks than GPUs or CPU cores, or one GPU named for all of them.
    """
    if config.ranks == 1:
        return
    if device.type == "cuda" and device.index is not None:
        raise ValueError(
            f"{which}.ranks={config.ranks} take a GPU each, and device={device} names one; use device=cuda"
        )
    if not local:
        return
    gpus, cores = torch.cuda.device_count(), usable_cores()
    if device.type == "cuda" and config.ranks > gpus:
        raise ValueError(f"{which}.ranks={config.ranks} take a GPU each, and this machine has {gpus}; lower ranks")
    if config.ranks * threads > cores:
        raise ValueError(
            f"{which}.ranks={config.ranks} of threads={threads} need {config.ranks * threads} CPU cores, and there are "
            f"{cores} here; lower ranks or threads"
        )


def search_on_ranks(job: SearchJob, images: ImageSet) -> Genotype:
    """Run a search on ``config.ranks`` processes of Ray Train, or go on with it, and return the winner.

    When a process is lost, all start again from the last checkpoint, with the same result; the search's
    ``events.jsonl`` tells of it.

    Args:
        job: The search.
        images: The training images, to compare those of the ranks with.

    Raises:
        ValueError: The cluster has not enough room, or a rank found a user's mistake.
        RuntimeError: Ray does not start, a rank failed, or ranks were lost again and again.
    """
    job.make(images, Folder(job.folder), Ranks(0, job.config.ranks))  # a mistake shows before anything starts
    scratch = job.folder / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    pool_cpus = job.pool.workers * (job.pool.threads or 1)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in a config are relative to where the command was given
    stop = start_ray(job.pool.address, cpus=job.config.ranks * job.num_threads + pool_cpus)
    try:
        _check_room(job)
        with _Follower(job) as follower:
            _until_done(lambda: _fit(job, _fingerprint(images), follower), job)
    finally:
        stop()
    shutil.rmtree(scratch, ignore_errors=True)
    return Genotype.load(job.folder / WINNER)


def _check_room(job: SearchJob) -> None:
    import ray

    resources: Mapping[str, float] = ray.cluster_resources()
    needs = {"CPU": job.config.ranks * job.num_threads} | ({"GPU": job.config.ranks} if job.device == "cuda" else {})
    for kind, number in needs.items():
        if resources.get(kind, 0) < number:
            raise ValueError(
                f"search.ranks={job.config.ranks} need {number} {kind}s, and Ray has {resources.get(kind, 0):g}; "
                "lower ranks or threads"
            )


def _until_done(attempt: Callable[[], None], job: SearchJob) -> None:
    """Repeat an attempt that lost ranks, as long as it gets on."""
    restarts, before = 0, -1
    while True:
        try:
            return attempt()
        except RankLostError as error:
            done = _epochs_done(job)
            restarts = 1 if done > before else restarts + 1
            before = done
            # a fresh folder: the ranks have written to the same files since
            Folder(job.folder).events("ranks_lost", epochs_done=done, restart=restarts, reason=str(error))
            if restarts > RESTARTS:
                raise RuntimeError(f"{job.title}: {error}, {restarts} times without a new epoch; given up") from None
            say(f"warning: {job.title}: {error}; all ranks start again from the last checkpoint")


def _epochs_done(job: SearchJob) -> int:
    return len(read_journal(job.folder / EPOCHS)[0])


def _fit(job: SearchJob, fingerprint: str, follower: _Follower) -> None:
    """Let Ray Train run the ranks once.

    Raises:
        RankLostError: A process ended, or could not be reached.
        Exception: What a rank raised.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray.train
    import ray.train.torch

    gpu = job.device == "cuda"
    trainer = ray.train.torch.TorchTrainer(
        _rank,
        # bytes: Ray's own processes on the way need not import what it is made of
        train_loop_config={"job": pickle.dumps(job), "images": fingerprint, "cwd": os.getcwd()},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_LIMIT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.ranks,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.num_threads} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(job.folder / SCRATCH)),
    )
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    # in a thread of its own: in the main one it would take Ctrl-C for itself, and for good
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        follower.catch_up()
    if failures:
        raise _cause(failures[0]) from None


def _cause(error: BaseException) -> BaseException:
    """Return what a rank raised, or RankLostError where none raised anything of its own."""
    found: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    if not found:
        return RuntimeError(f"Ray Train failed: {_line(error)}")
    lost = {
        rank: e for rank, e in found.items() if isinstance(e, RankLostError) or type(e).__module__.startswith("ray.")
    }
    for rank in sorted(found.keys() - lost.keys()):
        return found[rank]
    gone = [rank for rank, e in sorted(lost.items()) if not isinstance(e, RankLostError)]
    name = f"rank {', '.join(map(str, gone))}" if gone else "the connection between the ranks"
    return RankLostError(f"{name} was lost")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _rank(given: dict[str, Any]) -> None:
    """What each process of Ray Train runs."""
    import ray.train
    import ray.train.torch

    job: SearchJob = pickle.loads(given["job"])
    if Path(given["cwd"]).is_dir():
        os.chdir(given["cwd"])
    keep_memory()
    torch.set_num_threads(job.num_threads)
    compute_exactly()
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    images = load(job.data, "train")
    if _fingerprint(images) != given["images"]:
        raise ValueError(f"data: rank {ranks.rank} reads other training images than the process that started it")
    images = images.to(ray.train.torch.get_device())
    folder = Folder(job.folder)
    if not ranks.first:
        job.make(images, folder, ranks).follow()
        return
    lock = _lock(job.folder / LOCK)
    try:
        with open(job.folder / SCRATCH / MESSAGES, "a", buffering=1, encoding="utf-8") as messages:
            redirect(messages)
            folder.events("ranks_started", ranks=ranks.size, threads=job.num_threads, device=str(images.device))
            job.make(images, folder, ranks).run()
    finally:
        folder.close()
        lock.release()


def _lock(path: Path) -> Lock:
    """Wait until the rank 0 of an attempt before, which may outlive its killed parent for a moment, has ended."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return Lock(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} is held by another process that runs this search; stop it") from None
        time.sleep(POLL_S)


def _fingerprint(images: ImageSet) -> str:
    """Return a short name of the images that costs no pass over them; their mean and std come from the pixels."""
    digits = [f"{value:.5f}" for value in (*images.mean, *images.std)]
    text = repr((images.shape, images.classes, digits)).encode() + images.labels.numpy().tobytes()
    return hashlib.sha256(text).hexdigest()


class _Follower:
    """Shows, in the process that started the ranks, what rank 0 writes. A context manager."""

    def __init__(self, job: SearchJob) -> None:
        self._job = job
        self._messages = job.folder / SCRATCH / MESSAGES
        self._read = self._messages.stat().st_size if self._messages.exists() else 0
        self._done = _epochs_done(job)
        self._open = contextlib.ExitStack()
        self._bar: Tracker | None = None

    def __enter__(self) -> _Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.catch_up()
        self._open.close()

    def catch_up(self) -> None:
        """Show what is new."""
        for line in self._new_lines():
            say(line)
        records = read_journal(self._job.folder / EPOCHS)[0]
        if len(records) <= self._done:
            return
        if self._bar is None:  # from the first epoch on: the start of the processes says nothing about the time left
            tracking = track(self._job.title, self._job.config.epochs, done=self._done)
            self._bar = self._open.enter_context(tracking)
        self._bar.advance(f"loss {records[-1]['loss']:.3f}", num=len(records) - self._done)
        self._done = len(records)

    def _new_lines(self) -> list[str]:
        if not self._messages.exists():
            return []
        with open(self._messages, "rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
