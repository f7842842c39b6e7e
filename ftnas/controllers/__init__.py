"""Controllers: what proposes architectures and learns from their rewards."""

from ftnas.controllers.base import (
    CONTROLLERS,
    Choices,
    Controller,
    ControllerChoice,
    ControllerConfig,
    RandomConfig,
    RandomController,
    create_controller,
    read_config,
)
from ftnas.controllers.evolution import EvolutionConfig, EvolutionController
from ftnas.controllers.reinforce import ReinforceConfig, ReinforceController

__all__ = [
    "CONTROLLERS",
    "Choices",
    "Controller",
    "ControllerChoice",
    "ControllerConfig",
    "EvolutionConfig",
    "EvolutionController",
    "RandomConfig",
    "RandomController",
    "ReinforceConfig",
    "ReinforceController",
    "create_controller",
    "read_config",
]
