"""Feature points are rounded where they lie, if nobody else sees the tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from injected import FIXED, MIBB, create, images
from torch import nn

from ftnas import inject


class ReluConv(nn.Conv2d):
    """A layer whose own forward keeps its output for the gradient."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


def outputs(model, x, *faults, **options):
    """Return the output, and the gradient of each parameter."""
    model.zero_grad()
    with inject(model, *faults, quantization=FIXED, **options):
        y = model(x)
        y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def spy(module):
    """Let another hook see what the module gives, and return what it saw."""
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.detach().clone())) or None)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["plain", "residual", "separable", "linear", "twice"])
def test_in_place_or_not_gives_the_same_gradients(name, training):
    alone, seen = (create(name).train(training) for _ in range(2))
    found = [spy(module) for module in seen.modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = outputs(alone, images(), MIBB)
        torch.manual_seed(0)
        other = outputs(seen, images(), MIBB)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    if name != "linear":
        assert all(calls for calls in found)


def test_what_another_hook_was_given_stays_what_it_was():
    model = create("separable")
    seen = spy(model[0])
    with torch.no_grad(), inject(model, quantization=FIXED):
        model(images())
    given, copy = seen[-1]  # the first time feature points were looked for
    assert torch.equal(given, copy) and not torch.equal(given, FIXED.quantize(given))


@pytest.mark.parametrize("make", [lambda: ReluConv(3, 4, 3), lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())])
def test_a_layer_that_needs_its_output_for_the_gradient_keeps_it(make):
    torch.manual_seed(0)
    model, x = make(), images()
    found = outputs(model, x)
    conv = model if isinstance(model, nn.Conv2d) else model[0]
    raw = F.conv2d(x, FIXED.quantize(conv.weight), conv.bias)
    inner = isinstance(model, nn.Conv2d)
    y = FIXED.quantize(torch.sigmoid(raw)) if inner else torch.sigmoid(FIXED.quantize(raw))
    expected = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    assert torch.equal(found[0], y.detach())
    for one, other in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
