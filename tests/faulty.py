"""Fault models of every kind, and what their tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings

import torch
from scipy import stats

from ftnas.faults import (
    AdSAF,
    BitAdSAF,
    Fault,
    FeatureBitFlip,
    LogNormalVariation,
    MiBB,
    NeuronByzantine,
    NeuronCrash,
    Plan,
    ReciprocalNormalVariation,
    Site,
    WeightBitFlip,
)
from ftnas.quantize import FixedPoint, FloatFormat

ALARM = 1e-6
SHAPE = (4, 6, 5, 3)

# One line per variant; every registered model must have one, and the contract in test_faults.py then holds it.
CASES = {
    "mibb": MiBB(mac_error_rate=0.002),
    "mibb persistent": MiBB(mac_error_rate=0.0005, persistence=4.0),
    "feature_bit_flip": FeatureBitFlip(bit_error_rate=0.02),
    "crash": NeuronCrash(rate=0.05),
    "crash channel": NeuronCrash(rate=0.3, unit="channel"),
    "byzantine": NeuronByzantine(rate=0.05, capacity=3.0),
    "byzantine channel": NeuronByzantine(rate=0.3, capacity=3.0, unit="channel"),
    "adsaf": AdSAF(),
    "adsaf differential": AdSAF(cells="differential", stuck_at="max"),
    "bit_adsaf": BitAdSAF(),
    "flip": WeightBitFlip(bit_error_rate=0.02),
    "flip q2.5": WeightBitFlip(bit_error_rate=0.02, dtype="q2.5"),
    "flip fp32": WeightBitFlip(bit_error_rate=0.02, dtype="fp32"),
    "flip fp16": WeightBitFlip(bit_error_rate=0.02, dtype="fp16"),
    "flip bf16": WeightBitFlip(bit_error_rate=0.02, dtype="bf16"),
    "log normal": LogNormalVariation(sigma=0.2),
    "reciprocal normal": ReciprocalNormalVariation(sigma=0.2),
}
VARIATIONS = (LogNormalVariation, ReciprocalNormalVariation)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def never_waits():
    """Raise where the body waits for the GPU."""
    _forbid_waiting("error")
    try:
        yield
    finally:
        _forbid_waiting("default")


def _forbid_waiting(mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def float_word(fault: Fault) -> bool:
    """Tell whether the fault hits floating-point words."""
    return isinstance(fault, WeightBitFlip) and fault.dtype in ("fp32", "fp16", "bf16")


def keeps_grid(fault: Fault) -> bool:
    """Tell whether what the fault leaves behind is representable in fixed point."""
    return not (float_word(fault) or isinstance(fault, (NeuronByzantine, *VARIATIONS)))


def site_of(fault: Fault | None = None, shape=SHAPE, macs=36, bits: int | None = 8, layer="layer") -> Site:
    """Describe a weight or a feature tensor; without a fault model, a feature."""
    shape = tuple(shape)
    weight = fault is not None and fault.target == "weight"
    channels = shape[0] if weight else (shape[-3] if len(shape) > 2 else shape[-1])
    stride = math.prod(shape[1:]) if weight else (math.prod(shape[-2:]) if len(shape) > 2 else 1)
    bits, width = (None, form_of(fault).bits) if fault is not None and float_word(fault) else (bits, 32)
    return Site(layer, shape, macs, bits, width, channels, stride, shape[-2:] if len(shape) > 2 else (1, 1))


def form_of(fault: Fault, bits: int = 8) -> FixedPoint | FloatFormat:
    """Return the format of the tensors that the fault meets."""
    if fault.target == "feature":
        return FixedPoint(bits=bits)
    return fault.weight_format(FixedPoint(bits=bits))


def on_grid(fault: Fault, shape=SHAPE, seed=0, bits=8):
    """Return values in the fault's format, and their grid (None: floating-point words)."""
    form = form_of(fault, bits)
    x = torch.randn(shape, generator=gen(seed))
    return (form.rounded(x), None) if isinstance(form, FloatFormat) else (form.quantize(x), form.grid(x))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors hold the same values, NaN being the same as NaN."""
    return one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all())


def codes_per_site(plan: Plan) -> int:
    return len(plan.codes) // max(1, len(plan.sites))


def padded(plan: Plan, *, extra: int = 7) -> Plan:
    """What a draw on a GPU looks like: a fixed length, filled up with entries equal to the population."""
    sites = torch.cat([plan.sites, torch.full((extra,), plan.population)])
    codes = torch.cat([plan.codes, plan.codes.max().repeat(extra * codes_per_site(plan))])
    return dataclasses.replace(plan, sites=sites, codes=codes)


def assert_binomial(hits: int, trials: int, probability: float) -> None:
    low, high = stats.binom.interval(1.0 - ALARM, trials, probability)
    assert low <= hits <= high, f"{hits} of {trials}, expected {trials * probability:.1f} in [{low}, {high}]"


def assert_uniform(counts) -> None:
    """Hold counts to the same probability in each class, by chi-square."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    expected = float(counts.sum()) / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < stats.chi2.isf(ALARM, len(counts) - 1), f"chi-square {statistic:.0f} of {counts.tolist()}"
