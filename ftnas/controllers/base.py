"""What a controller is, how a config names one, and the random controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BeforeValidator, SerializeAsAny

from ftnas.registry import Registry, check_class
from ftnas.rng import generator
from ftnas.settings import Settings, parse
from ftnas.space.genotype import Genotype
from ftnas.space.space import Space


class Choices(Protocol):
    """What random and evolution need of a space whose genotypes are not cells; they are any hashable values."""

    def random(self, *, generator: torch.Generator) -> Any:
        """Draw a genotype."""

    def mutate(self, genotype: Any, *, generator: torch.Generator) -> Any:
        """Return a neighbour of a genotype, another one."""

    def validate(self, genotype: Any) -> None:
        """Raise a ValueError for a genotype that is not of the space."""

    def to_decisions(self, genotype: Any) -> Any:
        """Return a genotype as plain values, for a checkpoint."""

    def from_decisions(self, decisions: Any) -> Any:
        """Return the genotype of `to_decisions`; a ValueError if it is not of the space."""

    def signature(self) -> dict[str, Any]:
        """Return plain values that tell this space from others."""


class Cells:
    """A cell-based space, seen as `Choices`."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def random(self, *, generator: torch.Generator) -> Genotype:
        """See `Genotype.random`."""
        return Genotype.random(self._space, generator=generator)

    def mutate(self, genotype: Genotype, *, generator: torch.Generator) -> Genotype:
        """See `Genotype.mutate`."""
        return genotype.mutate(self._space, generator=generator)

    def validate(self, genotype: Genotype) -> None:
        """See `Genotype.validate`."""
        genotype.validate(self._space)

    def to_decisions(self, genotype: Genotype) -> Any:
        """See `Genotype.to_decisions`."""
        return genotype.to_decisions(self._space)

    def from_decisions(self, decisions: Any) -> Genotype:
        """See `Genotype.from_decisions`."""
        return Genotype.from_decisions(self._space, decisions)

    def signature(self) -> dict[str, Any]:
        """Return cells, nodes, primitives, and the functions of weights where a genotype decides on them."""
        space = self._space
        functions = {"functions": list(space.functions)} if space.functions else {}
        cells, primitives = list(space.cell_types), list(space.primitives)
        return {"cells": cells, "nodes": space.nodes, "primitives": primitives, **functions}


class ControllerConfig(Settings):
    """Base of every controller's settings; ``name`` chooses the controller."""

    name: str


class Controller(ABC):
    """Proposes genotypes and learns from their rewards; it sees nothing else of the search.

    A class under the registry is built as ``cls(config, space, seed=seed)`` and names the settings it takes
    in ``Config``. All its draws come from ``self.generator``, a CPU stream of its own.

    Args:
        config: Settings, an instance of ``Config``.
        space: The space that every genotype asked and told belongs to: of cells, or, for controllers that know no more
            of it than `Choices` says, of anything else.
        seed: Of the controller's stream; same seed and same calls, same genotypes.
    """

    Config: ClassVar[type[ControllerConfig]]

    def __init__(self, config: ControllerConfig, space: Space | Choices, *, seed: int) -> None:
        self.config = config
        self.space: Any = space
        self.choices: Choices = Cells(space) if isinstance(space, Space) else space
        self.generator = generator(seed, "controller", config.name)

    @abstractmethod
    def ask(self, num: int) -> list[Genotype]:
        """Propose ``num`` genotypes of the space, duplicates allowed; they need not be told.

        Raises:
            ValueError: ``num`` is below 1.
        """

    @abstractmethod
    def tell(self, genotypes: Sequence[Genotype], rewards: Sequence[float]) -> dict[str, float]:
        """Learn the rewards of any genotypes of the space, asked before or not, in one update.

        Args:
            genotypes: At least one.
            rewards: One finite number for each genotype, higher is better.

        Returns:
            Scalars to log, among them ``reward``, the mean.

        Raises:
            ValueError: Lengths differ or are zero, a reward is not finite, a genotype is not of the space.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that a controller needs to go on as if it had never stopped.

        It holds tensors, numbers, strings, lists and dicts only, so ``torch.load(weights_only=True)`` reads
        it.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a controller with the same settings and space.

        Raises:
            ValueError: The state is of another controller or space, or does not hold what it should.
        """


CONTROLLERS: Registry[type[Controller]] = Registry("controller")


def controller_class(name: str) -> type[Controller]:
    """Return the controller of a registered name, or of ``package.module:Name`` from the user's own config.

    Raises:
        ValueError: There is no such controller, or what is imported is none, or lacks something.
    """
    cls = CONTROLLERS.get(name, allow_import=True)
    check_class(cls, Controller, where=f"controller {name!r}", needs=("Config",))
    return cls


def read_config(value: Any) -> Any:
    """Turn keys and values into the settings of the controller that ``name`` chooses; pass other values on.

    Raises:
        ValueError: One line about ``name`` or the first wrong key.
    """
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get("name"), str):
        raise ValueError(f"name: required, one of {', '.join(CONTROLLERS.names())} or package.module:Name")
    return parse(controller_class(value["name"]).Config, value)


# The type of a config's field that holds any controller's settings. Not a closed union: a registered or
# imported controller brings its own settings class, and the message about a wrong key comes from that
# class.
ControllerChoice = Annotated[SerializeAsAny[ControllerConfig], BeforeValidator(read_config)]


def create_controller(config: ControllerConfig, space: Space | Choices, *, seed: int) -> Controller:
    """Build the controller that ``config.name`` chooses.

    Raises:
        ValueError: There is no such controller, or the settings are not its own.
    """
    cls = controller_class(config.name)
    if not isinstance(config, cls.Config):
        raise ValueError(f"controller {config.name!r} takes {cls.Config.__name__}, got {type(config).__name__}")
    return cls(config, space, seed=seed)


def check_num(num: int) -> None:
    """Raise a ValueError unless ``num`` genotypes can be asked for."""
    if num < 1:
        raise ValueError(f"ask: the number of genotypes must be at least 1, got {num}")


def check_told(genotypes: Sequence[Any], rewards: Sequence[float], choices: Choices) -> list[float]:
    """Return the rewards as numbers, after checking all that ``Controller.tell`` promises to check."""
    if len(genotypes) != len(rewards) or not len(genotypes):
        raise ValueError(
            f"tell: as many rewards as genotypes and at least one, got {len(genotypes)} genotypes "
            f"and {len(rewards)} rewards"
        )
    numbers = [float(reward) for reward in rewards]
    for genotype, number in zip(genotypes, numbers, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"tell: rewards must be finite, got {number}; leave failed candidates out")
        choices.validate(genotype)
    return numbers


def pack_state(controller: Controller, **extra: Any) -> dict[str, Any]:
    """Return the state that all controllers share (name, space, stream), and the given rest."""
    return {
        "controller": controller.config.name,
        **controller.choices.signature(),
        "generator": controller.generator.get_state(),
        **extra,
    }


def check_state(controller: Controller, state: Mapping[str, Any], *, keys: Sequence[str] = ()) -> None:
    """Raise a ValueError unless the state is of this kind of controller, on this space, with these keys."""
    same = ("controller", *controller.choices.signature())
    missing = [key for key in (*same, "generator", *keys) if key not in state]
    if missing:
        raise ValueError(f"controller state: {missing[0]!r} is missing; the checkpoint is not one of a controller")
    own = pack_state(controller)
    for key in dict.fromkeys((*same, "functions")):
        if state.get(key) != own.get(key):
            raise ValueError(f"controller state: {key} must be {own.get(key)!r}, got {state.get(key)!r}")


def restore_generator(controller: Controller, state: Mapping[str, Any]) -> None:
    """Put the controller's stream where ``state`` left it; a ValueError if that is no stream's state."""
    try:
        controller.generator.set_state(state["generator"].cpu())
    except (AttributeError, RuntimeError, TypeError):
        raise ValueError(
            "controller state: 'generator' is not a generator's state; the checkpoint is damaged"
        ) from None


class RandomConfig(ControllerConfig):
    """Settings of the random controller: none."""

    name: Literal["random"] = "random"


@CONTROLLERS.register("random")
class RandomController(Controller):
    """Uniform draws from the space; ``tell`` learns nothing. The control experiment of every search."""

    Config = RandomConfig

    def ask(self, num: int) -> list[Genotype]:
        """Draw ``num`` genotypes uniformly and independently."""
        check_num(num)
        return [self.choices.random(generator=self.generator) for _ in range(num)]

    def tell(self, genotypes: Sequence[Genotype], rewards: Sequence[float]) -> dict[str, float]:
        """Check the arguments and return the mean reward."""
        numbers = check_told(genotypes, rewards, self.choices)
        return {"reward": sum(numbers) / len(numbers)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream."""
        return pack_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        check_state(self, state)
        restore_generator(self, state)
