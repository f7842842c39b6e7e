"""Networks that change their input in place: estimates see a copy, and what reads the input again says so."""

import pytest
import torch
from test_single import images, run  # noqa: F401 a fixture
from torch import nn

from ftnas.bounds import Cut, exact_jointly, from_weights, loss_shift_from_weights
from ftnas.evaluate import score
from ftnas.faults import MiBB
from ftnas.faults.hardware import Hardware
from ftnas.rng import generator, isolated
from ftnas.train import FaultTolerantLoss

HARDWARE = Hardware(fault=MiBB(mac_error_rate=0.01), layers=None)


class Shifts(nn.Module):
    """Two layers behind a shift of the input, in place or not."""

    def __init__(self, inputs, *, inplace):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, 6), nn.Linear(6, 10)
        self.inplace = inplace

    def forward(self, x):
        x = x.sub_(0.5) if self.inplace else x - 0.5
        return self.b(torch.relu(self.a(x.flatten(1))))


def both(inputs):
    """Return the network that works in place, and the same that does not."""
    nets = []
    for inplace in (True, False):
        with isolated(0, "net"):
            nets.append(Shifts(inputs, inplace=inplace).eval())
    return nets


def normal(*shape):
    return torch.randn(*shape, generator=generator(1, "x"))


@pytest.mark.parametrize(
    "estimate",
    [
        lambda net, x: exact_jointly([(Cut(net, "a"), 0.3)], x).mean,
        lambda net, x: from_weights(net, "b", x, p=0.3).moments.mean,
        lambda net, x: loss_shift_from_weights(net, "b", x, torch.zeros(len(x), dtype=torch.int64), p=0.3),
    ],
    ids=["several layers", "weights", "loss"],
)
def test_bounds_see_a_copy(estimate):
    x = normal(5, 4)
    given = x.clone()
    first, second = (estimate(net, x) for net in both(4))
    assert torch.equal(first, second) and torch.equal(x, given)


def test_single_faults_see_a_copy(images, tmp_path):  # noqa: F811
    first, second = (run(tmp_path / str(n), images, net, margin=0.03) for n, net in enumerate(both(64)))
    assert first == second and 0 < sum(record["changed"] for record in first)


def twice(net, x, y):
    with HARDWARE.inject(net, seed=1, errors="soft") as injection:
        FaultTolerantLoss(net, alpha_l=0.5)(net, injection, x, y)


def scored(net, x, y):
    with HARDWARE.inject(net, seed=1, errors="soft") as injection:
        score(net, injection, [(x, y)], alpha_r=0.5)


@pytest.mark.parametrize("read", [twice, scored])
def test_what_reads_its_images_twice_says_so(read):
    inplace, plain = both(4)
    x, y = normal(8, 4), torch.arange(8)
    read(plain, x, y)
    with pytest.raises(ValueError, match="changes its input in place"):
        read(inplace, x, y)


def test_a_crashed_unit_sends_zero_whatever_it_was():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).eval()
    alive = torch.tensor([[True, False]])
    values = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]])
    assert Cut(net, "0").masked(values, alive).tolist() == [[[1.0, 0.0], [2.0, 0.0]]]
