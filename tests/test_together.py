"""The weights of a training step read together, as on a GPU: the same as one by one, bit for bit, in few operations."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from faulty import CASES as EVERY
from faulty import assert_binomial, assert_uniform, gen
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ftnas import bound, devices, inject, saturate
from ftnas.compute import Compute
from ftnas.faults import AdSAF, BitAdSAF, LogNormalVariation, MiBB, WeightBitFlip
from ftnas.faults.base import Site
from ftnas.faults.bounds import WeightBound
from ftnas.faults.together import Together
from ftnas.quantize import FixedPoint, Frozen
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, Supernet, build_network, load_space
from ftnas.train import FaultTolerantLoss

FIXED = FixedPoint(bits=8)
SPACE = load_space("small-8x8").resized(channels=4, cells=3)
FAULTS = {
    "adsaf": AdSAF(),
    "adsaf max": AdSAF(stuck_at="max"),
    "adsaf differential": AdSAF(cells="differential", stuck_at="max"),
    "adsaf differential range": AdSAF(cells="differential", sa0_rate=0.2, sa1_rate=0.1),
    "bit_adsaf": BitAdSAF(),
    "flip": WeightBitFlip(bit_error_rate=0.02),
    "mibb": MiBB(mac_error_rate=1e-3),
    "none": None,
}
SCRIPT = Path(__file__).parent.parent / "scripts" / "count_operations.py"


@pytest.fixture
def waiting(monkeypatch):
    """A CPU on which, as on a GPU, no value is read."""
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)


def chain(depth=3):
    """A network whose layers are traced, with a layer that runs twice and one that never does."""

    class Chain(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            for layer in list(self)[1:depth]:
                x = layer(x).relu()
            return self[depth](self[1](x).mean((2, 3)))

    with isolated(0, "chain"):
        inner = [nn.Conv2d(6, 6, 3, padding=1, groups=1 + (n % 2)) for n in range(depth - 1)]
        return Chain(nn.Conv2d(3, 6, 3), *inner, nn.Linear(6, 10), nn.Conv2d(1, 1, 1))


PLAIN = Compute()


def networks():
    genotype = Genotype.random(SPACE, generator=gen(3))
    with isolated(0, "net"):
        supernet, discrete = Supernet(SPACE, num_classes=10), build_network(genotype, SPACE, num_classes=10)
    return {"supernet": (supernet, partial(supernet, genotype=genotype)), "discrete": (discrete, discrete),
            "chain": (model := chain(), model)}  # fmt: skip


def watch(model, injection, read):
    """Note the weights that were ready in each forward; the one that looks for feature points is none."""

    def hook(*_):
        if not injection.finding:
            read.append(set(injection.together.ready))

    return model.register_forward_hook(hook, prepend=True)


class Step:
    """One fault-tolerant step; what it gave."""

    def __init__(
        self, name, fault, *, device="cpu", mask=False, last=False, alpha_l=0.5, plans=None, spoil=None, compute=PLAIN
    ):
        self.model, forward = networks()[name]
        self.model.to(device).train()
        if last:
            self.model.to(memory_format=torch.channels_last)
        if spoil is not None:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.dim() == 4).view(-1)[0] = spoil
        images, labels = torch.randn(8, 3, 12, 12, generator=gen(1)).to(device), torch.arange(8, device=device)
        faults = [] if plans is not None or fault is None else [fault]
        extra = {"plans": plans} if plans is not None else {"errors": "soft"}
        loss = FaultTolerantLoss(self.model, alpha_l=alpha_l, compute=compute)
        self.together = []
        with inject(
            self.model, *faults, quantization=FIXED, mask_gradients=mask, draw_on="device", **extra
        ) as injection:
            handle = watch(self.model, injection, self.together)
            losses = loss(forward, injection, images, labels)
            losses.total.backward()
            handle.remove()
            self.plans, self.record = injection.plans(), injection.record
        self.losses = (losses.clean, losses.faulty)
        self.gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def assert_same(one, other, *, rtol=0.0):
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0, equal_nan=True)
    if one.losses[0].isnan():
        return  # a gradient of NaN has no values
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=rtol, atol=rtol, equal_nan=True, msg=name)


CASES = [
    *[("supernet", fault, {}) for fault in FAULTS],
    *[("chain", fault, {"last": True, "mask": True}) for fault in FAULTS],
    ("discrete", "adsaf", {}),
    ("discrete", "adsaf differential", {"mask": True}),
    ("discrete", "flip", {"last": True}),
    ("discrete", "adsaf", {"alpha_l": 1.0}),
    ("discrete", "adsaf", {"alpha_l": 0.0}),
    ("chain", "adsaf max", {"spoil": float("nan")}),
    ("chain", "bit_adsaf", {"spoil": 1e9}),
]


@pytest.mark.parametrize(("name", "fault", "extra"), CASES)
def test_a_step_is_that_of_the_weights_one_by_one(name, fault, extra, waiting, monkeypatch):
    together = Step(name, FAULTS[fault], **extra)
    assert together.together and all(len(ready) > 1 for ready in together.together)
    monkeypatch.undo()
    # features are drawn alike either way; the plans of weights are replayed
    given = together.plans if FAULTS[fault] is not None and FAULTS[fault].target == "weight" else None
    given = None if extra.get("alpha_l") == 0.0 else given
    alone = Step(name, FAULTS[fault], plans=given, **extra)
    assert not any(alone.together)
    if fault != "mibb":  # what is drawn of features is padded where nothing is read, from other numbers
        # without faults of weights both forwards read one tensor, whose gradients come in another order; gradients
        # of features lie elsewhere in memory
        assert_same(together, alone, rtol=1e-6 if given is None or extra.get("last") else 0.0)
    if given is not None:
        assert all(plan.sites.diff().ge(0).all() for plan in together.plans.plans.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "fault", "extra"), CASES)
def test_a_step_on_a_gpu_is_that_of_the_weights_one_by_one(name, fault, extra):
    together = Step(name, FAULTS[fault], device="cuda", **extra)
    assert together.together and all(len(ready) > 1 for ready in together.together)
    if FAULTS[fault] is None or FAULTS[fault].target != "weight" or extra.get("alpha_l") == 0.0:
        return
    alone = Step(name, None, plans=together.plans, device="cuda", **extra)
    assert not any(alone.together)
    torch.testing.assert_close(together.losses, alone.losses, equal_nan=True)


NARROW = Compute(autocast="bf16", channels_last=True)


@pytest.mark.parametrize("fault", ["adsaf", "adsaf max", "bit_adsaf", "flip", "mibb", "none"])
def test_under_autocast_weights_are_made_narrow_at_once_to_the_same_step(fault, waiting, monkeypatch):
    steps, seen = [], []
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(Together, "_dtype", lambda *_: torch.float32)
        with Casts() as casts:
            steps.append(Step("discrete", FAULTS[fault], compute=NARROW))
        seen.append(casts.weights)
    assert_same(*steps)
    assert next(iter(steps[0].gradients.values())).dtype == torch.float32
    assert seen[0] == 0 < seen[1]  # of the layers that faults and fixed point concern, all are


class Casts(TorchDispatchMode):
    """Counts kernels of convolutions that are cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        narrowed = function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16
        self.weights += narrowed and out.dim() == 4 and out.shape[2] in (1, 3, 5) and out.shape[2] == out.shape[3]
        return out


class Places(TorchDispatchMode):
    """Notes by how many bytes the kernels of convolutions begin after the last multiple of 16."""

    def __init__(self):
        super().__init__()
        self.offsets = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.offsets.append(args[1].data_ptr() % 16)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("compute", [PLAIN, NARROW], ids=["wide", "narrow"])
def test_what_is_read_begins_where_a_vector_does(compute, learns, waiting):
    """For kernels that lie elsewhere cuDNN has only slow convolutions."""
    model = chain(6).train(learns)  # of 162 and of 324 values: every other one would begin elsewhere
    compute.prepare(model)
    images = compute.images(torch.randn(2, 3, 12, 12, generator=gen(1)))
    with inject(model, FAULTS["adsaf"], quantization=FIXED, errors="soft", draw_on="device") as injection:
        with torch.set_grad_enabled(learns):
            read = []
            watch(model, injection, read)
            with injection.weights_shared(), injection.paused():
                model(images)
            for draw in range(2):
                injection.draw = draw
                with injection.weights_shared(), compute.forward(images.device), Places() as places:
                    model(images)
                assert read[-1] and places.offsets == [0] * 7


def test_weights_stay_wide_where_what_reads_them_is_not_known(waiting):
    class Own(nn.Conv2d):
        def forward(self, x):
            dtypes.append(self.weight.dtype)
            return super().forward(x)

    dtypes, images = [], torch.randn(4, 3, 8, 8, generator=gen(1))
    model = nn.Sequential(Own(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten())
    with inject(model, AdSAF(), quantization=FIXED, errors="soft", draw_on="device") as injection:
        FaultTolerantLoss(model, alpha_l=0.5, compute=NARROW)(model, injection, images, torch.arange(4))
    assert len(dtypes) == 3 and set(dtypes) == {torch.float32}


@pytest.mark.parametrize("fault", [fault for fault in EVERY.values() if fault.in_rows])
@pytest.mark.parametrize("readable", [True, False])
def test_plans_for_rows_ascend(fault, readable, monkeypatch):
    monkeypatch.setattr(devices, "is_readable", lambda _device: readable)
    sites = fault.sample(Site("", (5000,), macs=0, bits=8), generator=gen(2)).sites
    assert len(sites) > 3 and bool((sites.diff() >= 0).all())


@pytest.mark.parametrize("fault", ["adsaf", "adsaf differential", "bit_adsaf", "flip"])
def test_hits_are_counted_by_layer(fault, waiting):
    step = Step("supernet", FAULTS[fault])
    (counted,) = step.record.faults
    plans = {layer: plan for (_, layer, _), plan in step.plans.plans.items()}
    assert set(counted.layers) == set(plans) and len(plans) > 5
    for layer, plan in plans.items():
        assert (counted.layers[layer].hits, counted.layers[layer].sites) == (len(plan.sites), plan.population)
        assert counted.layers[layer].expected == pytest.approx(plan.population * plan.rate)
        assert plan.population % step.model.get_submodule(layer).weight.numel() == 0
        assert plan.shape == tuple(step.model.get_submodule(layer).weight.shape)


def test_every_unit_is_hit_at_the_rate_whatever_its_layer(waiting):
    model, fault = chain(), AdSAF(cells="differential", sa0_rate=0.06, sa1_rate=0.02)
    model.to(memory_format=torch.channels_last)
    images, labels, draws = torch.zeros(2, 3, 5, 5), torch.tensor([0, 1]), 300
    loss = FaultTolerantLoss(model, alpha_l=0.5)
    seen = {}
    with inject(model, fault, quantization=FIXED, errors="soft", draw_on="device", seed=5) as injection:
        for _ in range(draws):
            loss(model, injection, images, labels)
            for (_, layer, _), plan in injection.plans().plans.items():
                seen.setdefault(layer, []).append(plan)
        record = injection.record
    for layer, plans in seen.items():
        sites, codes = torch.cat([p.sites for p in plans]), torch.cat([p.codes for p in plans])
        population = plans[0].population
        assert_binomial(len(sites), draws * population, 0.08)
        assert_binomial(int(codes.sum()), len(codes), 0.25)
        assert_uniform(torch.bincount(sites, minlength=population))
        assert record.faults[0].layers[layer].hits == len(sites)


def other_parametrization(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(model[1], "weight", Half())
    return model


ALONE = {
    "two faults": (chain, [AdSAF(), LogNormalVariation(sigma=0.1)], {}),
    "a part": (chain, [AdSAF(where={"channels": [0]})], {}),
    "protected parts": (chain, [AdSAF()], {"protect": ["1"]}),
    "drawn on the CPU": (chain, [AdSAF()], {"draw_on": "cpu"}),
    "a device": (chain, [AdSAF()], {"errors": "hard"}),
    "variation": (chain, [LogNormalVariation(sigma=0.1)], {}),
    "a given range": (chain, [WeightBitFlip(bit_error_rate=0.1)],
                      {"quantization": FixedPoint(range=Frozen(fraction_length=7))}),
    "bounds": (lambda: bound(chain(), weights=WeightBound(value=0.1)), [AdSAF()], {}),
    "another parametrization": (lambda: other_parametrization(chain()), [AdSAF()], {}),
    "saturated": (lambda: saturate(chain(), "tanh"), [AdSAF()], {}),
    "double": (lambda: chain().double(), [AdSAF()], {}),
    "watched": (chain, [AdSAF()], {"watch": True}),
}  # fmt: skip
SOME = {"protected parts": {"0", "2", "3"}, "another parametrization": {"0", "2", "3"}}


@pytest.mark.parametrize("case", ALONE)
def test_what_cannot_be_read_together_is_read_alone(case, waiting):
    make, faults, changed = ALONE[case]
    model = make()
    images = torch.randn(4, 3, 8, 8, generator=gen(1)).to(next(model.parameters()).dtype)
    options = {"quantization": FIXED, "errors": "soft", "draw_on": "device"} | changed
    read = []
    with inject(model, *faults, **options) as injection:
        handle = watch(model, injection, read)
        FaultTolerantLoss(model, alpha_l=0.5)(model, injection, images, torch.arange(4)).total.backward()
        handle.remove()
        assert injection.record.faults[0].hits > 0
    assert read == [SOME.get(case, set())] * 2


def test_outside_a_training_step_weights_are_read_alone(waiting):
    model = chain()
    with inject(model, AdSAF(), quantization=FIXED, errors="soft", draw_on="device") as injection:
        read = []
        handle = watch(model, injection, read)
        model(torch.ones(2, 3, 8, 8))
        with injection.weights_shared():
            model(torch.ones(2, 3, 8, 8))
        handle.remove()
        assert [len(ready) for ready in read] == [0, 4] and not injection.together.ready


def test_hits_are_those_of_their_layers_when_other_weights_are_read_together_later(waiting):
    model = chain()
    injection = inject(model, AdSAF(), quantization=FIXED, errors="soft", draw_on="device")
    hits = dict.fromkeys("0123", 0)
    for limited in (None, "1"):  # a layer in the middle is read alone the second time
        if limited is not None:
            bound(model, weights=WeightBound(value={limited: 0.1}))
        with injection, injection.weights_shared():
            model(torch.ones(2, 3, 8, 8))
            for (_, layer, _), plan in injection.plans().plans.items():
                hits[layer] += len(plan.compact().sites)
    counted = injection.record.faults[0].layers
    assert {name: counted[name].hits for name in hits} == hits and min(hits.values()) > 0


def test_an_injection_that_is_entered_again_reads_what_the_layers_hold_then(waiting):
    model, read = chain(), []
    injection = inject(model, AdSAF(), quantization=FIXED, errors="soft", draw_on="device")
    for _ in range(2):
        with injection, injection.weights_shared():
            handle = watch(model, injection, read)
            with injection.paused():
                answers = model(torch.ones(2, 3, 8, 8))
            handle.remove()
            model(torch.ones(2, 3, 8, 8))
        with inject(model, quantization=FIXED.model_copy(update={"encoding": "sign_magnitude"})):
            torch.testing.assert_close(answers, model(torch.ones(2, 3, 8, 8)), rtol=0, atol=0)
        for index in (0, 1):  # another Parameter
            model[index].weight = nn.Parameter(model[index].weight.detach() * 3)
    assert [len(ready) for ready in read] == [4, 4]


def test_a_step_asks_for_as_many_operations_of_weights_whatever_the_layers():
    spec = importlib.util.spec_from_file_location("count_operations", SCRIPT)
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)
    found = {}
    for depth in (3, 12):
        with counting.device_without_values() as device:
            model = chain(depth).to(device)
            images, labels = torch.zeros(2, 3, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
            loss = FaultTolerantLoss(model, alpha_l=0.5)
            with inject(model, AdSAF(), quantization=FIXED, errors="soft", draw_on="device") as injection:
                loss(model, injection, images, labels)
                with counting.Operations().named() as seen:
                    loss(model, injection, images, labels).total.backward()
        found[depth] = seen.by_part()
    assert found[3]["drawing"] == found[12]["drawing"] > 0
    assert found[3]["injection"] == found[12]["injection"] > 0
    # of features alone there are more: 9 layers, two forwards, 4 operations
    assert found[12]["rounding"] - found[3]["rounding"] == 9 * 2 * 4


def note(ran, name, *_):
    ran.append(name)


def test_layers_of_a_path_are_those_that_run():
    supernet, _ = networks()["supernet"]
    images = torch.randn(2, 3, 8, 8, generator=gen(0))
    for number in range(8):
        genotype = Genotype.random(SPACE, generator=generator(number, "genotype"))
        discrete = build_network(genotype, SPACE, num_classes=10)
        for model, given in ((supernet, (images, genotype)), (discrete, (images,))):
            ran, handles = [], []
            for name, module in model.named_modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    handles.append(module.register_forward_hook(partial(note, ran, name)))
            model(*given)
            for handle in handles:
                handle.remove()
            declared = model.running_layers(*given)
            assert len(declared) == len(set(declared)) and set(declared) == set(ran)


@pytest.mark.parametrize("fault", ["adsaf", "adsaf differential", "flip", "none"])
def test_candidates_meet_the_faults_that_a_draw_has_for_all_layers(fault, waiting):
    with isolated(0, "net"):
        supernet = Supernet(SPACE, num_classes=10).eval()
    images, fault = torch.randn(8, 3, 12, 12, generator=gen(1)), FAULTS[fault]
    paths = [Genotype.random(SPACE, generator=gen(seed)) for seed in (3, 4, 3)]
    seen, answers, ran = [], [], []
    hook = [m.register_forward_hook(partial(note, ran, name)) for name, m in supernet.named_modules() if layer(m)]
    faults = [] if fault is None else [fault]
    with torch.no_grad(), inject(supernet, *faults, quantization=FIXED, errors="soft", draw_on="device") as injection:
        with injection.weights_shared():
            for path in paths:
                injection.draw = 5
                with injection.paused():
                    clean = supernet(images, path)
                ran.clear()
                answers.append((clean, supernet(images, path)))
                seen.append((set(ran), injection.plans()))
        record = injection.record
    for handle in hook:
        handle.remove()
    for path, (clean, faulty), (running, plans) in zip(paths, answers, seen, strict=True):
        assert {name for _, name, _ in plans.plans} == (running if faults else set())
        with torch.no_grad(), inject(supernet, plans=plans, quantization=FIXED) as one_by_one:  # no weights shared
            torch.testing.assert_close(supernet(images, path), faulty, rtol=0, atol=0)
            with one_by_one.paused():
                torch.testing.assert_close(supernet(images, path), clean, rtol=0, atol=0)
    if not faults:
        return
    (one, other, again) = (plans.plans for _, plans in seen)
    assert one.keys() & other.keys() and one.keys() - other.keys()
    for key in one.keys() & other.keys():
        assert torch.equal(one[key].sites, other[key].sites) and torch.equal(one[key].codes, other[key].codes)
    assert all(torch.equal(one[key].sites, again[key].sites) for key in one)
    (counted,) = record.faults
    assert counted.layers.keys() == {name for _, name, _ in one.keys() | other.keys()}
    for (_, name, _), plan in (one | other).items():  # once for the draw, which the three share
        assert counted.layers[name].hits == len(plan.sites)
        assert counted.layers[name].sites == plan.population


def layer(module):
    return isinstance(module, (nn.Conv2d, nn.Linear))
