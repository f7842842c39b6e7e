"""How many operations a training step asks of a device: counted without one, on tensors that hold no values.

A model on PyTorch's `meta` device takes the way that it takes on a GPU, where nothing may wait for a value: whatever
reads one fails here, on any machine. Views and allocations ask nothing of a device and are not counted. The steps are
those of the shipped configs, without the optimizer, whose operations a GPU does for many parameters at once.

    python scripts/count_operations.py
    python scripts/count_operations.py --only W-FTT-Net-20 --top 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftnas.config import read_config
from ftnas.faults import drawing
from ftnas.faults.ahead import Ahead
from ftnas.faults.drawing import Drawing
from ftnas.faults.hits import Hits
from ftnas.faults.joint import Joint
from ftnas.faults.record import Tally
from ftnas.faults.together import Together
from ftnas.mistakes import positive, to_write
from ftnas.models import build
from ftnas.quantize import FixedPoint
from ftnas.rng import Label, generator, isolated, seed_for
from ftnas.space import Genotype, Supernet, load_space
from ftnas.train import FaultTolerantLoss

CLASSES, PIXELS, IMAGES = 10, 32, 8
META = torch.device("meta")
RUNS = {
    "search": ("w-ftt-nas-cifar10", None),
    "search, joint": ("w-ftt-nas-cifar10", None),
    "search, MiBB": ("f-ftt-nas-cifar10", None),
    "search, MiBB, joint": ("f-ftt-nas-cifar10", None),
    "W-FTT-Net-20": ("train-w-ftt-net-adsaf", "w-ftt-net-20"),
    "ResNet-18": ("train-resnet18-adsaf", "resnet18"),
    "VGG-16": ("train-vgg16-adsaf", "vgg16"),
    "MobileNet-V2": ("train-mobilenet-v2-adsaf", "mobilenet_v2"),
}
PARTS = ("rounding", "drawing", "injection", "network")
_FREE = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "scalar_tensor"),
    *("_record_function_enter_new", "_record_function_exit"),
}


_AT_ONCE = (
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
)


class _Stream(torch.Generator):
    """A generator that says it is of a device without values; what is drawn from it has none."""

    device = property(lambda self: META)  # type: ignore[assignment]


def _generator(seed: int, *labels: Label, device: torch.device | str = "cpu") -> torch.Generator:
    if torch.device(device) == META:
        return _Stream().manual_seed(seed_for(seed, *labels))
    return generator(seed, *labels, device=device)


@contextlib.contextmanager
def device_without_values() -> Iterator[torch.device]:
    """Let injections work on models of the meta device in the body; gives that device."""
    place = sys.modules["ftnas.faults.inject"]
    real = torch.autocast

    def autocast(device: str, **options: Any) -> Any:
        return contextlib.nullcontext() if device == META.type else real(device, **options)

    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(drawing, "generator", _generator),
        mock.patch.object(place, "check", lambda *_: None),  # meta models are refused: they would hit nothing
        mock.patch.object(Tally, "check", lambda _: None),  # reads the hits back
        mock.patch.object(torch, "autocast", autocast),
    ):
        # PyTorch has none of its own
        for name in _AT_ONCE:
            library.impl(name, lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)), "Meta")
        yield META


class Operations(TorchDispatchMode):
    """The operations of the body, in their order: (part of the step, name, shape of the first result)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, tuple[int, ...]]] = []
        self._parts = ["network"]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in _FREE and not name.startswith("empty"):
            first = out[0] if isinstance(out, (tuple, list)) else out
            self.seen.append((self._parts[-1], name, tuple(getattr(first, "shape", ()))))
        return out

    def _within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._parts.pop()

        return call

    @contextlib.contextmanager
    def named(self) -> Iterator[Operations]:
        """Count in the body, and tell rounding, drawing and injection from the network."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in (
                (FixedPoint, "round", "rounding"),
                (FixedPoint, "at_once", "rounding"),
                (FixedPoint, "each_at_once", "rounding"),
                (FixedPoint, "grid", "rounding"),
                (Drawing, "_drawn", "drawing"),
                (Tally, "add", "drawing"),
                (Ahead, "begin", "drawing"),
                (Ahead, "expect", "drawing"),
                (Ahead, "meet", "drawing"),
                (Tally, "add_each", "drawing"),
                (Hits, "apply", "injection"),
                (Joint, "_hit", "injection"),
                (Together, "_round", "rounding"),
                (Drawing, "row", "drawing"),
                (Tally, "add_row", "drawing"),
                (Together, "_hit", "injection"),
            ):
                stack.enter_context(mock.patch.object(owner, name, self._within(part, getattr(owner, name))))
            stack.enter_context(self)
            yield self

    def by_part(self) -> dict[str, int]:
        """Return the number of operations of each part of the step."""
        found = Counter(part for part, _, _ in self.seen)
        return {part: found[part] for part in PARTS}


def step_of(run: str, stack: contextlib.ExitStack, device: torch.device) -> Callable[[], None]:
    """Return the forwards and backwards of one step of a run; a search trains the same genotype every time."""
    name, model_name = RUNS[run]
    config = read_config(name)
    model: nn.Module
    if model_name is None:
        assert config.search is not None
        space, recipe = load_space(config.search.space), config.search.weights
        with isolated(0, "count-operations"):
            model = Supernet(space, num_classes=CLASSES).to(device)
        genotype = Genotype.random(space, generator=generator(0, "count-operations"))
        forward: Callable[..., Any] = partial(model, genotype=genotype)
    else:
        assert config.train is not None
        recipe = config.train.recipe
        chosen = config.train.models[model_name]
        model = build(chosen, num_classes=CLASSES, in_channels=3, image_size=PIXELS, seed=0).to(device)
        forward = model
    model.train()
    injection = stack.enter_context(config.hardware.inject(model, seed=0, errors="soft", draw_on="device"))
    loss = FaultTolerantLoss(model, alpha_l=recipe.alpha_l, joint=run.endswith(", joint"))
    images = torch.zeros(IMAGES, 3, PIXELS, PIXELS, device=device)
    labels = torch.zeros(IMAGES, dtype=torch.int64, device=device)

    parameters = list(model.parameters())

    def step() -> None:
        loss.gradients(forward, injection, images, labels, parameters)

    return step


def count(run: str) -> Operations:
    """Return the operations of one step of a run, after a first that finds the feature points."""
    with contextlib.ExitStack() as stack:
        step = step_of(run, stack, stack.enter_context(device_without_values()))
        step()
        seen = stack.enter_context(Operations().named())
        step()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="(default: all)")
    parser.add_argument("--top", type=positive, default=0, help="also print the most frequent operations")
    parser.add_argument("--json", type=to_write, help="file for the result")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'step of':<20} {'all':>7}", *(f"{part:>10}" for part in PARTS))
    for run in options.only or RUNS:
        seen = count(run)
        parts = seen.by_part()
        found[run] = {"all": len(seen.seen), **parts}
        print(f"{run:<20} {len(seen.seen):>7}", *(f"{parts[part]:>10}" for part in PARTS), flush=True)
        for (part, name), number in Counter((part, name) for part, name, _ in seen.seen).most_common(options.top):
            print(f"  {number:>6} {part}: {name}")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
