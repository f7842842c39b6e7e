"""The clean and the faulty forward as one: what the two in turn give, from fewer operations."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from faulty import gen
from test_search import ADSAF, MIBB, contents, make_search
from test_search import space as tiny  # noqa: F401 a fixture
from torch import nn

from ftnas import devices, inject
from ftnas.evaluate import score
from ftnas.faults import AdSAF, FeatureBitFlip, MiBB, NodeDown, WeightBitFlip, Where
from ftnas.faults.hardware import Hardware
from ftnas.faults.joint import halves, paired
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
    paths = [*genotypes(3), twice(genotypes(1)[0]), genotypes(1)[0]]
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
                for path in genotypes(4) for draws in (1, 2)
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
        with injection.joint.running():
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
    with pytest.raises(RuntimeError, match="stop"), injected(model) as injection, injection.joint.running():
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


def test_without_shared_weights_it_is_the_same(device):
    model, path = supernet(device), genotypes(1)[0]
    images, _ = batch(device)
    found = []
    with injected(model) as injection, torch.no_grad():
        for shared in (True, False):
            injection.draw = 4
            with injection.weights_shared() if shared else torch.no_grad(), injection.joint.running():
                found.append(model(paired(images), path))
    assert torch.equal(found[0], found[1])


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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_know_is_refused_by_name(model, faults, options, reason):
    with inject(model(), *faults, **{"quantization": FIXED, "errors": "soft", **options}) as injection:
        with pytest.raises(ValueError, match=f"cannot be one: .*{re.escape(reason)}"), injection.joint.running():
            pass
        injection._model(torch.zeros(2, 3, 2, 2))


def test_paused_faults_leave_no_faulty_half():
    model = linear()
    with injected(model) as injection, injection.joint.running():
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


@pytest.mark.parametrize("faults", [FAULTS["features"], FAULTS["weights"], FAULTS["both"]], ids=str)
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
                for number in range(4):
                    with counting.Operations().named() as operations:
                        loss.gradients(
                            partial(model, genotype=path), injection, images, labels, list(model.parameters())
                        )
                    if number > 1:  # the first shows the features, after the second their hits have been counted once
                        seen.append(operations.seen)
        assert seen[0] == seen[1]
        counts[joint] = operations.by_part()
    assert counts[True]["rounding"] < 0.6 * counts[False]["rounding"]
    assert counts[True]["network"] < 0.6 * counts[False]["network"]
    assert 0 < counts[True]["injection"] <= counts[False]["injection"]
    assert counts[True]["drawing"] <= counts[False]["drawing"] + 8  # for all features at once in both


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
TOLERANT = {"batch_size": 32, "lr": 0.1, "alpha_l": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {**TOLERANT, "compute": {"channels_last": True}}}, "does not know weights.compute.channels_last"),
        (
            {"weights": {**TOLERANT, "compute": {"fused_rounding": True}}},
            "does not know weights.compute.fused_rounding",
        ),
        ({"weights": {**TOLERANT, "compute": {"autocast": "bf16"}}}, "set weights.compute.autocast to tf32 or null"),
        ({"weights": {**TOLERANT, "alpha_l": 0.0}, "reward_draws": 2}, "joint_forwards has no effect"),
        ({"fault": BUFFER}, "search.joint_forwards: faults must hit weights or feature points"),
    ],
    ids=["channels_last", "fused_rounding", "bf16", "no effect", "buffers"],
)
def test_a_search_refuses_what_cannot_be_one(waiting, tiny, tmp_path, changes, message):  # noqa: F811
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match=message):
        make_search(tiny, run.stage("search"), joint_forwards=True, **changes)


def test_a_search_on_a_cpu_refuses_it(tiny, tmp_path):  # noqa: F811
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match="for GPUs, and this runs on cpu"):
        make_search(tiny, run.stage("search"), joint_forwards=True)


def test_hardware_without_faults_has_no_faulty_half():
    model = supernet("cpu")
    assert "faults must hit" in Hardware().inject(model, seed=0, errors="soft").joint.obstacle()
