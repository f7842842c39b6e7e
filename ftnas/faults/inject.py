"""`inject`: faults and fixed point in any ``nn.Module``, for as long as a ``with`` block lasts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

from torch import nn

from ftnas.faults.base import Fault
from ftnas.faults.drawing import Drawing, Drawings, DrawOn
from ftnas.faults.injection import Injection
from ftnas.faults.outage import NodeDown, Outages
from ftnas.faults.place import Protect, check, check_bounds, check_words, place, weight_format
from ftnas.faults.plans import PlanSet
from ftnas.faults.select import KNOWN, Layers, find_layers, unknown_layers
from ftnas.quantize import FixedPoint, Quantization

Errors = Literal["soft", "hard"]


def inject(
    model: nn.Module,
    *faults: Fault,
    quantization: Quantization | FixedPoint | None = None,
    seed: int = 0,
    layers: Layers = None,
    protect: Protect = (),
    errors: Errors | None = None,
    plans: PlanSet | None = None,
    mask_gradients: bool = False,
    draw_on: DrawOn = "cpu",
    bounds: Mapping[str, float] | None = None,
    watch: bool = False,
) -> Injection:
    """Put faults and fixed point into a model, inside a ``with`` block.

    Every Conv2d and Linear weight and every feature point (the output of a Conv2d or Linear, after the BatchNorm that
    alone consumes it) is quantized; the faults act on those of the selected layers. Other layers with weights (Conv1d,
    ConvTranspose2d, in_proj of attention, ...) are left as they are, which a warning says. On leaving the block, by
    an exception too, the model is what it was, bit for bit.

    Args:
        model: Any module with Conv2d or Linear layers. Call the model itself inside the block, not its parts.
        *faults: Fault models, applied in this order; each may have its own ``where``. None: quantization alone.
        quantization: Formats of weights and features; one FixedPoint serves both; None quantizes nothing.
        seed: The device, or the stream of draws; the same seed gives the same faults on every machine.
        layers: Which layers are faulted: a type name (``conv2d``, ``linear``), a name pattern (``layer1.*``), a depth
            (``depth:0-4``), a predicate of (name, module), or a sequence of those; None takes every Conv2d and Linear.
        protect: What is never hit: layers as above, or `Where` values for some channels, positions or bits of them.
            The faults elsewhere are those of the same seed without protection.
        errors: ``hard`` draws one plan and keeps it (a defect map, the same for every sample of a batch); ``soft``
            draws anew at each forward. None: hard for weights, soft for features.
        plans: Replay these instead of drawing; they bring their fault models along.
        mask_gradients: Stop gradients at faulty positions; by default they flow.
        draw_on: ``cpu`` gives the same plans on every kind of device; ``device`` never waits for the device, for
            training.
        bounds: Layer -> largest magnitude of its features, as a calibration found it: what lies beyond, before
            quantization or after a fault, is clipped to it, and NaN becomes 0 (range restriction).
        watch: Keep every change that a fault makes, for `Injection.changes`; for looking, not for speed.

    Returns:
        The context manager; ``with inject(...) as injection`` gives what was hit as ``injection.record``.

    Raises:
        ValueError: No layer is selected, a fault could hit nothing or needs a quantization that is missing, the model
            is compiled or has no values (meta), or (on entering) it has an injection already.
    """
    if plans is not None and (faults or layers is not None or errors is not None or protect != ()):
        raise ValueError("plans say themselves what is hit; give no faults, layers, protect or errors beside them")
    quantization = Quantization.of(quantization)
    faults = faults if plans is None else plans.faults
    check(model, faults, quantization, errors, draw_on)
    candidates = find_layers(model)
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Conv2d or Linear layer to quantize or to fault")
    if unknown := unknown_layers(model):
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        warnings.warn(f"{listed}: neither quantized nor hit, {KNOWN}", stacklevel=2)
    if plans is not None:
        plans.check_layers(candidates)
    placed = place(faults, candidates, layers, protect)
    formats = (
        weight_format(None if quantization is None else quantization.weights, faults),
        None if quantization is None else quantization.features,
    )
    check_words(candidates, *formats)

    def drawing(target: str, stage: str, hard: bool) -> Drawing:
        chosen = [p for p in placed if (p.fault.target, p.fault.stage) == (target, stage)]
        given = None if plans is None else plans.plans
        return Drawing(chosen, seed=seed, hard=hard, draw_on=draw_on, given=given)

    return Injection(
        model,
        faults,
        formats=formats,
        drawings=Drawings(
            weights=drawing("weight", "point", errors != "soft"),
            features=drawing("feature", "point", errors == "hard"),
            buffers=drawing("feature", "buffer", errors == "hard"),
        ),
        outages=Outages(
            model,
            {number: fault for number, fault in enumerate(faults) if isinstance(fault, NodeDown)},
            seed=seed,
            hard=errors == "hard",
        ),
        bounds=check_bounds(bounds or {}, candidates),
        mask_gradients=mask_gradients,
        watch=watch,
    )
