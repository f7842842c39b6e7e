"""The fault-tolerant loss, and one loop that fits a network with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from ftnas.compute import Compute
from ftnas.data import AugmentConfig, ImageSet
from ftnas.evaluate import Forward, answers
from ftnas.faults import Injection
from ftnas.faults.hardware import Hardware
from ftnas.models import check_state
from ftnas.progress import track
from ftnas.ranks import Ranks
from ftnas.rng import isolated, seed_for
from ftnas.rundir import Folder
from ftnas.settings import Count, Positive, Rate, Settings

CHECKPOINT = "checkpoint.pt"
HISTORY = "epochs.jsonl"

EpochDone = Callable[[dict[str, Any]], None]


class StepSchedule(Settings):
    """The learning rate times ``decay`` at each milestone (epochs done)."""

    name: Literal["step"] = "step"
    milestones: tuple[Count, ...]
    decay: Rate = 0.1


class CosineSchedule(Settings):
    """The learning rate along half a cosine, down to ``final_lr`` after the last epoch."""

    name: Literal["cosine"] = "cosine"
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0


class SgdConfig(Settings):
    """Gradient descent on the fault-tolerant loss.

    Attributes:
        method: ``sgd`` with momentum, or ``adamw``.
        batch_size: Images per step; the last, smaller batch of an epoch is dropped.
        grad_clip: Largest 2-norm of the gradient; None does not clip.
        alpha_l: Weight of the faulty loss, eq. 13; 0 trains without faults.
        mask_gradients: Stop gradients at faulty positions.
        compute: Memory and number formats.
    """

    method: Literal["sgd", "adamw"] = "sgd"
    batch_size: Count
    lr: Positive
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Annotated[StepSchedule | CosineSchedule, Field(discriminator="name")] = CosineSchedule()
    grad_clip: Positive | None = 5.0
    alpha_l: Rate = 0.5
    mask_gradients: bool = False
    augment: AugmentConfig = AugmentConfig()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _no_momentum(self) -> SgdConfig:
        if self.method == "adamw" and self.momentum != 0.9:
            raise ValueError("momentum belongs to sgd and has no effect on adamw; remove it")
        return self

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        if self.method == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
        """Return the schedule of an optimizer, moved once per epoch."""
        if isinstance(self.schedule, StepSchedule):
            # MultiStepLR does the same, but its state holds a Counter, which no safe checkpoint can
            step = self.schedule
            return LambdaLR(optimizer, lambda done: step.decay ** sum(done >= mark for mark in step.milestones))
        return CosineAnnealingLR(optimizer, epochs, self.schedule.final_lr)


class TrainConfig(SgdConfig):
    """Final training of one network.

    Attributes:
        epochs: Passes over the training images.
        bn_statistics: Which of the two forwards moves the running BatchNorm statistics (measured in
            docs/results/bn-statistics.md); the weights do not depend on it.
        rate_protocol: Training rates to try, as the paper's Table 4 does: the largest whose clean accuracy on the
            held-out training images is above ``rate_threshold`` is kept. None trains at the hardware's own rate.
        holdout: Share of the training images that is held out for the rate protocol (or, without one, not at all).
    """

    epochs: Count
    bn_statistics: Literal["both", "clean", "faulty"] = "both"
    rate_protocol: tuple[Rate, ...] | None = None
    rate_threshold: Rate = 0.5
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1

    @model_validator(mode="after")
    def _effective(self) -> TrainConfig:
        if self.alpha_l == 0.0 and (self.mask_gradients or self.bn_statistics != "both" or self.rate_protocol):
            raise ValueError(
                "alpha_l=0 trains without faults, so mask_gradients, bn_statistics and rate_protocol have no effect; "
                "remove them or set alpha_l above 0"
            )
        if self.rate_protocol is not None and not self.rate_protocol:
            raise ValueError("rate_protocol needs at least one rate; null trains at the hardware's own")
        return self


@dataclass(frozen=True)
class Losses:
    """Sums over the steps of an epoch: float32 scalars on the device."""

    total: Tensor
    clean: Tensor
    faulty: Tensor


class FaultTolerantLoss:
    """L = (1 - alpha_l) CE_clean + alpha_l CE_faulty (FTT-NAS eq. 13), over two forwards of the same batch.

    In training mode each forward is normalised by its own batch statistics; ``bn_statistics`` says which of them moves
    the running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha_l: float,
        bn_statistics: Literal["both", "clean", "faulty"] = "both",
        compute: Compute = Compute(),  # noqa: B008 a frozen value
    ) -> None:
        self._alpha, self._compute = alpha_l, compute
        compute.prepare(model)
        self._moves = {"clean": bn_statistics != "faulty", "faulty": bn_statistics != "clean"}
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    def __call__(self, forward: Forward, injection: Injection, images: Tensor, labels: Tensor) -> Losses:
        """Return the losses of a batch: images float [B, C, H, W], labels int64 [B]."""
        zero = torch.zeros((), device=images.device)
        images = self._compute.images(images)
        clean = faulty = zero
        with injection.weights_shared():
            if self._alpha < 1.0:
                with injection.paused(), self._statistics("clean"):
                    clean = self._cross_entropy(forward, images, labels)
            if self._alpha > 0.0:
                with self._statistics("faulty"):
                    faulty = self._cross_entropy(forward, images, labels)
        return Losses((1.0 - self._alpha) * clean + self._alpha * faulty, clean.detach(), faulty.detach())

    def _cross_entropy(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        with self._compute.forward(images.device):
            logits = forward(images)
        return F.cross_entropy(logits.float(), labels)

    @contextmanager
    def _statistics(self, which: str) -> Iterator[None]:
        frozen = [] if self._moves[which] else self._norms
        for norm in frozen:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in frozen:
                norm.track_running_stats = True


def fit(
    model: nn.Module,
    images: ImageSet,
    *,
    config: TrainConfig,
    hardware: Hardware,
    seed: int,
    folder: Folder,
    title: str = "train",
    epoch_done: EpochDone = lambda _: None,
) -> list[dict[str, float]]:
    """Train a model in place on faulty hardware, going on from the folder's checkpoint if there is one.

    The result depends on the seed alone: a run that was killed and resumed ends with the same weights.

    Args:
        model: Network on its device, from images to logits.
        images: Training images on the same device.
        config: How to train.
        hardware: What to train for.
        seed: Of the order of images, their augmentation and the faults.
        folder: Where the checkpoint and the history go.
        title: Name on the progress bar.
        epoch_done: Called with the record of each epoch, once its checkpoint is written.

    Returns:
        One record per epoch.

    Raises:
        ValueError: ``alpha_l`` above 0 without a fault model, or fewer images than one batch.
        RuntimeError: The loss became NaN or infinite; the checkpoint of the epoch before it is kept.
    """
    check_alpha(config.alpha_l, hardware, "train.alpha_l")
    optimizer = config.optimizer(model)
    scheduler = config.scheduler(optimizer, config.epochs)
    history = folder.journal(HISTORY)
    first = _restore(folder, model, optimizer, scheduler)
    config.compute.check(hardware.quantization, "train.compute")
    loss = FaultTolerantLoss(model, alpha_l=config.alpha_l, bn_statistics=config.bn_statistics, compute=config.compute)
    with track(title, config.epochs, done=first) as progress:
        for epoch in range(first, config.epochs):
            with isolated(seed, "epoch", epoch):
                record = _epoch(
                    model, images, loss, optimizer, config=config, hardware=hardware, seed=seed, epoch=epoch
                )
            scheduler.step()
            history.append(record)
            state = {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "history": history.offset,
            }
            folder.save(CHECKPOINT, state)
            progress.advance(f"loss {record['loss']:.3f}")
            epoch_done(record)
    return [dict(record) for record in history.records()]


def _restore(folder: Folder, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> int:
    """Load the folder's checkpoint, if any, and return the number of epochs that it holds."""
    if not folder.file(CHECKPOINT).exists():
        folder.journal(HISTORY).truncate(0)
        return 0
    state = folder.load(CHECKPOINT, keys=("epoch", "model", "optimizer", "scheduler", "history"))
    check_state(model.state_dict(), state["model"], where=str(folder.file(CHECKPOINT)))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    folder.journal(HISTORY).truncate(state["history"])
    return int(state["epoch"])


def _epoch(
    model: nn.Module,
    images: ImageSet,
    loss: FaultTolerantLoss,
    optimizer: torch.optim.Optimizer,
    *,
    config: TrainConfig,
    hardware: Hardware,
    seed: int,
    epoch: int,
) -> dict[str, Any]:
    num_steps = images.num_images // config.batch_size
    if num_steps == 0:
        raise ValueError(f"train.batch_size={config.batch_size} is above the {images.num_images} training images")
    device = next(model.parameters()).device
    sums = torch.zeros(3, device=device)
    model.train()
    injection = hardware.inject(
        model,
        seed=seed_for(seed, "train"),
        errors="soft",
        mask_gradients=config.mask_gradients,
        draw_on="device",
    )
    batches = images.batches(config.batch_size, seed=seed, epoch=epoch, augment=config.augment, drop_last=True)
    with injection:
        parameters = list(model.parameters())
        for step, (x, y) in enumerate(batches):
            injection.draw = epoch * num_steps + step
            losses = loss(model, injection, x, y)
            descend(losses.total, parameters, optimizer, config.grad_clip)
            sums += torch.stack([losses.total.detach(), losses.clean, losses.faulty])
    total, clean, faulty = finite_means(sums, num_steps, where=f"epoch {epoch}")
    record = injection.record
    return {
        "epoch": epoch,
        "lr": optimizer.param_groups[0]["lr"],
        "loss": total,
        "clean_loss": clean,
        "faulty_loss": faulty,
        "hits": record.hits,
        "sites": record.sites,
    }


def descend(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    grad_clip: float | None,
    ranks: Ranks | None = None,
) -> None:
    """Take one optimizer step down a loss, averaged over ranks; parameters that it does not reach stay untouched.

    ``parameters`` are the model's, listed once: to go through the modules of a supernet takes a while.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if ranks is not None:
        ranks.average_gradients(parameters)
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()


def finite_means(sums: Tensor, count: int, *, where: str) -> list[float]:
    """Return sums / count as numbers, read from the device once.

    Raises:
        RuntimeError: One of them is NaN or infinite.
    """
    means = (sums / count).tolist()
    if not all(value == value and abs(value) != float("inf") for value in means):
        raise RuntimeError(f"the loss became NaN or infinite in {where}; lower lr, or clip gradients with grad_clip")
    return [float(value) for value in means]


def check_alpha(alpha_l: float, hardware: Hardware, name: str) -> None:
    """Refuse a weight of the faulty loss without faults, which would have no effect."""
    if alpha_l > 0.0 and not hardware.faulty:
        raise ValueError(f"{name}={alpha_l:g} weighs the faulty loss, and there is no fault model; set it to 0")


def clean_accuracy(model: nn.Module, images: ImageSet, *, hardware: Hardware, batch_size: int) -> float:
    """Return the accuracy of a quantized, fault-free model on images, in [0, 1]; the model's mode is kept."""
    training = model.training
    model.eval()
    try:
        with hardware.without_faults().inject(model, seed=0):
            return float(answers(model, images.batches(batch_size)).correct.float().mean())
    finally:
        model.train(training)


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
        (which the folder's events and the accuracy itself show).
    """
    rates = sorted(config.rate_protocol or (), reverse=True)
    train_images, held_out = images.subset(split[0]), images.subset(split[1])
    for rate in rates:
        at_rate = hardware.with_rate(rate)
        model = build()
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
        accuracy = clean_accuracy(model, held_out, hardware=hardware, batch_size=config.batch_size)
        passed = accuracy > config.rate_threshold
        folder.events("rate_protocol", rate=rate, clean_accuracy=accuracy, passed=passed)
        if passed:
            break
    return model, at_rate
