"""Upper bounds of expected errors on networks so small that what they bound is known: maxima, joins, norms."""

import itertools

import pytest
import torch
from torch import nn

from ftnas.bounds import Cut, absolute, byzantine_from_variance, exact, norm, single

ORDERS = (1, 2, "inf")


class Twofold(nn.Module):
    """(x, x), joined."""

    def forward(self, x):
        return torch.cat([x, x], dim=1)


def ones(kind, into, out):
    layer = kind(into, out, bias=False) if kind is nn.Linear else kind(into, out, 1, bias=False)
    nn.init.ones_(layer.weight)
    return layer


def expected_norm(model, x, *, p, order):
    """Return E of the norm of the error of one sample, over every pattern of crashed inputs."""
    found = 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=x.numel()):
        weight = p ** pattern.count(0.0) * (1 - p) ** pattern.count(1.0)
        delta = model(x * torch.tensor(pattern).view_as(x)) - model(x)
        found += weight * float(delta.detach().double().norm(p=float(order)))
    return found


def test_a_maximum_of_expected_errors_is_not_the_expected_maximum():
    """Four values of -1: the maximum is lost when any of them crashes."""
    model, x = nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), -torch.ones(1, 1, 2, 2)
    truth = float(exact(Cut(model), x, p=0.1).mean)
    assert truth == pytest.approx(1 - 0.9**4)
    assert float(absolute(Cut(model), x, p=0.1)) == pytest.approx(4 * 0.1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_norms_at_the_cut(order, p):
    """Exact for 1 and infinity, above and not far off for 2."""
    model, x = nn.Flatten(), torch.tensor([[3.0, -1.0, 2.0, -2.5]])
    truth, found = expected_norm(model, x, p=p, order=order), float(norm(Cut(model), x, p=p, order=order))
    if order == 2:
        assert truth <= found == pytest.approx(p**0.5 * float(x.norm()))
    else:
        assert found == pytest.approx(truth)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_the_norm_of_a_concatenation(p):
    """Both parts err: twice in the 1-norm, sqrt(2) times in the 2-norm, once in the largest."""
    x = torch.tensor([[2.0]])
    found = {order: float(norm(Cut(Twofold()), x, p=p, order=order)) for order in ORDERS}
    assert found == pytest.approx({1: 4 * p, 2: (2 * p) ** 0.5 * 2, "inf": 2 * p})
    assert found[2] >= expected_norm(Twofold(), x, p=p, order=2)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize(("into", "out"), [(4, 1), (1, 4)])
def test_norms_through_a_layer_that_is_far_from_square(kind, into, out):
    """Sums of rows and columns are 4 and 1, or 1 and 4; the 2-norm of the matrix is 2."""
    model, p = nn.Sequential(ones(kind, into, out), nn.Flatten()), 0.9
    x = torch.ones(1, into) if kind is nn.Linear else torch.ones(1, into, 1, 1)
    for order in ORDERS:
        truth, found = expected_norm(model, x, p=p, order=order), float(norm(Cut(model), x, p=p, order=order))
        assert truth <= found * (1 + 1e-6)
    assert float(norm(Cut(model), x, p=p, order=2)) == pytest.approx(p**0.5 * into**0.5 * 2)


def test_a_unit_that_sends_0_tells_nothing_of_its_lies():
    """Infinite, where nothing else crashes to any effect too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    nn.init.constant_(model[0].bias, -10.0)
    cut, x = Cut(model, "1"), torch.rand(1, 2, generator=torch.Generator().manual_seed(0))
    variance = single(cut, x, p=0.1).variance
    assert float(variance) == 0.0
    assert torch.isposinf(byzantine_from_variance(cut, x, variance, p=0.1, delta=0.1)).all()
