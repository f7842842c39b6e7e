"""Which fault models go where in a model, and whether they can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ftnas.faults.base import Fault, Site, Where
from ftnas.faults.drawing import Placed
from ftnas.faults.select import Layers, Predicate, macs_per_output, select_layers
from ftnas.quantize import FixedPoint, FloatFormat, Quantization
from ftnas.settings import did_you_mean

Protect = str | Predicate | Where | Sequence[str | Predicate | Where]


def check(
    model: nn.Module, faults: Sequence[Fault], quantization: Quantization | None, errors: str | None, draw_on: str
) -> None:
    """Refuse what no injection can work on.

    Raises:
        ValueError: One line: what was given, and what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise ValueError(
            "a scripted model has no hooks and no parametrizations; inject into the model before scripting"
        )
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
        raise ValueError(
            "the model, or a part of it, is compiled, and what is compiled reads no faults; inject into the model "
            "before torch.compile (a compiled one keeps it as model._orig_mod)"
        )
    if any(torch.nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has lazy layers whose weights are not made yet; run it once before inject")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device and has no values to fault; load it on cpu or cuda first")
    for fault in faults:
        if not isinstance(fault, Fault):
            raise ValueError(f"inject takes fault models such as MiBB(mac_error_rate=1e-4), got {fault!r}")
        if fault.needs_quantization and quantization is None:
            raise ValueError(f"{fault.name} needs fixed point: give quantization=FixedPoint(bits=8), got None")
    if errors not in (None, "soft", "hard"):
        raise ValueError(f"errors must be 'soft', 'hard' or None, got {errors!r}")
    if draw_on not in ("cpu", "device"):
        raise ValueError(f"draw_on must be 'cpu' or 'device', got {draw_on!r}")


def place(
    faults: Sequence[Fault], candidates: Mapping[str, nn.Module], layers: Layers, protect: Protect
) -> list[Placed]:
    """Give each fault model the layers that it can hit.

    Raises:
        ValueError: A selector matches nothing, or a fault model is left without a layer.
    """
    selected = select_layers(candidates, layers)
    whole, parts = _protected(candidates, protect)
    placed = []
    for number, fault in enumerate(faults):
        if fault.target == "module":  # names what it hits itself
            continue
        own = fault.where.layers if fault.where is not None else None
        chosen = selected & select_layers(candidates, own)
        if not chosen:
            raise ValueError(f"{fault.name} could hit nothing: where.layers={own} has no layer of layers={layers!r}")
        if not chosen - whole:
            raise ValueError(f"{fault.name} could hit nothing: all its {len(chosen)} layers are protected")
        never = {name: tuple(where for names, where in parts if name in names) for name in chosen}
        placed.append(Placed(number, fault, chosen - whole, never))
    return placed


def _protected(
    candidates: Mapping[str, nn.Module], protect: Protect
) -> tuple[frozenset[str], list[tuple[frozenset[str], Where]]]:
    """Return the layers that are protected as a whole, and the parts of others."""
    entries = [protect] if isinstance(protect, (str, Where)) or callable(protect) else list(protect)
    whole: frozenset[str] = frozenset()
    parts = []
    for entry in entries:
        if not isinstance(entry, Where):
            whole |= select_layers(candidates, entry)
            continue
        names = select_layers(candidates, entry.layers)
        if entry.channels is None and entry.positions is None and entry.bits is None:
            whole |= names
        else:
            parts.append((names, entry))
    return whole, parts


def check_bounds(bounds: Mapping[str, float], candidates: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return bounds of features by layer.

    Raises:
        ValueError: A layer that the model lacks, or a bound that is not above 0.
    """
    for layer, bound in bounds.items():
        if layer not in candidates:
            raise ValueError(f"bounds: the model has no layer {layer!r}; {did_you_mean(layer, candidates)}")
        if not bound > 0.0:
            raise ValueError(f"bounds: {layer!r} needs a bound above 0, got {bound}")
    return dict(bounds)


def weight_format(given: FixedPoint | None, faults: Sequence[Fault]) -> FixedPoint | FloatFormat | None:
    """Return how the faulty hardware holds weights: as asked, unless a fault model's hardware has a format of its own.

    Raises:
        ValueError: Two fault models whose hardware differs.
    """
    owners = [fault for fault in faults if fault.target == "weight" and fault.encoding is not None]
    asked = {fault.weight_format(given): fault.name for fault in owners}
    formats = {form: name for form, name in asked.items() if form is not None}
    if len(formats) > 1:
        names = ", ".join(sorted({fault.name for fault in owners}))
        raise ValueError(f"these faults need weights in different formats: {names}; inject them one at a time")
    return next(iter(formats), given)


def most_bits(weights: FixedPoint | FloatFormat | None, features: FixedPoint | None) -> int:
    """Return the width of the widest word of fixed point; 0 without one."""
    return max((form.bits for form in (weights, features) if isinstance(form, FixedPoint)), default=0)


def check_words(
    layers: Mapping[str, nn.Module], weights: FixedPoint | FloatFormat | None, features: FixedPoint | None
) -> None:
    """Refuse words that the numbers of a layer do not hold exactly.

    Raises:
        ValueError: One line: the layer, its number format, and what it does not hold.
    """
    bits = most_bits(weights, features)
    for name, layer in layers.items():
        numbers = (tensor.dtype for tensor in layer.parameters() if tensor.is_floating_point() or tensor.is_complex())
        dtype = next(numbers, torch.float64)
        if dtype.is_complex:
            raise ValueError(f"layer {name!r} is {dtype}, and faults know words of real numbers alone")
        check_held(name, dtype, bits)
        if isinstance(weights, FloatFormat) and torch.promote_types(dtype, weights.torch_dtype) != dtype:
            raise ValueError(
                f"layer {name!r} of {dtype} does not hold the words of {weights.dtype}, so that hits would vanish; use "
                "model.float(), or the format that it has"
            )


def check_held(layer: str, dtype: torch.dtype, bits: int) -> None:
    """Refuse words of fixed point of more bits than numbers of a dtype hold exactly.

    Raises:
        ValueError: One line.
    """
    most = _digits(dtype)
    if bits > most:
        raise ValueError(
            f"layer {layer!r} computes in {dtype}, which holds words of up to {most} bits exactly, and there are words "
            f"of {bits}; use fewer bits, or float32 (model.float(), no autocast)"
        )


@cache
def _digits(dtype: torch.dtype) -> int:
    return 2 - round(math.log2(torch.finfo(dtype).eps))  # a word of one bit more than a number has digits


def check_output(layer: str, output: Tensor, bits: int) -> None:
    """Refuse a feature that faults cannot go into: nested tensors, and numbers that do not hold words of so many bits.

    Raises:
        ValueError: One line.
    """
    if output.is_nested:
        raise ValueError(
            f"layer {layer!r} gives a nested tensor, which has no places that faults could hit; pad the batch "
            "(nn.TransformerEncoder: enable_nested_tensor=False)"
        )
    if bits and output.dtype != torch.float32:
        check_held(layer, output.dtype, bits)


def check_forward() -> None:
    """Refuse a forward inside a function transform of torch, which our rounding does not know.

    Raises:
        ValueError: One line.
    """
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "the model runs within a transform of torch.func (vmap, grad, jvp, ...), which faults and quantization do "
            "not know; call it outside, and use torch.autograd for gradients"
        )


_ENTERED: WeakSet[nn.Module] = WeakSet()


def occupy(model: nn.Module) -> Callable[[], None]:
    """Take note that an injection is at work in a model; return what ends that.

    Raises:
        ValueError: One is already, in the model or in a part of it.
    """
    modules = list(model.modules())
    if any(module in _ENTERED for module in modules):
        raise ValueError("the model has an injection already; give all faults to one inject(model, ...)")
    _ENTERED.update(modules)
    return partial(_ENTERED.difference_update, modules)


def weight_site(layer: str, module: nn.Module, weight: Tensor, form: FixedPoint | FloatFormat | None) -> Site:
    """Describe the weight of a Conv2d or Linear, held in a format."""
    shape = tuple(weight.shape)
    rows_columns = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
    return Site(
        layer,
        shape,
        macs_per_output(module),
        bits=form.bits if isinstance(form, FixedPoint) else None,
        float_bits=form.bits if isinstance(form, FloatFormat) else 8 * weight.element_size(),
        channels=shape[0],
        channel_stride=weight.numel() // max(1, shape[0]),
        map_shape=rows_columns,
    )


def feature_site(layer: str, module: nn.Module, feature: Tensor, form: FixedPoint | None) -> Site:
    """Describe the output of a Conv2d [batch, channels, H, W] or a Linear [batch, ..., features], or of one sample."""
    shape = tuple(feature.shape)
    conv = isinstance(module, nn.Conv2d)
    return Site(
        layer,
        shape,
        macs_per_output(module),
        bits=None if form is None else form.bits,
        float_bits=8 * feature.element_size(),
        channels=shape[-3] if conv else shape[-1],
        channel_stride=shape[-2] * shape[-1] if conv else 1,
        map_shape=(shape[-2], shape[-1]) if conv else (1, 1),
        batched=len(shape) > (3 if conv else 1),
    )
