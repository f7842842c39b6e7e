"""What fixed point and faults cost: ResNet-18 at 32x32, forward without gradients, one thread, one process.

The variants take turns in every round, so that whatever else the machine does hits them alike. Figures are CPU
time: the median over the rounds, and the best round, which a busy machine disturbs least.

    python scripts/bench_injection.py --batch 8 --batch 128 --json injection.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ftnas import baselines, inject
from ftnas.faults import AdSAF, Fault, FeatureBitFlip, MiBB, NeuronCrash, WeightBitFlip
from ftnas.quantize import FixedPoint
from ftnas.rng import generator, isolated

FIXED = FixedPoint(bits=8)
VARIANTS: dict[str, tuple[Fault | None, str | None]] = {
    "quantized": (None, None),
    "weight flips 1e-5, a device": (WeightBitFlip(bit_error_rate=1e-5), "hard"),
    "weight flips 1e-5, anew": (WeightBitFlip(bit_error_rate=1e-5), "soft"),
    "feature flips, 1e-4 of values": (FeatureBitFlip(bit_error_rate=1e-4 / 8), None),
    "neuron crash 1e-4": (NeuronCrash(rate=1e-4), None),
    "MiBB 1e-4": (MiBB(mac_error_rate=1e-4), None),
    "MiBB 1e-6": (MiBB(mac_error_rate=1e-6), None),
    "adSAF 8%, a device": (AdSAF(), "hard"),
    "adSAF 8%, anew": (AdSAF(), "soft"),
}


def forwards(
    models: dict[str, nn.Module], images: Tensor, stack: contextlib.ExitStack
) -> dict[str, Callable[[], object]]:
    """Return one forward per variant, each with a model of its own, so that all injections are in force at once."""
    for name, (fault, errors) in VARIANTS.items():
        faults = [] if fault is None else [fault]
        stack.enter_context(inject(models[name], *faults, quantization=FIXED, layers="conv2d", errors=errors))
    return {name: lambda model=model: model(images) for name, model in models.items()}


def measure(batch: int, rounds: int, width: float) -> dict[str, list[float]]:
    """Return the seconds of each forward of every variant, for a batch of [batch, 3, 32, 32] images."""
    images = torch.randn(batch, 3, 32, 32, generator=generator(0, "bench"))
    models: dict[str, nn.Module] = {}
    for name in ("plain", *VARIANTS):
        with isolated(0, "bench"):
            models[name] = baselines.create("resnet18", width=width).eval()
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        forward = forwards(models, images, stack)
        for number in range(rounds + 1):
            for name, run in forward.items():
                start = time.process_time()
                run()
                if number > 0:  # the first round finds the feature points and fills caches
                    times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", help="batch size; may be given again (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="forwards of each variant (default: 7)")
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier of ResNet-18 (default: 1)")
    parser.add_argument("--json", type=Path, help="file for the medians")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for batch in options.batch or [8]:
        times = measure(batch, options.rounds, options.width)
        results[batch] = {name: {"median_s": statistics.median(t), "best_s": min(t)} for name, t in times.items()}
        print(f"batch {batch}: ms, times plain, times quantized{'median':>14}{'best':>28}", flush=True)
        plain, quantized = results[batch]["plain"], results[batch]["quantized"]
        for name, row in results[batch].items():
            cells = [
                f"{row[key] * 1e3:9.1f} ms {row[key] / plain[key]:5.2f} x {row[key] / quantized[key]:5.2f} x"
                for key in ("median_s", "best_s")
            ]
            print(f"  {name:<30}", *cells, flush=True)
    if options.json:
        record = {
            "model": "resnet18", "width": options.width, "image": [3, 32, 32], "threads": 1, "rounds": options.rounds,
            "torch": torch.__version__, "machine": platform.machine(), "results": results,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
