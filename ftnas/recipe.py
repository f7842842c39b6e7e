"""How gradient descent goes: the settings of a training, and the optimizer and schedule that they ask for."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from ftnas.augment import AugmentConfig
from ftnas.compute import Compute
from ftnas.regularizers import CrashVariance, Regularizer
from ftnas.settings import Count, Positive, Rate, Settings


class StepSchedule(Settings):
    """The learning rate times ``decay`` at each milestone (epochs done)."""

    name: Literal["step"] = "step"
    milestones: tuple[Count, ...]
    decay: Rate = 0.1

    def unreached(self, epochs: int) -> tuple[int, ...]:
        """Return the milestones that no epoch of so many comes after, which have no effect."""
        return tuple(mark for mark in self.milestones if mark >= epochs)


class CosineSchedule(Settings):
    """The learning rate along half a cosine, down to ``final_lr`` after the last epoch."""

    name: Literal["cosine"] = "cosine"
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0


class SgdConfig(Settings):
    """Gradient descent on the fault-tolerant loss.

    Attributes:
        method: ``sgd`` with momentum, or ``adamw``.
        batch_size: Images per step; the last, smaller batch of an epoch is dropped.
        lr: Learning rate that the schedule begins with.
        momentum: Of ``sgd``.
        weight_decay: L2 penalty of ``sgd``, decoupled decay of ``adamw``.
        schedule: How the learning rate falls: ``step`` or ``cosine``.
        augment: Crop, flip and cutout.
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
    def _consistent(self) -> SgdConfig:
        if self.method == "adamw" and self.momentum != 0.9:
            raise ValueError("momentum belongs to sgd and has no effect on adamw; remove it")
        if self.alpha_l == 0.0 and self.mask_gradients:
            raise ValueError("alpha_l=0 trains without faults, so mask_gradients has no effect; remove it")
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
            held-out training images is above ``rate_threshold`` is kept; one at which training diverges is not. None
            trains at the hardware's own rate.
        holdout: Share of the training images that is held out for the rate protocol.
        regularizers: What is added to the loss, or done to units, against crashes: ``crash_variance``, ``dropout``,
            ``fep`` (``ftnas.regularizers``).
    """

    epochs: Count
    bn_statistics: Literal["both", "clean", "faulty"] = "both"
    rate_protocol: tuple[Rate, ...] | None = None
    rate_threshold: Rate = 0.5
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    regularizers: tuple[Regularizer, ...] = ()

    @model_validator(mode="after")
    def _effective(self) -> TrainConfig:
        if self.alpha_l == 0.0 and (self.bn_statistics != "both" or self.rate_protocol):
            raise ValueError(
                "alpha_l=0 trains without faults, so bn_statistics and rate_protocol have no effect; remove them or "
                "set alpha_l above 0"
            )
        if self.rate_protocol is not None and not self.rate_protocol:
            raise ValueError("rate_protocol needs at least one rate; null trains at the hardware's own")
        for name in ("rate_threshold", "holdout"):
            given, default = getattr(self, name), TrainConfig.model_fields[name].default
            if self.rate_protocol is None and given != default:
                raise ValueError(f"{name}={given} belongs to rate_protocol, and there is none; remove it")
        if self.alpha_l == 1.0 and any(isinstance(extra, CrashVariance) for extra in self.regularizers):
            raise ValueError("crash_variance is of the clean forward, and alpha_l=1 has none; set alpha_l below 1")
        return self
