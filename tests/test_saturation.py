"""Saturated weights: stored format -> fault -> s * f(w / s) -> layer."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from injected import create, images, rounded, snapshot
from torch import nn

import ftnas
from ftnas import FixedPoint, inject, rng
from ftnas.faults import AdSAF, Plan, PlanSet, WeightBitFlip
from ftnas.faults.saturation import Saturation, check_functions, power_of_two, saturations

NUMPY = {"tanh": np.tanh, "arctan": np.arctan, "softsign": lambda x: x / (1 + np.abs(x))}
RANGE = {"tanh": 1.0, "arctan": math.pi / 2, "softsign": 1.0}


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def stored(model, layer):
    module = model.get_submodule(layer)
    return module.parametrizations.weight.original


def one_flip(layer, weight, index, bit, fault):
    """The plans of one flip of one bit of one word."""
    rate, bits = 0.0, 8 * weight.element_size()
    site = torch.tensor([bit * weight.numel() + index])
    plan = Plan(site, torch.zeros_like(site), bits * weight.numel(), rate, tuple(weight.shape))
    return PlanSet((fault,), {(0, layer, 0): plan})


@pytest.mark.parametrize("function", NUMPY)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_the_function_is_that_of_numpy(function, scale):
    model = create(chain)
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    ftnas.saturate(model, function, scale=scale)
    for name in ("0", "3", "5"):
        w = plain[f"{name}.weight"].double().numpy()
        expected = scale * NUMPY[function](w / scale)
        read = model.get_submodule(name).weight
        assert torch.equal(stored(model, name), plain[f"{name}.weight"])
        assert float((read.detach().double() - torch.from_numpy(expected)).abs().max()) < 1e-6 * scale
        assert torch.equal(model.get_submodule(name).bias, plain[f"{name}.bias"])


@pytest.mark.parametrize("function", NUMPY)
def test_every_float_becomes_bounded_and_gradients_stay_finite(function):
    layer = nn.Linear(8, 1, bias=False)
    odd = [0.0, 1e-30, 0.5, -2.0, 3.4e38, -3.4e38, math.inf, -math.inf]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([odd]))
    ftnas.saturate(layer, function, scale=0.125)
    read = layer.weight
    read.sum().backward()
    assert float(read.detach().abs().max()) <= 0.125 * RANGE[function] * (1 + 1e-6)
    assert bool((read.sign() == torch.tensor([odd]).sign()).all())
    gradient = layer.parametrizations.weight.original.grad
    assert bool(gradient.isfinite().all()) and torch.equal(gradient[0, 4:], torch.zeros(4))


@pytest.mark.parametrize("function", NUMPY)
def test_the_gradient_is_that_of_the_table(function):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    layer = nn.Linear(13, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(x)
    ftnas.saturate(layer, function, scale=0.5)
    layer.weight.sum().backward()
    u = x / 0.5
    table = {"tanh": 1 - u.tanh() ** 2, "arctan": 1 / (1 + u**2), "softsign": 1 / (1 + u.abs()) ** 2}[function]
    torch.testing.assert_close(layer.parametrizations.weight.original.grad[0], table)


@pytest.mark.parametrize("nan", ["zero", "keep"])
def test_nan_is_zero_or_stays_and_is_counted(nan):
    model = create(chain)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = 1.5  # exponent 127: the highest bit of it makes a NaN
    ftnas.saturate(model, "tanh", nan=nan)
    plans = one_flip("3", model[3].weight, 0, 30, WeightBitFlip(bit_error_rate=0.0, dtype="fp32"))
    with torch.no_grad(), inject(model, plans=plans) as injection:
        out = model(images())
        read = model[3].weight[0, 0, 0, 0]
    assert (injection.record.nonfinite, injection.record.nan) == (1, 1)
    assert injection.record.nan_zeroed == (nan == "zero")
    assert bool(read == 0.0 if nan == "zero" else read.isnan())
    assert bool(out.isfinite().all()) == (nan == "zero")


def test_a_fault_hits_the_stored_value():
    model, plain = create(chain), create(chain)
    ftnas.saturate(model, "softsign", scale=0.5)
    index, bit = 5, 30
    plans = one_flip("3", plain[3].weight, index, bit, WeightBitFlip(bit_error_rate=0.0, dtype="fp32"))
    words = plain[3].weight.detach().numpy().copy()
    words.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
    expected = torch.from_numpy(words / (1 + np.abs(words.astype(np.float64)) / 0.5)).float()
    with torch.no_grad(), inject(model, plans=plans):
        model(images())
        read = model[3].weight.clone()
    torch.testing.assert_close(read, expected, rtol=1e-6, atol=1e-7)
    assert abs(float(words.reshape(-1)[index])) > 1e30 and float(read.abs().max()) <= 0.5


def test_quantization_comes_before_the_function():
    model, plain = create(chain), create(chain)
    ftnas.saturate(model, "tanh", layers="conv2d")
    with torch.no_grad(), inject(model, quantization=FixedPoint()):
        model(images())
        for name in ("0", "3"):
            assert torch.equal(model.get_submodule(name).weight, rounded(plain.get_submodule(name).weight).tanh())
        assert torch.equal(model[5].weight, rounded(plain[5].weight))


@pytest.mark.parametrize("fault", [WeightBitFlip(bit_error_rate=0.02), AdSAF(sa0_rate=0.1, sa1_rate=0.1)])
@pytest.mark.parametrize("learning", [False, True])
def test_the_faults_are_those_of_the_plain_model(fault, learning):
    model, plain = create(chain), create(chain)
    ftnas.saturate(model, "arctan", scale=0.25)
    seen = []
    for network in (model, plain):
        with torch.set_grad_enabled(learning), inject(network, fault, quantization=FixedPoint(), seed=3) as injection:
            network(images())
            seen.append({name: network.get_submodule(name).weight.detach().clone() for name in ("0", "3", "5")})
            hits = injection.record.hits
    assert hits > 0
    for name, weight in seen[1].items():
        assert torch.equal(seen[0][name], torch.atan(weight / 0.25) * 0.25)


def test_folded_weights_compute_the_same_and_leave_no_trace():
    model, x = create(chain), images()
    before = snapshot(model)
    ftnas.saturate(model, "tanh", scale=0.5)
    with torch.no_grad():
        expected = model(x)
        assert ftnas.unsaturate(model) is model
        assert torch.equal(model(x), expected)
    after = snapshot(model)
    for key in before.keys() - {"values", "parameters"}:
        assert after[key] == before[key], key
    assert [entry[:2] + entry[3:] for entry in after["parameters"]] == [e[:2] + e[3:] for e in before["parameters"]]


def test_an_injection_leaves_no_trace_in_a_saturated_model():
    model = ftnas.saturate(create(chain), "tanh")
    before = snapshot(model)
    with torch.no_grad(), inject(model, WeightBitFlip(bit_error_rate=0.01), quantization=FixedPoint()):
        inside = list(model.state_dict())
        model(images())
    assert snapshot(model) == before and inside == list(model.state_dict())


def test_state_has_plain_names_and_knows_its_function():
    model, plain = ftnas.saturate(create(chain), "tanh", scale=0.5, layers="conv2d"), create(chain, seed=1)
    state = model.state_dict()
    assert set(state) == {*plain.state_dict(), "0.saturation", "3.saturation"}
    assert torch.equal(state["0.weight"], stored(model, "0"))
    again = ftnas.saturate(create(chain, seed=2), "tanh", scale=0.5, layers="conv2d")
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    again.load_state_dict(plain.state_dict())  # where fine-tuning starts
    assert torch.equal(stored(again, "3"), plain[3].weight)
    for function, scale in (("softsign", 0.5), ("tanh", 1.0)):
        other = ftnas.saturate(create(chain), function, scale=scale, layers="conv2d")
        with pytest.raises(ValueError, match="trained with another function: layer '0' is saturated by"):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"x.pt: the state was trained with another function") as caught:
            check_functions(other, state, where="x.pt")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="layer '0' was trained saturated by tanh scale=0.5, and here it is not"):
        check_functions(plain, state, where="x.pt")


def test_copies_and_pickles_are_whole():
    model, x = ftnas.saturate(create(chain), "softsign", scale=0.5, nan="keep", layers=("0", "5")), images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(x), model(x))
            assert stored(other, "0").data_ptr() != stored(model, "0").data_ptr()
        assert list(other.state_dict()) == list(model.state_dict())
        assert {n: (s.identity, s.zeroes_nan) for n, s in saturations(other).items()} == {
            "0": ("softsign scale=0.5", False),
            "5": ("softsign scale=0.5", False),
        }
        other.load_state_dict(model.state_dict())
        ftnas.unsaturate(other)
        assert set(other.state_dict()) == set(create(chain).state_dict())
    assert set(saturations(model)) == {"0", "5"}


def test_a_saturated_model_compiles():
    model, x = ftnas.saturate(create(chain), "tanh"), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_training_moves_the_stored_weights():
    model = ftnas.saturate(create(chain), "tanh", scale=0.5).train()
    before = stored(model, "0").detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fault = WeightBitFlip(bit_error_rate=0.001, dtype="fp32")
    with inject(model, fault, errors="soft", seed=1) as injection:
        for _ in range(5):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
    assert injection.record.hits > 0
    assert not torch.equal(stored(model, "0"), before) and bool(stored(model, "0").isfinite().all())


def test_settings_and_scales_by_layer():
    model = create(chain)
    Saturation(function="tanh", scale={"conv2d": 0.5, "5": 2.0}).apply(model)
    assert {name: found.scale for name, found in saturations(model).items()} == {"0": 0.5, "3": 0.5, "5": 2.0}
    model = create(chain)
    with torch.no_grad():
        model[3].weight.mul_(100.0)
    wanted = Saturation(function="tanh", std_multiple=2.0, layers="conv2d")
    expected = {
        name: power_of_two(2 * float(model.get_submodule(name).weight.detach().std(correction=0)))
        for name in ("0", "3")
    }
    wanted.apply(model)
    assert {name: found.scale for name, found in saturations(model).items()} == expected
    again = create(chain, seed=5)
    wanted.resolved(model).apply(again)
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="takes the place of scale"):
        Saturation(function="tanh", std_multiple=2.0, scale=3.0)
    with pytest.raises(ValueError, match="remove layers"):
        Saturation(function="tanh", scale={"0": 1.0}, layers="0")
    assert [power_of_two(v) for v in (0.3, 0.36, 1.0, 0.0)] == [0.25, 0.5, 1.0, 1.0]


def test_mistakes_are_one_line():
    model = create(chain)
    for kwargs, message in (
        ({"function": "tan"}, "unknown saturation function 'tan'; did you mean 'tanh'"),
        ({"function": "tanh", "layers": "conv9"}, "layers='conv9' matches no layer"),
        ({"function": "tanh", "scale": 0.0}, "a number above 0, got 0.0"),
        ({"function": "tanh", "nan": "drop"}, "nan must be 'zero' or 'keep', got 'drop'"),
    ):
        with pytest.raises(ValueError, match=message):
            ftnas.saturate(model, **kwargs)
    assert not saturations(model)
    with pytest.raises(ValueError, match="nothing to fold"):
        ftnas.unsaturate(model)
    with pytest.raises(ValueError, match="ReLU has no Conv2d or Linear"):
        ftnas.saturate(nn.ReLU(), "tanh")
    ftnas.saturate(model, "tanh", layers="3")
    with pytest.raises(ValueError, match=r"layer '3' is saturated already \(tanh scale=1.0\)"):
        ftnas.saturate(model, "softsign")
    assert set(saturations(model)) == {"3"}
    with torch.no_grad(), inject(model, quantization=FixedPoint()):
        model(images())
        with pytest.raises(ValueError, match="inside inject"):
            ftnas.saturate(model, "tanh", layers="0")
        with pytest.raises(ValueError, match="inside inject"):
            ftnas.unsaturate(model)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def test_a_parametrization_of_the_models_own_comes_before_the_memory():
    model, plain = create(chain), create(chain)
    torch.nn.utils.parametrize.register_parametrization(model[3], "weight", Doubled())
    ftnas.saturate(model, "tanh", layers="3")
    before = snapshot(model)
    with torch.no_grad(), inject(model, quantization=FixedPoint()):
        model(images())
        assert torch.equal(model[3].weight, rounded(2.0 * plain[3].weight).tanh())
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="layer '3' has a parametrization of its own"):
        ftnas.unsaturate(model)


def tied(function=None, *, layers=None):
    with rng.isolated(0, "tied"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    if function is not None:
        ftnas.saturate(model, function, layers=layers)
    return model


def test_a_weight_that_layers_share_is_folded_once():
    model, x = tied("tanh"), torch.randn(3, 4)
    before = model(x)
    ftnas.unsaturate(model)
    assert torch.equal(model(x), before) and model[0].weight is model[2].weight


@pytest.mark.parametrize("other", ["plain", "softsign", "embedding"])
def test_a_weight_that_layers_read_in_two_ways_is_not_folded(other):
    model = tied("tanh", layers="0")
    if other == "softsign":
        ftnas.saturate(model, "softsign", layers="2")
    if other == "embedding":
        model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)])
        model[1].weight = model[0].weight
        ftnas.saturate(model, "tanh")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shares? (a|its) weight.*give them weights of their own"):
        ftnas.unsaturate(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
