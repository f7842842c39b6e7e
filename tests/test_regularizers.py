"""Penalties and dropout of a training: against explicit formulas and finite differences, and a kill changes nothing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftnas import saturate
from ftnas.baselines import chain_of_convolutions, create
from ftnas.bounds import Cut, linear
from ftnas.data import DataConfig, load
from ftnas.faults import MiBB
from ftnas.faults.hardware import Hardware
from ftnas.recipe import TrainConfig
from ftnas.regularizers import CrashVariance, Dropout, Fep, Regularization, chain_of, log_fep
from ftnas.rng import generator, isolated
from ftnas.rundir import RunDir
from ftnas.settings import parse
from ftnas.train import CHECKPOINT, FaultTolerantLoss, fit

CLEAN = Hardware(layers=None)
ALL = (
    {"name": "crash_variance", "layers": "relu", "rate": 0.1, "unit": "channel"},
    {"name": "dropout", "layers": "relu", "rate": 0.1},
    {"name": "fep", "weight": 0.01},
)


def small_net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 10),
        )


def pooled(layer):
    return nn.Sequential(nn.Conv2d(1, 2, 1), layer, nn.Conv2d(2, 2, 1), nn.Flatten())


def smooth_net():
    with isolated(0, "net"):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture(scope="module")
def images():
    digits = load(DataConfig(name="digits"), "train")
    return digits.subset(torch.arange(128))


def recipe(*regularizers, **changes):
    values = {"epochs": 3, "batch_size": 32, "lr": 0.02, "alpha_l": 0.0, "regularizers": regularizers}
    return parse(TrainConfig, values | changes)


def penalty(net, x, config, seed=0):
    """Return the penalty of a batch, watched in one forward."""
    extras = Regularization([config], net)
    extras.step(generator(seed, "signs"))
    with extras.attached(), extras.watching():
        return extras.penalties(net(x))[config.name]


@pytest.mark.parametrize("unit", ["position", "channel"])
def test_the_mean_penalty_is_the_variance_of_b3(unit):
    """Over the signs it is sum_k Var y_k; the two layers add up. Tolerance: 5.5 standard errors (1e-7)."""
    net = small_net().double()
    x = torch.randn(3, 1, 8, 8, generator=generator(1, "x"), dtype=torch.float64)
    config = CrashVariance(layers=("relu",), rate=0.1, weight=2.0, unit=unit)
    draws = torch.stack([penalty(net, x, config, seed).detach() for seed in range(150)]).double()
    cut_unit = "value" if unit == "position" else "channel"
    truth = sum(2.0 * linear(Cut(net, name, unit=cut_unit), x, p=0.1).variance.sum(1).mean() for name in ("1", "4"))
    assert abs(draws.mean() - truth) < 5.5 * draws.std() / math.sqrt(len(draws))
    assert draws.std() > 0


def test_one_logit_needs_no_luck():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(6, 4, generator=generator(1, "x"), dtype=torch.float64)
    found = penalty(net, x, CrashVariance(layers=("tanh",), rate=0.2))
    truth = linear(Cut(net, "1"), x, p=0.2).variance.sum(1).mean()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "config", [CrashVariance(layers=("tanh",), rate=0.3), CrashVariance(layers=("0",), rate=0.3), Fep(weight=0.7)]
)
def test_gradients_are_those_of_finite_differences(config):
    """Float32 inside the penalty: central differences of 1e-3 are good to about 1e-3 of the largest gradient."""
    net = smooth_net()
    x = torch.randn(6, 4, generator=generator(1, "x"), dtype=torch.float64)
    penalty(net, x, config).backward()
    found, truth = [], []
    for parameter in net.parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for index in range(0, parameter.numel(), 3):
            with torch.no_grad():
                sides = []
                for sign in (1, -1):
                    parameter.view(-1)[index] += sign * 1e-3
                    with torch.enable_grad():
                        sides.append(float(penalty(net, x, config).detach()))
                    parameter.view(-1)[index] -= sign * 1e-3
            found.append(float(own.view(-1)[index]))
            truth.append((sides[0] - sides[1]) / 2e-3)
    scale = max(map(abs, truth))
    assert scale > 1e-3
    np.testing.assert_allclose(found, truth, atol=2e-3 * scale)


def test_fep_is_its_formula():
    """Explicit sum over the hidden layers, fan-ins and largest weights."""
    net = chain_of_convolutions()
    layers = chain_of(net)
    assert [type(layer).__name__ for layer in layers] == ["Conv2d"] * 3 + ["Linear"]
    w = [float(layer.weight.detach().abs().max()) for layer in layers]
    n = [None, 16 * 9, 32 * 9, 64]
    fep = w[1] * n[2] * w[2] * n[3] * w[3] + w[2] * n[3] * w[3] + w[3]
    assert float(log_fep([layer.weight for layer in layers]).detach()) == pytest.approx(math.log(fep), rel=1e-5)


@torch.no_grad()
def test_fep_bounds_what_one_unit_of_each_hidden_layer_can_do():
    net = small_net()
    fep = float(log_fep([layer.weight for layer in chain_of(net)]).exp())
    x = torch.randn(4, 1, 8, 8, generator=generator(1, "x"))
    draw = generator(2, "units")
    for _ in range(20):
        first = net[1](net[0](x))
        first[:, torch.randint(4, (), generator=draw), torch.randint(8, (), generator=draw), 0] += 1.0
        second = net[4](net[3](net[2](first)))
        second[:, torch.randint(6, (), generator=draw), 0, 1] -= 1.0
        assert (net[6](net[5](second)) - net(x)).abs().max() <= fep


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool2d(2), nn.AvgPool2d((1, 2)), nn.MaxPool2d(1, 3), nn.AdaptiveAvgPool2d(1), nn.ELU(), nn.LeakyReLU(0.3)],
)
def test_layers_of_a_chain_that_move_no_more_than_they_read(layer):
    """In all: one value that moves by 1 moves the sum of those that come out by 1 at most."""
    assert len(chain_of(pooled(layer))) == 2
    x = torch.randn(2, 1, 4, 6, generator=generator(1, "x"))
    for place in range(24):
        moved = x.flatten(2).index_add(2, torch.tensor([place]), torch.ones(2, 1, 1)).view_as(x)
        assert (layer(moved) - layer(x)).abs().flatten(1).sum(1).max() <= 1.0 + 1e-5


def test_dropout_crashes_units_and_does_not_scale():
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    x = torch.ones(50, 4, 10, 10)
    for unit, count in (("position", 20_000), ("channel", 200)):
        extras = Regularization([Dropout(layers=("0",), rate=0.3, unit=unit)], net)
        extras.step(generator(0, "masks"))
        with extras.attached():
            found = net(x).view(50, 4, 100)
        assert set(found.unique().tolist()) == {0.0, 1.0}
        share = float((found == 0).double().mean())
        assert abs(share - 0.3) < 5 * math.sqrt(0.21 / count)
        assert (found.amin(2) == found.amax(2)).all() == (unit == "channel")
    assert torch.equal(net(x), x.flatten(1))  # nothing stays


@pytest.mark.parametrize("which", [(), ("0",), ("0", "3")])
def test_saturated_layers_are_of_their_type_too(which):
    net = small_net()
    for name in which:
        saturate(net, "tanh", layers=name)
    found = Dropout(layers=("conv2d",), rate=0.1).modules(net)
    assert [id(module) for module in found] == [id(net[0]), id(net[3])]
    with pytest.raises(ValueError, match="'convv2d' matches no layer; by type did you mean 'conv2d'"):
        Dropout(layers=("convv2d",), rate=0.1).modules(net)


@pytest.mark.parametrize("read", [True, False])
def test_dropout_reaches_who_reads_the_input_of_an_activation_in_place(read):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = nn.ELU(inplace=True)

        def forward(self, given):
            x = given * 1
            y = self.function(x)
            return y if read else x

    net, x = Net(), torch.linspace(-1, 1, 600).view(2, 3, 100).requires_grad_()
    extras = Regularization([Dropout(layers=("elu",), rate=0.5)], net)
    extras.step(generator(0, "masks"))
    with extras.attached():
        dropped = net(x)
        (gradient,) = torch.autograd.grad(dropped.sum(), x)
    alive = dropped != 0
    assert 200 < alive.sum() < 400
    own = torch.where(x > 0, x, x.expm1())
    torch.testing.assert_close(dropped, own * alive)
    torch.testing.assert_close(gradient, torch.where(x > 0, 1.0, x.exp()) * alive)
    assert net.function.inplace and (net(x) == 0).sum() == 0


def test_the_loss_is_the_cross_entropy_and_the_penalties(images):
    net = small_net().train()
    x, y = next(images.batches(32))
    config = recipe(ALL[0], ALL[2])
    extras = Regularization(config.regularizers, net)
    extras.step(generator(0, "signs"))
    with CLEAN.inject(net, seed=0), extras.attached():
        losses = FaultTolerantLoss(net, alpha_l=0.0, regularization=extras)(net, _injection(net), x, y)
    assert set(losses.penalties) == {"crash_variance", "fep"}
    torch.testing.assert_close(losses.total.detach(), losses.clean + sum(losses.penalties.values()))
    assert losses.penalties["crash_variance"] > 0


class _injection:  # noqa: N801 stands in for an injection without faults
    def __init__(self, net):
        pass

    def weights_shared(self):
        return torch.enable_grad()

    paused = weights_shared


@pytest.mark.parametrize(
    ("alpha_l", "hardware"), [(0.0, CLEAN), (0.5, Hardware(fault=MiBB(mac_error_rate=0.01), layers=None))]
)
def test_a_cut_run_ends_with_the_same_weights(images, tmp_path, alpha_l, hardware):
    whole, config = small_net(), recipe(*ALL, alpha_l=alpha_l)
    with RunDir.create(tmp_path / "a", {}) as run:
        history = fit(whole, images, config=config, hardware=hardware, seed=1, folder=run)
    assert all(set(record["penalties"]) == {"crash_variance", "fep"} for record in history)
    with RunDir.create(tmp_path / "b", {}) as run:
        cut = small_net()
        calls = iter(range(4 * 2 * (2 if alpha_l else 1) + 3))  # two epochs of four steps, and a bit

        def die(module, inputs):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        handle = cut.register_forward_pre_hook(die)
        with pytest.raises(KeyboardInterrupt):
            fit(cut, images, config=config, hardware=hardware, seed=1, folder=run)
        handle.remove()
        assert run.file(CHECKPOINT).exists()
        fresh = small_net()
        fit(fresh, images, config=config, hardware=hardware, seed=1, folder=run)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("extra", [*ALL[:2], {"name": "fep", "weight": 0.2}])
def test_each_moves_what_it_says(images, tmp_path, extra):
    """Against the same training without it: a smaller variance or propagation; and other weights by dropout."""
    nets = []
    for number, extras in enumerate(([], [extra | ({"weight": 3.0} if extra["name"] == "crash_variance" else {})])):
        nets.append(small_net())
        with RunDir.create(tmp_path / str(number), {}) as run:
            fit(nets[-1], images, config=recipe(*extras, epochs=6), hardware=CLEAN, seed=1, folder=run)
    x, _ = next(images.batches(64))
    if extra["name"] == "fep":
        plain, kept = (float(log_fep([layer.weight for layer in chain_of(net)]).detach()) for net in nets)
    else:
        plain, kept = (float(linear(Cut(net, "4", unit="channel"), x, p=0.1).variance.mean()) for net in nets)
    assert kept < plain if extra["name"] != "dropout" else kept != plain
    assert not nets[1]._forward_hooks and not any(module._forward_hooks for module in nets[1].modules())


def test_without_regularizers_the_loss_is_as_before(images):
    net = small_net().train()
    x, y = next(images.batches(32))
    losses = FaultTolerantLoss(net, alpha_l=0.0)(net, _injection(net), x, y)
    assert torch.equal(losses.total, F.cross_entropy(net(x), y)) and losses.penalties == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe({"name": "dropout", "layers": "relu", "rate": 1.0}), "should be less than 1"),
        (lambda: recipe({"name": "dropout", "layers": [], "rate": 0.1}), "at least 1 item"),
        (lambda: recipe({"name": "fep"}), "required, and not given"),
        (lambda: recipe({"name": "drpout", "rate": 0.1}), "name: unknown 'drpout'; did you mean 'dropout'"),
        (lambda: recipe({"name": "x", "rate": 0.1}), "name: unknown 'x'; there is: crash_variance, dropout, fep"),
        (lambda: recipe({"rate": 0.1}), "name: required, and not given"),
        (
            lambda: parse(
                TrainConfig, {"epochs": 1, "batch_size": 1, "lr": 1.0, "alpha_l": 1.0, "regularizers": ALL[:1]}
            ),
            "crash_variance is of the clean forward",
        ),
        (lambda: Regularization([Dropout(layers=("tanh",), rate=0.1)], small_net()), "'tanh' matches no layer"),
        (lambda: Regularization([Fep(weight=1.0)], create("resnet20", width=0.25)), "fep is for chains"),
        (lambda: Regularization([Fep(weight=1.0)], create("vgg16", width=0.125)), "got BatchNorm2d"),
        (lambda: Regularization([Fep(weight=1.0)], nn.Sequential(nn.Linear(2, 2))), "fep needs two layers"),
        (lambda: chain_of(pooled(nn.MaxPool2d(3, 1, 1))), "'1' has windows of \\(3, 3\\) that overlap"),
        (lambda: chain_of(pooled(nn.MaxPool2d((1, 3), (1, 2)))), "'1' has windows of \\(1, 3\\) that overlap"),
        (lambda: chain_of(pooled(nn.MaxPool2d(2, dilation=2))), "that overlap, at strides \\(2, 2\\) and dilations"),
        (lambda: chain_of(pooled(nn.AvgPool2d(2, 1))), "'1' has windows of \\(2, 2\\) that overlap"),
        (lambda: chain_of(pooled(nn.AdaptiveAvgPool2d(7))), "'1' can repeat values, with output size 7"),
        (lambda: chain_of(pooled(nn.ELU(alpha=5.0))), "'1' has alpha 5.0; use at most 1"),
        (lambda: chain_of(pooled(nn.LeakyReLU(-2.0))), "'1' has negative_slope -2.0; use at most 1"),
        (
            lambda: penalty(small_net(), torch.ones(1, 1, 8, 8), CrashVariance(layers=("0",), rate=0.1)),
            "outputs of 0 are changed in place",
        ),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
