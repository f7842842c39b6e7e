"""The settings of a search, and of how its winner is chosen."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ftnas.controllers import ControllerChoice, ReinforceConfig
from ftnas.faults.bounds import Limits
from ftnas.recipe import SgdConfig, TrainConfig
from ftnas.settings import Count, Rate, Settings


class DeriveConfig(Settings):
    """How the final genotype is chosen.

    Attributes:
        samples: Distinct genotypes asked from the controller.
        draws: Fault draws per image for each of them.
        finalists: How many of the best are scored again.
        final_draws: Fault draws per image for each finalist.
        train_epochs: Epochs of fault-tolerant training from scratch that each finalist gets on the weights split
            before it is scored again; 0 scores finalists with the shared weights. One whose training fails scores 0.
    """

    samples: Count = 50
    draws: Count = 1
    finalists: Count = 5
    final_draws: Count = 5
    train_epochs: Annotated[int, Field(ge=0)] = 0

    def recipe(self, weights: SgdConfig) -> TrainConfig | None:
        """Return how finalists are trained, from the settings of the shared weights; None where they are not.

        Raises:
            ValueError: Settings that a final training does not take.
        """
        return TrainConfig(**(weights.model_dump() | {"epochs": self.train_epochs})) if self.train_epochs else None


class SearchConfig(Limits):
    """One search; `Limits` say what keeps the supernet and the finalists within bounds.

    Attributes:
        space: Name of a shipped space, or the path of a space file.
        epochs: Epochs of Algorithm 1, warm-up included.
        weights: The shared-weight steps; ``alpha_l=0`` is FT-NAS, above 0 FTT-NAS.
        controller: What proposes architectures.
        warmup_epochs: First epochs, in which genotypes are uniform and the controller does not learn.
        controller_steps: Controller updates per epoch; None takes one pass over the controller split.
        controller_batch: Images per reward; None takes ``weights.batch_size``.
        rollouts: Genotypes per controller update, all scored on the same images and fault draws.
        reward_draws: Fault draws that a reward averages.
        alpha_r: Weight of the faulty accuracy in the reward, eq. 12.
        split: Share of the training images for the weights; the rest is for the controller.
        dropout: Rate before the classifier in the shared-weight steps.
        joint_forwards: Compute the clean and the faulty forward of steps and candidates as one, on each image twice,
            with the same faults: half the operations. For GPUs, which wait for Python in a search.
        ranks: Processes that train the shared weights together, through Ray Train. In each step every rank takes a
            batch and a genotype of its own, and gradients are averaged over the ranks that used a weight: a step sees
            ``ranks * weights.batch_size`` images, an epoch has that many times fewer steps, and ``weights.lr`` is
            taken as it is given. It changes the result, unlike ``pool.workers``.
        derive: How the final genotype is chosen.
    """

    space: str
    epochs: Count
    weights: SgdConfig
    controller: ControllerChoice = ReinforceConfig()
    warmup_epochs: int = 0
    controller_steps: Count | None = None
    controller_batch: Count | None = None
    rollouts: Count = 1
    reward_draws: Count = 1
    alpha_r: Rate = 0.5
    split: Rate = 0.8
    dropout: Rate = 0.1
    joint_forwards: bool = False
    ranks: Count = 1
    derive: DeriveConfig = DeriveConfig()

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in 0..epochs-1 = {self.epochs - 1}, got {self.warmup_epochs}")
        if not 0.0 < self.split < 1.0:
            raise ValueError(f"split must be above 0 and below 1, so that both parts have images, got {self.split:g}")
        if self.alpha_r == 0.0 and self.reward_draws > 1:
            raise ValueError("alpha_r=0 rewards without faults, so reward_draws has no effect; remove it")
        if self.joint_forwards:
            self._check_joint()
        self.derive.recipe(self.weights)
        return self

    def _check_joint(self) -> None:
        """Refuse what forwards that are one do not do, and where there are none.

        Raises:
            ValueError: One line.
        """
        self.weights.compute.check_joint("weights.compute")
        rewards = self.alpha_r > 0.0 and 1 in (self.reward_draws, self.derive.draws, self.derive.final_draws)
        if not rewards and not 0.0 < self.weights.alpha_l < 1.0:
            raise ValueError(
                "joint_forwards has no effect, since no step has a clean and a faulty forward and no reward has one of "
                "each; remove it"
            )
