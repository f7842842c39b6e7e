"""Range restriction: what lies beyond a layer's bound is clipped, before quantization and after a fault."""

import pytest
import torch
from injected import create, images, snapshot
from torch import nn

from ftnas import FixedPoint, inject
from ftnas.faults import MiBB, NeuronByzantine, WeightBitFlip


def chain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def test_features_are_clipped_where_a_bound_is_given():
    model, x = create(chain), images()
    with torch.no_grad():
        expected = model[3](model[2](model[1](model[0](x)).clamp(-0.3, 0.3)))
        with inject(model, bounds={"0": 0.3}):
            assert torch.equal(model(x), expected)
        plain = model(x)
        with inject(model, bounds={"0": 1e30, "3": 1e30}):
            assert torch.equal(model(x), plain)


def test_the_bound_decides_the_grid():
    model, x, form = create(chain), images(), FixedPoint()
    with torch.no_grad():
        point = form.quantize(
            model[1](nn.functional.conv2d(x, form.quantize(model[0].weight), model[0].bias)).clamp(-0.3, 0.3)
        )
        last = nn.functional.conv2d(point.relu(), form.quantize(model[3].weight), model[3].bias)
        with inject(model, bounds={"0": 0.3}, quantization=form):
            assert torch.equal(model(x), form.quantize(last))


def test_what_a_fault_makes_is_clipped_and_nan_is_zero():
    model, x = create(chain), images()
    lies = NeuronByzantine(rate=0.2, capacity=100.0)
    with torch.no_grad(), inject(model, lies, bounds={"3": 2.0}, layers="3", seed=3):
        faulty = model(x)
    assert float(faulty.abs().max()) == 2.0
    with torch.no_grad(), inject(model, MiBB(mac_error_rate=0.05), bounds={"3": 0.25}, quantization=FixedPoint()):
        assert float(model(x).abs().max()) <= 0.25
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
        with inject(model, bounds={"3": 2.0}):
            assert torch.equal(model(x)[:, 0], torch.zeros_like(faulty[:, 0]))


def test_gradients_pass_inside_the_bound_alone():
    model, x = create(chain), images().requires_grad_()
    with inject(model, bounds={"3": 0.8}):
        out = model(x)
        out.sum().backward()
    assert bool((x.grad != 0).any()) and bool((out.abs() == 0.8).any())
    plain = torch.zeros_like(x).requires_grad_()
    with torch.no_grad():
        plain.copy_(x)
    model(plain).clamp(-0.8, 0.8).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_floats_that_explode_are_held():
    model, x = create(chain), images()
    flips = WeightBitFlip(bit_error_rate=0.02, dtype="fp32")
    with torch.no_grad():
        with inject(model, flips, seed=1):
            wild = model(x)
        with inject(model, flips, seed=1, bounds={"0": 3.0, "3": 3.0}):
            held = model(x)
    assert not bool((wild.abs() < 1e6).all()) and float(held.abs().max()) <= 3.0


def test_no_trace_and_clear_mistakes():
    model = create(chain)
    before = snapshot(model)
    with torch.no_grad(), inject(model, bounds={"0": 1.0}):
        model(images())
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="the model has no layer '4'"):
        inject(model, bounds={"4": 1.0})
    with pytest.raises(ValueError, match="needs a bound above 0, got -1"):
        inject(model, bounds={"0": -1.0})
