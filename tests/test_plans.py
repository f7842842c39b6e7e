"""Plans as things to keep: saved, read back with mistakes found, replayed; single changes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faulty import CASES, float_word, same
from injected import FIXED, create, gen, images, rounded
from torch import nn

from ftnas import FixedPoint, inject
from ftnas.faults import FeatureBitFlip, LogNormalVariation, MiBB, Plan, PlanSet, WeightBitFlip
from ftnas.faults.plans import kind_of

QUANTIZED = {name: None if float_word(fault) else FIXED for name, fault in CASES.items()}


def drawn_plans(fault, model=None, *, quantization=FIXED, x=None, **options):
    """Return what a model gives under a fault, and the plans of it."""
    model = create("plain") if model is None else model
    with torch.no_grad(), inject(model, fault, quantization=quantization, **options) as injection:
        out = model(images() if x is None else x)
    return out, injection.plans()


def equal(one: PlanSet, other: PlanSet) -> bool:
    def content(plan: Plan):
        numbers = plan.population, plan.rate, plan.shape, plan.span, plan.at_risk
        return plan.sites.tolist(), plan.codes.tolist(), plan.codes.dtype, numbers

    plans = [{key: content(plan) for key, plan in kept.plans.items()} for kept in (one, other)]
    return one.faults == other.faults and plans[0] == plans[1]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "plans.npz"


# Saving and replaying


@pytest.mark.parametrize("errors", ["soft", "hard"])
@pytest.mark.parametrize("name", CASES)
def test_saved_plans_are_the_same_and_give_the_same_outputs(file, name, errors):
    fault = CASES[name]
    out, plans = drawn_plans(fault, errors=errors, quantization=QUANTIZED[name], seed=3)
    assert plans.hits() > 0 and plans.faults == (fault,)
    plans.save(file)
    loaded = PlanSet.load(file)
    assert equal(loaded, plans) and kind_of(file) == "ftnas plans"
    model = create("plain")
    with torch.no_grad(), inject(model, plans=loaded, quantization=QUANTIZED[name]) as injection:
        assert same(model(images()), out) and same(model(images()), out)
    assert injection.record.hits == plans.hits()  # counted once, however often they are met
    assert equal(injection.plans(), plans)


def test_plans_hit_the_same_sites_of_another_model_of_the_same_shapes():
    _, plans = drawn_plans(WeightBitFlip(bit_error_rate=0.05))
    other = create("plain", seed=8)
    with torch.no_grad(), inject(other, plans=plans, quantization=FIXED, watch=True) as injection:
        other(images())
    hit = {(layer, value) for (_, layer, _), plan in plans.plans.items() for value in plan.values_hit().tolist()}
    shapes = {name: module.weight.shape for name, module in other.named_modules() if isinstance(module, nn.Conv2d)}
    assert {(c.layer, int(np.ravel_multi_index(c.index, shapes[c.layer]))) for c in injection.changes()} == hit


def test_several_fault_models_with_layers_of_their_own_are_replayed_together(file):
    faults = (LogNormalVariation(sigma=0.2, where={"layers": "0"}), MiBB(mac_error_rate=0.01, where={"layers": "3"}))
    model = create("plain")
    with torch.no_grad(), inject(model, *faults, quantization=FIXED, seed=2) as injection:
        out = model(images())
    plans = injection.plans()
    assert list(plans.plans) == [(0, "0", 0), (1, "3", 0)] and plans.layers() == ("0", "3")
    plans.save(file)
    with torch.no_grad(), inject(model, plans=PlanSet.load(file), quantization=FIXED):
        assert torch.equal(model(images()), out)


def test_a_hard_plan_of_features_serves_every_batch_size_and_a_soft_one_its_own():
    _, hard = drawn_plans(MiBB(mac_error_rate=0.01), errors="hard")
    _, soft = drawn_plans(MiBB(mac_error_rate=0.01), errors="soft")
    model = create("plain")
    with torch.no_grad(), inject(model, plans=hard, quantization=FIXED):
        model(images(4)), model(images(3))
    with torch.no_grad(), inject(model, plans=soft, quantization=FIXED):
        model(images(4))
        with pytest.raises(ValueError, match=r"'0': the plan is for the shape \(4, 4, 8, 8\), the tensor has \(3, 4"):
            model(images(3))


def test_replaying_one_plan_after_the_other():
    model, fault = create("plain"), WeightBitFlip(bit_error_rate=0.05)
    outs, plans = zip(*(drawn_plans(fault, seed=seed) for seed in range(3)), strict=True)
    with torch.no_grad(), inject(model, plans=plans[0], quantization=FIXED) as injection:
        assert torch.equal(model(images()), outs[0])
        for number in (2, 1):
            injection.replay(plans[number])
            assert torch.equal(model(images()), outs[number])
    assert injection.record.hits == sum(kept.hits() for kept in plans)
    with inject(model, fault, quantization=FIXED) as injection, torch.no_grad():
        model(images())
        with pytest.raises(ValueError, match="replay takes plans of the fault models that the injection was made with"):
            injection.replay(plans[0])


def test_soft_plans_are_those_of_the_last_faulty_forward_alone():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = True, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.a(x) if self.first else self.b(x)

        def feature_points(self):
            return {}

    model = Either().eval()
    with torch.no_grad(), inject(model, MiBB(mac_error_rate=0.1), quantization=FIXED) as injection:
        model(images())
        model.first = False
        model(images())
        with injection.paused():
            model.first = True
            model(images())
        assert injection.plans().layers() == ("b",)


@pytest.mark.parametrize("errors", ["soft", "hard"])
def test_a_seed_gives_one_plan_whatever_the_batch_holds_and_however_many_threads_draw(errors):
    threads = torch.get_num_threads()
    for fault in CASES.values():
        quantization = None if float_word(fault) else FIXED
        _, one = drawn_plans(fault, errors=errors, quantization=quantization)
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            _, other = drawn_plans(fault, errors=errors, quantization=quantization, x=images(seed=9))
        finally:
            torch.set_num_threads(threads)
        assert equal(one, other)


# Files


def test_a_file_is_read_with_numpy_alone(file):
    _, plans = drawn_plans(MiBB(mac_error_rate=0.01))
    plans.save(file)
    with np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        assert header["kind"] == "ftnas plans" and header["schema"] == 1
        assert header["faults"] == [{"name": "mibb", "persistence": 1.0, "where": None, "mac_error_rate": 0.01}]
        for index, (entry, plan) in enumerate(zip(header["plans"], plans.plans.values(), strict=True)):
            assert entry["shape"] == list(plan.shape) and entry["population"] == plan.population
            assert archive[f"{index}.sites"].tolist() == plan.sites.tolist()
            assert archive[f"{index}.codes"].tolist() == plan.codes.tolist()


def rewrite(file, change) -> None:
    """Change the header and the arrays of a file by hand."""
    with np.load(file) as archive:
        arrays = dict(archive)
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)


def entry(index=0, **values):
    return lambda header, arrays: header["plans"][index].update(values)


def array(name, make):
    return lambda header, arrays: arrays.update({name: make(arrays[name])})


def doubled(sites):
    return np.concatenate([sites[:1], sites[:-1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a: h.update(kind="ftnas defect map"), "not a file of ftnas plans"),
        (lambda h, a: h.update(schema=2), "this release reads schema 1 of ftnas plans, got 2"),
        (lambda h, a: h.pop("plans"), "the header must hold a list of plans, got None"),
        (lambda h, a: h.update(plans=5), "the header must hold a list of plans, got 5"),
        (lambda h, a: h.update(plans=[5]), "plan 0: expected keys and values, got 5"),
        (lambda h, a: h.update(faults={"name": "mibb"}), "the header must hold a list of faults"),
        (lambda h, a: h.update(faults=[]), "plan 0 belongs to fault 0 of 0"),
        (
            lambda h, a: h["faults"][0].update(name="os:system"),
            "'os:system': names to import are accepted from a config only",
        ),
        (lambda h, a: h["faults"][0].update(name="ftnas.faults.feature:MiBB"), "names to import are accepted"),
        (lambda h, a: h["faults"][0].update(mac_error_rate=7), "mac_error_rate: .* got 7"),
        (lambda h, a: a.pop("1.codes"), "1.codes.* is missing; the file is not whole"),
        (lambda h, a: h["plans"].append(h["plans"][0]), "2.sites.* is missing"),
        (lambda h, a: h["plans"][1].update(layer="0"), "plan 1 is the second one of fault 0 for '0'"),
        (entry(rate=1.5), "plan 0.rate: .* got 1.5"),
        (entry(pages=3), "plan 0.pages: unknown key"),
        (entry(shape=[4, 4, 8, 7]), "does not fit the shape"),
        (entry(shape=[-4, -4, 8, 8]), "does not fit the shape"),
        (entry(population=10), "does not fit the shape"),
        (entry(at_risk=9999), "at_risk must lie in 0..1024, got 9999"),
        (array("0.sites", lambda sites: sites + 1024), "sites must be distinct and lie in 0..1023"),
        (array("0.sites", lambda sites: sites - 1024), "sites must be distinct and lie in 0..1023"),
        (array("0.sites", doubled), "sites must be distinct"),
        (array("0.sites", lambda sites: sites[1:]), "sites and .* codes do not belong together"),
        (array("0.sites", lambda sites: sites.astype(float)), "sites must be int64 .* got torch.float64"),
        (array("0.sites", lambda sites: sites[:, None]), "do not belong together"),
        (array("0.codes", lambda codes: codes.astype(np.float32)), "codes torch.int64, got .* torch.float32"),
        (array("0.codes", lambda codes: codes + 500), "codes must lie in 0..47"),
        (array("0.codes", lambda codes: codes - 500), "codes must lie in 0..47"),
        (array("0.codes", lambda codes: np.array([{}])), "cannot be read as a file of ftnas plans"),  # a pickle
        (array("0.codes", lambda codes: np.array(["a"] * len(codes))), "file|codes"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused_in_one_line(file, change, message):
    _, plans = drawn_plans(MiBB(mac_error_rate=0.01))
    plans.save(file)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as error:
        PlanSet.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_file_that_is_not_whole_or_not_one_is_refused_in_one_line(file, tmp_path):
    _, plans = drawn_plans(MiBB(mac_error_rate=0.01))
    plans.save(file)
    whole = file.read_bytes()
    noise = np.random.default_rng(0)
    broken = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 60))]
    for place in noise.integers(0, len(whole), 150):
        broken.append(whole[:place] + bytes([whole[place] ^ int(noise.integers(1, 256))]) + whole[place + 1 :])
    broken += [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04K\x01.", os.urandom(300)]
    refused = 0
    for content in broken:
        file.write_bytes(content)
        try:
            assert equal(PlanSet.load(file), plans)  # a byte that says nothing of the content
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error)
            assert kind_of(file) in (None, "ftnas plans")
    assert refused > 60
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "scalar.npz", header=np.frombuffer(b"3", dtype=np.uint8))
    for name in ("array.npy", "other.npz", "scalar.npz", "missing.npz", "."):
        assert kind_of(tmp_path / name) is None
        with pytest.raises(ValueError, match="no such file|cannot be read|not a file of ftnas plans"):
            PlanSet.load(tmp_path / name)


def test_plans_that_do_not_fit_the_model_or_the_call():
    _, plans = drawn_plans(MiBB(mac_error_rate=0.01))
    with pytest.raises(ValueError, match="the plans hit a layer '0' that the model lacks"):
        inject(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), plans=plans, quantization=FIXED)
    model = create("plain")
    for options in ({"layers": "0"}, {"errors": "hard"}, {"protect": "0"}):
        with pytest.raises(ValueError, match="plans say themselves what is hit"):
            inject(model, plans=plans, quantization=FIXED, **options)
    with pytest.raises(ValueError, match="plans say themselves what is hit"):
        inject(model, MiBB(mac_error_rate=0.01), plans=plans, quantization=FIXED)
    with pytest.raises(ValueError, match="mibb needs fixed point"):
        inject(model, plans=plans)


@pytest.mark.parametrize("fault", [MiBB(mac_error_rate=0.02), FeatureBitFlip(bit_error_rate=0.05)])
def test_plans_of_other_words_are_refused(fault):
    _, plans = drawn_plans(fault)
    model = create("plain")
    with (
        pytest.raises(ValueError, match="'0': the plan of .* is for words of another width than the 4 bits here"),
        torch.no_grad(),
        inject(model, plans=plans, quantization=FixedPoint(bits=4)),
    ):
        model(images())
    with torch.no_grad(), inject(model, plans=plans, quantization=FIXED):
        model(images())


# Changes


def test_changes_of_a_weight_are_those_computed_by_hand():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[96.0, -3.0], [5.0, 127.0]]) / 128)
    fault = WeightBitFlip(bit_error_rate=0.5)
    sites = torch.tensor([0 * 4 + 0, 7 * 4 + 1, 1 * 4 + 3, 2 * 4 + 3])  # bit * 4 + weight
    plans = PlanSet((fault,), {(0, "", 0): Plan(sites, sites * 0, 32, 0.5, (2, 2))})
    with torch.no_grad(), inject(model, plans=plans, quantization=FIXED, watch=True) as injection:
        model(torch.zeros(1, 2))
    found = [(c.fault, c.layer, c.call, c.index, c.bit, c.before * 128, c.after * 128) for c in injection.changes()]
    assert found == [
        ("weight_bit_flip", "", 0, (0, 0), 0, 96, 97),
        ("weight_bit_flip", "", 0, (0, 1), 7, -3, 125),
        ("weight_bit_flip", "", 0, (1, 1), 1, 127, 121),  # two flips of one word: before and after of the word
        ("weight_bit_flip", "", 0, (1, 1), 2, 127, 121),
    ]


def test_changes_of_a_feature_are_those_computed_by_hand():
    model, x = create("twice"), images(2)
    every = MiBB(mac_error_rate=0.02)
    with torch.no_grad(), inject(model, every, quantization=FIXED, layers="conv", watch=True) as injection:
        model(x)
    first, second = (injection.plans().plans[0, "conv", call] for call in (0, 1))
    with torch.no_grad():
        f = F.conv2d(x, rounded(model.conv.weight), model.conv.bias, padding=1)
    before, lsb = rounded(f).reshape(-1), float(FIXED.grid(f).lsb)
    changes = injection.changes()
    assert [c.call for c in changes] == [0] * len(first.sites) + [1] * len(second.sites) and len(first.sites)
    for change, site, code in zip(changes, first.sites.tolist(), first.codes.tolist(), strict=False):
        value = float(before[site])
        after = value + (-1) ** (code % 2) * 2 ** (code // 2) * lsb
        assert change.index == tuple(int(i) for i in np.unravel_index(site, f.shape)) and change.bit == code // 2
        assert (change.before, change.after) == (value, min(max(after, -128 * lsb), 127 * lsb))


def test_changes_are_kept_only_when_asked_for():
    model = create("root")
    with torch.no_grad(), inject(model, MiBB(mac_error_rate=0.01), quantization=FIXED) as injection:
        model(torch.randn(2, 3, 8, 8, generator=gen()))
    with pytest.raises(ValueError, match=r"inject\(..., watch=True\)"):
        injection.changes()


def test_replay_refuses_plans_for_layers_that_the_model_lacks():
    model = create("plain")
    _, plans = drawn_plans(MiBB(mac_error_rate=0.01), model)
    other = PlanSet(plans.faults, {(fault, "nope", call): plan for (fault, _, call), plan in plans.plans.items()})
    with torch.no_grad(), inject(model, plans=plans, quantization=FIXED) as injection:
        before = model(images())
        with pytest.raises(ValueError, match="the plans hit a layer 'nope' that the model lacks"):
            injection.replay(other)
        assert torch.equal(model(images()), before)
