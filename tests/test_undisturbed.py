"""A model is what it was after an injection, for autograd too; and what a forward for looking may move is put back."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from injected import FIXED
from torch import Tensor, nn

import ftnas
from ftnas import inject, rng
from ftnas.faults import AdSAF, MiBB, NeuronCrash
from ftnas.quantize import FixedPoint
from ftnas.undisturbed import undisturbed

X = torch.randn(4, 3, 8, 8, generator=rng.generator(0, "x"))
MIBB = MiBB(mac_error_rate=0.01)


def network(*, norm=True):
    with rng.isolated(0, "model"):
        middle = nn.BatchNorm2d(4) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def end_of_graph(parameter):
    """Return the node that accumulates a parameter's gradient, on which DistributedDataParallel hangs."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("change", ["inject", "saturate"])
def test_the_end_of_a_parameters_graph_stays_what_it_is(change):
    model, fired = network(), []
    node = end_of_graph(model[0].weight)
    node.register_hook(lambda *_: fired.append(True))
    before = model[0].weight._version
    if change == "inject":
        with torch.no_grad(), inject(model, AdSAF(), quantization=FIXED):
            model(X)
    else:
        ftnas.saturate(model, "tanh")
    model(X).sum().backward()
    assert fired == [True]
    stored = model[0].weight if change == "inject" else model[0].parametrizations.weight.original
    assert stored._version == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("faults", [[AdSAF(), MIBB], [NeuronCrash(rate=0.1)]])
def test_a_clean_forward_before_the_block_keeps_its_gradient(training, faults):
    def forward(model, inside):
        if not inside:
            return model(X).square().mean()
        with inject(model, *faults, quantization=FIXED) as injection, injection.paused():
            return model(X).square().mean()

    models = [network().train(training) for _ in range(3)]
    (forward(models[0], False) + forward(models[0], True)).backward()
    forward(models[1], False).backward()
    forward(models[2], True).backward()
    for both, *each in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(both.grad, each[0].grad + each[1].grad, atol=1e-6)


def test_a_graph_from_evaluation_outlives_the_trace_in_training():
    model = network().eval()
    with inject(model, MIBB, quantization=FIXED):
        loss = model(X).square().mean()
        model.train()
        model(X)
        loss.backward()


def test_an_expanded_buffer_is_no_obstacle():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5).expand(1, 3, 8, 8))

        def forward(self, x):
            return self.conv(x - self.mean)

    model = Centred()
    with torch.no_grad(), inject(model, quantization=FixedPoint(bits=24)):
        found = model(X)
    assert torch.allclose(found, model.conv(X - 0.5), atol=1e-4)


def test_what_attributes_hold_is_put_back():
    model = nn.Linear(2, 2)
    model.history, model.table, model.names = [1], {"a": {"n": 2}}, {"x"}
    model.recent, model.scale = deque([1, 2], maxlen=2), torch.ones(3)
    model.pair = ([1], torch.ones(2))
    generators = torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)
    model.generators = list(generators)
    expected = [torch.rand(1, generator=torch.Generator().manual_seed(1)), np.random.default_rng(1).random()]
    with undisturbed(model):
        model.history.append(2)
        model.table["a"]["n"] += 1
        model.names.add("y")
        model.recent.append(3)
        model.scale.mul_(2)
        model.pair[0].append(2)
        model.pair[1].zero_()
        torch.rand(1, generator=generators[0]), generators[1].random(), generators[2].random()
    assert (model.history, model.table, model.names, model.recent) == ([1], {"a": {"n": 2}}, {"x"}, deque([1, 2]))
    assert torch.equal(model.scale, torch.ones(3)) and model.recent.maxlen == 2
    assert model.pair[0] == [1] and torch.equal(model.pair[1], torch.ones(2))
    assert [torch.rand(1, generator=generators[0]), generators[1].random()] == expected
    assert generators[2].random() == random.Random(1).random()


@dataclass
class Batch:
    """A container that torch does not know."""

    x: Tensor


class Graph(nn.Module):
    """Writes to what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch):
        batch.x.div_(2)
        batch.x = self.layer(batch.x)
        return batch.x


def test_an_object_that_the_model_changes_is_changed_once():
    model, x = Graph(), torch.randn(5, 4)
    with torch.no_grad(), inject(model, quantization=FixedPoint(bits=24)):
        found = model(Batch(x.clone()))
    assert torch.allclose(found, model.layer(x / 2), atol=1e-4)


def test_an_object_that_is_known_by_identity_is_recognised():
    task = Batch(X)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x, which):
            if which is not task:
                raise KeyError("no such task")
            return self.layer(x)

    model = Heads()
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED) as injection:
        model(X, task)
    assert injection.record.hits > 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("to_sparse", [Tensor.to_sparse_coo, Tensor.to_sparse_csr])
def test_sparse_arguments_pass(to_sparse):
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, neighbours):
            return torch.sparse.mm(neighbours, self.layer(x))

    model, x = Convolution(), torch.randn(6, 4)
    with torch.no_grad(), inject(model, MIBB, AdSAF(), quantization=FIXED) as injection:
        assert model(x, to_sparse(torch.eye(6))).shape == (6, 4)
    assert injection.record.sites > 0


def test_a_model_that_takes_gradients_itself_is_traced_with_them():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            x = x.requires_grad_()
            return torch.autograd.grad(self.layers(x).sum(), x, create_graph=True)[0]

    model = Field()
    with inject(model, MIBB, quantization=FIXED) as injection:
        model(torch.randn(4, 3)).sum().backward()
    assert injection.record.hits > 0 and model.layers[0].weight.grad is not None


def test_what_faults_cannot_go_into_is_refused_in_one_line():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with (
        pytest.warns(UserWarning),
        torch.no_grad(),
        pytest.raises(ValueError, match="nested tensor.*enable_nested_tensor=False"),
        inject(encoder, quantization=FIXED),
    ):
        encoder(torch.randn(3, 5, 8), src_key_padding_mask=padding)
    with pytest.raises(ValueError, match="complex64, and faults know words of real numbers"):
        inject(nn.Linear(3, 3, dtype=torch.complex64), quantization=FIXED)
    model = network(norm=False)
    state = dict(model.state_dict())
    with inject(model, MIBB, quantization=FIXED):
        with pytest.raises(NotImplementedError, match="cannot be assigned inside inject"):
            torch.func.functional_call(model, state, (X,))
        with pytest.raises(ValueError, match="within a transform of torch.func"):
            torch.func.vmap(model)(X[:, None])
        model(X)
