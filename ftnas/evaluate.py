"""Accuracy on faulty hardware, and the reward of the search."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ftnas.faults import Injection
from ftnas.faults.joint import halves, paired

Forward = Callable[[Tensor], Tensor]
NONFINITE = -1
"""In place of a class, where a logit is NaN or infinite."""


@dataclass(frozen=True)
class Score:
    """Accuracies of one candidate on common images and common fault draws, each in [0, 1].

    ``faulty`` is None where no fault was drawn, since ``alpha_r`` is 0.
    """

    clean: float
    faulty: float | None
    reward: float


class Answers(NamedTuple):
    """What a model said of N images.

    Attributes:
        top1: int64 [N], the class with the largest logit; `NONFINITE` where a logit is NaN or infinite.
        labels: int64 [N], the right class.
    """

    top1: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Where the answer is right: bool [N]. One with a NaN or an infinity is wrong."""
        return self.top1 == self.labels

    @property
    def nonfinite(self) -> Tensor:
        """Where there is no answer, since a logit is NaN or infinite: bool [N]."""
        return self.top1 == NONFINITE


def unchanged(forward: Forward, images: Tensor) -> Tensor:
    """Return the answer to images that other forwards read too.

    Raises:
        ValueError: The forward changes its images in place.
    """
    before = None if images.is_inference() else images._version  # nothing counts changes of what inference mode made
    logits = forward(images)
    if before is not None and images._version != before:
        raise ValueError(
            "the model changes its input in place, so that its next forward would meet other images; let it compute "
            "a new tensor (x = x - mean, not x -= mean)"
        )
    return logits


@torch.no_grad()
def top1(logits: Tensor) -> Tensor:
    """Return the class of the largest logit of each row of [B, classes], int64 [B]; `NONFINITE` without one."""
    return torch.where(torch.isfinite(logits).all(dim=1), logits.argmax(dim=1), NONFINITE)


@torch.no_grad()
def answers(model: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """Ask a model for its top-1 class of every image.

    Args:
        model: A module in evaluation mode, from images [B, C, H, W] to logits [B, classes].
        batches: Images and labels int64 [B], on the model's device.

    Returns:
        The answers, on the CPU.
    """
    said, right = [], []
    for images, labels in batches:
        said.append(top1(model(images)))
        right.append(labels)
    return Answers(torch.cat(said).cpu(), torch.cat(right).cpu())


@torch.no_grad()
def score(
    forward: Forward,
    injection: Injection,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    alpha_r: float,
    draws: int = 1,
    first_draw: int = 0,
    joint: bool = False,
) -> Score:
    """Score a candidate: R = (1 - alpha_r) acc_clean + alpha_r acc_faulty (FTT-NAS eq. 12).

    Args:
        forward: The candidate, from images [B, C, H, W] to logits, inside ``injection``.
        injection: The hardware; its draws are common to all candidates that are given the same ``first_draw``.
        batches: Images and labels, on the candidate's device.
        alpha_r: Weight of the faulty accuracy, in [0, 1].
        draws: Fault draws per batch, averaged.
        first_draw: Number of the first draw.
        joint: Compute the clean forward and the faulty one, where it is one, as one forward; see `Joint`.

    Raises:
        RuntimeError: An answer is NaN or infinite although no fault is there; under faults it counts as wrong.
    """
    injection.draw = first_draw
    clean, faulty, images_seen = [], [], 0
    for images, labels in batches:
        images_seen += len(labels)
        if joint and draws == 1 and alpha_r > 0:
            with injection.joint.running():
                said, hit = halves(top1(unchanged(forward, paired(images))))
            clean.append(torch.stack([(said == labels).sum(), (said == NONFINITE).sum()]))
            faulty.append((hit == labels).sum())
            continue
        with injection.paused():
            said = top1(unchanged(forward, images))
        clean.append(torch.stack([(said == labels).sum(), (said == NONFINITE).sum()]))
        faulty += [_num_correct(unchanged(forward, images), labels) for _ in range(draws if alpha_r > 0 else 0)]
    right, lost = torch.stack(clean).sum(dim=0).tolist()
    if lost:
        raise RuntimeError(f"without faults, {lost} of {images_seen} answers are NaN or infinite")
    accuracy_clean = right / images_seen
    accuracy_faulty = float(torch.stack(faulty).sum()) / (images_seen * draws) if faulty else None
    reward = (1.0 - alpha_r) * accuracy_clean + alpha_r * (accuracy_faulty or 0.0)
    return Score(clean=accuracy_clean, faulty=accuracy_faulty, reward=reward)


def _num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (top1(logits) == labels).sum()
