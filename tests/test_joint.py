"""The clean and the faulty forward as one: what the two in turn give, from fewer operations."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from faulty import gen
from test_search import ADSAF, MIBB, contents, make_search
from test_search import space as tiny  # noqa: F401 a fixture
from torch import nn

from ftnas import devices, inject
from ftnas.compute import Compute
from ftnas.evaluate import score
from ftnas.faults import AdSAF, FeatureBitFlip, MiBB, NodeDown, WeightBitFlip, Where
from ftnas.faults.base import Uniform
from ftnas.faults.hardware import Hardware
from ftnas.faults.joint import halves, paired
from ftnas.faults.memory import storage
from ftnas.quantize import Bounded, FixedPoint, Quantization
from ftnas.rng import generator, isolated
from ftnas.rundir import RunDir
from ftnas.space import Genotype, Supernet, load_space
from ftnas.space.ops import dropout
from ftnas.space.supernet import use_batch_statistics
from ftnas.train import FaultTolerantLoss

FIXED = FixedPoint(bits=8)
FAULT = MiBB(mac_error_rate=2e-3)
SAF = AdSAF(cells="differential", stuck_at="max")
SPACE = load_space("small-8x8").resized(channels=4, cells=3)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WAYS = ["reads", "waits", pytest.param("cuda", marks=GPU)]


@pytest.fixture(params=WAYS)
def device(request, monkeypatch):
    """A CPU, a CPU on which as on a GPU no value is read, and a GPU."""
    if request.param == "waits":
        monkeypatch.setattr(devices, "is_readable", lambda _device: False)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def supernet(device, space=SPACE, **options):
    with isolated(0, "net"):
        return Supernet(space, num_classes=5, **options).to(device)


def batch(device, number=6, side=12):
    return torch.randn(number, 3, side, side, generator=gen(1)).to(device), (torch.arange(number) % 5).to(device)


def injected(model, *faults, **options):
    options = {"quantization": FIXED, "errors": "soft", "draw_on": "device", **options}
    return inject(model, *(faults or (FAULT,)), **options)


def genotypes(number):
    return [Genotype.random(SPACE, generator=generator(n, "paths")) for n in range(number)]


def twice(genotype):
    """The genotype with the first node of each cell reading one source by one primitive twice."""
    data = genotype.to_dict()
    data["normal"]["2"] = data["reduce"]["2"] = [["sep_conv_3x3", 0], ["sep_conv_3x3", 0]]
    return Genotype.from_dict(data)


def steps(device, paths, *, joint, faults=(FAULT,), alpha=0.4):
    """Losses, gradients, plans and hits of a step along each path."""
    model, found = supernet(device), []
    images, labels = batch(device)
    loss, parameters = FaultTolerantLoss(model, alpha_l=alpha, joint=joint), list(model.parameters())
    with injected(model, *faults) as injection:
        for number, path in enumerate(paths):
            injection.draw = 10 + number
            losses = loss.gradients(partial(model, genotype=path), injection, images, labels, parameters)
            gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
            found.append((losses, gradients, injection.plans().plans, injection.record))
    return found


FAULTS = {
    "features": (FAULT,),
    "features, some by themselves": (FAULT, MiBB(mac_error_rate=5e-4, where=Where(layers="*.edges.*"))),
    "weights": (SAF,),
    "weights, some": (AdSAF(cells="differential", stuck_at="max", where=Where(layers="*.edges.*")),),
    "weights, two ways": (SAF, AdSAF(cells="differential", stuck_at="max", where=Where(layers="*.edges.*"))),
    "bits of weights": (WeightBitFlip(bit_error_rate=1e-3),),
    "both": (SAF, FAULT),
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_step_is_that_of_the_forwards_in_turn(device, faults):
    paths = [*genotypes(2), twice(genotypes(1)[0]), genotypes(1)[0]]
    for one, other in zip(*(steps(device, paths, joint=joint, faults=faults) for joint in (True, False)), strict=True):
        for name in ("total", "clean", "faulty"):
            assert float(getattr(one[0], name)) == pytest.approx(float(getattr(other[0], name)), rel=1e-5)
        assert [g is None for g in one[1]] == [g is None for g in other[1]]
        for mine, theirs in zip(one[1], other[1], strict=True):
            if mine is not None:
                assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
        assert one[2].keys() == other[2].keys() and len(one[2]) > 2
        for key, plan in one[2].items():
            assert torch.equal(plan.sites, other[2][key].sites) and torch.equal(plan.codes, other[2][key].codes)
            assert plan.shape == other[2][key].shape
        assert one[3] == other[3] and one[3].hits > 0


def test_images_of_other_sizes_meet_the_faults_that_they_meet_in_turn(device):
    path, found = genotypes(1)[0], []
    for joint in (True, False):
        model = supernet(device).eval()
        with injected(model) as injection, injection.weights_shared():
            forward = partial(model, genotype=path)
            for side in (12, 8, 12, 8, 10):
                score(forward, injection, [batch(device, side=side)], alpha_r=0.5, first_draw=side, joint=joint)
                found.append((injection.record, {key: plan.sites for key, plan in injection.plans().plans.items()}))
    for (record, sites), (other, others) in zip(found[:5], found[5:], strict=True):
        assert record == other
        assert sites.keys() == others.keys() and all(torch.equal(sites[key], others[key]) for key in sites)


def test_faults_hit_the_second_half_alone_and_move_it(device):
    model, path = supernet(device), genotypes(1)[0]
    images, _ = batch(device)
    seen = {}
    with injected(model) as injection, injection.weights_shared():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out))
        with torch.no_grad():
            with injection.paused():
                without = model(images, path)
            quiet, seen = seen, {}
            with injection.joint.running():
                clean, faulty = halves(model(paired(images), path))
    assert torch.allclose(clean, without, rtol=1e-5, atol=1e-6) and not torch.allclose(faulty, without, atol=1e-3)
    assert quiet.keys() == seen.keys() and len(seen) > 10
    for name, outs in seen.items():
        for out, alone in zip(outs, quiet[name], strict=True):
            assert torch.allclose(halves(out)[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_score_is_that_of_the_forwards_in_turn(device, faults):
    found = []
    for joint in (True, False):
        model = supernet(device).eval()
        with injected(model, *faults) as injection, injection.weights_shared():
            scores = [
                score(
                    partial(model, genotype=path), injection, [batch(device), batch(device, 4)],
                    alpha_r=0.5, draws=draws, first_draw=3, joint=joint,
                )
                for path, draws in zip(genotypes(4), (1, 2, 1, 1), strict=True)
            ]  # fmt: skip
        found.append((scores, injection.record))
    assert found[0] == found[1]
    assert len({one.clean for one in found[0][0]}) > 1


def test_an_answer_that_is_lost_is_told_by_half(device):
    model, path = supernet(device).eval(), genotypes(1)[0]
    images, labels = batch(device)
    with injected(model) as injection, injection.weights_shared():
        forward = partial(model, genotype=path)
        images[2] = float("nan")
        with pytest.raises(RuntimeError, match="without faults, 6 of 6 answers"):
            score(forward, injection, [(images, labels)], alpha_r=0.5, joint=True)


@pytest.mark.parametrize("size", [1, 3])
def test_each_part_is_rounded_as_it_would_be_alone(device, size):
    form = FixedPoint(bits=5)
    x = torch.randn(size, 3, 700, generator=gen(2)).clamp(-1.9, 1.9).mul(torch.tensor([2.0, 2.0**-8, 32.0])[:, None])
    x = x.to(device)
    x[0, :, 0] = torch.tensor([4.0, 2.0**-7, -64.0])  # at the end of a range, which is clamped on one side
    x.requires_grad_()
    values, lsb = form.each_at_once(x)
    (own,) = torch.autograd.grad(values.sum(), x)
    for part in range(3):
        alone = x[:, part].detach().clone().requires_grad_()
        rounded = form.quantize(alone)
        (gradient,) = torch.autograd.grad(rounded.sum(), alone)
        assert torch.equal(values[:, part], rounded) and torch.equal(own[:, part], gradient)
        assert lsb[part] == form.grid(alone).lsb
    assert (own == 0).any() and (own == 1).any()
    with torch.no_grad():
        x[0, 1, 0] = float("inf")
        values, _ = form.each_at_once(x)
    assert values[:, 1].isnan().all() and values[:, [0, 2]].isfinite().all()


def test_halves_of_a_batch_normalise_by_themselves():
    norm = nn.BatchNorm2d(4, eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, 1.0, 2.0]))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    use_batch_statistics(model)
    x = torch.randn(3, 4, 5, 5, generator=gen(3))
    rows = torch.stack([x, 5 * x + 1], dim=1).flatten(0, 1)
    with injected(model) as injection:
        with injection.weights_shared(), injection.joint.running():
            model(rows)
            for given in (rows, rows.contiguous(memory_format=torch.channels_last)):
                for mine, half in zip(halves(norm.forward(given)), halves(rows), strict=True):
                    mean, var = half.mean((0, 2, 3), keepdim=True), half.var((0, 2, 3), unbiased=False, keepdim=True)
                    scale, shift = norm.weight.view(1, 4, 1, 1), norm.bias.view(1, 4, 1, 1)
                    assert torch.allclose(mine, (half - mean) / (var + 0.1).sqrt() * scale + shift, atol=1e-5)
        assert torch.equal(norm.forward(rows), nn.BatchNorm2d.forward(norm, rows))


def test_a_fault_model_without_a_rate_for_all_draws_for_itself(device):
    path = genotypes(1)[0]
    part = MiBB(mac_error_rate=0.01, where=Where(channels=[0]))
    for one, other in zip(
        *(steps(device, [path], joint=joint, faults=(part,)) for joint in (True, False)), strict=True
    ):
        assert one[3] == other[3] and one[3].hits > 0
        assert float(one[0].faulty) == pytest.approx(float(other[0].faulty), rel=1e-5)


def test_the_model_is_left_as_it_was(device):
    model, path = supernet(device), genotypes(1)[0]
    images, _ = batch(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), injected(model) as injection:
        with injection.weights_shared(), injection.joint.running():
            model(paired(images), path)
            raise RuntimeError("stop")
    assert [set(module.__dict__) for module in model.modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # and within the injection other forwards are what they were
    with injected(model) as injection, injection.paused():
        first = model(images, path)
        with injection.joint.running():
            pass
        assert torch.equal(model(images, path), first)


@pytest.mark.parametrize(
    ("rows", "shared", "message"),
    [
        (3, True, r"takes each image twice, as paired\(images\), got 3 rows"),
        (0, True, "got 0 rows"),
        (4, False, r"run it within weights_shared\(\)"),
    ],
)
def test_what_is_no_pairs_of_rows_is_refused(device, rows, shared, message):
    model = linear().to(device)
    with injected(model) as injection, injection.joint.running():
        with injection.weights_shared() if shared else torch.no_grad(), pytest.raises(ValueError, match=message):
            model(torch.zeros(rows, 3, 2, 2, device=device))
        injection.joint.on = False
        model(torch.zeros(2, 3, 2, 2, device=device))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def reflecting():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


def own():
    return nn.Sequential(Own(3, 4, 1))


def normed():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def remembering():
    model = normed()
    model[1].track_running_stats = False  # in evaluation it normalises by its buffers still
    return model


def replaced():
    model = normed()
    use_batch_statistics(model)
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    return model


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


def standardised():
    return nn.Sequential(Standardised(3, 4, 1))


@pytest.mark.parametrize(
    ("model", "faults", "options", "reason"),
    [
        (linear, (FeatureBitFlip(bit_error_rate=1e-3),), {}, "faults must hit weights or feature points"),
        (linear, (), {}, "faults must hit weights or feature points"),
        (reflecting, (SAF,), {}, "'0' must be a Conv2d, padded with zeros, or a Linear as PyTorch has them"),
        (own, (SAF,), {}, "'0' must be a Conv2d, padded with zeros, or a Linear as PyTorch has them"),
        (linear, (FAULT,), {"mask_gradients": True}, "mask_gradients"),
        (linear, (FAULT,), {"watch": True}, "watch"),
        (linear, (FAULT,), {"bounds": {"1": 2.0}}, "bounds"),
        (linear, (FAULT, NodeDown(nodes={"a": ["1"]}, rate=0.5)), {}, "node_down"),
        (linear, (FAULT,), {"quantization": Quantization(features=FixedPoint(range=Bounded(bound=4.0)))}, "dynamic"),
        (normed, (FAULT,), {}, "'1' must be a BatchNorm2d that normalises by its batch alone"),
        (remembering, (FAULT,), {}, "'1' must be a BatchNorm2d that normalises by its batch alone"),
        (replaced, (FAULT,), {}, "'1' must be a BatchNorm2d that normalises by its batch alone"),
        (standardised, (SAF,), {}, "'0' must be a Conv2d, padded with zeros, or a Linear as PyTorch has them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_know_is_refused_by_name(model, faults, options, reason):
    with inject(model(), *faults, **{"quantization": FIXED, "errors": "soft", **options}) as injection:
        with pytest.raises(ValueError, match=f"cannot be one: .*{re.escape(reason)}"), injection.joint.running():
            pass
        injection._model(torch.zeros(2, 3, 2, 2))


def test_replayed_plans_are_refused():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), torch.zeros(2, 3, 2, 2)
    with injected(model) as injection:
        model(images)
        plans = injection.plans()
    with inject(model, quantization=FIXED, plans=plans) as injection:
        assert injection.joint.obstacle() == "it does not know replayed plans"
        model(images)


class Tied(nn.Module):
    """Reads the weight of a layer by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(nn.functional.linear(self.a(x), self.a.weight))


class Flat(nn.Module):
    """Has other rows than images within."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x.reshape(-1, 4)).view(len(x), 8))


class Half(nn.Module):
    """Computes in half precision within."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 4).bfloat16()

    def forward(self, x):
        return self.b(self.a(x).bfloat16())


@pytest.mark.parametrize(
    ("model", "fault", "message"),
    [
        (Tied, SAF, "the weight of 'a' is read outside of its layer"),
        (Flat, SAF, "'a' has 8 rows of 4"),
        (Flat, FAULT, "'a' has 8 rows of 4"),
        (Half, FAULT, "computes in float32: 'b' has torch.bfloat16"),
    ],
)
def test_what_turns_up_in_a_forward_is_refused_by_name(device, model, fault, message):
    net, x = model().to(device), torch.ones(4, 8, device=device)
    with injected(net, fault) as injection, injection.weights_shared():
        with injection.paused():
            net(x)
        with injection.joint.running(), pytest.raises(ValueError, match=message):
            net(x)
        net(x)


@pytest.mark.parametrize("faults", [(FAULT,), (SAF,)], ids=["features", "weights"])
@pytest.mark.parametrize("first", [True, False])
def test_feature_points_of_a_traced_model_are_those_without(device, faults, first):
    """Also where the forward that is traced is one on pairs of rows."""
    found = []
    images, labels = batch(device)
    for joint in (True, False):
        with isolated(0, "net"):
            model = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), nn.Linear(6, 5),
            ).to(device)  # fmt: skip
        use_batch_statistics(model)
        with injected(model, *faults) as injection:
            if not first:
                with injection.paused():
                    model(images)
            injection.draw = 7
            loss = FaultTolerantLoss(model, alpha_l=0.5, joint=joint)
            found.append(loss.gradients(model, injection, images, labels, list(model.parameters())))
            found.append((injection.plans().plans, [p.grad for p in model.parameters()], injection.record))
    assert float(found[0].clean) == pytest.approx(float(found[2].clean), rel=1e-5)
    assert float(found[0].faulty) == pytest.approx(float(found[2].faulty), rel=1e-5)
    assert found[1][0].keys() == found[3][0].keys() and found[1][2] == found[3][2]
    for mine, theirs in zip(found[1][1], found[3][1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


class Zero(MiBB):
    """A fault model of one's own that reads the sites of its plans, as these are documented."""

    name: ClassVar[str] = "zero"

    def uniform(self, site):
        return Uniform(site.num_values, 0.1, 1)

    def sample(self, site, *, generator):
        raise AssertionError("drawn ahead")

    def apply_(self, values, plan, grid):
        assert plan.shape == tuple(values.shape) and plan.num_values == plan.population == values.numel()
        valid = plan.sites < plan.population
        storage(values)[plan.sites[valid]] = 0.0
        assert torch.equal(plan.at[valid], plan.sites[valid]) and int(valid.sum()) > 0
        return values


def test_a_fault_model_of_ones_own_meets_plans_that_fit_its_tensors(waiting):
    paths = genotypes(1)
    for one, other in zip(
        *(steps("cpu", paths, joint=joint, faults=(Zero(mac_error_rate=1e-3),)) for joint in (True, False)), strict=True
    ):
        assert float(one[0].clean) == pytest.approx(float(other[0].clean), rel=1e-5)
        assert float(one[0].faulty) == pytest.approx(float(other[0].faulty), rel=1e-5)
        assert one[3] == other[3] and one[3].hits > 0


def test_a_body_within_a_body_leaves_the_outer_one_as_it_was(device):
    model, path = supernet(device), genotypes(1)[0]
    with injected(model) as injection, injection.weights_shared(), injection.joint.running():
        with injection.joint.running():
            pass
        assert injection.joint.on
        model(paired(batch(device)[0]), path)
    assert not injection.joint.on
    with pytest.raises(ValueError, match="within the block of the injection"), injection.joint.running():
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_may_be_called_by_keyword(device):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(input=self.norm(input=self.conv(input=x)).mean((2, 3)))

    model = Named().to(device)
    use_batch_statistics(model)
    images, _ = batch(device)
    with injected(model, SAF, FAULT) as injection, injection.weights_shared():
        with injection.paused():
            without = model(images)
        with injection.joint.running():
            assert torch.allclose(halves(model(paired(images)))[0], without, atol=1e-5)


@pytest.mark.parametrize("odd", ["transposed", "channels_last"])
def test_weights_that_lie_otherwise(waiting, odd):
    """Of one output, transposed from one input, as a conversion leaves it; and with the channels innermost."""
    if odd == "transposed":
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Linear(1, 4))
        model[1].weight = nn.Parameter(model[1].weight.detach().view(12, 1).clone().t())
    else:
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten())
        model = model.to(memory_format=torch.channels_last)
    x, found = torch.randn(4, 3, 2, 2, generator=gen(4)), []
    with injected(model, SAF) as injection, torch.no_grad(), injection.weights_shared():
        with injection.paused():
            model(x)
        injection.draw = 3
        found.append(model(x))
        injection.draw = 3
        with injection.joint.running():
            if odd == "channels_last":
                with pytest.raises(ValueError, match="leave channels_last out"):
                    model(paired(x))
                return
            found.append(halves(model(paired(x)))[1])
    assert torch.allclose(found[0], found[1], atol=1e-6)


class Twice(nn.Module):
    """Runs a layer twice, and says so by naming it twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x)))

    def running_layers(self, _x):
        return "a", "a", "b"


def test_layers_that_are_named_twice_are_counted_once(waiting):
    model, x, records = Twice(), torch.randn(4, 3, 8, 8, generator=gen(4)), []
    for joint in (True, False):
        with injected(model) as injection, torch.no_grad(), injection.weights_shared():
            for _ in range(2):  # the first shows what runs
                if joint:
                    with injection.joint.running():
                        model(paired(x))
                else:
                    with injection.paused():
                        model(x)
                    model(x)
        records.append(injection.record)
    assert records[0] == records[1] and records[0].hits > 0


def test_paused_faults_leave_no_faulty_half():
    model = linear()
    with injected(model) as injection, injection.weights_shared(), injection.joint.running():
        with pytest.raises(ValueError, match=r"run it outside of paused\(\)"), injection.paused():
            model(torch.zeros(2, 3, 2, 2))
        model(torch.zeros(2, 3, 2, 2))


def test_copies_lose_the_same_values_to_dropout():
    x = torch.ones(6, 40)
    one = dropout(x[:3], 0.5, generator=gen(5))
    both = dropout(x, 0.5, generator=gen(5), copies=2)
    assert torch.equal(both, one.repeat_interleave(2, dim=0)) and 0 < one.count_nonzero() < one.numel()
    model, images = supernet("cpu", dropout=0.5), paired(batch("cpu")[0])
    logits = model(images, genotypes(1)[0], dropout_generator=gen(6), copies=2)
    assert torch.allclose(*halves(logits), atol=1e-5)


@pytest.mark.parametrize("faults", [FAULTS["features"], FAULTS["both"]], ids=["features", "both"])
def test_no_step_waits_for_a_value_and_all_ask_for_the_same(faults):
    script = Path(__file__).parent.parent / "scripts" / "count_operations.py"
    spec = importlib.util.spec_from_file_location("count_operations", script)
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)
    counts = {}
    for joint in (True, False):
        with counting.device_without_values() as device:  # what reads a value raises here
            model, seen = supernet(device), []
            loss, path = FaultTolerantLoss(model, alpha_l=0.5, joint=joint), genotypes(1)[0]
            images, labels = torch.zeros(4, 3, 8, 8, device=device), torch.zeros(4, dtype=torch.int64, device=device)
            with injected(model, *faults) as injection:
                forward, parameters = partial(model, genotype=path), list(model.parameters())
                step = partial(loss.gradients, forward, injection, images, labels, parameters)
                step()  # shows the features
                for _ in range(2):
                    with counting.Operations().named() as operations:
                        step()
                    seen.append(operations.seen)
        assert seen[0] == seen[1]
        counts[joint] = operations.by_part()
    assert counts[True]["rounding"] < 0.6 * counts[False]["rounding"]
    assert counts[True]["network"] < 0.6 * counts[False]["network"]
    assert 0 < counts[True]["injection"] <= counts[False]["injection"]
    assert counts[True]["drawing"] <= counts[False]["drawing"] + 16  # for all features at once in both


def test_weights_of_both_begin_at_vectors_and_are_read_at_once(waiting):
    model, path = supernet("cpu"), genotypes(1)[0]
    images, _ = batch("cpu")
    seen = []
    model.stem.register_forward_pre_hook(lambda *_: seen.append(dict(injection.together.ready)))
    with injected(model, SAF) as injection, injection.weights_shared(), injection.joint.running():
        for learns in (True, False):
            with torch.set_grad_enabled(learns):
                model(paired(images), path)
    for ready in seen:
        assert len(ready) > 5
        for name, weight in ready.items():
            own = model.get_submodule(name).weight
            assert weight.shape == (2 * own.shape[0], *own.shape[1:])
            assert weight.data_ptr() % 16 == 0 and weight.is_contiguous()
            clean, _ = weight.chunk(2)
            assert torch.equal(clean, FixedPoint(bits=8, encoding="sign_magnitude").quantize(own))
    assert any(not torch.equal(*weight.detach().chunk(2)) for weight in seen[0].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_gpu_is_never_waited_for(faults):
    device = torch.device("cuda")
    model, (images, labels) = supernet(device), batch(device)
    loss, parameters = FaultTolerantLoss(model, alpha_l=0.5, joint=True), list(model.parameters())
    with injected(model, *faults) as injection:
        for mode in ("default", "default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for path in genotypes(2):
                    loss.gradients(partial(model, genotype=path), injection, images, labels, parameters)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waiting(monkeypatch):
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)


@pytest.mark.parametrize("fault", [MIBB, ADSAF], ids=["mibb", "adsaf"])
def test_a_search_finds_what_that_in_turn_finds_and_can_be_cut(fault, waiting, tiny, tmp_path):  # noqa: F811
    folders = {}
    for name, joint in (("turn", False), ("joint", True)):
        with RunDir.create(tmp_path / name, {}) as run:
            make_search(tiny, run.stage("search"), fault=fault, joint_forwards=joint).run()
        folders[name] = tmp_path / name / "search"
    epochs, trials = (
        {
            name: [json.loads(line) for line in (folder / file).read_text().splitlines()]
            for name, folder in folders.items()
        }
        for file in ("epochs.jsonl", "trials.jsonl")
    )
    assert [epoch["hits"] for epoch in epochs["joint"]][0] == [epoch["hits"] for epoch in epochs["turn"]][0] > 0
    assert epochs["joint"][0]["loss"] == pytest.approx(epochs["turn"][0]["loss"], rel=1e-4)
    assert (
        len(trials["joint"]) == len(trials["turn"]) and trials["joint"][0]["genotype"] == trials["turn"][0]["genotype"]
    )

    with RunDir.create(tmp_path / "cut", {}) as run:
        search = make_search(tiny, run.stage("search"), fault=fault, joint_forwards=True)
        step = search._weights_epoch

        def cut(epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            return step(epoch)

        search._weights_epoch = cut
        with pytest.raises(KeyboardInterrupt):
            search.run()
    with RunDir.open(tmp_path / "cut") as run:
        make_search(tiny, run.stage("search"), fault=fault, joint_forwards=True).run()
    assert contents(tmp_path / "cut" / "search") == contents(folders["joint"])


BUFFER = {"name": "feature_bit_flip", "bit_error_rate": 0.001}
UNTRAINED = {"batch_size": 32, "lr": 0.1, "alpha_l": 0.0}
TOLERANT = {"batch_size": 32, "lr": 0.1, "alpha_l": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {**TOLERANT, "compute": {"channels_last": True}}}, "set weights.compute.channels_last to false"),
        (
            {"weights": {**TOLERANT, "compute": {"fused_rounding": True}}},
            "set weights.compute.fused_rounding to false",
        ),
        ({"weights": {**TOLERANT, "compute": {"autocast": "bf16"}}}, "set weights.compute.autocast to tf32 or null"),
        ({"weights": UNTRAINED, "reward_draws": 2, "derive": {"draws": 2}}, "joint_forwards has no effect"),
        ({"weights": {**TOLERANT, "mask_gradients": True}}, "search.joint_forwards: it does not know mask_gradients"),
        ({"fault": BUFFER}, "search.joint_forwards: faults must hit weights or feature points"),
    ],
    ids=["channels_last", "fused_rounding", "bf16", "no effect", "masks", "buffers"],
)
def test_a_search_refuses_what_cannot_be_one(waiting, tiny, tmp_path, changes, message):  # noqa: F811
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match=message):
        make_search(tiny, run.stage("search"), joint_forwards=True, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": Compute(autocast="bf16")}, "set compute.autocast to tf32 or null"),
        ({"compute": Compute(channels_last=True)}, "set compute.channels_last to false"),
        ({"bn_statistics": "clean"}, "bn_statistics=both and without regularizers"),
        ({"regularization": object()}, "bn_statistics=both and without regularizers"),
    ],
)
def test_a_loss_refuses_what_has_no_effect_in_one_forward(options, message):
    with pytest.raises(ValueError, match=message):
        FaultTolerantLoss(supernet("cpu"), alpha_l=0.5, joint=True, **options)


def test_a_search_whose_derivation_alone_has_one_draw_takes_it(waiting, tiny, tmp_path):  # noqa: F811
    with RunDir.create(tmp_path / "run", {}) as run:
        make_search(tiny, run.stage("search"), joint_forwards=True, weights=UNTRAINED, reward_draws=2)


def test_a_search_on_a_cpu_refuses_it(tiny, tmp_path):  # noqa: F811
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match="for GPUs, and this runs on cpu"):
        make_search(tiny, run.stage("search"), joint_forwards=True)


def test_hardware_without_faults_has_no_faulty_half():
    model = supernet("cpu")
    assert "faults must hit" in Hardware().inject(model, seed=0, errors="soft").joint.obstacle()
