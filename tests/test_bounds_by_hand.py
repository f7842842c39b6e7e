"""Worst cases on networks so small that the worst failure is known: a bound is reached, or its number is named."""

import pytest
import torch
from torch import nn

from ftnas.bounds import (
    Failures,
    local_errors,
    neuron_costs,
    of_samples,
    precision,
    summarize,
    synapse_costs,
    total,
)
from ftnas.bounds.fep import receptive
from ftnas.bounds.lower import shared_windows
from ftnas.bounds.ops import Box
from ftnas.quantize import Bounded, FixedPoint, Quantization


def set_weights(layer, weight, bias=None):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor(bias or [0.0] * len(layer.bias)))
    return layer


def all_ones(*layers):
    for layer in layers:
        nn.init.ones_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def error(summary, x, layer, change):
    """Return the largest error of an output when something is done to what a layer sends."""
    return float((summary.run(x, {layer.node: change})[-1] - summary.run(x)[-1]).abs().max())


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh])
def test_an_error_through_an_activation_function_in_a_box(kind):
    """Against a grid of values in the box and errors: for each end alone, up and down."""
    op = summarize(nn.Sequential(nn.Linear(1, 1), kind()), (1,)).nodes[2].op
    share = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
    for low, high, off in ((0.0, 0.0, 1.0), (-1.0, -1.0, 2.0), (6.0, 6.0, 1.0), (-0.5, 0.2, 0.4), (-3.0, 7.0, 5.0)):
        value = low + (high - low) * share[:, None]
        truth = float((op.run(value + off * (2.0 * share - 1.0)) - op.run(value)).abs().max())
        box = Box(*(torch.tensor([[end]], dtype=torch.float64) for end in (low, high)))
        found = float(op.bound_in(box, torch.tensor([[off]], dtype=torch.float64)))
        assert truth <= found * (1 + 1e-9) and found <= op.lipschitz * off
        assert low != high or found == pytest.approx(truth)


def test_the_rounding_of_weights_meets_values_that_are_off_already():
    """The second layer's weight of 0.3 is moved by |W' - W|, times the value 0.7 and the error that arrives with it."""
    model = nn.Sequential(set_weights(nn.Linear(1, 1), [1.0]), set_weights(nn.Linear(1, 1), [0.3]))
    form = FixedPoint(bits=3, range=Bounded(bound=2.0))
    summary, x = summarize(model, (1,)), torch.tensor([[0.7]])
    found = precision(summary, of_samples(summary, x), Quantization(weights=form, features=FixedPoint(bits=3)))
    weight = model[1].weight.detach().double()
    moved = float((form.quantize(weight) - weight).abs())
    assert moved > 0.1 and found.layers[0].error > 0.1
    assert float(found.weights) == pytest.approx(moved * (float(x) + found.layers[0].error))


def test_a_whole_channel_loses_all_its_positions():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    all_ones(model[0], model[3])
    summary, x = summarize(model, (1, 2, 2)), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    costs = neuron_costs(summary, of_samples(summary, x), Failures(unit="channel"))
    assert [float(total(costs, [count])) for count in (1, 2)] == pytest.approx([10.0, 20.0])


def test_a_maximum_that_a_failure_moves_elsewhere():
    """y = (x1, 9 - 10 x2) = (1, -1): without x2 the maximum is 9."""
    model = nn.Sequential(
        set_weights(nn.Linear(2, 2), [1.0, 0.0, 0.0, 1.0]),
        set_weights(nn.Linear(2, 2), [1.0, 0.0, 0.0, -10.0], [0.0, 9.0]),
        nn.Unflatten(1, (1, 1, 2)),
        nn.MaxPool2d((1, 2)),
        nn.Flatten(),
    )
    summary, x = summarize(model, (2,)), torch.ones(1, 2)
    first = summary.layers[0]
    lost = error(summary, x, first, lambda value: value * torch.tensor([1.0, 0.0]))
    assert lost == pytest.approx(8.0)
    assert float(local_errors(summary, x, first, count=1, failures=Failures())) >= lost


def test_a_synapse_that_transmits_something_else():
    """Of a product of 2 it sends -3: the sum is off by 5."""
    summary, x = summarize(nn.Sequential(set_weights(nn.Linear(1, 1), [1.0])), (1,)), torch.tensor([[2.0]])
    failures = Failures(kind="byzantine", component="synapse", capacity=3.0, capacity_of="transmitted")
    assert float(total(synapse_costs(summary, of_samples(summary, x), failures), [1])) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("pool", "size", "windows"),
    [
        (nn.MaxPool2d(2, stride=1), 3, 4),
        (nn.MaxPool2d(2), 4, 1),
        (nn.AvgPool2d(1), 1, 1),
        (nn.AdaptiveAvgPool2d(7), 1, 49),
        (nn.AdaptiveAvgPool2d((3, 1)), 1, 3),
    ],
)
def test_fep_counts_the_windows_that_a_value_is_in(pool, size, windows):
    """One neuron that is off by 1 moves as many pooled values, and the output by their sum."""
    features = pool(torch.zeros(1, 1, size, size)).numel()
    model = nn.Sequential(nn.Conv2d(1, 1, 1), pool, nn.Flatten(), nn.Linear(features, 1))
    all_ones(model[0], model[3])
    summary, x = summarize(model, (1, size, size)), torch.zeros(1, 1, size, size)
    (layer,) = summary.layers
    off = torch.zeros(1, size, size, dtype=torch.float64)
    off[0, size // 2, size // 2] = 1.0
    seen = error(summary, x, layer, lambda value: value + off)
    assert seen == pytest.approx(windows)
    assert receptive(summary, {layer.name: 1}, {layer.name: 1.0}) == pytest.approx(windows)


def test_windows_of_adaptive_pooling_that_share_a_value():
    """Counted in the matrix of every pair of sizes up to 16."""
    for source in range(1, 17):
        for out in range(1, 17):
            matrix = nn.functional.adaptive_avg_pool1d(torch.eye(source)[:, None], out)[:, 0]
            assert shared_windows(source, out) == int((matrix > 0).sum(1).max())
