"""Final trainings side by side: trials of Ray Tune, each of which works in its own part of the run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from ftnas.data import ImageSet, load
from ftnas.devices import compute_exactly
from ftnas.heap import keep_memory
from ftnas.pool import PoolConfig, attempt
from ftnas.progress import say, track
from ftnas.rundir import Folder
from ftnas.settings import Count, Settings
from ftnas.storage import Lock, read_journal
from ftnas.train import HISTORY
from ftnas.trainings import STOPPED, Failure, Training, note, one_line, rate_folder, train_in_turn
from ftnas.workers import start_ray

TUNE = "tune"
"""Sub-folder of the stage in which Ray Tune keeps its own books, until all trials are done."""
RETRIES = 2
"""How often a trial whose process died is started again, from its last epoch."""
LOCK = ".lock"
LOCK_PATIENCE_S = 60.0
POLL_S = 0.5
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
"""No TensorBoard files and no tables of Tune's own."""


class AshaConfig(Settings):
    """Asynchronous successive halving: trainings that lag behind in their loss are stopped for good.

    Which ones are stopped depends on the order in which they get on, and so on the machine: unlike all else here, the
    result is not a function of the seed.

    Attributes:
        grace_epochs: No training is stopped before.
        reduction: Of the trainings that reach a rung, one in so many goes on; rungs lie at ``grace_epochs`` times the
            powers of it.
    """

    grace_epochs: Count
    reduction: Annotated[int, Field(ge=2)] = 4


def train_on_workers(
    trainings: Sequence[Training], images: ImageSet, *, pool: PoolConfig, asha: AshaConfig | None, folder: Folder
) -> list[Failure]:
    """Do trainings side by side, going on where an earlier call was cut off; one that fails is recorded.

    Rates of the rate protocol train side by side as well, more of them than in turn; which one is kept is then
    decided as in turn, from their checkpoints.

    Args:
        trainings: What to do; those done already are left as they are. The workers must see their folders.
        images: The training images, on the device, which the workers read themselves.
        pool: How many at once, and the threads of each; on a GPU each takes one.
        asha: Whether to stop trainings that lag behind.
        folder: Of the stage.

    Raises:
        ValueError: The cluster cannot be joined or has no room, or a training found a user's mistake.
        RuntimeError: Ray does not start, or Tune fails as a whole.
    """
    todo = [training for training in trainings if not training.done]
    parts = [part for training in todo for part in training.parts]
    threads = pool.threads or 1
    gpus = int(images.device.type == "cuda")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in a config are relative to where the command was given
    stop = start_ray(pool.address, cpus=pool.workers * threads)
    try:
        _check_room(threads, gpus)
        work = _Work({part.key: part for part in parts}, images.digest, os.getcwd(), threads)
        folder.events("trials_started", trials=len(parts), workers=pool.workers, threads=threads)
        outcomes = _tune(work, pool, asha=asha, gpus=gpus, folder=folder)
    finally:
        stop()
    failures = _settle(parts, outcomes, asha=asha)
    failed = {failure.key for failure in failures}
    rest = [t for t in todo if t.recipe.rate_protocol is not None or not (t.done or t.key in failed)]
    decided = {training.key for training in rest}
    # a rate that failed may be one that is not needed: in turn, those after the first that passes are not tried
    failures = [failure for failure in failures if failure.key.partition("/rate-")[0] not in decided]
    if rest:  # decides between rates that are trained, and makes models that Tune's books have and the folder has not
        result = attempt(lambda waiting: train_in_turn(waiting, images), rest, threads=threads)
        failures += result.get()
    return failures


class _Work:
    """What the processes of Tune are sent."""

    def __init__(self, parts: Mapping[str, Training], digest: str, cwd: str, threads: int) -> None:
        self.parts, self.digest, self.cwd, self.threads = parts, digest, cwd, threads

    def do(self, key: str) -> None:
        """Do one training; what it raises is reported, so that Tune does not try it again."""
        from ray import tune

        training = self.parts[key]
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)
        keep_memory()
        compute_exactly()
        torch.set_num_threads(self.threads)
        folder = training.folder if training.rate is None else training.folder / rate_folder(training.rate)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _alone(folder / LOCK):
                images = load(training.data, "train")
                if images.digest != self.digest:
                    raise ValueError("data: a worker reads other training images than the process that started it")
                if torch.cuda.is_available() and tune.get_context().get_trial_resources().required_resources.get("GPU"):
                    images = images.to(torch.device("cuda"))
                training.run(images, epoch_done=partial(_report, tune.report, training.recipe.epochs))
        except Exception as error:
            mistake = isinstance(error, ValueError)
            tune.report(
                {"epoch": -1, "loss": float("inf"), "failed": one_line(error), "mistake": mistake}
                | {"trace": traceback.format_exc()}
            )


def _report(report: Callable[[dict[str, Any]], None], epochs: int, record: Mapping[str, Any]) -> None:
    """Tell a scheduler of an epoch; not of the last one, when it is too late to stop."""
    if record["epoch"] + 1 < epochs:
        report({"epoch": record["epoch"] + 1, "loss": record["loss"]})


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the folder of a training; a trial before, whose parent was killed, may outlive it for a moment."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            lock = Lock(path)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} is held by another process that does this training; stop it") from None
        time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release()


def _check_room(threads: int, gpus: int) -> None:
    import ray

    found: Mapping[str, float] = ray.cluster_resources()
    for kind, number in {"CPU": threads, "GPU": gpus}.items():
        if found.get(kind, 0) < number:
            raise ValueError(f"a training needs {number} {kind}s, and Ray has {found.get(kind, 0):g}; use workers=0")


def _tune(work: _Work, pool: PoolConfig, *, asha: AshaConfig | None, gpus: int, folder: Folder) -> Any:
    """Let Ray Tune do the work, or go on with what it had begun; return its result grid."""
    os.environ.update(QUIET)  # Tune reads them when it is imported
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost process is told by us, in one line
    told = folder.path.resolve()

    class Lost(tune.Callback):
        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            key = trial.config["training"]
            say(f"warning: the process that trains {key} is lost; another goes on from its last epoch")
            Folder(told).events("trial_lost", training=key)

    def trial(config: dict[str, Any]) -> None:
        work.do(config["training"])

    resources: dict[str, float] = {"CPU": float(work.threads), "GPU": float(gpus)}
    trainable = tune.with_resources(trial, resources)
    books = folder.path.resolve() / TUNE
    if (books / "trials").is_dir() and tune.Tuner.can_restore(str(books / "trials")) and _same(books, work):
        say("going on with the trials of an earlier run")
        tuner = tune.Tuner.restore(str(books / "trials"), trainable=trainable, resume_errored=True)
    else:
        shutil.rmtree(books, ignore_errors=True)
        folder.stage(TUNE).write_json("keys.json", sorted(work.parts))
        scheduler = None
        if asha is not None:
            epochs = max(part.recipe.epochs for part in work.parts.values())
            scheduler = ASHAScheduler(
                time_attr="epoch",
                metric="loss",
                mode="min",
                max_t=epochs,
                grace_period=asha.grace_epochs,
                reduction_factor=asha.reduction,
            )
        tuner = tune.Tuner(
            trainable,
            param_space={"training": tune.grid_search(list(work.parts))},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=pool.workers),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(books),
                verbose=0,
                callbacks=[Lost()],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
    grid = _followed(tuner.fit, list(work.parts.values()))
    shutil.rmtree(books, ignore_errors=True)
    return grid


def _same(books: Path, work: _Work) -> bool:
    """Whether the trials begun cover what is to be done."""
    with contextlib.suppress(OSError, ValueError):
        return set(work.parts) <= set(json.loads((books / "keys.json").read_text(encoding="utf-8")))
    return False


def _followed(fit: Any, parts: Sequence[Training]) -> Any:
    """Call in a thread, since Ctrl-C belongs to this one, and show how far the trainings are."""
    outcome: list[Any] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    done = _epochs(parts)
    with track(f"train {len(parts)} networks", sum(part.recipe.epochs for part in parts), done=done) as progress:
        while thread.is_alive():
            thread.join(POLL_S)
            now = _epochs(parts)
            if now > done:
                progress.advance(num=now - done)
                done = now
    if failures:
        raise RuntimeError(f"Ray Tune failed: {one_line(failures[0])}") from failures[0]
    return outcome[0]


def _epochs(parts: Sequence[Training]) -> int:
    folders = [part.folder if part.rate is None else part.folder / rate_folder(part.rate) for part in parts]
    return sum(len(read_journal(folder / HISTORY)[0]) for folder in folders if (folder / HISTORY).exists())


def _settle(parts: Sequence[Training], grid: Any, *, asha: AshaConfig | None) -> list[Failure]:
    """Write down what failed and what was stopped; only a scheduler stops a training before its last epoch.

    Raises:
        ValueError: A training found a user's mistake.
    """
    by_key = {part.key: part for part in parts}
    failures, mistakes = [], []
    for result in grid:
        part = by_key.get((result.config or {}).get("training", ""))
        if part is None:  # of an earlier call, and done since
            continue
        metrics: Mapping[str, Any] = result.metrics or {}
        if "failed" in metrics:
            if metrics["mistake"]:
                mistakes.append(str(metrics["failed"]).partition(": ")[2])
            failures.append(Failure(part.key, metrics["failed"], metrics["trace"]))
        elif result.error is not None:
            lost = f"its process died {RETRIES + 1} times: {' '.join(str(result.error).split())[-300:]}"
            failures.append(Failure(part.key, lost))
        elif asha is not None and part.rate is None and not part.done and _epochs([part]) < part.recipe.epochs:
            at = {"epoch": metrics.get("epoch"), "loss": metrics.get("loss"), "by": "asha"}
            Folder(part.folder).write_json(STOPPED, at)
            say(f"note: {part.title} was stopped after {at['epoch']} of {part.recipe.epochs} epochs, as lagging behind")
            continue
        else:
            continue
        note(part, failures[-1])
    if mistakes:
        raise ValueError(mistakes[0])
    return failures
