"""Mistakes that show beforehand, found before hours are spent: the config of a run cannot be changed afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ftnas.bounds.summary import summarize
from ftnas.campaign import KnownDevice, SweepConfig, known_devices
from ftnas.config import RunConfig
from ftnas.data import ImageSet
from ftnas.faults.hardware import Hardware
from ftnas.progress import say
from ftnas.recipe import SgdConfig, StepSchedule, TrainConfig
from ftnas.regularizers import Regularization
from ftnas.search_settings import DeriveConfig, SearchConfig
from ftnas.train import check_fits


def check_recipe(recipe: TrainConfig, images: ImageSet, *, config: RunConfig) -> None:
    """Refuse a recipe of final trainings that these images, this device or this hardware do not allow.

    Args:
        recipe: Of the train section.
        images: The training images, on the device.
        config: Of the run.

    Raises:
        ValueError: One line: the setting, its value, what there is.
    """
    hardware, num_images = config.hardware, images.num_images
    if recipe.alpha_l == 0.0:
        hardware = hardware.without_faults()
    if recipe.rate_protocol is not None:
        hardware.with_rate(recipe.rate_protocol[0])
        num_images -= int(recipe.holdout * num_images)
    try:
        check_fits(recipe, num_images, images.device, hardware)
        recipe.augment.check(*images.shape[1:])
    except ValueError as error:
        raise ValueError(f"train: {error}") from None


def check_network(network: nn.Module, shape: Sequence[int], *, config: RunConfig, name: str, trains: bool) -> None:
    """Let a network meet all that will be done to it, on one blank image.

    Args:
        network: Untrained or trained, in evaluation mode.
        shape: [C, H, W] of an image.
        config: Of the run.
        name: Of the network.
        trains: Whether it is one that is trained here.

    Raises:
        ValueError: One line: the section, its entry, the network, the reason.
    """
    blank = torch.zeros(1, *shape, device=next(network.parameters()).device)
    if trains and config.train is not None and config.train.recipe.regularizers:
        with _told(f"train: {name}"):
            Regularization(config.train.recipe.regularizers, network)
    for where, under in _injections(config):
        with _told(f"{where} on {name}"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with under(network):
                network(blank)
    if config.bounds is not None:
        with _told(f"bounds: {name}"):
            summarize(network, tuple(shape))


def say_of_search(search: SearchConfig, which: str) -> None:
    """Say what has no effect in a search, which is in the section ``which`` of the config."""
    derive = search.derive
    say_unreached(search.weights, search.epochs, where=f"{which}.weights")
    if derive.train_epochs:
        by = f"{which}.derive.train_epochs"
        say_unreached(search.weights, derive.train_epochs, where=f"{which}.weights", by=by)
    for key in ("draws", "final_draws"):
        draws = getattr(derive, key)
        if search.alpha_r == 0.0 and draws != DeriveConfig.model_fields[key].default:
            say(f"note: {which}.alpha_r=0 scores without faults; {which}.derive.{key}={draws} plays no part in it")


def say_unreached(recipe: SgdConfig, epochs: int, *, where: str, by: str = "epochs") -> None:
    """Say that milestones of the learning rate have no effect, as in a config whose epochs were shortened alone.

    ``by`` names the setting that gives the epochs.
    """
    marks = recipe.schedule.unreached(epochs) if isinstance(recipe.schedule, StepSchedule) else ()
    if marks:
        late = ", ".join(map(str, marks))
        say(f"warning: {where}.schedule.milestones: {by}={epochs} ends before {late} can have an effect")


def say_without_effect(config: RunConfig, device: torch.device) -> None:
    """Say what of a config that trains plays no part in what follows, or cannot go on as it is."""
    stage, hardware = config.train, config.hardware
    if stage is None:
        return
    if hardware.defects is not None and hardware.layers != Hardware().layers:
        say("note: hardware.layers plays no part in the training, since defects name their layers themselves")
    for entry in config.protections:
        if not getattr(entry.fault, entry.fault.rate_name):
            say(f"warning: protections: {entry.label}: at rate 0 nothing fails, and there is nothing to protect")
    if config.campaign is not None and config.pool.workers and device.type != "cpu":
        say(f"note: workers measure on CPUs, and the run is on {device}: the campaign goes on by --resume --workers 0")
    say_unreached(stage.recipe, stage.recipe.epochs, where="train.recipe")
    if stage.recipe.alpha_l == 0.0 and hardware.faulty and config.search is None:
        say("note: train.recipe.alpha_l=0 trains without faults; the fault of hardware plays no part in it")
    elif hardware.defects is not None and config.campaign and hardware.defects not in config.campaign.defects:
        say(
            "note: the campaign does not measure the device that is trained for; "
            f"campaign.defects=[{hardware.defects}] does"
        )


def say_unmet(config: RunConfig) -> None:
    """Say that the fault of a config that neither searches nor trains is met by nothing that is measured."""
    if config.hardware.fault is not None and config.search is config.control is config.train is None:
        say(
            "note: hardware.fault is for search and training, and plays no part in what is measured; campaign.sweeps, "
            "single_faults and protections bring their own"
        )


def _injections(config: RunConfig) -> list[tuple[str, Callable[[nn.Module], AbstractContextManager[Any]]]]:
    """Return the hardware that a network will be under, each with its section and name."""
    found: list[tuple[str, Callable[[nn.Module], AbstractContextManager[Any]]]] = []
    if config.campaign is not None:
        every: list[SweepConfig | KnownDevice] = [*config.campaign.sweeps, *known_devices(config.campaign.defects)]
        for sweep in every:
            under = partial(_sweep, sweep, config)
            found.append((f"campaign: {sweep.label}", under))
    for section in ("single_faults", "protections"):
        for entry in getattr(config, section):
            fault = entry.fault.with_rate(0.0) if section == "single_faults" else entry.fault
            found.append((f"{section}: {entry.label}", partial(config.hardware.with_fault(fault).inject, seed=0)))
    return found


def _sweep(sweep: Any, config: RunConfig, network: nn.Module) -> AbstractContextManager[Any]:
    under: AbstractContextManager[Any] = sweep.under(config.hardware, network, sweep.rates[0], seed=0)
    return under


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say where a mistake is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
