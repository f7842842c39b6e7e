"""Buffer values: what activation functions, modules or not, in place or not, write for the next layers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from faulty import site_of
from injected import FIXED, MIBB, create, gen, images, rounded, snapshot
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ftnas import inject
from ftnas.dataflow import trace_feature_points
from ftnas.faults import FeatureBitFlip, NeuronByzantine, NeuronCrash
from ftnas.rng import generator

FLIPS = FeatureBitFlip(bit_error_rate=0.05)
CRASH = NeuronCrash(rate=0.3)


def ignored(x):
    """In place, by a call whose return value nobody uses."""
    F.relu_(x)
    return x


def ignored_method(x):
    x.relu_()
    return x


ACTIVATIONS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "F.relu_, result ignored": ignored,
    "x.relu_, result ignored": ignored_method,
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "nn.SiLU": nn.SiLU(),
    "nn.SiLU in place": nn.SiLU(inplace=True),
    "nn.LeakyReLU in place": nn.LeakyReLU(0.1, inplace=True),
    "tanh": torch.tanh,
}


class Net(nn.Module):
    """Two convolutions with an activation function, a module or not, in between."""

    def __init__(self, activation, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.activation = activation
        self.last = nn.Conv2d(4, 2, 1)
        self.seen: torch.Tensor | None = None

    def forward(self, x):
        self.seen = self.activation(self.norm(self.conv(x)))
        return self.last(self.seen)


def net(name, norm=False):
    return create(lambda: Net(ACTIVATIONS[name], norm))


def naive(fault, values, grid, layer="conv", seed=0, draw=0):
    site = site_of(shape=values.shape, layer=layer)
    plan = fault.sample(site, generator=generator(seed, fault.name, 0, draw, layer, 0))
    return fault.apply(values, plan, grid=grid), plan


def by_hand(model, x, name, fault):
    """Return what the buffer after the activation holds, from the raw feature; and the raw feature."""
    raw = model.norm(F.conv2d(x, rounded(model.conv.weight.detach()), model.conv.bias, padding=1)).detach()
    y = ACTIVATIONS[name](rounded(raw).clone())
    is_relu = "elu" in name and "6" not in name and "Leaky" not in name
    grid = FIXED.grid(raw if is_relu else y)  # ReLU keeps the grid of its input, others get one of their own
    if not is_relu and fault.needs_quantization:
        y = rounded(y)
    return naive(fault, y, grid)[0], raw


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("fault", [FLIPS, CRASH], ids=["flips", "crash"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_output_of_the_activation_is_hit(name, fault, learning, norm):
    model, x = net(name, norm), images()
    expected, _ = by_hand(model, x, name, fault)
    with torch.set_grad_enabled(learning), inject(model, fault, quantization=FIXED, layers="conv") as injection:
        model(x)
        assert torch.equal(model.seen.detach(), expected)
        model(x)  # a second forward of one injection
    assert injection.record.sites == 2 * expected.numel() * (8 if fault is FLIPS else 1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("fault", [FLIPS, CRASH], ids=["flips", "crash"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_those_of_a_naive_computation(name, fault, mask):
    model, x = net(name), images()
    expected, raw = by_hand(model, x, name, fault)
    with inject(model, fault, quantization=FIXED, layers="conv", mask_gradients=mask) as injection:
        out = model(x)
        upstream = torch.randn(out.shape, generator=gen(5))
        out.backward(upstream)
    plan = injection.plans().plans[0, "conv", 0]
    # the same with autograd: rounding passes gradients where nothing is clamped, faults pass them unless masked
    weight = model.conv.weight.detach().requires_grad_()
    lsb = FIXED.grid(raw).lsb
    f = F.conv2d(x, rounded(model.conv.weight.detach()) + weight - weight.detach(), model.conv.bias.detach(), padding=1)
    f = torch.where((raw / lsb).round() <= 127, f, f.detach())
    f = rounded(raw) + f - f.detach()
    y = ACTIVATIONS[name](f.clone())
    if fault.needs_quantization and not torch.equal(rounded(y.detach()), y.detach()):
        grid = FIXED.grid(y.detach())
        y = torch.where(
            (y.detach() / grid.lsb).round().clamp(grid.lo, grid.hi) == (y.detach() / grid.lsb).round(), y, y.detach()
        )
    if mask:
        hit = torch.zeros(y.numel(), dtype=torch.bool)
        hit[plan.values_hit()] = True
        y = torch.where(hit.view_as(y), y.detach(), y)
    y = expected + y - y.detach()
    last = F.conv2d(y, rounded(model.last.weight.detach()), model.last.bias.detach())
    unclamped = (last.detach() / FIXED.grid(last.detach()).lsb).round() <= 127
    last.backward(upstream * unclamped)
    inside = (model.conv.weight.detach() / FIXED.grid(model.conv.weight.detach()).lsb).round() <= 127
    assert model.conv.weight.grad.isfinite().all() and bool(model.conv.weight.grad.any())
    assert torch.allclose(model.conv.weight.grad, weight.grad * inside, rtol=1e-4, atol=1e-4)


def test_a_skip_that_aliases_the_buffer_reads_what_is_stored_and_the_batch_stays_clean():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            skip = F.relu_(self.stem(x))
            self.body = self.conv(skip)
            self.skip = skip
            return self.body + skip + x

    model, x = create(Skip), images()
    before = x.clone()
    for learning in (False, True):
        with torch.set_grad_enabled(learning), inject(model, FLIPS, quantization=FIXED, layers="stem"):
            out = model(x)
        raw = F.conv2d(x, rounded(model.stem.weight.detach()), model.stem.bias).detach()
        y, _ = naive(FLIPS, F.relu(rounded(raw)), FIXED.grid(raw), layer="stem")
        assert torch.equal(model.skip.detach(), y)
        body = rounded(F.conv2d(y, rounded(model.conv.weight.detach()), model.conv.bias).detach())
        assert torch.equal(out.detach(), body + y + x) and torch.equal(x, before)


def test_an_activation_of_the_batch_itself_or_of_a_sum_is_not_met():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.relu(self.a(F.relu(x)) + self.b(x))

    model, x = create(Sums), images()
    with torch.no_grad(), inject(model, CRASH):
        out = model(x)
    with torch.no_grad():  # no activation alone consumes the feature points: they are the buffer values themselves
        a, _ = naive(CRASH, model.a(F.relu(x)), None, layer="a")
        b, _ = naive(CRASH, model.b(x), None, layer="b")
    assert torch.equal(out, F.relu(a + b))


def test_buffer_and_point_faults_of_one_layer_act_before_and_after_the_activation():
    model, x = net("nn.ReLU in place"), images()
    with torch.no_grad(), inject(model, MIBB, FLIPS, quantization=FIXED, layers="conv", watch=True) as injection:
        model(x)
        with injection.paused():
            model(x)
            clean = model.seen
    raw = F.conv2d(x, rounded(model.conv.weight.detach()), model.conv.bias, padding=1).detach()
    assert torch.equal(clean, F.relu(rounded(raw)))
    flips = [c for c in injection.changes() if c.fault == FLIPS.name]
    assert flips and all(c.before >= 0 for c in flips)


def test_neurons_of_floats_need_no_quantization_and_lie_within_the_capacity():
    model, x = create("plain"), images()
    with torch.no_grad(), inject(model, NeuronByzantine(rate=1.0, capacity=2.0), layers="3") as injection:
        out = model(x)
    assert out.abs().max() <= 2.0 and injection.record.hits == injection.record.sites == out.numel()


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(), nn.RReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU(),
        nn.GELU(), nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Hardswish(),
        nn.Softplus(), nn.Softsign(), nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink(), nn.Threshold(0.1, 0.0),
    ],
    ids=lambda activation: type(activation).__name__,
)  # fmt: skip
def test_every_activation_function_of_torch_is_known_and_met(activation):
    model, x = create(lambda: Net(activation)), images()
    assert trace_feature_points(model, (x,), {}).activated == {("conv", 0)}
    for learning in (False, True):
        with torch.set_grad_enabled(learning), inject(model, NeuronCrash(rate=1.0), layers="conv"):
            model(x)
        assert not model.seen.any()


class Switched(nn.Module):
    """An activation function that is there in the first forward alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.active = nn.Conv2d(3, 3, 1), True

    def forward(self, x):
        return F.relu(self.conv(x)) + 0 if self.active else self.conv(x) + 0


def test_an_activation_that_was_expected_and_did_not_run_is_an_error():
    model = create(Switched)
    with torch.no_grad(), inject(model, CRASH):
        model(images())
        model.active = False
        with pytest.raises(RuntimeError, match=r"no activation function followed layer 'conv'.* activated_points\(\)"):
            model(images())
        model.active = True
        model(images())


@pytest.mark.parametrize("where", ["conv", "relu"])
def test_a_full_backward_hook_is_named_as_what_hides_an_activation(where):
    model = create(lambda: nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU(), last=nn.Conv2d(3, 3, 1))))
    hook = model.get_submodule(where).register_full_backward_hook(lambda *_: None)
    with inject(model, CRASH), pytest.raises(RuntimeError, match=f"the full backward hook of '{where}' puts other"):
        model(images().requires_grad_())
    hook.remove()
    with inject(model, CRASH):
        model(images().requires_grad_())


# Nothing is left behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_forward_leaves_no_mode_behind(error):
    class Failing(nn.Sequential):
        fail = True

        def forward(self, x):
            x = self[1](self[0](x))
            if self.fail and not torch.equal(x, x * 0) and len(x) > 2:  # not while the feature points are found
                raise error
            return x

    model = create(lambda: Failing(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)))
    before = snapshot(model)
    with pytest.raises(error), torch.no_grad(), inject(model, FLIPS, quantization=FIXED):
        model(images())
    assert not _get_current_function_mode_stack() and snapshot(model) == before
    with torch.no_grad(), inject(model, FLIPS, quantization=FIXED) as injection:
        with pytest.raises(error):
            model(images())
        model.fail = False
        model(images())  # and it goes on
        assert not _get_current_function_mode_stack()
        assert injection.record.sites == 2 * 8 * 4 * 4 * 64
