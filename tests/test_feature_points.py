"""Where features are stored: read off the data flow, whatever the order of definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftnas import inject
from ftnas.dataflow import trace_feature_points
from ftnas.faults import MiBB
from ftnas.quantize import FixedPoint


def points(model, *shape):
    found = trace_feature_points(model, (torch.randn(*shape),), {})
    return {f"{layer}#{call}": f"{point}#{index}" for (layer, call), (point, index) in found.points.items()}


class Reversed(nn.Module):
    """Defined in the opposite order of execution."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.norm_b = nn.BatchNorm2d(4)
        self.norm_a = nn.BatchNorm2d(4)
        self.conv_b = nn.Conv2d(4, 4, 1)
        self.conv_a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = F.relu(self.norm_a(self.conv_a(x)), inplace=True)
        x = F.relu(self.norm_b(self.conv_b(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """One output normalised twice, one normalised and added, one normalised alone, one normalised and returned."""

    def __init__(self):
        super().__init__()
        self.twice, self.added, self.alone, self.returned = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x):
        a, b, c, d = self.twice(x), self.added(x), self.alone(x), self.returned(x)
        total = self.norms[0](a) + self.norms[1](a) + self.norms[2](b) + b + self.norms[3](c) + self.norms[4](d)
        return total, d


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(F.relu(self.norm(self.conv(x))))


def test_plain_and_separable_and_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2),
    )  # fmt: skip
    expected = {"0#0": "1#0", "3#0": "3#0", "4#0": "5#0", "7#0": "7#0", "11#0": "12#0", "13#0": "13#0"}
    for training in (True, False):
        assert points(model.train(training), 4, 3, 8, 8) == expected


def test_the_order_of_definition_does_not_matter():
    expected = {"conv_a#0": "norm_a#0", "conv_b#0": "norm_b#0", "head#0": "head#0"}
    assert points(Reversed().eval(), 2, 3, 4, 4) == expected


def test_a_batch_norm_must_be_the_only_consumer():
    expected = {"twice#0": "twice#0", "added#0": "added#0", "alone#0": "norms.3#0", "returned#0": "returned#0"}
    assert points(Branches().eval(), 2, 3, 4, 4) == expected


def test_each_call_of_a_module_has_its_own_feature_point():
    assert points(Twice().eval(), 2, 3, 4, 4) == {"conv#0": "norm#0", "conv#1": "conv#1"}


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.MaxPool2d(1), nn.Dropout(0.5)])
def test_anything_in_between_keeps_the_batch_norm_apart(between):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.BatchNorm2d(4)).eval()
    assert points(model, 2, 3, 4, 4) == {"0#0": "0#0"}


def test_an_identity_in_between_does_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4)).eval()
    assert points(model, 2, 3, 4, 4) == {"0#0": "2#0"}


class Switched(nn.Module):
    """Runs one of two paths."""

    def __init__(self):
        super().__init__()
        self.first = True
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.a(x)) if self.first else self.b(x)


def test_a_path_that_was_not_traced_must_be_declared():
    model, x = Switched().eval(), torch.randn(2, 3, 4, 4)
    with inject(model, quantization=FixedPoint()):
        model(x)
        model.first = False
        with pytest.raises(RuntimeError, match=r"layer 'b' runs now .* must declare feature_points\(\)"):
            model(x)

    class Declared(Switched):
        def feature_points(self):
            return {"a": "norm"}

    model = Declared().eval()
    with inject(model, MiBB(mac_error_rate=0.1), quantization=FixedPoint()) as injection:
        model(x)
        assert injection.record.layers == ("a",)
        model.first = False
        model(x)
    assert injection.record.layers == ("a", "b")


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_no_trace(training):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.drop = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Dropout(0.5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            x.add_(1.0)
            self.seen = self.seen + 1  # a new tensor in the buffer's place
            return self.drop(self.conv(self.norm(x)))

    model = Model().train(training)
    x = torch.randn(5, 3, 4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    rng, batch = torch.get_rng_state(), x.clone()
    trace_feature_points(model, (x,), {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_needs_its_whole_batch_is_traced_on_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return self.linear(x.view(5, 6))

    assert points(Fixed(), 5, 2, 3) == {"linear#0": "linear#0"}
