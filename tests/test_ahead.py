"""The faults of all features of a forward drawn at once, as on a GPU: the distribution, and nothing else changes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from faulty import assert_binomial, assert_uniform, gen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftnas import devices, inject
from ftnas.evaluate import score
from ftnas.faults import FeatureBitFlip, MiBB, Where, ahead
from ftnas.faults.ahead import mix_, unit_, walks
from ftnas.faults.sampling import walk_length
from ftnas.quantize import FixedPoint
from ftnas.rng import isolated
from ftnas.space import Genotype, Supernet, load_space
from ftnas.train import FaultTolerantLoss

FIXED = FixedPoint(bits=8)
FAULT = MiBB(mac_error_rate=2e-3)
SPACE = load_space("small-8x8").resized(channels=4, cells=3)
WORD = (1 << 64) - 1
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def waiting(monkeypatch):
    """A CPU on which, as on a GPU, no value is read."""
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)


class Net(nn.Sequential):
    """Layers of which the second runs twice, and the last only when asked for."""

    def __init__(self):
        with isolated(0, "net"):
            super().__init__(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5), nn.Conv2d(6, 6, 1))
        self.shortened = False

    def forward(self, x):
        x = self[1](self[1](self[0](x).relu()).relu())
        x = x if self.shortened else self[3](x)
        return self[2](x.mean((2, 3)))


def images(number=4, side=10):
    return torch.randn(number, 3, side, side, generator=gen(1))


def injected(model, *faults, **options):
    options = {"quantization": FIXED, "errors": "soft", "draw_on": "device", **options}
    return inject(model, *(faults or (FAULT,)), **options)


def pair(model, injection, clean, faulty=None):
    """A clean and a faulty forward that share weights; what the second gave, and its plans."""
    with injection.weights_shared():
        with injection.paused():
            model(clean)
        out = model(clean if faulty is None else faulty)
    return out, injection.plans().plans


def python_word(state):
    """SplitMix64's output as its authors give it, with integers that do not wrap around by themselves."""
    z = state & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def signed(word):
    return word - (1 << 64) if word >> 63 else word


@pytest.mark.parametrize("device", DEVICES)
def test_words_are_those_of_splitmix64(device):
    golden, state = 0x9E3779B97F4A7C15, 1234567
    first = [python_word(state + n * golden) for n in (1, 2, 3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # as published for this seed
    words = [0, 1, WORD, 1 << 63, 12345, *first]
    mixed = mix_(torch.tensor([signed(word) for word in words], device=device))
    assert [word & WORD for word in mixed.tolist()] == [python_word(word) for word in words]
    assert unit_(mixed.clone()).tolist() == [((word & WORD) >> 11) * 2.0**-53 for word in mixed.tolist()]


def naive(start, length, rate, population, codes):
    """One tensor's hits and codes, number by number."""
    golden, site, hits = 0x9E3779B97F4A7C15, -1, []
    for number in range(length):
        unit, code = ((python_word(start + (2 * number + odd) * golden) >> 11) * 2.0**-53 for odd in (0, 1))
        site += 1 + (0 if rate == 1.0 else math.floor(np.log1p(-unit) / np.log1p(-rate)))
        if site >= population:
            break
        hits.append((site, math.floor(code * codes)))
    return hits


def test_a_walk_is_that_of_each_tensor_number_by_number():
    tensors = [(11, 900, 0.1, 16), (WORD >> 1, 400, 0.5, 12), (5, 7, 1.0, 16), (123456789, 10**6, 1e-5, 16)]
    lengths = [walk_length(population, rate) for _, population, rate, _ in tensors]
    reals = [[0.0 if rate == 1.0 else 1.0 / math.log1p(-rate), n, codes] for _, n, rate, codes in tensors]
    found = walks(
        torch.tensor([start for start, *_ in tensors]), torch.tensor(lengths),
        torch.tensor(reals, dtype=torch.float64), sum(lengths),
    )  # fmt: skip
    hits = found[3].tolist()
    parts = zip(tensors, *(every.split(lengths) for every in found[:3]), hits, lengths, strict=True)
    for (start, population, rate, codes), sites, its_codes, at, number, length in parts:
        expected = naive(start, length, rate, population, codes)
        assert number == len(expected) > 0
        assert list(zip(sites.tolist(), its_codes.tolist(), strict=True))[:number] == expected
        assert at.tolist() == [site for site, _ in expected] + [0] * (length - number)
        assert (sites[number:] == population).all() and (its_codes[number:] == codes).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rate", [0.003, 0.2])
def test_every_value_is_hit_at_the_rate_and_by_every_code(rate, device):
    population, draws = 300, 4000
    length = walk_length(population, rate)
    starts = torch.randint(-(2**62), 2**62, (draws,), generator=gen(3)).to(device)
    reals = torch.tensor([[1.0 / math.log1p(-rate), population, 16]], dtype=torch.float64).expand(draws, 3).to(device)
    lengths = torch.full((draws,), length, device=device)
    sites, codes, _, hits = (found.cpu() for found in walks(starts, lengths, reals, draws * length))
    hit = sites < population
    assert_binomial(int(hits.sum()), draws * population, rate)
    assert_uniform(sites[hit].bincount(minlength=population))
    assert_uniform(codes[hit].bincount(minlength=16))
    # draws are independent of each other, and so are neighbours: their numbers of common hits are binomial too
    table = torch.zeros(draws, population + 1, dtype=torch.bool)
    table[torch.arange(draws).repeat_interleave(length), sites] = True
    table = table[:, :population]
    assert_binomial(int((table[1:] & table[:-1]).sum()), (draws - 1) * population, rate**2)
    assert_binomial(int((table[:, 1:] & table[:, :-1]).sum()), draws * (population - 1), rate**2)


def test_a_forward_that_was_shown_its_tensors_draws_for_all_at_once(monkeypatch):
    model, drawn = Net(), []
    real = ahead.walks
    monkeypatch.setattr(ahead, "walks", lambda *given: (drawn.append(given[-1]), real(*given))[1])
    monkeypatch.setattr(MiBB, "sample", None)  # none draws for itself
    with injected(model) as injection:
        plans = [pair(model, injection, images())[1] for _ in range(3)]
    assert len(drawn) == 3
    assert list(plans[0]) == [(0, "0", 0), (0, "1", 0), (0, "1", 1), (0, "3", 0), (0, "2", 0)]
    for key in list(plans[0])[:4]:
        assert not torch.equal(plans[0][key].sites, plans[1][key].sites)


@pytest.mark.parametrize("training", [True, False])
def test_plans_replayed_give_the_same_answers(training):
    model = Net().train(training)
    with torch.set_grad_enabled(training), injected(model) as injection:
        out, _ = pair(model, injection, images())
        plans = injection.plans()
    with torch.set_grad_enabled(training), inject(model, quantization=FIXED, plans=plans) as injection:
        again = model(images())
    assert torch.equal(out, again)
    with inject(model, quantization=FIXED) as injection:
        assert not torch.equal(out, model(images()))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("readable", [False, True])
def test_a_step_is_that_of_its_plans(mask, last, readable, monkeypatch):
    found = []
    model = Net()
    if last:
        model.to(memory_format=torch.channels_last)
    given = images().contiguous(memory_format=torch.channels_last) if last else images()
    plans = None
    for _ in range(2):
        model.zero_grad()
        extra = {"plans": plans} if plans else {"errors": "soft"}
        faults = () if plans else (FAULT,)
        with inject(model, *faults, quantization=FIXED, mask_gradients=mask, draw_on="device", **extra) as injection:
            losses = FaultTolerantLoss(model, alpha_l=0.5)(model, injection, given, torch.arange(4))
            losses.total.backward()
            plans = injection.plans()
        monkeypatch.setattr(devices, "is_readable", lambda _device: readable)  # where rounding goes another way
        found.append([losses.clean, losses.faulty, *(p.grad for p in model.parameters())])
    tolerance = 1e-6 if readable else 0.0  # gradients of weights that are read one by one come in another order
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_hits_are_counted_by_layer():
    model = Net()
    with injected(model) as injection:
        counted = [pair(model, injection, images())[1] for _ in range(2)]
        injection.draw = 7
        with injection.weights_shared(), injection.paused():
            model(images())  # shown, and never met: not at risk
        record = injection.record
    for layer in ("0", "1", "2", "3"):
        plans = [plan for plans in counted for (_, name, _), plan in plans.items() if name == layer]
        found = record.faults[0].layers[layer]
        assert found.sites == sum(plan.population for plan in plans)
        assert found.hits == sum(len(plan.sites) for plan in plans)
        assert found.hits > 0 or layer == "2"
        assert found.expected == pytest.approx(sum(plan.population * plan.rate for plan in plans))


def test_what_a_forward_does_not_come_to_is_not_at_risk():
    model = Net()
    with injected(model) as injection:
        pair(model, injection, images())
        before = injection.record
        with injection.weights_shared():
            with injection.paused():
                model(images())
            model.shortened = True
            model(images())
        after = injection.record
    gained = {name: layer.sites - before.faults[0].layers[name].sites for name, layer in after.faults[0].layers.items()}
    assert gained["3"] == 0 < gained["0"] and gained["1"] == 2 * gained["0"]
    assert after.faults[0].layers["3"].hits == before.faults[0].layers["3"].hits
    assert after.faults[0].layers["1"].hits > before.faults[0].layers["1"].hits


def test_what_hits_a_tensor_does_not_depend_on_what_else_is_drawn(monkeypatch):
    model = Net()
    with injected(model) as injection:
        _, whole = pair(model, injection, images())
    monkeypatch.setattr(ahead, "MOST", 1500)  # in groups
    with injected(model) as injection:
        _, parts = pair(model, injection, images())
    model.shortened = True
    with injected(model) as injection:
        _, shortened = pair(model, injection, images())
    assert list(parts) == list(whole) and len(shortened) == len(whole) - 1
    for key, plan in whole.items():
        assert torch.equal(plan.sites, parts[key].sites) and torch.equal(plan.codes, parts[key].codes)
        assert key[1] == "3" or torch.equal(plan.sites, shortened[key].sites)


def test_large_tensors_draw_for_themselves(monkeypatch):
    monkeypatch.setattr(ahead, "MOST", 20)
    model = Net()
    with injected(model) as injection:
        _, plans = pair(model, injection, images())
        record = injection.record
    assert len(plans) == 5 and record.hits == sum(len(plan.sites) for plan in plans.values())


class OwnDraw(MiBB):
    """Says nothing of how uniform its own draw is."""

    def sample(self, site, *, generator):
        return super().sample(site, generator=generator)


@pytest.mark.parametrize(
    "case",
    ["other batch", "not shown", "hard", "drawn on the cpu", "where", "protected", "watched", "bits", "own draw"],
)
def test_otherwise_each_tensor_draws_for_itself(case, monkeypatch):
    model, fault = Net(), FAULT
    monkeypatch.setattr(ahead, "walks", lambda *_: pytest.fail("drawn ahead") if case != "other batch" else real(*_))
    real = walks
    options = {
        "hard": {"errors": "hard"},
        "drawn on the cpu": {"draw_on": "cpu"},
        "protected": {"protect": [Where(channels=(1,))]},
        "watched": {"watch": True},
    }.get(case, {})
    fault = MiBB(mac_error_rate=2e-3, where=Where(channels=(0, 1, 2))) if case == "where" else fault
    fault = FeatureBitFlip(bit_error_rate=1e-2) if case == "bits" else fault
    fault = OwnDraw(mac_error_rate=2e-3) if case == "own draw" else fault
    if case in ("hard", "watched"):
        monkeypatch.setattr(devices, "is_readable", lambda device: True)
    with injected(model, fault, **options) as injection:
        if case == "not shown":
            with injection.weights_shared():
                model(images())
            plans = injection.plans().plans
        else:
            _, plans = pair(model, injection, images(), images(3) if case == "other batch" else None)
        record = injection.record
    assert len(plans) == 5
    assert record.hits == sum(len(plan.sites) for plan in plans.values()) > 0
    if case == "other batch":
        assert all(plan.shape[0] == 3 for plan in plans.values())
        assert record.sites == sum(plan.population for plan in plans.values())


def test_two_fault_models_draw_apart():
    model, faults = Net(), (FAULT, MiBB(mac_error_rate=1e-3))
    with injected(model, *faults) as injection:
        out, plans = pair(model, injection, images())
        record, kept = injection.record, injection.plans()
    assert len(plans) == 10
    for number, fault in enumerate(record.faults):
        mine = [plan for (owner, *_), plan in plans.items() if owner == number]
        assert fault.hits == sum(len(plan.sites) for plan in mine)
        assert fault.sites == sum(plan.population for plan in mine)
    with inject(model, quantization=FIXED, plans=kept):
        assert torch.equal(model(images()), out)


class Draws(TorchDispatchMode):
    """Counts operations that make the gaps between hits."""

    def __init__(self):
        super().__init__()
        self.drawn = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.drawn += function._schema.name == "aten::log1p_"
        return function(*args, **(kwargs or {}))


def test_candidates_that_share_a_layer_meet_the_same_faults_there():
    with isolated(0, "net"):
        supernet = Supernet(SPACE, num_classes=10).eval()
    batches = [(images(8, 12), torch.arange(8))]
    found = []
    with injected(supernet) as injection, injection.weights_shared(), Draws() as draws:
        for number in range(2):
            genotype = Genotype.random(SPACE, generator=gen(number))
            score(partial(supernet, genotype=genotype), injection, batches, alpha_r=0.5, first_draw=3)
            found.append(injection.plans().plans)
    common = found[0].keys() & found[1].keys()
    assert len(common) > 1 and found[0].keys() != found[1].keys()
    for key in common:
        assert torch.equal(found[0][key].sites, found[1][key].sites)
    assert draws.drawn == 2  # once a candidate, for all tensors
