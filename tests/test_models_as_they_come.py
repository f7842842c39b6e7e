"""Models as people bring them: readers that hide, hooks that watch, parametrizations, state beside buffers."""

from __future__ import annotations

import copy
import math
import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from injected import FIXED
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ftnas import bound, devices, inject, rng
from ftnas.dataflow import trace_feature_points
from ftnas.evaluate import score
from ftnas.faults import (
    AdSAF,
    FeatureBitFlip,
    LogNormalVariation,
    MiBB,
    NeuronByzantine,
    NeuronCrash,
    NodeDown,
    ReciprocalNormalVariation,
    WeightBitFlip,
)
from ftnas.faults.bounds import FeatureBound, WeightBound, stored_bound
from ftnas.faults.saturation import power_of_two
from ftnas.quantize import FixedPoint
from ftnas.regularizers import Dropout, Regularization

X = torch.randn(4, 3, 6, 6, generator=rng.generator(0, "x"))


def built(make, *args):
    with rng.isolated(0, "model"):
        model = make(*args)
    return model.eval()


def points(model, x=X):
    return {layer: point for (layer, _), (point, _) in trace_feature_points(model, (x,), {}).points.items()}


@dataclass
class Answer:
    feature: Tensor
    out: Tensor


class Read(nn.Module):
    """A convolution and its BatchNorm, with something else that reads the convolution, or only its shape."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), other

    def forward(self, x):
        y = self.conv(x)
        other = self.other(y)
        return (self.norm(y), other)


def written(y):
    kept = torch.zeros(y.shape)
    kept[...] = y
    return kept


@pytest.mark.parametrize(
    ("other", "point"),
    [
        (lambda y: 2 * y, "conv"),
        (written, "conv"),
        (lambda y: Answer(y, y.shape), "conv"),
        (lambda y: y.new_tensor(1.0), "norm"),
        (torch.zeros_like, "norm"),
        (lambda y: y.new_zeros(2), "norm"),
        (lambda y: torch.ones(1).expand_as(y), "norm"),
        (lambda y: y.expand_as(y), "conv"),
    ],
)
def test_who_reads_the_values_decides_on_the_feature_point(other, point):
    assert points(built(Read, other)) == {"conv": point}


@pytest.mark.parametrize("fault", [MiBB(mac_error_rate=5e-3), FeatureBitFlip(bit_error_rate=0.02)])
@pytest.mark.parametrize("place", ["conv", "norm", "relu"])
def test_a_hook_that_only_looks_changes_nothing(fault, place):
    def made():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    seen = []
    plain, watched = built(made), built(made)
    module = watched[["conv", "norm", "relu"].index(place)]
    module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].mean()))
    module.register_forward_hook(lambda _module, given, output: seen.append((given[0].detach(), output.detach())))
    hooks = [dict(module._forward_pre_hooks), dict(module._forward_hooks)]
    found = []
    for model in (plain, watched):
        with torch.no_grad(), inject(model, fault, quantization=FIXED, seed=1):
            found.append(model(X))
    assert torch.equal(*found) and seen
    assert [dict(module._forward_pre_hooks), dict(module._forward_hooks)] == hooks


def test_a_hook_that_changes_what_a_module_is_given_reads_it():
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert points(model) == {"0": "1"}
    model[1].register_forward_pre_hook(lambda _module, given: (given[0] * 2,))
    assert points(model) == {"0": "0"}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_batch_norm_with_an_activation_function_in_it_is_told(inplace):
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x), inplace=inplace)

    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)))
    with pytest.warns(UserWarning, match="BatchNorm '1' \\(NormAct\\) does more than normalise"):
        assert points(model) == {"0": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points(built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace))))


def test_a_layer_that_gives_more_than_a_tensor_is_refused():
    class WithBias(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight), self.bias

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WithBias(6, 2)

        def forward(self, x):
            y, bias = self.layer(x)
            return y + bias

    model = Net().eval()
    with pytest.raises(ValueError, match="'layer' .* gives a tuple"), inject(model, quantization=FIXED):
        model(X)


class Moving(nn.Module):
    """Moves everything that a forward may move: a teacher's weights, an attribute, global random states."""

    def __init__(self):
        super().__init__()
        self.layer, self.teacher, self.memory, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), None, 0
        self.teacher.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
                own.mul_(0.5).add_(other, alpha=0.5)
        self.memory = x if self.memory is None else self.memory + x
        self.calls += 1
        return self.layer(self.memory) + self.teacher(x) + random.random() + float(np.random.rand()) + torch.rand(())


def test_looking_for_feature_points_moves_nothing():
    plain, injected = built(Moving), built(Moving)
    found = []
    for model in (plain, injected):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        with torch.no_grad():
            if model is plain:
                model(X)
            else:
                with inject(model, MiBB(mac_error_rate=1e-3), quantization=FIXED, seed=1):
                    model(X)
        found.append((random.random(), np.random.rand(), torch.rand(1).item(), model.calls, model.memory.shape))
        found[-1] += (float(model.teacher.weight.sum()), float(model.teacher.bias.sum()))
    assert found[0] == found[1] and found[0][3] == 1


class Block(nn.Module):
    """Has ``inplace`` for the activation function at its end, and is added to what it was given."""

    def __init__(self):
        super().__init__()
        self.inplace = True
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        x = x * 1
        return x + self.block(x=x)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_block_that_ends_in_place_leaves_what_it_was_given(rate):
    model = built(Residual)
    with torch.no_grad():
        wanted = model(X) if rate == 0 else X
        with inject(model, NodeDown(rate=rate, nodes={"n": ["block"]}), seed=1):
            assert torch.equal(model(X), wanted)


def test_a_block_that_begins_in_place_changes_what_it_was_given():
    class First(Block):
        def forward(self, x):
            return self.conv(self.relu(x))

    model = built(Residual)
    model.block = built(First)
    with torch.no_grad():
        wanted = model(X)
        with inject(model, NodeDown(rate=0.0, nodes={"n": ["block"]}), seed=1):
            assert torch.equal(model(X), wanted)
        with inject(model, NodeDown(rate=1.0, nodes={"n": ["block"]}), seed=1):
            assert torch.equal(model(X), X.relu())


@pytest.mark.parametrize("layers", ["relu", "conv2d"])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_beside_faults_of_the_buffer(layers, inplace):
    """What a unit that dropout crashed holds is 0, whatever was in the buffer."""
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace))).train()
    extras = Regularization([Dropout(layers=(layers,), rate=0.3)], model)
    fault = NeuronByzantine(rate=0.5, capacity=3.0)
    with (
        inject(model, fault, quantization=FIXED, seed=1, errors="soft") as injection,
        extras.attached(injection.replaced),
    ):
        extras.step(rng.generator(0, "masks"))
        out = model(X)
        out.sum().backward()
    assert injection.record.hits > 100 and model[0].weight.grad.abs().sum() > 0
    zero = (out == 0).double().mean()
    assert 0.3 < zero < 0.7 if layers == "relu" else zero > 0.05
    if layers == "relu":
        draws = torch.rand(out.shape, generator=rng.generator(0, "masks"))
        assert (out[draws < 0.3] == 0).all()


# Weights with parametrizations of their own


def normed(kind):
    return nn.Sequential(kind(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("fault", [AdSAF(sa0_rate=0.05, sa1_rate=0.05), MiBB(mac_error_rate=1e-3)])
def test_a_training_step_with_a_parametrization_of_the_models_own(kind, fault):
    model = built(normed, kind).train()
    with inject(model, fault, quantization=FIXED, seed=1, errors="soft", draw_on="device") as injection:
        with injection.weights_shared():
            with injection.paused():
                clean = model(X)
            (clean.sum() + model(X).sum()).backward()
    assert injection.record.hits > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", [nn.Identity, parametrizations.orthogonal])
def test_a_forward_without_gradients_takes_none_from_those_that_share_its_weights(kind):
    found = []
    for teacher in (False, True):
        model = built(normed, lambda layer: layer if kind is nn.Identity else kind(layer)).train()
        with inject(model, MiBB(mac_error_rate=1e-3), quantization=FIXED, seed=1, errors="soft") as injection:
            with injection.weights_shared(), injection.paused():
                if teacher:
                    with torch.no_grad():
                        model(X)
                model(X).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_bound_is_a_multiple_of_the_weights_that_a_parametrization_gives():
    model = built(normed, parametrizations.spectral_norm)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(40.0)
        wanted = float(model[0].weight.std())
    bound(model, weights=WeightBound(std_multiple=2.0))
    assert float(stored_bound(model[0], "weight_bound")) == power_of_two(2.0 * wanted) < 1.0


def test_weights_that_torch_keeps_between_forwards_are_refused():
    model = built(normed, parametrizations.weight_norm)
    with torch.no_grad(), inject(model, AdSAF(), quantization=FIXED, seed=1, errors="soft"):
        with parametrize.cached(), pytest.raises(RuntimeError, match="call it outside of that"):
            model(X)
        model(X)


def test_a_copy_of_a_layer_with_a_parametrized_bias_is_left_alone():
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    other = nn.Sequential(*model)
    other[0] = copy.deepcopy(model[0])
    with torch.no_grad():
        wanted = other(X)
        with inject(model, AdSAF(sa0_rate=0.2, sa1_rate=0.2), quantization=FIXED, seed=1):
            assert torch.equal(other(X), wanted) and not torch.equal(model(X), wanted)
        assert torch.equal(model(X), wanted)


def test_a_weight_that_is_no_part_of_the_state_stays_none():
    def made():
        layer = nn.Conv2d(3, 4, 3)
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.register_buffer("first", torch.zeros(1))
        layer.register_buffer("weight", weight, persistent=False)
        layer.register_buffer("last", torch.ones(1))
        return nn.Sequential(layer)

    model = built(made)
    before, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    with torch.no_grad(), inject(model, AdSAF(), quantization=FIXED, seed=1):
        model(X)
    assert list(model.state_dict()) == before == ["0.bias", "0.first", "0.last"]
    assert [name for name, _ in model.named_buffers()] == buffers


def test_a_state_has_its_order_inside_a_block_too():
    model = built(normed, lambda layer: layer)
    names = list(model.state_dict())
    with inject(model, AdSAF(), quantization=FIXED, seed=1):
        assert list(model.state_dict()) == names
        model(X)


# Modes, seeds, number formats


@pytest.mark.parametrize("faults", [(), (AdSAF(sa0_rate=0.1, sa1_rate=0.1),), (MiBB(mac_error_rate=1e-3),)])
def test_gradients_through_frozen_weights_after_a_forward_in_inference_mode(faults):
    model = built(normed, lambda layer: layer).requires_grad_(False)
    x = X.clone().requires_grad_()
    with inject(model, *faults, quantization=FIXED, seed=1):
        with torch.inference_mode():
            model(X)
        model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        AdSAF(sa0_rate=0.1, sa1_rate=0.1),
        MiBB(mac_error_rate=1e-3),
        WeightBitFlip(bit_error_rate=0.05, dtype="fp32"),
        ReciprocalNormalVariation(sigma=0.3),
        NeuronCrash(rate=0.1),
    ],
    ids=lambda fault: fault.name,
)
def test_hits_are_counted_in_inference_mode_and_out_of_it(fault, readable, monkeypatch):
    if not readable:  # the way that a GPU takes
        monkeypatch.setattr(devices, "is_readable", lambda _: False)
    formats = {} if fault.name == "weight_bit_flip" else {"quantization": FIXED}
    records = []
    for modes in ((torch.inference_mode, torch.no_grad, torch.inference_mode), (torch.no_grad,) * 3):
        model = built(normed, lambda layer: layer)
        with inject(model, fault, **formats, seed=1, errors="soft", draw_on="device") as injection:
            for mode in modes:
                with mode():
                    model(X)
        records.append(injection.record)
    assert records[0] == records[1] and records[0].hits > 0


def test_features_read_as_zero_are_counted_in_inference_mode_and_out_of_it():
    model = built(normed, lambda layer: layer)
    bound(model, features=FeatureBound(value=1.0, nan="zero"))
    with torch.no_grad(), inject(model, MiBB(mac_error_rate=1e-3), quantization=FIXED, seed=1) as injection:
        with torch.inference_mode():
            model(X * math.nan)
        before = injection.record.features_zeroed
        model(X * math.nan)
    assert injection.record.features_zeroed == 2 * before > 0


def test_a_score_of_images_that_inference_mode_made():
    model = built(normed, lambda layer: layer)
    labels = torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode():
        images = X * 1
    with inject(model, MiBB(mac_error_rate=1e-3), quantization=FIXED, seed=1, errors="soft") as injection:
        found = score(model, injection, [(images, labels)], alpha_r=0.5)
        assert found == score(model, injection, [(X.clone(), labels)], alpha_r=0.5)


def test_the_same_number_is_the_same_seed_whatever_its_type():
    wanted = rng.seed_for(3, "layer", 1)
    for seed, label in ((np.int64(3), np.uint8(1)), (torch.tensor(3), torch.tensor(1)), (3, True)):
        assert rng.seed_for(seed, "layer", label) == wanted
    model = built(normed, lambda layer: layer)
    found = []
    for draw in (7, np.int64(7), torch.tensor(7)):
        with torch.no_grad(), inject(model, MiBB(mac_error_rate=1e-2), quantization=FIXED, seed=1) as injection:
            injection.draw = draw
            found.append(model(X))
            assert injection.draw == 8
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for wrong in (3.0, "3", None):
        with pytest.raises(ValueError, match="are integers, got"):
            rng.seed_for(wrong, "layer")


@pytest.mark.parametrize(
    "fault",
    [
        MiBB(mac_error_rate=1e-2),
        NeuronByzantine(rate=0.1, capacity=1.0),
        NeuronCrash(rate=0.1),
        LogNormalVariation(sigma=0.2),
        WeightBitFlip(bit_error_rate=0.01),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_draw_is_the_same_under_another_default_number_format(fault, dtype, tmp_path):
    model, found = built(normed, lambda layer: layer), []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            with torch.no_grad(), inject(model, fault, quantization=FIXED, seed=1) as injection:
                found.append(model(X))
                injection.plans().save(tmp_path / "plans.npz")
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 9), (torch.float16, 12), (torch.float32, 24)])
def test_words_are_no_wider_than_the_numbers_of_the_model_hold(dtype, bits):
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    assert torch.equal(every.to(dtype).double(), every)
    model = built(normed, lambda layer: layer).to(dtype)
    with torch.no_grad(), inject(model, quantization=FixedPoint(bits=bits)):
        model(X.to(dtype))
    if dtype != torch.float32:
        assert not torch.equal((every * 2 + 1).to(dtype).double(), every * 2 + 1)
        with pytest.raises(ValueError, match=f"up to {bits} bits exactly, and there are words of {bits + 1}"):
            inject(model, quantization=FixedPoint(bits=bits + 1))


@pytest.mark.parametrize("inside", [True, False])
def test_words_are_no_wider_than_autocast_holds(inside):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
                return self.layer(x)

    def run(bits):
        flips = FeatureBitFlip(bit_error_rate=0.5, where={"bits": (0, 1)})
        model, x = Casting().eval(), torch.randn(64, 16)
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside),
            inject(model, flips, quantization=FixedPoint(bits=bits)) as injection,
        ):
            faulty = model(x)
            with injection.paused():
                return int((faulty != model(x)).sum()), injection.record.hits

    changed, hits = run(9)
    assert abs(changed - 384) < 60 and hits > changed  # three words of four, by one bit or two
    with pytest.raises(ValueError, match="computes in torch.bfloat16, which holds words of up to 9 bits"):
        run(10)


@pytest.mark.parametrize(
    ("dtype", "words", "fits"),
    [
        (torch.bfloat16, "fp32", False),
        (torch.float16, "fp32", False),
        (torch.float16, "bf16", False),
        (torch.bfloat16, "fp16", False),
        (torch.bfloat16, "bf16", True),
        (torch.float16, "fp16", True),
        (torch.float32, "bf16", True),
        (torch.float64, "fp32", True),
    ],
)
def test_float_words_are_no_wider_than_the_numbers_of_the_model(dtype, words, fits):
    model, flips = nn.Linear(8, 8).to(dtype), WeightBitFlip(bit_error_rate=0.1, dtype=words)
    if not fits:
        with pytest.raises(ValueError, match=f"does not hold the words of {words}"):
            inject(model, flips)
        return
    with torch.no_grad(), inject(model, flips) as injection:
        model(torch.randn(2, 8, dtype=dtype))
    assert injection.record.hits > 0


def test_lazy_layers_are_refused_before_their_first_forward():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(ValueError, match="run it once before inject"):
        inject(model, AdSAF(), quantization=FIXED)
    model(X)
    with inject(model, AdSAF(), quantization=FIXED):
        model(X)


# What a forward for looking, and what a hook, may do


class First(nn.Module):
    """Makes things in its first forward: a hook, a submodule, weights that follow the data."""

    def __init__(self):
        super().__init__()
        self.layer, self.ready = nn.Linear(6, 6), False

    def forward(self, x):
        if not self.ready:
            self.ready = True
            self.layer.register_forward_hook(lambda _module, _given, output: output + 1)
            self.last = nn.Identity()
            with torch.no_grad():
                self.layer.bias.add_(x.mean())
        return self.last(self.layer(x))


def test_what_a_model_makes_in_its_first_forward_is_made_once():
    plain, injected = built(First), built(First)
    with torch.no_grad():
        plain(X)
        with inject(injected, MiBB(mac_error_rate=1e-3), quantization=FIXED, seed=1):
            injected(X)
        assert len(injected.layer._forward_hooks) == 1 and isinstance(injected.last, nn.Identity)
        assert torch.equal(plain(X), injected(X))


def test_a_hook_that_changes_its_argument_in_place_reads_it():
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

    def double(_module, given):
        given[0].mul_(2)

    model[1].register_forward_pre_hook(double)
    assert points(model) == {"0": "0"}


def test_an_activation_function_in_a_hook_is_met():
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity()))

    def activate(_module, given):
        F.relu_(given[0])

    model[2].register_forward_pre_hook(activate)
    assert trace_feature_points(model, (X,), {}).activated == {("0", 0)}


def test_a_bound_moves_nothing_else():
    for settings in (
        {"weights": WeightBound(value=1.0)},
        {"weights": WeightBound(std_multiple=2.0)},
        {"features": FeatureBound(value=1.0)},
    ):
        model = built(normed, parametrizations.spectral_norm).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        bound(model, **settings)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert model[0].parametrizations.weight[0].training


def test_kept_weights_matter_only_where_weights_are_read():
    model = built(normed, parametrizations.weight_norm)
    with torch.no_grad(), parametrize.cached(), inject(model, NodeDown(rate=0.0, nodes={"n": ["1"]}), seed=1):
        model(X)


def test_words_of_layers_alone_must_fit():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 2), nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x):
            return self.layer(x) * self.scale

    model = built(Net)
    with torch.no_grad(), inject(model, quantization=FixedPoint(bits=16)):
        model(X)


def test_what_a_model_returns_may_hold_anything():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x):
            found = Answer(self.layer(x), torch)
            found.me, found.many = found, []
            found.many.append(found.many)
            return found

    assert points(built(Net)) == {"layer": "layer"}


def test_the_class_of_a_layer_comes_back():
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    kind = type(model[0])
    with torch.no_grad(), inject(model, AdSAF(), quantization=FIXED, seed=1):
        model(X)
    assert type(model[0]) is kind
