"""What a controller is, how a config names one, and the random controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, SerializeAsAny

from ftnas.registry import Registry
from ftnas.rng import generator
from ftnas.settings import Settings, parse
from ftnas.space.genotype import Genotype
from ftnas.space.space import Space


class ControllerConfig(Settings):
    """Base of every controller's settings; ``name`` chooses the controller."""

    name: str


class Controller(ABC):
    """Proposes genotypes and learns from their rewards; it sees nothing else of the search.

    A class under the registry is built as ``cls(config, space, seed=seed)`` and names the settings it takes
    in ``Config``. All its draws come from ``self.generator``, a CPU stream of its own.

    Args:
        config: Settings, an instance of ``Config``.
        space: The space that every genotype asked and told belongs to.
        seed: Of the controller's stream; same seed and same calls, same genotypes.
    """

    Config: ClassVar[type[ControllerConfig]]

    def __init__(self, config: ControllerConfig, space: Space, *, seed: int) -> None:
        self.config = config
        self.space = space
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
        ValueError: There is no such controller, or what is imported is not one.
    """
    cls = CONTROLLERS.get(name, allow_import=True)
    if not (isinstance(cls, type) and issubclass(cls, Controller)):
        raise ValueError(f"controller {name!r}: expected a subclass of ftnas.controllers.Controller, got {cls!r}")
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


def create_controller(config: ControllerConfig, space: Space, *, seed: int) -> Controller:
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


def check_told(genotypes: Sequence[Genotype], rewards: Sequence[float], space: Space) -> list[float]:
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
        genotype.validate(space)
    return numbers


def pack_state(controller: Controller, **extra: Any) -> dict[str, Any]:
    """Return the state that all controllers share (name, space, stream), and the given rest."""
    functions = {"functions": list(controller.space.functions)} if controller.space.functions else {}
    return {
        **functions,
        "controller": controller.config.name,
        "cells": list(controller.space.cell_types),
        "nodes": controller.space.nodes,
        "primitives": list(controller.space.primitives),
        "generator": controller.generator.get_state(),
        **extra,
    }


def check_state(controller: Controller, state: Mapping[str, Any], *, keys: Sequence[str] = ()) -> None:
    """Raise a ValueError unless the state is of this kind of controller, on this space, with these keys."""
    missing = [key for key in ("controller", "cells", "nodes", "primitives", "generator", *keys) if key not in state]
    if missing:
        raise ValueError(f"controller state: {missing[0]!r} is missing; the checkpoint is not one of a controller")
    own = pack_state(controller)
    for key in ("controller", "cells", "nodes", "primitives", "functions"):
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
        return [Genotype.random(self.space, generator=self.generator) for _ in range(num)]

    def tell(self, genotypes: Sequence[Genotype], rewards: Sequence[float]) -> dict[str, float]:
        """Check the arguments and return the mean reward."""
        numbers = check_told(genotypes, rewards, self.space)
        return {"reward": sum(numbers) / len(numbers)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream."""
        return pack_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        check_state(self, state)
        restore_generator(self, state)
