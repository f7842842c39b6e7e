"""Models of users that injectors trip over: odd names, one sample, declared points, hooks, frozen weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from injected import FIXED
from torch import nn
from torch.nn.utils import prune

from ftnas import bound, inject, rng, saturate
from ftnas.faults import LogNormalVariation, MiBB, NeuronCrash, NodeDown, WeightBitFlip
from ftnas.faults.bounds import FeatureBound, WeightBound, stored_bound
from ftnas.faults.saturation import Saturation, saturations
from ftnas.faults.select import exactly, find_layers, select_layers
from ftnas.quantize import FixedPoint, Quantization

FLIPS = WeightBitFlip(bit_error_rate=0.2)


def built(make):
    with rng.isolated(0, "model"):
        return make().eval()


def chain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Named(nn.Module):
    """Two layers, one of which is called like a type."""

    def __init__(self):
        super().__init__()
        self.hidden, self.linear = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.hidden(x))


X = torch.randn(5, 6, generator=rng.generator(0, "x"))


# Layers that are called like a type or a pattern


def test_a_layer_called_like_a_type_is_selected_by_its_whole_name():
    layers = find_layers(built(Named))
    assert select_layers(layers, "linear") == {"hidden", "linear"}
    assert select_layers(layers, "name:linear") == {"linear"} == select_layers(layers, exactly("linear"))
    odd = {"a[0]": nn.Linear(1, 1), "a0": nn.Linear(1, 1), "depth:0": nn.Linear(1, 1), "name:x": nn.Linear(1, 1)}
    assert all(select_layers(odd, exactly(name)) == {name} for name in odd)
    assert exactly("stage1.conv") == "stage1.conv"
    with pytest.raises(ValueError, match="name:lin"):
        select_layers(layers, "name:lin")


def test_the_hint_for_layers_is_never_what_was_given():
    layers = {"a": nn.Linear(1, 1), "conv[0]": nn.Linear(1, 1)}
    absent = re.escape("layers='conv2d' matches no layer; the model has none of that type; there is: linear")
    with pytest.raises(ValueError, match=absent):
        select_layers(layers, ["conv2d", "linear"])
    with pytest.raises(ValueError, match="there is: nothing"):
        select_layers({}, "Linear")
    for given, meant in {"conv[0]": "name:conv[0]", "linea": "linear"}.items():
        with pytest.raises(ValueError, match=re.escape(f"layers={given!r} matches no layer; did you mean {meant!r}?")):
            select_layers(layers, given)


def test_saturation_and_bounds_reach_a_layer_called_like_a_type():
    settings = Saturation(function="tanh", std_multiple=4.0, layers=("linear",))
    model = built(Named)
    settings.apply(model)
    again = built(Named)
    settings.resolved(model).apply(again)
    assert saturations(again).keys() == {"hidden", "linear"}
    assert {k: v.scale for k, v in saturations(again).items()} == {k: v.scale for k, v in saturations(model).items()}

    model = bound(built(Named), weights=WeightBound(value={"hidden": 4.0, "name:linear": 1.0}))
    assert [float(stored_bound(layer, "weight_bound")) for layer in (model.hidden, model.linear)] == [4.0, 1.0]


def test_two_bounds_of_a_layer_are_refused():
    with pytest.raises(ValueError, match="layer 'hidden' has two bounds, by 'hidden' and by 'linear'"):
        bound(built(Named), weights=WeightBound(value={"hidden": 4.0, "linear": 1.0}))


# One sample without a batch axis


@pytest.mark.parametrize(
    ("make", "shape"),
    [(chain, (6,)), (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (3, 6, 6))],
    ids=["linear", "conv2d"],
)
@pytest.mark.parametrize("unit", ["position", "channel"])
def test_a_device_fails_one_sample_as_it_fails_a_batch_of_it(make, shape, unit):
    model, x = built(make), torch.randn(shape, generator=rng.generator(1, "x"))
    fault = NeuronCrash(rate=0.4, unit=unit)
    answers, records = [], []
    for given in (x, x.unsqueeze(0)):
        with torch.no_grad(), inject(model, fault, seed=3, errors="hard") as injection:
            answers.append(model(given).reshape(-1))
            plans = injection.plans()
        records.append(injection.record)
        with torch.no_grad(), inject(model, plans=plans):
            assert torch.equal(model(given).reshape(-1), answers[-1])
    assert torch.equal(*answers) and records[0] == records[1] and 0 < records[0].hits < records[0].sites


# Points that a model declares


class Declares(nn.Module):
    """Two layers with a BatchNorm each, of which it tells as it is told."""

    def __init__(self, points, activated=()):
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.c2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.gn = nn.GroupNorm(2, 4)
        self.points, self.names = points, activated

    def feature_points(self):
        return self.points

    def activated_points(self):
        return self.names

    def forward(self, x):
        return self.gn(self.bn2(self.c2(torch.sigmoid(self.bn1(self.c1(x))))))


@pytest.mark.parametrize(
    ("points", "activated", "message"),
    [
        ({"c1": "bnl"}, (), "feature_points.. declares 'bnl', which is no BatchNorm; did you mean 'bn[12]'"),
        ({"c1": "gn"}, (), "feature_points.. declares 'gn', which is no BatchNorm"),
        ({"cl": "bn1"}, (), "feature_points.. declares 'cl', which is no Conv2d or Linear; there is: c1, c2"),
        ({"c1": "bn1", "c2": "bn1"}, (), "feature_points.. declares BatchNorm 'bn1' for 2 layers"),
        ({}, ("bn1",), "activated_points.. declares 'bn1', which is no Conv2d or Linear"),
    ],
)
def test_declared_points_that_do_not_exist_are_refused(points, activated, message):
    model = built(lambda: Declares(points, activated))
    with pytest.raises(ValueError, match=message), inject(model, MiBB(mac_error_rate=0.01), quantization=FIXED):
        model(torch.randn(2, 3, 4, 4))


def test_an_activation_that_is_exchanged_between_two_blocks_is_met():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last, self.function = nn.Linear(6, 400), nn.Identity(), lambda x: x

        def forward(self, x):
            return self.last(self.function(self.layer(x)))

    model = built(Switch)
    for function in (lambda x: x, torch.sigmoid):
        model.function = function
        with torch.no_grad(), inject(model, NeuronCrash(rate=0.3), seed=1) as injection:
            zeros = int((model(X) == 0).sum())
        assert zeros == injection.record.hits > 0


# Weights that a hook makes, frozen ones with a bound that learns, ones of inference mode


def test_a_pruned_layer_is_refused_until_pruning_is_permanent():
    model = built(chain)
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"layer '2' gets its weight from a hook.*prune\.remove"):
        inject(model, FLIPS, quantization=FIXED).__enter__()
    assert not any(module._forward_pre_hooks for module in (model, model[0]))
    prune.remove(model[2], "weight")
    with torch.no_grad(), inject(model, FLIPS, quantization=FIXED) as injection:
        model(X)
    assert injection.record.hits > 0


@pytest.mark.parametrize("quantization", [None, FIXED], ids=["float", "fixed"])
def test_a_bound_learns_over_frozen_weights(quantization):
    gradients = []
    for frozen in (False, True):
        model = bound(built(lambda: nn.Sequential(nn.Linear(6, 8))), weights=WeightBound(value=0.1, learned=True))
        model[0].weight.requires_grad_(not frozen)
        limit = stored_bound(model[0], "weight_bound")
        with inject(model, quantization=quantization):
            for _ in range(2):
                model(X).square().sum().backward()
        gradients.append(limit.grad)
    assert torch.equal(*gradients) and float(gradients[0]) != 0.0


def test_a_bound_that_changes_within_a_block_is_noticed():
    model = bound(built(lambda: nn.Sequential(nn.Linear(6, 8))), weights=WeightBound(value=0.125))
    with torch.no_grad(), inject(model, quantization=FIXED):
        model(X)
        assert float(model[0].weight.abs().max()) <= 0.125
        model[0].weight_bound.fill_(0.25)
        assert 0.125 < float(model[0].weight.abs().max()) <= 0.25


def test_a_model_made_in_inference_mode_is_met():
    with torch.inference_mode():
        model = built(chain)
        with inject(model, FLIPS, quantization=FIXED, seed=2) as injection:
            faulty = model(X)
    plain = built(chain)
    with torch.no_grad(), inject(plain, FLIPS, quantization=FIXED, seed=2):
        assert torch.equal(plain(X), faulty)
    assert injection.record.hits > 0


# What is counted, and what is called by itself


def test_weights_that_are_no_numbers_are_counted_by_the_fault_that_made_them_so():
    model = nn.Sequential(nn.Linear(400, 400)).eval()
    flips = WeightBitFlip(bit_error_rate=0.02, dtype="fp16")
    with torch.no_grad():
        model[0].weight.fill_(1.5)  # a flip of the highest bit of its exponent makes it NaN
        model[0].weight[:10] = torch.nan
        with inject(model, flips, LogNormalVariation(sigma=0.1), seed=1) as injection:
            model(torch.randn(1, 400))
            new = int((~model[0].weight[10:].isfinite()).sum())
    first, second = injection.record.faults
    assert first.nonfinite == new > 0 and 0 < first.nan < new and second.nonfinite == second.nan == 0


@pytest.mark.parametrize("errors", ["hard", "soft"])
@pytest.mark.parametrize("quantization", [None, FIXED], ids=["float", "fixed"])
def test_a_layer_with_faulty_weights_is_not_called_by_itself(errors, quantization):
    model = built(chain)
    with inject(model, FLIPS, quantization=quantization, errors=errors):
        with pytest.raises(RuntimeError, match="'0' was called by itself"):
            model[0](X)
        model(X)
    model[0](X)


def test_a_part_of_a_model_is_not_copied_inside_a_block():
    model = built(chain)
    with torch.no_grad(), inject(model, NeuronCrash(rate=0.5)):
        model(X)
        with pytest.raises(ValueError, match="inside inject"):
            copy.deepcopy(model[0])
    copy.deepcopy(model[0])(X)


# Nodes that are down, beside faults of the buffer


@pytest.mark.parametrize("errors", ["hard", "soft"])
def test_a_node_that_is_down_before_an_activation_function(errors):
    model = built(chain)
    node = NodeDown(rate=1.0, nodes={"a": ["0"]})
    with torch.no_grad(), inject(model, node, NeuronCrash(rate=0.5), seed=1, errors=errors) as injection:
        answers = model(X)
    assert torch.equal(answers == 0, answers != model[2].bias) and injection.record.faults[1].sites > 0
    with torch.no_grad(), inject(model, node, protect=["*"]) as injection:
        assert torch.equal(model(X), model[2].bias.expand(5, 4))
    assert injection.record.hits == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("read", [True, False])
def test_a_node_with_an_activation_function_in_place(read, training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.function, self.last = nn.Linear(6, 40), nn.ReLU(inplace=True), nn.Linear(40, 4)

        def forward(self, x):
            hidden = self.first(x)
            after = self.function(hidden)
            return self.last(after if read else hidden)

    model, crash = built(Net), NeuronCrash(rate=0.5, where={"layers": ["first"]})
    for rate in (0.0, 1.0):
        node = NodeDown(rate=rate, nodes={"a": ["function"]})
        for also in ([crash], []):
            with torch.set_grad_enabled(training), inject(model, *also, node, seed=1, errors="soft") as injection:
                answers = model(X)
            if rate == 1.0:
                assert torch.equal(answers, model.last.bias.expand_as(answers))
            elif also:
                with torch.set_grad_enabled(training), inject(model, *also, seed=1, errors="soft") as alone:
                    assert torch.equal(answers, model(X))
                assert injection.record.faults[0].hits == alone.record.faults[0].hits > 0
            else:
                assert torch.equal(answers, model(X))


# What is left as it is


def test_layers_that_faults_do_not_know_are_named():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 2, 2)
            self.attention = nn.MultiheadAttention(4, 2)
            self.last = nn.Linear(4, 2)

        def forward(self, images):
            tokens = self.up(images).flatten(2)[..., :4]
            return self.last(self.attention(tokens, tokens, tokens)[0])

    with pytest.warns(
        UserWarning, match=r"^up \(ConvTranspose2d\), attention \(MultiheadAttention\): neither quantized"
    ):
        inject(Attends(), quantization=FixedPoint(bits=8))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"'up' matches no layer.*Conv2d and Linear layers alone"),
    ):
        inject(Attends(), LogNormalVariation(sigma=0.1), layers="up")


# Formats


def test_features_are_in_twos_complement():
    with pytest.raises(ValueError, match=r"features are held in two's complement"):
        Quantization(features=FixedPoint(encoding="sign_magnitude"))
    both = Quantization.of(FixedPoint(bits=6, encoding="sign_magnitude"))
    assert (both.weights.encoding, both.features.encoding) == ("sign_magnitude", "twos_complement")
    assert both.features.bits == 6


def test_saturated_features_of_a_layer_called_like_a_type():
    model = bound(built(Named), features=FeatureBound(value={"name:linear": 0.25}))
    saturate(model, "tanh", layers="name:linear")
    assert saturations(model).keys() == {"linear"} and stored_bound(model.hidden, "feature_bound") is None
