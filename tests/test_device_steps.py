"""What a training step asks of a device: nothing that waits for a value, the same operations in every step, few."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from faulty import CASES
from torch import nn

from ftnas.faults import AdSAF
from ftnas.faults.hardware import Hardware
from ftnas.quantize import FixedPoint
from ftnas.rng import isolated
from ftnas.train import FaultTolerantLoss

SCRIPT = Path(__file__).parent.parent / "scripts" / "count_operations.py"
ADSAF = AdSAF(cells="differential", stuck_at="max")


@pytest.fixture(scope="module")
def counting():
    spec = importlib.util.spec_from_file_location("count_operations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 5),
        )  # fmt: skip


class Steps:
    """Fault-tolerant forwards and backwards of a small network."""

    def __init__(self, fault, device="cpu"):
        self.model = net().to(device)
        self.injection = Hardware(fault=fault).inject(self.model, seed=0, errors="soft", draw_on="device")
        self.loss = FaultTolerantLoss(self.model, alpha_l=0.5)
        self.images = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).to(device)
        self.labels = torch.arange(4, device=device)

    def __call__(self):
        self.model.zero_grad(set_to_none=True)
        losses = self.loss(self.model, self.injection, self.images, self.labels)
        losses.total.backward()
        return losses


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_a_value_and_all_ask_for_the_same(counting, case):
    with counting.device_without_values() as device:  # what reads a value raises here
        steps = Steps(CASES[case], device)
        with steps.injection:
            steps()  # finds the feature points
            seen = []
            for _ in range(2):
                with counting.Operations().named() as operations:
                    steps()
                seen.append(operations.seen)
    assert seen[0] == seen[1]
    parts = operations.by_part()
    assert min(parts["drawing"], parts["injection"], parts["network"]) > 0


def test_what_reads_a_value_is_found(counting, monkeypatch):
    real = FixedPoint.grid
    monkeypatch.setattr(FixedPoint, "grid", lambda self, x: (float(x.amax()), real(self, x))[1])
    with counting.device_without_values() as device:
        steps = Steps(ADSAF, device)
        with steps.injection, pytest.raises(RuntimeError, match="meta"):
            steps()


def test_a_weight_is_rounded_once_for_both_forwards(monkeypatch):
    steps, rounded = Steps(ADSAF), []
    real = FixedPoint.round

    def spy(self, x, **options):
        rounded.append(tuple(x.shape))
        return real(self, x, **options)

    monkeypatch.setattr(FixedPoint, "round", spy)
    with steps.injection:
        steps()
    for layer in steps.injection._layers.values():
        assert rounded.count(tuple(layer.weight.shape)) == 1


@pytest.mark.parametrize("fault", [ADSAF, CASES["mibb"], CASES["bit_adsaf"], CASES["flip"]])
def test_sharing_roundings_changes_nothing(fault):
    found = []
    for shares in (True, False):
        steps = Steps(fault)
        with steps.injection as injection:
            if not shares:
                injection.weights_shared = contextlib.nullcontext
            losses = steps()
        found.append([losses.clean, losses.faulty, *(p.grad for p in steps.model.parameters())])
    for shared, alone in zip(*found, strict=True):
        assert torch.equal(shared, alone)


def test_the_script_counts_a_shipped_training(counting, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["count_operations.py", "--only", "VGG-16", "--top", "3"])
    counting.main()
    lines = capsys.readouterr().out.splitlines()
    total, *parts = (int(word) for word in lines[1].split()[1:])
    assert total == sum(parts) > 0
    assert len(lines) == 5
