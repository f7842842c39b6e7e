"""The fault-tolerant loss, and one loop that fits a network with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler

from ftnas.branches import IN_TURN, InTurn, parts_of_a_step
from ftnas.compute import Compute
from ftnas.data import ImageSet
from ftnas.evaluate import Forward, answers, unchanged
from ftnas.faults import Injection
from ftnas.faults.hardware import Hardware, check_alpha
from ftnas.faults.joint import halves, paired
from ftnas.graphs import WARM_UP, CudaGraph, Graph, GraphedStep
from ftnas.models import check_state
from ftnas.progress import say, track
from ftnas.recipe import TrainConfig
from ftnas.regularizers import Regularization
from ftnas.rng import generator, isolated, seed_for
from ftnas.rundir import Folder
from ftnas.storage import Checkpoints

CHECKPOINT = "checkpoint.pt"
HISTORY = "epochs.jsonl"

EpochDone = Callable[[dict[str, Any]], None]
Gradients = Callable[[Tensor, Tensor, int], "Losses"]  # from images, labels and the number of the draw


@dataclass(frozen=True)
class Losses:
    """The losses of a step: float32 scalars; ``penalties`` by regularizer; ``parts``, by forward, have gradients."""

    total: Tensor
    clean: Tensor
    faulty: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[Tensor, ...] = ()


class FaultTolerantLoss:
    """L = (1 - alpha_l) CE_clean + alpha_l CE_faulty (FTT-NAS eq. 13), over two forwards of the same batch.

    In training mode each forward is normalised by its own batch statistics; ``bn_statistics`` says which of them moves
    the running statistics. Penalties of ``regularization`` are added; those of values are of the clean forward.

    Attributes:
        joint: Whether both forwards are one, on each image twice in a row, without sides; see `ftnas.faults.joint`.
            With settings that this does not go with: a ValueError.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha_l: float,
        bn_statistics: Literal["both", "clean", "faulty"] = "both",
        compute: Compute = Compute(),  # noqa: B008 a frozen value
        regularization: Regularization | None = None,
        joint: bool = False,
    ) -> None:
        if joint:
            compute.check_joint("compute")
            if bn_statistics != "both" or regularization is not None:
                raise ValueError("joint forwards go with bn_statistics=both and without regularizers alone")
        self._alpha, self._compute, self._regularization = alpha_l, compute, regularization
        self.joint = joint and 0.0 < alpha_l < 1.0
        self._watching = nullcontext if regularization is None else regularization.watching
        self._layers = compute.prepare(model)
        self._moves = {"clean": bn_statistics != "faulty", "faulty": bn_statistics != "clean"}
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    def __call__(
        self, forward: Forward, injection: Injection, images: Tensor, labels: Tensor, sides: InTurn = IN_TURN
    ) -> Losses:
        """Return the losses of a batch: images float [B, C, H, W], labels int64 [B]."""
        zero = torch.zeros((), device=images.device)
        images = self._compute.images(images)
        if self.joint:
            return self._jointly(forward, injection, images, labels)
        clean = faulty = zero
        penalties: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        with injection.weights_shared():
            with injection.paused(), self._watching():
                logits = None
                if self._alpha < 1.0:
                    with sides.first():
                        with self._statistics("clean"):
                            logits = self._logits(forward, images)
                        clean = F.cross_entropy(logits, labels)
                        parts.append((1.0 - self._alpha) * clean)
                        if self._regularization is None:
                            sides.issued(parts[0])
                if self._regularization is not None:
                    penalties = self._regularization.penalties(logits)
            if self._alpha > 0.0:
                with sides.second(), self._statistics("faulty"):
                    faulty = F.cross_entropy(self._logits(forward, images), labels)
                    parts.append(self._alpha * faulty)
        total = sum(penalties.values(), parts[0] + parts[-1] if len(parts) > 1 else parts[0])
        seen = {name: value.detach() for name, value in penalties.items()}
        return Losses(total, clean.detach(), faulty.detach(), seen, tuple(parts))

    def _jointly(self, forward: Forward, injection: Injection, images: Tensor, labels: Tensor) -> Losses:
        with injection.weights_shared(), injection.joint.running():
            clean, faulty = (F.cross_entropy(part, labels) for part in halves(self._logits(forward, paired(images))))
        total = (1.0 - self._alpha) * clean + self._alpha * faulty
        return Losses(total, clean.detach(), faulty.detach(), parts=(total,))

    def gradients(
        self,
        forward: Forward,
        injection: Injection,
        images: Tensor,
        labels: Tensor,
        parameters: Sequence[nn.Parameter],
        sides: InTurn = IN_TURN,
    ) -> Losses:
        """Set the gradients of a batch anew, None where it gives none, and return its losses without theirs."""
        for parameter in parameters:
            parameter.grad = None
        losses = self(forward, injection, images, labels, sides)
        sides.backward(losses.total, losses.parts, parameters)
        return replace(losses, total=losses.total.detach(), parts=())

    def named(self, clean: float, faulty: float) -> dict[str, float | None]:
        """Return the mean losses of an epoch for its record; None for the one that is left out."""
        return {
            "clean_loss": clean if self._alpha < 1.0 else None,
            "faulty_loss": faulty if self._alpha > 0.0 else None,
        }

    def _logits(self, forward: Forward, images: Tensor) -> Tensor:
        with self._compute.forward(images.device, self._layers):
            logits = unchanged(forward, images)
        return logits.float()

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


def check_fits(config: TrainConfig, num_images: int, device: torch.device, hardware: Hardware) -> None:
    """Refuse a recipe that a device, hardware or a number of images does not allow.

    Raises:
        ValueError: ``alpha_l`` above 0 without a fault model, fewer images than one batch, or ``compute``.
    """
    check_alpha(config.alpha_l, hardware, "train.alpha_l")
    config.compute.check(hardware.formats(), "train.recipe.compute")
    steps = num_images // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size={config.batch_size} is above the {num_images} images; use less")
    num = steps * config.epochs
    obstacle = f"there are {num}, of which the first {WARM_UP} never are" if num <= WARM_UP else None
    obstacle = "regularizers draw outside of it" if config.regularizers else obstacle
    config.compute.check_device(device, "train.recipe.compute", obstacle=obstacle)


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
        epoch_done: Called with the record of each epoch, once its checkpoint is written where one is due.

    Returns:
        One record per epoch.

    Raises:
        ValueError: ``alpha_l`` above 0 without a fault model, fewer images than one batch, or a regularizer that does
            not fit the model.
        DivergedError: Loss or weights became NaN or infinite; the last checkpoint before that is kept.
    """
    device = next(model.parameters()).device
    check_fits(config, images.num_images, device, hardware)
    optimizer = config.optimizer(model)
    scheduler = config.scheduler(optimizer, config.epochs)
    history = folder.journal(HISTORY)
    first = _restore(folder, model, optimizer, scheduler)
    extras = Regularization(config.regularizers, model) if config.regularizers else None
    loss = FaultTolerantLoss(
        model, alpha_l=config.alpha_l, bn_statistics=config.bn_statistics, compute=config.compute, regularization=extras
    )
    injection = hardware.inject(
        model, seed=seed_for(seed, "train"), errors="soft", mask_gradients=config.mask_gradients, draw_on="device"
    )

    @cache
    def begin() -> tuple[Gradients, list[nn.Parameter]]:
        parameters = list(model.parameters())
        graph = CudaGraph() if config.compute.cuda_graph else None
        return gradients_by(model, loss, injection, parameters, graph=graph), parameters

    run = partial(_epoch, model, images, loss, optimizer, injection, begin, config=config, seed=seed, extras=extras)
    checkpoints = Checkpoints(partial(folder.save, CHECKPOINT))
    with track(title, config.epochs, done=first) as progress:
        for epoch in range(first, config.epochs):
            with isolated(seed, "epoch", epoch):
                record = run(epoch=epoch)
            scheduler.step()
            history.append(record)
            if epoch == first and config.alpha_l > 0.0:
                tell_unhit(title, record)
            if checkpoints.due or epoch + 1 == config.epochs:
                state = {
                    "epoch": epoch + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "history": history.offset,
                }
                checkpoints.write(state)
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
    injection: Injection,
    begin: Callable[[], tuple[Gradients, list[nn.Parameter]]],
    *,
    config: TrainConfig,
    seed: int,
    epoch: int,
    extras: Regularization | None,
) -> dict[str, Any]:
    num_steps = images.num_images // config.batch_size
    device = next(model.parameters()).device
    names = () if extras is None else extras.names
    sums = torch.zeros(3 + len(names), device=device)
    model.train()
    before = None if injection.drawings.lasting else injection.record
    batches = images.batches(config.batch_size, seed=seed, epoch=epoch, augment=config.augment, drop_last=True)
    attached = nullcontext() if extras is None else extras.attached(injection.replaced)
    with injection, attached, config.compute.steps():
        gradients, parameters = begin()
        for step, (x, y) in enumerate(batches):
            draw = epoch * num_steps + step
            if extras is not None:
                extras.step(generator(seed, "regularizers", draw, device=device))
            losses = gradients(x, y, draw)
            move(parameters, optimizer, config.grad_clip)
            added = [losses.penalties[name] for name in names]
            sums += torch.stack([losses.total, losses.clean, losses.faulty, *added])
    total, clean, faulty, *penalties = finite_means(sums, num_steps, where=f"epoch {epoch}")
    check_finite(model, where=f"epoch {epoch}")
    record = injection.record
    found = {"penalties": dict(zip(names, penalties, strict=True))} if names else {}
    return {
        "epoch": epoch,
        "lr": optimizer.param_groups[0]["lr"],
        "loss": total,
        **loss.named(clean, faulty),
        "hits": record.hits - (before.hits if before else 0),
        "sites": record.sites - (before.sites if before else 0),
        **found,
    }


def gradients_by(
    model: nn.Module,
    loss: FaultTolerantLoss,
    injection: Injection,
    parameters: Sequence[nn.Parameter],
    *,
    graph: Graph | None = None,
) -> Gradients:
    """Return what makes the gradients of a fixed network that is inside its injection.

    With a graph the steps after the first few are replayed; see `GraphedStep`.
    """
    sides = parts_of_a_step(model, graphed=graph is not None)

    def step(images: Tensor, labels: Tensor) -> Losses:
        return loss.gradients(model, injection, images, labels, parameters, sides)

    def at_once(images: Tensor, labels: Tensor, draw: int) -> Losses:
        injection.draw = draw
        return step(images, labels)

    return at_once if graph is None else GraphedStep(step, injection, graph, parameters)


def move(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, grad_clip: float | None) -> None:
    """Take one optimizer step along gradients that are there; parameters without one stay untouched."""
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()


def tell_unhit(title: str, record: Mapping[str, Any]) -> None:
    """Say so where faults hit nothing in the epoch of a record, so that training under them is training without."""
    if not record["hits"]:
        say(f"warning: {title}: no fault hit anything in epoch {record['epoch']}; its rate is too low to learn from")


class DivergedError(RuntimeError):
    """A training came to NaN or infinite values."""


def diverged(what: str, where: str) -> DivergedError:
    """Return the error that says what became so, and in which epoch."""
    return DivergedError(f"{what} became NaN or infinite in {where}; lower lr, or clip gradients with grad_clip")


def finite_means(sums: Tensor, count: int, *, where: str) -> list[float]:
    """Return sums / count as numbers, read from the device once.

    Raises:
        DivergedError: One of them is NaN or infinite.
    """
    means = (sums / count).tolist()
    if not all(map(math.isfinite, means)):
        raise diverged("the loss", where)
    return [float(value) for value in means]


def check_finite(model: nn.Module, *, where: str) -> None:
    """Check what the last step of an epoch left: no loss shows it before the next, and the checkpoint comes between.

    Raises:
        DivergedError: A parameter that learns, or a statistic of a BatchNorm, holds NaN or an infinity.
    """
    moved: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            moved |= {f"{name}.{own}": b for own, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    if not moved:
        return
    finite = torch.stack(torch._foreach_norm([value.detach() for value in moved.values()], math.inf)).isfinite()
    broken = next((name for name, is_finite in zip(moved, finite.tolist(), strict=True) if not is_finite), None)
    if broken is not None:
        raise diverged(repr(broken), f"the last step of {where}")


def clean_accuracy(model: nn.Module, images: ImageSet, *, hardware: Hardware, batch_size: int) -> float:
    """Return the accuracy of a model on images, in [0, 1], on hardware at rest; the model's mode is kept."""
    training = model.training
    model.eval()
    try:
        with hardware.at_rest().inject(model, seed=0):
            return float(answers(model, images.batches(batch_size)).correct.float().mean())
    finally:
        model.train(training)
