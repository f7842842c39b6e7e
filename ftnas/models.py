"""A model's description -> module; model files; parameters and FLOPs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ftnas import baselines, rng
from ftnas.faults.bounds import FEATURE, RULE, WEIGHT, Limits, take_bounds
from ftnas.faults.saturation import MARK, check_functions, saturations
from ftnas.registry import import_name
from ftnas.settings import Count, Positive, did_you_mean, parse
from ftnas.space.genotype import Genotype
from ftnas.space.network import build_network
from ftnas.space.space import Space, load_space
from ftnas.storage import load_checkpoint, save_checkpoint

SCHEMA = 1
_KINDS = ("genotype", "baseline", "factory")
_OWN = {"space": "genotype", "channels": "genotype", "cells": "genotype", "width": "baseline"}


class ModelConfig(Limits):
    """Which model: exactly one of ``genotype``, ``baseline`` and ``factory``; and what keeps it within bounds.

    Attributes:
        genotype: Path of a genotype file, or the name of a shipped one such as ``w-ftt-net``.
        space: Its space, by name or path; the one that the genotype names when left out.
        channels: Channels of the first cell; the space's when left out.
        cells: Number of cells; the space's when left out.
        baseline: One of ``ftnas.baselines.names()``.
        width: Factor on the baseline's channels, 1 when left out.
        factory: ``package.module:Name`` of the user's own, called with ``num_classes=`` and ``in_channels=``.
        start: File of the weights that training starts from: a ``model.pt`` of the same architecture, or a
            ``state_dict`` such as those of torchvision; None starts from random ones.
        saturation: As of `Limits`; so are ``weight_bound`` and ``feature_bound``.
    """

    genotype: str | None = None
    space: str | None = None
    channels: int | None = Field(default=None, ge=2)
    cells: Count | None = None
    baseline: str | None = None
    width: Positive | None = None
    factory: str | None = None
    start: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelConfig:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(_KINDS)}, got {' and '.join(given) or 'none'}")
        for key, kind in _OWN.items():
            if getattr(self, key) is not None and kind != given[0]:
                raise ValueError(f"{key} belongs to a {kind} and has no effect on a {given[0]}; remove it")
        if self.baseline is not None and self.baseline not in baselines.names():
            raise ValueError(f"unknown baseline {self.baseline!r}; {did_you_mean(self.baseline, baselines.names())}")
        if self.factory is not None and ":" not in self.factory:
            raise ValueError(f"factory is written package.module:Name, got {self.factory!r}")
        return self


class Complexity(NamedTuple):
    """Size and cost of a model.

    Attributes:
        params: Number of parameters.
        flops: Of one image: 2 x multiply-accumulates of convolutions and matrix products.
    """

    params: int
    flops: int


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Name a model in front of what a ValueError says of it: a run has several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def describe(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: int) -> dict[str, Any]:
    """Resolve a config to a spec: plain data that builds the model without any other file.

    Args:
        config: The model.
        num_classes: Number of classes.
        in_channels: Of the images.
        image_size: Shorter side of the images, in pixels.

    Raises:
        ValueError: A file is missing or wrong, or a genotype names no space and the config neither.
    """
    spec: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    limits = config.limits.model_dump(mode="json", exclude_none=True)
    if limits:
        spec["limits"] = limits
    if config.genotype is not None:
        genotype = Genotype.load(config.genotype)
        space_name = config.space or genotype.space
        if space_name is None:
            raise ValueError(f"genotype {config.genotype!r} names no space; give one as space")
        space = load_space(space_name).resized(channels=config.channels, cells=config.cells)
        genotype.validate(space)
        return {"kind": "genotype", **spec, "genotype": genotype.to_dict(), "space": space.model_dump(mode="json")}
    if config.baseline is not None:
        width = 1.0 if config.width is None else config.width
        return {"kind": "baseline", **spec, "baseline": config.baseline, "width": width, "image_size": image_size}
    return {"kind": "factory", **spec, "factory": config.factory}


def build_spec(
    spec: Mapping[str, Any], *, seed: int, allow_factory: bool = False, start: str | Path | None = None
) -> nn.Module:
    """Build the model of a spec, its weights drawn from the stream (seed, "init") or read from a file.

    Args:
        spec: As ``describe`` returns it.
        seed: Of the first weights; the global random state stays as it was.
        allow_factory: Whether names of the user's own modules may be imported. Only for specs that come from the
            user's config, never for what was read from a file.
        start: File of the weights, see `ModelConfig`. Bounds that the file has are taken; where it has none, a multiple
            of a deviation is that of its weights.

    Raises:
        ValueError: One line: what is wrong with the spec, a name to import that is not allowed, or weights that do not
            fit or were trained with another saturation.
    """
    model = _plain_model(spec, seed=seed, allow_factory=allow_factory)
    state = {} if start is None else read_start(model, start)
    limits = parse(Limits, spec.get("limits", {}), where="model: limits")
    limits.apply(model)
    check_functions(model, state, where=str(start))
    take_bounds(model, state, limits, where=str(start))
    return model


def read_start(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load the weights of a file into a model without saturation or bounds; return the file's whole state.

    Raises:
        ValueError: One line: the file is missing, or does not fit.
    """
    state = load_checkpoint(path)
    for key in ("state", "state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: neither a model file nor a state_dict; give one of them as start")
    extra = tuple(f".{name}" for name in (MARK, WEIGHT, FEATURE, RULE))
    plain = {key: value for key, value in state.items() if not key.endswith(extra)}
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(extra)}
    check_state(own, plain, where=str(path))
    model.load_state_dict(plain)
    return state


def resolved_spec(spec: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a spec that builds a saturated model with the scales that it has, whatever its first weights are."""
    limits = parse(Limits, spec.get("limits", {}), where="model: limits")
    if limits.saturation is None or not saturations(model):
        return dict(spec)
    found = limits.model_copy(update={"saturation": limits.saturation.resolved(model)})
    return {**spec, "limits": found.model_dump(mode="json", exclude_none=True)}


def _plain_model(spec: Mapping[str, Any], *, seed: int, allow_factory: bool) -> nn.Module:
    """Build the model of a spec without what limits it."""
    kind = spec.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"model: kind is one of {', '.join(_KINDS)}, got {kind!r}")
    try:
        sizes = {"num_classes": spec["num_classes"], "in_channels": spec["in_channels"]}
        with rng.isolated(seed, "init"):
            if kind == "genotype":
                space = parse(Space, spec["space"], where="model: space")
                _refuse_imports(space.imported_primitives, allow_factory)
                genotype = Genotype.from_dict(spec["genotype"], where="model: genotype")
                return build_network(genotype, space, **sizes)
            if kind == "baseline":
                return baselines.create(spec["baseline"], **sizes, width=spec["width"], image_size=spec["image_size"])
            _refuse_imports([spec["factory"]], allow_factory)
            return call_factory(spec["factory"], **sizes)
    except KeyError as error:
        raise ValueError(f"model: a spec of kind {kind!r} needs {error}") from None


def build(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: int, seed: int) -> nn.Module:
    """Build the model of a config, its weights drawn from the stream (seed, "init").

    Raises:
        ValueError: As ``describe`` and ``build_spec``.
    """
    spec = describe(config, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    return build_spec(spec, seed=seed, allow_factory=True, start=config.start)


def count(model: nn.Module, input_shape: Sequence[int]) -> Complexity:
    """Count parameters and FLOPs, by running one zero image through the model in evaluation mode.

    BatchNorm statistics, gradients, training flags and random state stay as they are.

    Args:
        model: Takes images alone.
        input_shape: (C, H, W) of an image.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        _try(model, 1, input_shape)
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def check_logits(model: nn.Module, input_shape: Sequence[int], num_classes: int) -> None:
    """Check that a model gives logits, by running two zero images through it as `count` does.

    Args:
        model: Of the user's own.
        input_shape: (C, H, W) of an image.
        num_classes: Of the images.

    Raises:
        ValueError: Its forward raises something, lack of memory apart, or gives anything else than a tensor
            [2, num_classes].
    """
    try:
        found = _try(model, 2, input_shape)
    except (torch.OutOfMemoryError, MemoryError):  # of the machine, and not the model's
        raise
    except Exception as error:  # the user's own code
        raise ValueError(
            f"on images of shape {[2, *input_shape]} its forward raises {type(error).__name__}: "
            f"{' '.join(str(error).split())} (FTNAS_DEBUG=1 shows where)"
        ) from error
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, num_classes]:
        raise ValueError(f"must give logits, {[2, num_classes]} for two images of {num_classes} classes, got {shape}")


def _try(model: nn.Module, num_images: int, input_shape: Sequence[int]) -> Any:
    """Return what a model gives in evaluation mode for zero images; its state and modes stay as they are."""
    first = next(model.parameters(), torch.empty(0))
    images = torch.zeros(num_images, *input_shape, dtype=first.dtype, device=first.device)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            return model(images)
    finally:
        for module in training:
            module.training = True


def save_model(path: str | Path, model: nn.Module, spec: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write a self-contained model file, in one step.

    Args:
        path: The file.
        model: Built from the spec; its parameters and buffers are written.
        spec: As ``describe`` returns it.
        metadata: Anything that JSON can hold, e.g. dataset, normalisation, accuracy.

    Raises:
        ValueError: The spec or the metadata is not JSON.
    """
    plain = {"spec": _plain(spec, "spec"), "metadata": _plain(metadata, "metadata")}
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    save_checkpoint(Path(path), {"schema": SCHEMA, **plain, "state": state})


def load_model(path: str | Path, *, allow_factory: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model file.

    Args:
        path: The file.
        allow_factory: Whether it may import what it names as the user's own module. Allow it only for files that
            you made yourself.

    Returns:
        The model, on the CPU and in evaluation mode, and the metadata.

    Raises:
        ValueError: One line: the file is missing, truncated, of another kind or schema; its state does not fit its
            architecture (the first key is told); or it names something to import.
    """
    data = load_checkpoint(path)
    if not isinstance(data, dict) or not {"schema", "spec", "state", "metadata"} <= data.keys():
        raise ValueError(f"{path}: not a model file; those of `ftnas train` are called model.pt")
    if data["schema"] != SCHEMA:
        raise ValueError(f"{path}: this release reads model files of schema {SCHEMA}, got {data['schema']!r}")
    try:
        model = build_spec(data["spec"], seed=0, allow_factory=allow_factory)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_state(model.state_dict(), data["state"], where=str(path))
    model.load_state_dict(data["state"])
    return model.eval(), data["metadata"]


def check_state(own: Mapping[str, Any], given: Any, *, where: str) -> None:
    """Check that a state that was read fits an architecture and holds no NaN (an infinity may be a mask).

    Args:
        own: The architecture's ``state_dict``.
        given: What was read.
        where: Prefix of messages: the file.

    Raises:
        ValueError: One line with the first key at which they differ, or that holds NaN.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: a state is tensors by name, got {type(given).__name__}")
    for key in [*own, *(key for key in given if key not in own)]:
        want, have = _shape(own.get(key)), _shape(given.get(key))
        if want != have:
            raise ValueError(f"{where}: state of another architecture: {key!r} should be {want}, got {have}")
    for key, value in given.items():
        if isinstance(value, Tensor) and value.isnan().any():
            raise ValueError(f"{where}: {key!r} holds NaN, so every answer would be wrong; take an intact file")


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    return "nothing" if value is None else type(value).__name__


def _refuse_imports(names: Sequence[str], allowed: bool) -> None:
    if names and not allowed:
        raise ValueError(
            f"it would import {names[0]!r}; if you trust the file, give allow_factory=True "
            "(ftnas verify: --allow-factory; a campaign: factory and checkpoint in place of file)"
        )


def call_factory(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """Import the user's own ``package.module:Name`` and call it.

    Raises:
        ValueError: It cannot be imported, raises something, or returns no module.
    """
    factory = import_name(name, "factory")
    try:
        model = factory(num_classes=num_classes, in_channels=in_channels)
    except Exception as error:  # the user's own code
        raise ValueError(
            f"factory {name!r}: called with num_classes={num_classes}, in_channels={in_channels} it raised "
            f"{type(error).__name__}: {error} (FTNAS_DEBUG=1 shows where)"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"factory {name!r}: must return a torch.nn.Module, got {type(model).__name__}")
    return model


def load_factory(name: str, checkpoint: str | Path, *, num_classes: int, in_channels: int) -> nn.Module:
    """Build the user's own network and load its weights; nothing but tensors is read from the checkpoint.

    Raises:
        ValueError: As `call_factory`; or the checkpoint cannot be read or does not fit.
    """
    network = call_factory(name, num_classes=num_classes, in_channels=in_channels)
    state = load_checkpoint(checkpoint)
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        problem = str(error).splitlines()[-1].strip()
        raise ValueError(f"{checkpoint}: does not fit {name!r}: {problem}") from None
    check_state(network.state_dict(), network.state_dict(), where=str(checkpoint))
    return network


def _plain(data: Mapping[str, Any], what: str) -> Any:
    try:
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model file: {what} must be JSON: {error}") from None
