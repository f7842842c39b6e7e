"""Saturated weights: what is read from memory passes through a bounded function before it is used.

A weight w of a saturated layer is stored as it is, and the layer computes with ``s * f(w / s)``, in training and in
deployment, so that a flipped exponent bit can do no more than the bound of the function (arXiv 2411.19027). Under
`ftnas.inject` the order is the hardware's: stored format -> fault -> saturation -> convolution.

| function | s * f(w / s) | range | gradient |
|---|---|---|---|
| ``tanh`` | s tanh(w / s) | (-s, s) | 1 - tanh(w / s)^2 |
| ``arctan`` | s arctan(w / s) | (-s pi/2, s pi/2) | 1 / (1 + (w / s)^2) |
| ``softsign`` | w / (1 + abs(w) / s) | (-s, s) | 1 / (1 + abs(w) / s)^2 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ftnas.faults.select import Layers, exactly, find_layers, select_layers
from ftnas.faults.stored import is_stored
from ftnas.saturated import FUNCTIONS, MARK, Saturated, after_memory, attach, chain, check_mark, detach
from ftnas.settings import Positive, Settings, did_you_mean

_UNTIE = "; give them weights of their own before unsaturate"


class Saturation(Settings):
    """How the weights of a model are saturated.

    Attributes:
        function: ``tanh``, ``arctan`` or ``softsign``.
        scale: s of s * f(w / s): one for all, or by layer (selectors as in ``layers``, which is then left out).
        std_multiple: In place of ``scale``: the power of two nearest to this many standard deviations of the layer's
            weight at the time, so of its first weights in a training.
        layers: Type names, name patterns or depths; None for every Conv2d and Linear, but with ``std_multiple`` for the
            convolutions alone: a classifier may start next to zero, and would have to stay there.
        nan: What a stored NaN is read as; see `saturate`.
    """

    function: Literal["tanh", "arctan", "softsign"]
    scale: Positive | dict[str, Positive] = 1.0
    std_multiple: Positive | None = None
    layers: tuple[str, ...] | None = None
    nan: Literal["zero", "keep"] = "zero"

    @field_validator("layers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_scale(self) -> Saturation:
        if isinstance(self.scale, dict) and (self.layers is not None or not self.scale):
            raise ValueError("scale by layer says itself which layers are saturated; remove layers, or give one scale")
        if self.std_multiple is not None and self.scale != 1.0:
            raise ValueError("std_multiple takes the place of scale; remove one of them")
        return self

    def apply(self, model: nn.Module) -> None:
        """Saturate a model in place; raises as `saturate` does."""
        if isinstance(self.scale, dict):
            for selector, scale in self.scale.items():
                saturate(model, self.function, scale=scale, layers=selector, nan=self.nan)
            return
        if self.std_multiple is None:
            saturate(model, self.function, scale=self.scale, layers=self.layers, nan=self.nan)
            return
        layers = find_layers(model)
        for name in sorted(select_layers(layers, self.layers or ("conv2d",))):
            scale = power_of_two(self.std_multiple * standard_deviation(cast(Tensor, layers[name].weight)))
            saturate(model, self.function, scale=scale, layers=exactly(name), nan=self.nan)

    def resolved(self, model: nn.Module) -> Saturation:
        """Return the same with the scales that a model was saturated with, so that it builds the same again."""
        if self.std_multiple is None:
            return self
        scales = {exactly(name): found.scale for name, found in saturations(model).items()}
        return Saturation(function=self.function, scale=scales, nan=self.nan)


def saturate(
    model: nn.Module,
    function: str,
    *,
    scale: float = 1.0,
    layers: Layers = None,
    nan: Literal["zero", "keep"] = "zero",
) -> nn.Module:
    """Saturate the weights of a model in place, by a parametrization of each.

    The state of a saturated layer has plain names: ``weight`` is the stored, unsaturated weight, and ``saturation``
    says the function. A plain checkpoint loads, as the point from which fine-tuning starts; one that was trained with
    another function or scale is refused.

    Args:
        model: Any module with Conv2d or Linear layers.
        function: ``tanh``, ``arctan`` or ``softsign``.
        scale: s > 0 of s * f(w / s).
        layers: Which layers, as in `ftnas.inject`; None takes every Conv2d and Linear.
        nan: What a stored NaN (which a flip in a float may make) is read as: ``zero``, or ``keep`` lets it through.
            `InjectionRecord.nan_zeroed` counts those that were read as 0.

    Returns:
        The model.

    Raises:
        ValueError: One line: an unknown function, a scale or a nan policy that is none, layers that match nothing, or
            a layer that is saturated already or is inside ``inject``.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"unknown saturation function {function!r}; {did_you_mean(function, FUNCTIONS)}")
    if not (isinstance(scale, (int, float)) and 0.0 < scale < math.inf):
        raise ValueError(f"the scale of a saturation is a number above 0, got {scale!r}")
    if nan not in ("zero", "keep"):
        raise ValueError(f"nan must be 'zero' or 'keep', got {nan!r}")
    candidates = find_layers(model)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Conv2d or Linear layer to saturate")
    chosen = select_layers(candidates, layers)
    for name in sorted(chosen):
        if is_stored(candidates[name]):
            raise ValueError("the model is inside inject(...); saturate it before or after the block")
        found = after_memory(candidates[name])
        if found is not None:
            raise ValueError(f"layer {name!r} is saturated already ({found.identity}); call unsaturate(model) first")
    for name in candidates:
        if name in chosen:
            attach(candidates[name], Saturated(function, float(scale), zeroes_nan=nan == "zero"))
    return model


def unsaturate(model: nn.Module) -> nn.Module:
    """Fold the functions into plain weights, in place; the model computes what it did, bit for bit.

    Raises:
        ValueError: One line: nothing is saturated, the model is inside ``inject``, a layer has a parametrization of
            the model's own, which cannot be folded, or shares its weight with one that reads it in another way.
    """
    layers = find_layers(model)
    names = list(saturations(model))
    if not names:
        raise ValueError("no layer of the model is saturated; there is nothing to fold")
    for name in names:
        if is_stored(layers[name]):
            raise ValueError("the model is inside inject(...); unsaturate it before or after the block")
        if len(chain(layers[name])) > 1:
            raise ValueError(
                f"layer {name!r} has a parametrization of its own, which cannot be folded; remove it first"
            )
    folded = _folded(model, {name: layers[name] for name in names})
    for name in names:
        detach(layers[name])
    with torch.no_grad():
        for weight, values in folded:
            weight.copy_(values)
    return model


def _folded(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Return the stored weights of saturated layers, each once, and what the layers compute with.

    Raises:
        ValueError: A weight is shared with a layer that reads it in another way.
    """
    weights: dict[int, tuple[Tensor, Tensor, str, str]] = {}
    for name, module in layers.items():
        weight, how = chain(module).original, saturations(model)[name].identity
        _, _, first, other = weights.setdefault(id(weight), (weight, cast(Tensor, module.weight).detach(), name, how))
        if other != how:
            raise ValueError(f"layers {first!r} ({other}) and {name!r} ({how}) share a weight{_UNTIE}")
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) or name in layers:
            continue
        for own in module._parameters.values():
            if own is not None and id(own) in weights and module not in layers.values():
                first = weights[id(own)][2]
                raise ValueError(f"layer {first!r} shares its weight with {name!r}, which reads it as it is{_UNTIE}")
    return [(weight, values) for weight, values, *_ in weights.values()]


def saturations(model: nn.Module) -> dict[str, Saturated]:
    """Return what each saturated layer of a model is saturated with, by name."""
    found = {name: after_memory(module) for name, module in find_layers(model).items()}
    return {name: entry for name, entry in found.items() if isinstance(entry, Saturated)}


def standard_deviation(weight: Tensor) -> float:
    """Return the standard deviation of a weight of any shape; its magnitude where it holds one value."""
    flat = weight.detach().double()
    return float(flat.std(correction=0)) if flat.numel() > 1 else float(flat.abs().sum())


def power_of_two(value: float) -> float:
    """Return the power of two that is nearest to a value > 0 on the logarithmic scale; 1 for 0."""
    return 2.0 ** round(math.log2(value)) if value > 0.0 else 1.0


def check_functions(model: nn.Module, state: Mapping[str, Any], *, where: str) -> None:
    """Refuse a state of a model that was saturated otherwise; a plain one fits every model.

    Args:
        model: What the state is for.
        state: A ``state_dict``.
        where: Prefix of messages: the file.

    Raises:
        ValueError: One line.
    """
    own = saturations(model)
    for key, mark in state.items():
        if not key.endswith("." + MARK) or not isinstance(mark, Tensor):
            continue
        layer = key.removesuffix("." + MARK)
        if layer not in own:
            raise ValueError(
                f"{where}: layer {layer!r} was trained saturated by {bytes(mark.tolist()).decode(errors='replace')}, "
                "and here it is not; give the same saturation"
            )
        try:
            check_mark(mark, own[layer], layer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
