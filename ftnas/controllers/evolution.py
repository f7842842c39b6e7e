"""Regularised evolution (Real et al. 2019, "Regularized Evolution for Image Classifiers")."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator

from ftnas.controllers.base import (
    CONTROLLERS,
    Choices,
    Controller,
    ControllerConfig,
    check_num,
    check_state,
    check_told,
    pack_state,
    restore_generator,
)
from ftnas.settings import Count
from ftnas.space.genotype import Genotype
from ftnas.space.space import Space


class EvolutionConfig(ControllerConfig):
    """Settings of regularised evolution; the defaults are P and S of Real et al. (2019), section 3.

    Attributes:
        population_size: P, genotypes alive; that many are drawn at random first.
        sample_size: S, of whom the best is mutated; at most P.
    """

    name: Literal["evolution"] = "evolution"
    population_size: Count = 100
    sample_size: Count = 25

    @model_validator(mode="after")
    def _sample_fits(self) -> EvolutionConfig:
        if self.sample_size > self.population_size:
            raise ValueError(
                f"sample_size must be at most population_size={self.population_size}, got {self.sample_size}"
            )
        return self


@CONTROLLERS.register("evolution")
class EvolutionController(Controller):
    """A queue of genotypes: the best of a random sample is mutated, the oldest dies.

    ``ask`` draws uniformly until ``population_size`` genotypes have been told. After that each genotype
    asked is a mutation of the best among ``sample_size`` members drawn with replacement (the first drawn
    wins a tie). Rewards are kept as told: a noisy one is forgotten by ageing, never measured again.
    """

    Config = EvolutionConfig
    config: EvolutionConfig

    def __init__(self, config: EvolutionConfig, space: Space | Choices, *, seed: int) -> None:
        super().__init__(config, space, seed=seed)
        self.population: deque[tuple[Genotype, float]] = deque(maxlen=config.population_size)

    def ask(self, num: int) -> list[Genotype]:
        """Propose ``num`` genotypes; within one call the population stays as it is."""
        check_num(num)
        return [self._propose() for _ in range(num)]

    def _propose(self) -> Genotype:
        if len(self.population) < self.config.population_size:
            return self.choices.random(generator=self.generator)
        drawn = torch.randint(len(self.population), (self.config.sample_size,), generator=self.generator).tolist()
        parent, _ = max((self.population[index] for index in drawn), key=lambda member: member[1])
        return self.choices.mutate(parent, generator=self.generator)

    def tell(self, genotypes: Sequence[Genotype], rewards: Sequence[float]) -> dict[str, float]:
        """Append the genotypes in order; beyond ``population_size`` the oldest die.

        Returns:
            ``reward`` (mean of those told), ``population`` (its size), ``population_reward`` (its mean) and
            ``best_reward`` (its maximum).
        """
        numbers = check_told(genotypes, rewards, self.choices)
        self.population.extend(zip(genotypes, numbers, strict=True))
        alive = [reward for _, reward in self.population]
        return {
            "reward": sum(numbers) / len(numbers),
            "population": float(len(alive)),
            "population_reward": sum(alive) / len(alive),
            "best_reward": max(alive),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the stream and the population, oldest first, as decisions and rewards."""
        return pack_state(
            self,
            genotypes=[self.choices.to_decisions(genotype) for genotype, _ in self.population],
            rewards=[reward for _, reward in self.population],
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; one with more members than ``population_size`` is refused."""
        check_state(self, state, keys=("genotypes", "rewards"))
        if len(state["genotypes"]) != len(state["rewards"]):
            raise ValueError("controller state: as many rewards as genotypes; the checkpoint is damaged")
        if len(state["genotypes"]) > self.config.population_size:
            raise ValueError(
                f"controller state: at most population_size={self.config.population_size} members, "
                f"got {len(state['genotypes'])}"
            )
        genotypes = [self.choices.from_decisions(decisions) for decisions in state["genotypes"]]
        members = list(zip(genotypes, state["rewards"], strict=True))
        restore_generator(self, state)
        self.population.clear()
        self.population.extend(members)
