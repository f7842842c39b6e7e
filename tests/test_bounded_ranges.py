"""Bounded ranges: parameter -> bound -> quantize -> fault -> saturation; feature -> bound -> quantize -> MiBB."""

import copy

import numpy as np
import pytest
import torch
from injected import ADSAF, create, drawn, images, snapshot
from torch import nn

import ftnas
from ftnas import FeatureBound, FixedPoint, WeightBound, bound, inject
from ftnas.faults import MiBB, WeightBitFlip
from ftnas.faults.bounds import Limits, Rule, saturated
from ftnas.faults.saturation import Saturation, saturations
from ftnas.quantize import Bounded


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def on_grid(x, limit, *, lowest=-128):
    """Clip to a power-of-two limit and round to 8 bits, the slow way."""
    lsb = limit / 128
    return (x.clamp(-limit, limit) / lsb).round().clamp(lowest, 127) * lsb


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("limit", [0.0625, 2.0])
def test_the_bound_is_the_range_of_weights(limit, learning):
    model, plain = create(chain), create(chain)
    bound(model, weights=WeightBound(value=limit, layers="conv2d"))
    with torch.set_grad_enabled(learning), inject(model, quantization=FixedPoint()):
        model(images())
        for name in ("0", "3"):
            weight = plain.get_submodule(name).weight
            assert (float(weight.detach().abs().max()) > limit) == (limit < 1)  # narrower, and wider, than the values
            assert torch.equal(model.get_submodule(name).weight, on_grid(weight, limit))
        assert torch.equal(model[5].weight, FixedPoint().quantize(plain[5].weight))


def test_stuck_cells_are_stuck_at_the_bound_and_the_function_comes_last():
    limit, form = 0.125, FixedPoint(encoding="sign_magnitude", range=Bounded(bound=0.125))
    model, plain = create(chain), create(chain)
    bound(model, weights=WeightBound(value=limit))
    ftnas.saturate(model, "tanh", scale=0.5)
    with torch.no_grad(), inject(model, ADSAF, quantization=FixedPoint(), seed=4) as injection:
        model(images())
        for name, macs in (("0", 27), ("3", 36), ("5", 32)):
            stored = on_grid(plain.get_submodule(name).weight, limit, lowest=-127)
            faulty, plan = drawn(ADSAF, stored, name, macs, seed=4, when="device", form=form)
            assert torch.equal(model.get_submodule(name).weight, torch.tanh(faulty / 0.5) * 0.5)
            assert len(plan.sites) and not torch.equal(faulty, stored)
            assert float(faulty.abs().max()) == pytest.approx(limit * 127 / 128)
    assert injection.record.hits > 0


def test_the_bound_is_the_range_of_features_after_batchnorm():
    limit = 0.5
    model, plain = create(chain), create(chain)
    bound(model, features=FeatureBound(value=limit))
    form = FixedPoint()
    with torch.no_grad():
        x = images()
        point = on_grid(plain[1](nn.functional.conv2d(x, form.quantize(plain[0].weight), plain[0].bias)), limit)
        second = on_grid(nn.functional.conv2d(point.relu(), form.quantize(plain[3].weight), plain[3].bias), limit)
        last = nn.functional.linear(second.flatten(1), form.quantize(plain[5].weight), plain[5].bias)
        with inject(model, quantization=form):
            assert torch.equal(model(x), form.quantize(last))


def test_mac_errors_are_as_large_as_the_bound_lets_them():
    limit, fault = 0.25, MiBB(mac_error_rate=0.01)
    model, plain = create(chain), create(chain)
    bound(model, features=FeatureBound(value={"0": limit}))
    form, seen = FixedPoint(), []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        x = images()
        clean = on_grid(plain[1](nn.functional.conv2d(x, form.quantize(plain[0].weight), plain[0].bias)), limit)
        ranged = FixedPoint(range=Bounded(bound=limit))
        faulty, _ = drawn(fault, clean, "0", 27, seed=2, form=ranged)
        with inject(model, fault, quantization=form, seed=2, layers="0"):
            model(x)
    assert torch.equal(seen[-1], faulty.relu()) and not torch.equal(faulty, clean)


def test_gradients_pass_inside_the_bound_and_move_a_learned_one():
    limit = 0.125
    for learned in (False, True):
        model, plain = create(chain), create(chain)
        bound(model, weights=WeightBound(value=limit, learned=learned, layers="3"))
        x = plain[2](plain[1](plain[0](images()))).detach()
        with inject(model):  # no number format: the bound alone
            model(images()).sum().backward()
        weight = plain[3].weight.detach().clone().requires_grad_()
        b = torch.tensor(limit, requires_grad=True)
        clipped = torch.minimum(torch.maximum(weight, -b), b)
        nn.functional.linear(
            nn.functional.conv2d(x, clipped, plain[3].bias).flatten(1), plain[5].weight
        ).sum().backward()
        torch.testing.assert_close(model[3].weight.grad, weight.grad)
        assert bool((weight.grad == 0).any()) and bool((weight.grad != 0).any())
        if learned:
            torch.testing.assert_close(model[3].weight_bound.grad, b.grad)
            assert float(b.grad) != 0.0


NUMPY = {
    "tanh": lambda x, b: b * np.tanh(x / b),
    "arctan": lambda x, b: 2 * b / np.pi * np.arctan(np.pi * x / (2 * b)),
    "softsign": lambda x, b: x / (1 + np.abs(x) / b),
}


@pytest.mark.parametrize("function", NUMPY)
def test_a_function_keeps_features_within_their_range(function):
    limit = 0.5
    model, plain = create(chain), create(chain)
    bound(model, features=FeatureBound(value=limit, function=function, layers="0"))
    seen = []
    model[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    form = FixedPoint()
    with torch.no_grad():
        x = images()
        point = plain[1](nn.functional.conv2d(x, form.quantize(plain[0].weight), plain[0].bias))
        exact = NUMPY[function](point.double().numpy(), limit)
        with inject(model, quantization=form):
            model(x)
    read = seen[-1].double().numpy()
    lsb = limit / 128
    assert np.abs(read / lsb - np.round(read / lsb)).max() == 0.0 and np.abs(read).max() <= limit
    assert np.abs(read - exact).max() <= lsb * (1.0 + 1e-4)  # half of it by rounding, all of it at the upper end
    assert np.abs(point.numpy()).max() > 2 * limit
    assert np.abs(read - exact)[exact < limit - lsb].max() <= lsb * (0.5 + 1e-4)


@pytest.mark.parametrize("function", NUMPY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_functions_of_large_features_of_short_numbers(function, dtype):
    x = torch.tensor([300.0, -1000.0, 30000.0], dtype=dtype, requires_grad=True)
    out = saturated(x, torch.tensor(512.0), Rule(function))
    exact = NUMPY[function](x.detach().double().numpy(), 512.0)
    assert (
        out.dtype == dtype and np.abs(out.detach().double().numpy() / exact - 1).max() <= torch.finfo(dtype).eps * 1.5
    )
    out.sum().backward()
    assert x.grad[0] > 0 > x.grad[1] - 1 and x.grad.isfinite().all()


@pytest.mark.parametrize("function", NUMPY)
def test_slope_and_limits_of_the_functions_of_features(function):
    limit = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.0, 0.3, -2.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64, requires_grad=True)
    out = saturated(x, limit, Rule(function, zeroes_nan=True))
    ends = out.detach()[3:].numpy()
    assert ends[0] == -ends[1] == pytest.approx(0.5) and ends[2] == 0.0
    assert saturated(x, limit, Rule(function))[5].isnan()
    out[:3].sum().backward()
    assert x.grad[0] == pytest.approx(1.0) and bool(x.grad.isfinite().all())
    step, values = 1e-6, x.detach().numpy()[:3]
    below, above = (NUMPY[function](values, 0.5 + sign * step).sum() for sign in (-1, 1))
    assert float(limit.grad) == pytest.approx((above - below) / (2 * step), rel=1e-6)


def test_nan_features_are_read_as_zero_and_counted():
    model = create(chain)
    bound(model, features=FeatureBound(value=1.0, nan="zero"))
    x = images()
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        with inject(model) as injection:
            out = model(x)
        reached = int(chain()[0](x).isnan().sum())
    assert injection.record.features_zeroed == reached > 0 and bool(out.isfinite().all())


def test_a_learned_bound_that_is_no_power_of_two_has_the_next_one_as_its_range():
    model, plain = create(chain), create(chain)
    bound(model, weights=WeightBound(value=0.1, learned=True))
    with torch.no_grad(), inject(model, quantization=FixedPoint()):
        model(images())
        assert torch.equal(model[0].weight, (plain[0].weight.clamp(-0.1, 0.1) * 1024).round() / 1024)


@pytest.mark.parametrize("learned", [False, True])
def test_weights_beyond_the_bound_may_return(learned):
    """With number formats, whose own range ends where the bound does."""
    limit, direction = 0.125, torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    model = create(chain)
    bound(model, weights=WeightBound(value=limit, learned=learned, outside="return", layers="3"))
    weight = model[3].weight.detach().clone()
    with inject(model, quantization=FixedPoint(encoding="sign_magnitude")):
        model(images())
        (model[3].weight * direction).sum().backward()
    beyond, back = weight.abs() > limit, direction * weight > 0
    assert bool((beyond & back).any()) and bool((beyond & ~back).any())
    assert torch.equal(model[3].weight.grad, torch.where(beyond & ~back, 0.0, direction))
    if learned:
        expected = (direction * weight.sign())[beyond].sum()
        torch.testing.assert_close(model[3].weight_bound.grad, expected)


def test_a_learned_bound_moves_although_the_format_ends_where_it_does():
    """The straight-through gradient of rounding is 0 at the end of the range, where all that was clipped lies."""
    limit = 0.125
    model = create(chain)
    bound(model, weights=WeightBound(value=limit, learned=True), features=FeatureBound(value=limit, learned=True))
    with inject(model, quantization=FixedPoint(encoding="sign_magnitude")):
        model(images()).square().sum().backward()
    for name in ("0", "3"):
        layer = model.get_submodule(name)
        assert float(layer.weight_bound.grad) != 0.0 and float(layer.feature_bound.grad) != 0.0


def test_floats_are_clipped_before_the_fault():
    model = create(chain)
    bound(model, weights=WeightBound(value=0.125))
    with torch.no_grad(), inject(model, WeightBitFlip(bit_error_rate=0.0, dtype="fp32")):
        model(images())
        assert torch.equal(model[0].weight, create(chain)[0].weight.clamp(-0.125, 0.125))


def test_bounds_of_deviations_state_copies_and_no_trace():
    model = create(chain)
    with torch.no_grad():
        model[3].weight.normal_(std=7.0)
    limits = Limits(
        weight_bound=WeightBound(std_multiple=2.0), saturation=Saturation(function="tanh", std_multiple=4.0)
    )
    plain = copy.deepcopy(model)
    limits.apply(model)
    # of convolutions alone: a classifier may start next to zero
    assert not hasattr(model[5], "weight_bound") and set(saturations(model)) == {"0", "3"}
    for name in ("0", "3"):
        target = 2 * float(plain.get_submodule(name).weight.detach().std(correction=0))
        found = float(model.get_submodule(name).weight_bound)
        assert found / 2**0.5 <= target <= found * 2**0.5 and torch.frexp(torch.tensor(found)).mantissa == 0.5
    other = create(chain)
    bound(other, weights=WeightBound(value=1.0, layers="conv2d"))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("saturation")})
    assert torch.equal(other[3].weight_bound, model[3].weight_bound)
    assert torch.equal(copy.deepcopy(model)[0].weight_bound, model[0].weight_bound)
    before = snapshot(model)
    with torch.no_grad(), inject(model, quantization=FixedPoint()):
        model(images())
    assert snapshot(model) == before


def test_mistakes_are_one_line():
    model = create(chain)
    with pytest.raises(ValueError, match="weights=WeightBound"):
        bound(model)
    with pytest.raises(ValueError, match="matches no layer"):
        bound(model, weights=WeightBound(value=1.0, layers="conv9"))
    bound(model, features=FeatureBound(value=1.0))
    with pytest.raises(ValueError, match="layer '0' has a feature_bound already"):
        bound(model, features=FeatureBound(value=2.0))
    for settings in ({}, {"value": 1.0, "std_multiple": 1.0}):
        with pytest.raises(ValueError, match="one of the two"):
            WeightBound(**settings)
    for kind in (WeightBound, FeatureBound):
        with pytest.raises(ValueError, match="remove layers, or give one value"):
            kind(value={"0": 1.0}, layers="0")
