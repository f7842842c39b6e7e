"""Errors of crashed units against exact enumeration, closed forms and naive loops."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ftnas import baselines
from ftnas.bounds import Cut, absolute, byzantine, exact, exact_jointly, linear, norm, sampled, single
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, build_network, load_space

DENSE = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}


def dense(kind, *, widths=(6, 8, 5, 3), seed=0):
    with isolated(seed, "net"):
        layers = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b)] + ([DENSE[kind]()] if number < len(widths) - 2 else [])
        return nn.Sequential(*layers)


def conv(seed=0, **first):
    """A chain with everything that can be bounded, on images [2, 5, 5]."""
    with isolated(seed, "net"):
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, **first), nn.BatchNorm2d(4), nn.ReLU()),
            nn.MaxPool2d(3, stride=1),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.AvgPool2d(2, stride=1),
            nn.ELU(alpha=1.5),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        norm = net[0][1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        return net


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"))


def naive(function, values, p):
    """Enumerate by a Python loop, one pattern and one sample at a time."""
    mean = square = 0.0
    before = function(values)
    for pattern in itertools.product((0.0, 1.0), repeat=len(values)):
        xi = torch.tensor(pattern)
        weight = p ** float((1 - xi).sum()) * (1 - p) ** float(xi.sum())
        delta = (function(values * xi) - before).double()
        mean, square = mean + weight * delta, square + weight * delta**2
    return mean, square - mean**2


@torch.no_grad()
@pytest.mark.parametrize("kind", DENSE)
def test_exact_is_the_naive_sum_over_patterns_at_any_layer(kind):
    net, x = dense(kind), normal(2, 6)
    found = exact(Cut(net, "1"), x, p=0.2)
    for sample in range(2):
        hidden = net[1](net[0](x[sample]))
        mean, variance = naive(lambda v: net[2:](v), hidden, 0.2)
        torch.testing.assert_close(found.mean[sample], mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.variance[sample], variance, rtol=1e-4, atol=1e-7)


def test_in_a_linear_network_the_means_are_exact_and_the_variances_up_to_their_factor():
    net, x, p = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 2)), normal(3, 9), 0.3
    truth = exact(Cut(net), x, p=p)
    for moments in (single(Cut(net), x, p=p), linear(Cut(net), x, p=p)):
        torch.testing.assert_close(moments.mean, truth.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.variance * (1 - p), truth.variance, rtol=1e-4, atol=1e-6)


def test_the_inputs_stay_as_they_are():
    x = normal(1, 6)
    linear(Cut(dense("relu")), x, p=0.1)
    assert not x.requires_grad


@pytest.mark.parametrize("unit", ["value", "channel"])
def test_linear_is_the_jacobian_of_one_output_after_the_other(unit):
    net, x, p = conv(), normal(2, 2, 5, 5), 0.1
    found = linear(Cut(net, unit=unit), x, p=p)
    for sample, output in itertools.product(range(2), range(3)):
        own = x[sample : sample + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(own)[0, output], own)
        effects = (gradient * own)[0].detach().double()
        effects = effects.sum(dim=(1, 2)) if unit == "channel" else effects
        assert found.mean[sample, output].item() == pytest.approx(-p * effects.sum().item(), rel=1e-4, abs=1e-7)
        assert found.variance[sample, output].item() == pytest.approx(p * effects.square().sum().item(), rel=1e-4)


def test_single_crashes_of_channels_against_a_loop():
    net, x, p = conv(), normal(2, 2, 5, 5), 0.1
    found = single(Cut(net, "0.2", unit="channel"), x, p=p)
    with torch.no_grad():
        hidden = net[0](x)
        deltas = []
        for channel in range(4):
            dead = hidden.clone()
            dead[:, channel] = 0.0
            deltas.append(net[1:](dead) - net[1:](hidden))
    deltas = torch.stack(deltas).double()
    torch.testing.assert_close(found.mean, p * deltas.sum(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.variance, p * deltas.square().sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", ["input", "1"])
def test_the_error_of_single_crashes_falls_as_the_square_of_p(layer):
    net, x, ps = dense("sigmoid").double(), normal(4, 6).double(), [0.04, 0.02, 0.01, 0.005]
    cut = Cut(net, layer)
    for what in ("mean", "variance"):
        errors = [
            float((getattr(single(cut, x, p=p), what) - getattr(exact(cut, x, p=p), what)).abs().mean()) for p in ps
        ]
        slope = np.polyfit(np.log(ps), np.log(errors), 1)[0]
        assert 1.9 < slope < 2.1, (what, slope)


def test_sampling_meets_the_exact_moments():
    cut, x, samples = Cut(dense("relu")), normal(3, 6), 20_000
    truth = exact(cut, x, p=0.3)
    found = sampled(cut, x, p=0.3, samples=samples, generator=generator(0, "crashes"))
    assert ((found.mean - truth.mean).abs() < 5.5 * found.mean_error).all()  # 9 normal figures: 3e-7
    assert torch.allclose(found.variance, truth.variance, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [*DENSE, "conv"])
def test_upper_bounds_hold_on_random_networks(kind, seed):
    """E|Delta| over every pattern is below b2, and E of its norms below b1."""
    if kind == "conv":
        cut, x = Cut(conv(seed), "0.2", unit="channel"), normal(3, 2, 5, 5, seed=seed)
    else:
        cut, x = Cut(dense(kind, seed=seed), ["input", "1"][seed % 2]), normal(3, 6, seed=seed)
    p = [0.02, 0.3][seed % 2]
    values = cut.values(x)
    units = cut.num_units(values)
    expected = {"absolute": 0.0, 1: 0.0, 2: 0.0, "inf": 0.0}
    with torch.no_grad():
        before = cut.rest(x)(values)
        for pattern in itertools.product((False, True), repeat=units):
            alive = torch.tensor([pattern])
            delta = (cut.rest(x)(cut.masked(values, alive)[0]) - before).double()
            weight = p ** pattern.count(False) * (1 - p) ** pattern.count(True)
            expected["absolute"] = expected["absolute"] + weight * delta.abs()
            for order in (1, 2, "inf"):
                size = delta.norm(p=float(order), dim=1)
                expected[order] = expected[order] + weight * size
    assert (expected["absolute"] <= absolute(cut, x, p=p) * (1 + 1e-5)).all()
    for order in (1, 2, "inf"):
        assert (expected[order] <= norm(cut, x, p=p, order=order) * (1 + 1e-5)).all(), order


def test_upper_bounds_are_reached():
    """One positive layer and positive inputs: E|Delta| = p W x; for one unit every norm is its own."""
    net, x = nn.Sequential(nn.Linear(4, 2, bias=False)), normal(1, 4).abs()
    with torch.no_grad():
        net[0].weight.abs_()
    truth = exact(Cut(net), x, p=0.25).mean.abs()
    torch.testing.assert_close(absolute(Cut(net), x, p=0.25), truth, rtol=1e-5, atol=0.0)
    one = nn.Sequential(nn.Linear(1, 1, bias=False))
    truth = exact(Cut(one), x[:, :1], p=0.25).mean.abs()[:, 0]
    for order in (1, "inf"):
        torch.testing.assert_close(norm(Cut(one), x[:, :1], p=0.25, order=order), truth, rtol=1e-5, atol=0.0)


def test_any_network_can_be_cut_where_a_layer_runs_once():
    """A searched network with concatenations and slices: single crashes against enumeration at a small p."""
    space = load_space("small-8x8")
    with isolated(0, "net"):
        net = build_network(Genotype.random(space, generator=generator(3, "g")), space, num_classes=10, in_channels=1)
    x = normal(2, 1, 8, 8)
    name = next(name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    cut = Cut(net, name, unit="channel")
    units = cut.num_units(cut.values(x))
    assert units <= 20
    truth, found = exact(cut, x, p=1e-3), single(cut, x, p=1e-3)
    assert truth.mean.abs().max() > 0
    torch.testing.assert_close(found.mean, truth.mean, rtol=0.1, atol=1e-3 * float(truth.mean.abs().max()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: Cut(net, "convv"), "no layer 'convv'"),
        (lambda net, x: exact(Cut(net), x, p=1.5), "a crash probability is in"),
        (lambda net, x: exact(Cut(nn.Flatten()), torch.ones(1, 21), p=0.1), "21 units have 2\\^21 patterns"),
        (lambda net, x: norm(Cut(net), x, p=0.1, order=3), "order must be 1, 2 or 'inf'"),
        (lambda net, x: absolute(Cut(nn.Sequential(nn.Linear(6, 2), nn.GELU())), x, p=0.1), "layer '1' is a GELU"),
        (lambda net, x: sampled(Cut(net), x, p=0.1, samples=1, generator=None), "samples must be at least 2"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(dense("relu"), normal(1, 6))
    assert "\n" not in str(caught.value)


def test_a_layer_that_runs_twice_is_refused():
    shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="layer '0' runs 2 times"):
        exact(Cut(nn.Sequential(shared, shared), "0"), normal(1, 6), p=0.1)


class Adds(nn.Module):
    """Shifts its input, then adds to what its layer gave, in place or not."""

    def __init__(self, *, inplace):
        super().__init__()
        self.inplace = inplace
        with isolated(0, "net"):
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.inplace:
            x += 1.0
            out = self.first(x)
            out += x
            out = out.relu_()
        else:
            x = x + 1.0
            out = torch.relu(self.first(x) + x)
        return self.last(out)


ESTIMATES = {
    "exact": lambda cut, x: exact(cut, x, p=0.2),
    "single": lambda cut, x: single(cut, x, p=0.2),
    "linear": lambda cut, x: linear(cut, x, p=0.2),
    "sampled": lambda cut, x: sampled(cut, x, p=0.2, samples=50, generator=generator(0, "draws")),
    "byzantine": lambda cut, x: byzantine(cut, x, delta=0.3),
    "absolute": lambda cut, x: absolute(cut, x, p=0.2),
    "norm": lambda cut, x: norm(cut, x, p=0.2, order="inf"),
}


@pytest.mark.parametrize("layer", ["input", "first"])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_what_works_in_place_counts_as_its_copy_that_does_not(estimate, layer):
    x = normal(3, 4)
    given, plain = x.clone(), ESTIMATES[estimate](Cut(Adds(inplace=False), layer), x)
    found = ESTIMATES[estimate](Cut(Adds(inplace=True), layer), given)
    assert torch.equal(given, x)
    values = (
        [(plain, found)] if torch.is_tensor(plain) else [(plain.mean, found.mean), (plain.variance, found.variance)]
    )
    for truth, value in values:
        assert truth.abs().max() > 0
        torch.testing.assert_close(value, truth)


class Ignores(nn.Module):
    """Reads what its activation function, in place or not, made of a value."""

    def __init__(self, *, inplace):
        super().__init__()
        with isolated(0, "net"):
            self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)

    def forward(self, x):
        out = self.first(x)
        given = self.act(out)
        return self.last(out if self.act.inplace else given)


@pytest.mark.parametrize("estimate", ["exact", "linear"])
def test_crashes_of_a_layer_in_place_are_seen_where_its_return_value_is_not_read(estimate):
    x = normal(3, 4)
    truth, found = (ESTIMATES[estimate](Cut(Ignores(inplace=inplace), "act"), x) for inplace in (False, True))
    assert truth.mean.abs().max() > 0
    torch.testing.assert_close(found.mean, truth.mean)
    torch.testing.assert_close(found.variance, truth.variance)


def test_joint_crashes_of_a_layer_in_place_are_seen_too():
    x = normal(3, 4)
    truth, found = (exact_jointly([(Cut(Ignores(inplace=inplace), "act"), 0.2)], x) for inplace in (False, True))
    assert truth.mean.abs().max() > 0
    torch.testing.assert_close(found.mean, truth.mean)
    torch.testing.assert_close(found.variance, truth.variance)


@torch.no_grad()
def test_a_unit_that_is_not_finite_is_0_once_it_has_crashed():
    class Blown(nn.Module):
        def forward(self, x):
            return torch.where(torch.arange(4) == 1, torch.inf, x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blown, self.last = Blown(), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.blown(x).clamp(-3.0, 3.0))

    with isolated(0, "net"):
        cut, x = Cut(Net(), "blown"), normal(2, 4)
    truth, found = exact(cut, x, p=0.2), exact_jointly([(cut, 0.2)], x)
    assert truth.mean.isfinite().all()
    torch.testing.assert_close(found.mean, truth.mean)


@torch.no_grad()
def test_a_cut_before_the_sum_of_a_residual_block_leaves_the_network_as_it_is():
    with isolated(0, "net"):
        net = baselines.create("resnet8", in_channels=1, width=0.25, image_size=8).eval()
    x, cut = normal(2, 1, 8, 8), Cut(net, "stages.0.0.bn2", unit="channel")
    torch.testing.assert_close(cut.rest(x)(cut.values(x)), net(x))
    found, truth = exact(cut, x, p=0.2), exact_jointly([(cut, 0.2)], x)
    assert truth.mean.abs().max() > 0
    torch.testing.assert_close(found.mean, truth.mean)
    torch.testing.assert_close(found.variance, truth.variance)


def test_a_layer_that_gives_no_batch_is_refused():
    net = nn.Sequential(nn.Linear(6, 6), nn.GRU(6, 6))
    with pytest.raises(ValueError, match="layer '1' runs 1 times, or gives no batch"):
        Cut(net, "1").values(normal(2, 6))
