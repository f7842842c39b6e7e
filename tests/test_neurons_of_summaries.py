"""A summary is the network: its neurons are those that `inject` hits; a network that is something else is refused."""

import pytest
import torch
from torch import nn

import ftnas
from ftnas.bounds import (
    BoxOfInputs,
    Failures,
    certify,
    neuron_costs,
    of_samples,
    precision,
    summarize,
    total,
)
from ftnas.faults import NeuronCrash
from ftnas.quantize import FixedPoint
from ftnas.rng import generator, isolated


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"))


class Calls(nn.Module):
    """A network that is one function of its layers."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.call(self, x)


def norm(kind, width):
    made = kind(width)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(made.weight)
    nn.init.constant_(made.bias, 2.0)
    return made


def dense(call):
    return Calls(call, a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def images(*between):
    return nn.Sequential(nn.Conv2d(1, 2, 2), *between, nn.Flatten(), nn.Linear(8, 3))


NETS = {
    "plus": lambda: dense(lambda m, x: m.b(torch.relu(m.a(x) + 2.0))),
    "minus": lambda: dense(lambda m, x: m.b(torch.relu(m.a(x) - 100.0))),
    "times": lambda: dense(lambda m, x: m.b(torch.relu(m.a(x) * 0.3))),
    "outputs": lambda: dense(lambda m, x: 0.3 * m.b(torch.relu(m.a(x))) - 5.0),
    "norm and number": lambda: Calls(
        lambda m, x: m.b(torch.tanh(m.n(m.a(x)) + 2.0)), a=nn.Linear(4, 6), n=norm(nn.BatchNorm1d, 6), b=nn.Linear(6, 3)
    ),
    "two norms": lambda: nn.Sequential(
        nn.Linear(4, 6), norm(nn.BatchNorm1d, 6), norm(nn.BatchNorm1d, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "norm": lambda: images(norm(nn.BatchNorm2d, 2), nn.ReLU()),
    "identity": lambda: images(nn.Identity(), norm(nn.BatchNorm2d, 2), nn.Identity(), nn.ReLU()),
    "dropout": lambda: images(nn.Dropout(), norm(nn.BatchNorm2d, 2), nn.ReLU()),
}


def make(name):
    with isolated(0, "net"):
        model = NETS[name]().eval()
        if name == "minus":  # values near 100 less 100: a step of the layer's grid is as large as what is left
            nn.init.constant_(model.a.bias, 100.3)
    return model, ((1, 3, 3) if name in ("norm", "identity", "dropout") else (4,))


@pytest.mark.parametrize("name", NETS)
def test_the_neurons_are_those_that_faults_hit(name):
    """All neurons of a layer crash: the same outputs, and within the bound."""
    model, shape = make(name)
    summary, x = summarize(model.double(), shape), normal(6, *shape).double()
    costs, right = neuron_costs(summary, of_samples(summary, x), Failures()), summary.run(x)[-1]
    for number, layer in enumerate(summary.layers):
        with torch.no_grad(), ftnas.inject(model, NeuronCrash(rate=1.0), layers=layer.name, seed=0):
            wanted = model(x)
        torch.testing.assert_close(summary.run(x, {layer.node: torch.zeros_like})[-1], wanted)
        bound = total(costs, [cost.components if n == number else 0 for n, cost in enumerate(costs)])
        assert ((wanted - right).abs() <= bound.view_as(right) + 1e-9).all()


@pytest.mark.parametrize("name", NETS)
def test_rounding_is_where_inject_rounds(name):
    model, shape = make(name)
    summary, x, form = summarize(model, shape), normal(20, *shape), FixedPoint(bits=8)
    with torch.no_grad(), ftnas.inject(model, quantization=form):
        error = (model(x).double() - summary.run(x)[-1]).abs()
    assert error.max() > 0
    assert (error <= precision(summary, of_samples(summary, x), form).error + 1e-4).all()


def test_a_certificate_counts_what_is_added_after_a_neuron():
    """Neurons near -2.5 with 2 added send nothing on; one that crashes sends 2."""
    model = dense(lambda m, x: m.b(torch.relu(m.a(x) + 2.0)))
    with torch.no_grad():
        model.a.weight.mul_(0.1)
        model.a.bias.fill_(-2.5)
        model.b.weight.fill_(1.0)
    box = BoxOfInputs(low=(0.0,) * 4, high=(1.0,) * 4)
    assert certify(model, box, shape=(4,), failures=Failures(), budget=0.01).counts == [0]


def test_a_summary_leaves_modules_and_weights_that_are_shared_alone():
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), tied, nn.Linear(4, 2))
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters(remove_duplicate=False)}
    x = normal(3, 4)
    torch.testing.assert_close(summarize(model, (4,)).run(x)[-1].float(), model(x), rtol=1e-5, atol=1e-6)
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert weight is before[name][0] and torch.equal(weight, before[name][1])


class Smallest(nn.MaxPool2d):
    def forward(self, x):
        return -super().forward(-x)


class Twice(nn.Linear):
    """A layer that the trace takes for torch's own, by its module."""

    def forward(self, x):
        return 2.0 * super().forward(x)


Twice.__module__ = nn.Linear.__module__


def hooked(register):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    getattr(model[1], register)(lambda module, inputs, *output: 10.0 * (output or inputs)[0])
    return model


def replaced():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[1].forward = lambda x: 10.0 * x
    return model


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (hooked("register_forward_hook"), (4,), "layer '1' has hooks or a forward of its own"),
        (hooked("register_forward_pre_hook"), (4,), "layer '1' has hooks or a forward of its own"),
        (replaced(), (4,), "layer '1' has hooks or a forward of its own"),
        (images(nn.ReLU(), Smallest(1)), (1, 3, 3), "function 'neg' \\(neg\\) is not bounded"),
        (nn.Sequential(Twice(4, 3)), (4,), "gives other outputs than the layers it is made of"),
        (Calls(lambda m, x: m.a(x).view(2, 3), a=nn.Linear(4, 3)), (4,), "cannot be summarised"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()),
            (4, 4),
            "layer '1' normalises positions and not the features that '0' gives",
        ),
        (
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm2d(2), nn.Flatten()),
            (2, 3, 4),
            "layer '1' normalises positions and not the features that '0' gives",
        ),
    ],
)
def test_what_is_something_else_is_refused_in_one_line(model, shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        summarize(model, shape)
    assert "\n" not in str(caught.value)


class Aliased(nn.Module):
    """Adds to a value under another name, and reads it under the first."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        first = second = self.layer(x)
        second += x
        return self.last(torch.relu(first) + second)


def test_a_value_that_is_overwritten_under_another_name_is_refused():
    with pytest.raises(ValueError, match="overwrites in place"):
        summarize(Aliased().eval(), (4,))
