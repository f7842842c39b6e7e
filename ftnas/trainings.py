"""One final training: everything it is made of, as values, so that any process can do it or go on with it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ftnas.data import DataConfig, ImageSet, stratified_split
from ftnas.faults.hardware import Hardware
from ftnas.models import about, build_spec, check_logits, resolved_spec, save_model
from ftnas.progress import say
from ftnas.recipe import TrainConfig
from ftnas.rundir import Folder, quoted
from ftnas.train import DivergedError, EpochDone, clean_accuracy, fit

MODEL = "model.pt"
STOPPED = "stopped.json"
"""What a training leaves that a scheduler has stopped for good."""


@dataclass(frozen=True)
class Failure:
    """Why a training came to no end: its key, one line, and where the error comes from."""

    key: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Training:
    """One model from one seed.

    Attributes:
        name: Of the model.
        spec: What the network is, as `models.describe` gives it.
        recipe: How it is trained.
        hardware: What it is trained for.
        data: Where the images come from.
        train_seed: Of ``train.seeds``.
        seed: Of everything random in it.
        holdout_seed: Of the split for the rate protocol.
        folder: Absolute path of its folder.
        title: Name on the progress bar.
        rate: Of the rate protocol, the one that is trained ahead; None does the whole training.
        start: File of the weights that it starts from; None starts from random ones.
    """

    name: str
    spec: dict[str, Any]
    recipe: TrainConfig
    hardware: Hardware
    data: DataConfig
    train_seed: int
    seed: int
    holdout_seed: int
    folder: Path
    title: str
    rate: float | None = None
    start: str | None = None

    @property
    def key(self) -> str:
        """Name of the training within the run."""
        ahead = "" if self.rate is None else f"/{rate_folder(self.rate)}"
        return f"{self.name}/seed-{self.train_seed}{ahead}"

    @property
    def done(self) -> bool:
        """Whether its model is written, or it was stopped for good."""
        return is_done(self.folder)

    @property
    def parts(self) -> Sequence[Training]:
        """The trainings that can go on side by side: one for each rate of the rate protocol."""
        rates = self.recipe.rate_protocol
        return [self] if rates is None else [replace(self, rate=rate) for rate in rates]

    def run(self, images: ImageSet, *, epoch_done: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        """Train, or go on, and write ``model.pt``; a single rate leaves its checkpoint for the whole training.

        Args:
            images: The training images, on the device.
            epoch_done: Called with the record of each epoch.

        Raises:
            ValueError: A user's mistake.
            DivergedError: Loss or weights became NaN or infinite.
        """
        folder = Folder(self.folder)
        try:
            with about(self.name):
                network, hardware = self._fit(images, folder, epoch_done)
                if self.rate is None:
                    spec = resolved_spec(self.spec, network)
                    save_model(folder.file(MODEL), network, spec, self._metadata(network, hardware, images))
        finally:
            folder.close()

    def _fit(
        self, images: ImageSet, folder: Folder, epoch_done: Callable[[dict[str, Any]], None]
    ) -> tuple[nn.Module, Hardware]:
        recipe = self.recipe
        hardware = self.hardware.without_faults() if recipe.alpha_l == 0.0 else self.hardware

        def build() -> nn.Module:
            network = build_spec(self.spec, seed=self.seed, allow_factory=True, start=self.start)
            if self.spec["kind"] == "factory":
                check_logits(network, images.shape, len(images.classes))
            return network.to(images.device)

        common: dict[str, Any] = {"config": recipe, "seed": self.seed, "title": self.title, "epoch_done": epoch_done}
        if recipe.rate_protocol is None:
            network = build()
            fit(network, images, hardware=hardware, folder=folder, **common)
            return network, hardware
        held, rest = stratified_split(images.labels, recipe.holdout, seed=self.holdout_seed)
        if self.rate is None:
            return fit_by_rate_protocol(build, images, hardware=hardware, folder=folder, split=(rest, held), **common)
        network, hardware = build(), hardware.with_rate(self.rate)
        fit(network, images.subset(rest), hardware=hardware, folder=folder.stage(rate_folder(self.rate)), **common)
        return network, hardware

    def _metadata(self, network: nn.Module, hardware: Hardware, images: ImageSet) -> dict[str, Any]:
        return {
            "name": self.name,
            "train_seed": self.train_seed,
            "training": hardware.label(),
            "classes": list(images.classes),
            "shape": list(images.shape),
            "mean": [float(value) for value in images.mean],
            "std": [float(value) for value in images.std],
            "dataset_digest": images.digest,
            "train_accuracy": clean_accuracy(network, images, hardware=hardware, batch_size=self.recipe.batch_size),
        }


def is_done(folder: Path) -> bool:
    """Tell of a training by its folder whether its model is written, or it was stopped for good."""
    return (folder / MODEL).exists() or (folder / STOPPED).exists()


def rate_folder(rate: float) -> str:
    """Return the name of the folder in which a rate of the rate protocol trains."""
    return f"rate-{rate:g}"


def fit_by_rate_protocol(
    build: Callable[[], nn.Module],
    images: ImageSet,
    *,
    config: TrainConfig,
    hardware: Hardware,
    split: tuple[Tensor, Tensor],
    seed: int,
    folder: Folder,
    title: str = "train",
    epoch_done: EpochDone = lambda _: None,
) -> tuple[nn.Module, Hardware]:
    """Train at falling rates until the clean accuracy on held-out images is above the threshold (Table 4).

    A rate at which training diverges does not pass.

    Args:
        build: Makes the untrained network, the same each time.
        images: Training images, of which ``split`` gives (trained on, held out) indices.
        config: With ``rate_protocol``.
        hardware: Its fault model is set to each rate in turn.
        split: Indices of the two parts.
        seed: As in `fit`.
        folder: Each rate trains in a sub-folder of its own.
        title: Name on the progress bar.
        epoch_done: As in `fit`.

    Returns:
        The network and the hardware at the rate that was kept: the largest that passed, or the smallest when none did
        (which is said, and the folder's events show).

    Raises:
        DivergedError: None passed, and the smallest diverged.
    """
    rates = sorted(config.rate_protocol or (), reverse=True)
    train_images, held_out = images.subset(split[0]), images.subset(split[1])
    for rate in rates:
        at_rate = hardware.with_rate(rate)
        model = build()
        try:
            fit(
                model,
                train_images,
                config=config,
                hardware=at_rate,
                seed=seed,
                folder=folder.stage(rate_folder(rate)),
                title=f"{title} at {rate:g}",
                epoch_done=epoch_done,
            )
        except DivergedError as error:
            folder.events("rate_protocol", rate=rate, clean_accuracy=None, passed=False, reason=str(error))
            if rate == rates[-1]:
                raise
            say(f"warning: {title} at {rate:g}: {error}; the next smaller rate is tried")
            continue
        accuracy = clean_accuracy(model, held_out, hardware=hardware, batch_size=config.batch_size)
        passed = accuracy > config.rate_threshold
        folder.events("rate_protocol", rate=rate, clean_accuracy=accuracy, passed=passed)
        if passed:
            break
    else:
        say(
            f"warning: {title}: no rate of rate_protocol passes rate_threshold={config.rate_threshold:g}; the "
            f"smallest, {rates[-1]:g}, is kept, with a clean accuracy of {accuracy:.1%}"
        )
    return model, at_rate


def train_in_turn(trainings: Iterable[Training], images: ImageSet) -> list[Failure]:
    """Do one training after the other in this process; one that fails is recorded, and the others go on.

    Args:
        trainings: What to do; those done already are left as they are.
        images: The training images, on the device.

    Raises:
        ValueError: A user's mistake, at once.
    """
    failures = []
    for training in trainings:
        if training.done:
            continue
        try:
            training.run(images)
        except ValueError:
            raise
        except Exception as error:
            failures.append(Failure(training.key, one_line(error), traceback.format_exc()))
            note(training, failures[-1])
    return failures


def one_line(error: BaseException) -> str:
    """Return kind and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def note(training: Training, failure: Failure) -> None:
    """Say that a training failed, and write it to the events of its folder."""
    say(f"warning: {training.title} failed: {failure.reason}")
    Folder(training.folder).events("training_failed", reason=failure.reason, traceback=failure.trace)


def check_failures(failures: Sequence[Failure], num: int, *, folder: Path) -> None:
    """Raise RuntimeError, in one line, where trainings failed.

    Args:
        failures: What failed.
        num: Of how many trainings.
        folder: Of the run.
    """
    if failures:
        names = ", ".join(failure.key for failure in failures)
        failed = len({failure.key.partition("/rate-")[0] for failure in failures})  # rates are tried side by side
        last = ", the last" if len(failures) > 1 else ""
        others = "" if failed == num else "the others are done; "
        raise RuntimeError(
            f"{failed} of {num} trainings failed ({names}){last} with {failures[-1].reason}; {others}events.jsonl in "
            f"each folder has the reason, and --resume {quoted(folder)} tries again"
        )
