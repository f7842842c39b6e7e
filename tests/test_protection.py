"""What to protect: costs, choice, prediction, and measurements that can be resumed."""

from __future__ import annotations

import math

import pytest
import torch
from faulty import gen
from torch import nn

from ftnas.campaign import Subject
from ftnas.data import DataConfig, load
from ftnas.evaluate import answers
from ftnas.faults import inject
from ftnas.faults.hardware import Hardware
from ftnas.knapsack import best_sets, chosen_order, decay, predict, sets_to_try, steps_of
from ftnas.models import count
from ftnas.protection import (
    RECORDS,
    ProtectionConfig,
    check_bits,
    feature_bounds,
    overheads,
    run_protection,
)
from ftnas.rng import isolated, seed_for
from ftnas.rundir import RunDir
from ftnas.train import clean_accuracy
from ftnas.vulnerability import protection_to_csv, read_protection

HARDWARE = Hardware(layers=None)


@pytest.fixture(scope="module")
def images():
    return load(DataConfig(name="digits"), "test").subset(torch.arange(60))


@pytest.fixture(scope="module")
def model():
    """A small net, trained for a moment so that faults have something to destroy."""
    data = load(DataConfig(name="digits"), "train")
    with isolated(0, "net"):
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for epoch in range(3):
        for x, y in data.batches(64, seed=0, epoch=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def study(path, images, model, hardware=HARDWARE, **settings):
    config = ProtectionConfig(**({"method": "ecc", "budget": 1.0, "devices": 3, "images": 60} | settings))
    subject = Subject("net", 0, "clean", count(model, (1, 8, 8)), lambda: model)
    with RunDir.create(path, {}) as folder:
        run_protection([subject], images, images, config=config, hardware=hardware, seed=0, folder=folder)
        return [dict(record) for record in folder.journal(RECORDS).records()]


FLIPS = {"name": "weight_bit_flip", "bit_error_rate": 0.02}


def test_check_bits_are_those_of_secded_codes():
    assert [check_bits(bits) for bits in (4, 8, 16, 32, 64)] == [4, 5, 6, 7, 8]


def test_overheads(model):
    image = torch.zeros(1, 1, 8, 8)
    tripled = overheads(model, image, "triplicate", 8)
    macs = {"0": 8 * 9 * 9, "2": 8 * 9 * 8, "5": 720}
    assert tripled == pytest.approx({name: 2 * number / sum(macs.values()) for name, number in macs.items()})
    weights = {"0": 72, "2": 64, "5": 720}
    assert overheads(model, image, "ecc", 8) == pytest.approx({k: 5 / 8 * v / 856 for k, v in weights.items()})
    values = {"0": 72, "2": 72, "5": 10}
    assert overheads(model, image, "clip", 8) == pytest.approx({k: v / sum(macs.values()) for k, v in values.items()})


def test_decay_is_the_logarithm_of_what_is_left_above_chance():
    assert decay(0.9, clean=0.9, chance=0.1) == 0.0 == decay(0.95, clean=0.9, chance=0.1)
    assert decay(0.5, clean=0.9, chance=0.1) == pytest.approx(math.log(2))
    assert decay(0.05, clean=0.9, chance=0.1) == 7.0


def test_the_order_is_by_decay_per_cost_within_the_budget():
    decays = {"a": 0.3, "b": 0.2, "c": 0.0, "d": 0.1}
    costs = {"a": 0.6, "b": 0.1, "c": 0.01, "d": 0.1}
    assert chosen_order(decays, costs, 1.0) == ["b", "d", "a"]
    assert chosen_order(decays, costs, 0.5) == ["b", "d"]  # a does not fit, d still does
    assert chosen_order(decays, costs, 0.05) == []


def every_set(decays, costs, budget):
    names = sorted(decays)
    for bits in range(2 ** len(names)):
        chosen = tuple(name for place, name in enumerate(names) if bits >> place & 1)
        if sum(costs[name] for name in chosen) <= budget * (1 + 1e-9):
            yield chosen


@pytest.mark.parametrize("seed", range(20))
def test_the_best_sets_are_those_of_all_sets(seed):
    drawn = torch.rand(8, 2, generator=gen(seed), dtype=torch.float64).tolist()
    decays = {f"l{number}": gain if number else 0.0 for number, (gain, _) in enumerate(drawn)}
    costs = {f"l{number}": 0.05 + cost for number, (_, cost) in enumerate(drawn)}
    budget = 0.4 * sum(costs.values())

    def gain(names):
        return sum(decays[name] for name in names)

    def price(names):
        return sum(costs[name] for name in names)

    found = best_sets(decays, costs, budget)
    everything = list(every_set(decays, costs, budget))
    assert gain(found[-1]) == pytest.approx(max(map(gain, everything)))
    for names in found:
        assert price(names) == pytest.approx(
            min(price(other) for other in everything if gain(other) >= gain(names) - 1e-9)
        )
    target = 0.7 * gain(found[-1])
    tried = sets_to_try(decays, costs, budget, gain, target)
    cheapest = min((other for other in everything if gain(other) >= target), key=price)
    assert frozenset(cheapest) in set(map(frozenset, tried)) and frozenset(found[-1]) in set(map(frozenset, tried))
    assert tried[0] == () and [price(names) for names in tried] == sorted(price(names) for names in tried)
    assert all(price(names) <= budget * (1 + 1e-9) for names in tried)


def test_many_layers_are_chosen_from_in_steps_of_the_budget():
    drawn = torch.rand(60, 2, generator=gen(1), dtype=torch.float64).tolist()
    decays = {f"l{number}": gain for number, (gain, _) in enumerate(drawn)}
    costs = {f"l{number}": 0.05 + cost for number, (_, cost) in enumerate(drawn)}
    budget = 0.3 * sum(costs.values())
    found = best_sets(decays, costs, budget)
    assert len(found) <= 2_001
    best = sum(decays[name] for name in found[-1])
    assert best >= sum(decays[name] for name in chosen_order(decays, costs, budget))
    relaxed, left = 0.0, budget  # the best that parts of layers would allow
    for name in sorted(decays, key=lambda layer: -decays[layer] / costs[layer]):
        part = min(1.0, left / costs[name])
        relaxed, left = relaxed + part * decays[name], left - part * costs[name]
    assert best >= 0.99 * relaxed


def test_a_dear_layer_that_matters_most_is_tried():
    decays, costs = {"a": 1.0, "b": 5.0}, {"a": 0.1, "b": 1.0}
    assert ("b",) in sets_to_try(decays, costs, 1.0, len, None)


def test_layers_that_do_nothing_alone_are_tried_last():
    decays, costs = {"a": 0.0, "b": 0.0, "c": 0.2}, {"a": 0.3, "b": 0.2, "c": 0.2}
    assert sets_to_try(decays, costs, 1.0, len, None) == [(), ("c",), ("c", "b", "a")]
    assert sets_to_try(decays, costs, 0.5, len, None) == [(), ("c",), ("c", "b")]
    assert sets_to_try(dict.fromkeys(decays, 0.0), costs, 1.0, len, 0.9) == [(), ("b", "c", "a")]


def test_rounding_of_a_mean_is_no_loss():
    assert decay(sum([0.8] * 10) / 10, clean=0.8, chance=0.1) == 0.0
    assert decay(0.7999, clean=0.8, chance=0.1) > 0.0


class Attention(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(64, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        return self.last(torch.relu(nn.functional.linear(x, self.inner.weight, self.inner.bias)))


@pytest.mark.parametrize("method", ["ecc", "triplicate", "clip"])
def test_a_layer_that_is_never_called_is_protected_by_ecc_alone(method, images, tmp_path, capsys):
    with isolated(0, "attention"):
        net = Attention().eval()
    study(tmp_path / "run", images, net, fault=FLIPS, method=method, budget=3.0)
    (found,) = read_protection(tmp_path / "run" / RECORDS)
    assert any("inner" in plan.layers for plan in found.plans) == (method == "ecc")
    assert ("inner is never called" in capsys.readouterr().err) == (method != "ecc")


def test_the_prediction_meets_both_ends():
    decays = {"a": 0.3, "b": 0.1}
    ends = {"clean": 0.9, "unprotected": 0.5, "chance": 0.1}
    assert predict([], decays, **ends) == pytest.approx(0.5)
    assert predict(["a", "b"], decays, **ends) == pytest.approx(0.9)
    assert predict(["a"], decays, **ends) == pytest.approx(0.1 + 0.8 * 0.5**0.25)
    assert predict(["a"], {"a": 0.0, "b": 0.0}, **ends) == 0.5


def test_what_is_measured():
    assert steps_of([0.5, 0.6, 0.7, 0.8, 0.9], 0.8) == [1, 2, 3, 4, 5]
    assert steps_of([0.1] * 7 + [0.9, 0.95], 0.9) == [2, 4, 6, 8, 9]
    assert steps_of([0.1] * 8, None) == [2, 4, 6, 8] == steps_of([0.1] * 8, 0.5)
    assert steps_of([], None) == []


def test_all_layers_protected_are_as_good_as_no_faults(images, model, tmp_path):
    records = study(tmp_path / "run", images, model, fault=FLIPS)
    clean = next(record["accuracy"] for record in records if record["stage"] == "clean")
    (found,) = read_protection(tmp_path / "run" / RECORDS)
    assert set(found.losses) == {"0", "2", "5"} and found.plans[0].layers == ()
    assert all(loss.mean > 0 for loss in found.losses.values()), "the faults must hurt for the test to mean anything"
    last = found.plans[-1]
    assert set(last.layers) == {"0", "2", "5"} and last.accuracy.mean == pytest.approx(clean)
    assert found.chosen is not None and found.chosen.accuracy.mean >= found.plans[0].accuracy.mean
    assert "measured" in found.verdict() and protection_to_csv([found]).count("\n") == 1 + len(found.plans)


def accuracies(records, stage, layers):
    return [record["accuracy"] for record in records if record["stage"] == stage and set(record["layers"]) == layers]


def test_layers_that_are_called_like_types_are_protected_alone(images, model, tmp_path):
    names = {"0": "first", "2": "conv2d", "5": "linear"}
    renamed = nn.Sequential()
    for name, module in model.named_children():
        renamed.add_module(names.get(name, name), module)
    plain = study(tmp_path / "plain", images, model, fault=FLIPS)
    odd = study(tmp_path / "odd", images, renamed.eval(), fault=FLIPS)
    assert accuracies(odd, "measured", set(names.values())) == accuracies(plain, "measured", set(names))
    alone = {name: accuracies(odd, "alone", {name}) for name in names.values()}
    for name, found in alone.items():  # the same as by a predicate
        for device, accuracy in enumerate(found):
            fault = ProtectionConfig(fault=FLIPS, method="ecc", budget=1.0).fault
            only = inject(
                renamed,
                fault,
                quantization=HARDWARE.quantization,
                seed=seed_for(0, "device", device),
                layers=lambda layer, _, name=name: layer == name,
            )
            with only:
                assert float(answers(renamed, images.batches(200)).correct.double().mean()) == accuracy


def test_words_of_the_fault_stay_where_nothing_fails(images, model, tmp_path):
    fault = FLIPS | {"bit_error_rate": 0.1, "dtype": "q1.1"}  # so coarse that it costs accuracy by itself
    records = study(tmp_path / "run", images, model, hardware=Hardware(layers="linear"), fault=fault, budget=2.0)
    faults = ProtectionConfig(fault=fault, method="ecc", budget=1.0).fault
    with inject(model, faults.with_rate(0.0), quantization=HARDWARE.quantization):
        coarse = float(answers(model, images.batches(200)).correct.double().mean())
    plain = clean_accuracy(model, images, hardware=HARDWARE, batch_size=60)
    assert coarse < plain
    assert accuracies(records, "clean", set()) == [coarse]
    assert accuracies(records, "measured", {"5"}) == [coarse] * 3
    assert clean_accuracy(model, images, hardware=HARDWARE.with_fault(faults), batch_size=60) == coarse


@pytest.mark.parametrize(("dtype", "share"), [("fp32", 7 / 32), ("fp16", 6 / 16), ("q2.5", 5 / 8), (None, 5 / 8)])
def test_ecc_costs_what_the_words_of_the_fault_need(images, model, tmp_path, dtype, share):
    fault = FLIPS | {"bit_error_rate": 0.1, "dtype": dtype}  # so high that each layer is worth protecting
    records = study(tmp_path / "run", images, model, fault=fault)
    assert max(record.get("overhead", 0.0) for record in records) == pytest.approx(share)


def test_protection_that_a_fault_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="ecc guards words of weights, and mibb hits features"):
        ProtectionConfig(fault={"name": "mibb", "mac_error_rate": 0.1}, method="ecc", budget=1.0)
    node = {"name": "node_down", "rate": 0.1, "nodes": {"a": ["0"]}}
    with pytest.raises(ValueError, match="node_down takes whole nodes down"):
        ProtectionConfig(fault=node, method="clip", budget=1.0)


@pytest.mark.parametrize("entry", ["2", {"layers": ["2"]}, {"layers": ["2"], "bits": list(range(8))}])
def test_spare_parts_of_the_hardware_stay(images, model, tmp_path, entry):
    hardware = Hardware(layers=None, protect=[entry])
    records = study(tmp_path / "run", images, model, hardware=hardware, fault=FLIPS)
    assert {name for record in records for name in record["layers"]} == {"0", "5"}
    clean = accuracies(records, "clean", set())
    assert accuracies(records, "measured", {"0", "5"}) == clean * 3


def test_a_layer_whose_features_are_all_zero_is_clipped(images, tmp_path):
    with isolated(0, "net"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    fault = {"name": "weight_bit_flip", "bit_error_rate": 0.02, "dtype": "fp32"}
    records = study(tmp_path / "run", images, net, fault=fault, method="clip", budget=2.0)
    assert feature_bounds(net, images, HARDWARE, batch_size=60)["0"] == pytest.approx(1e-5)
    assert any(record["stage"] == "measured" for record in records)


def test_the_target_ends_the_search(images, model, tmp_path):
    records = study(tmp_path / "run", images, model, fault=FLIPS, target=0.01)
    (found,) = read_protection(tmp_path / "run" / RECORDS)
    assert found.chosen == found.plans[0] and found.chosen.layers == ()
    assert sum(record["stage"] == "measured" for record in records) <= 2 * 3
    (out_of_reach,) = (study(tmp_path / "b", images, model, fault=FLIPS, target=1.0, budget=0.05),)
    (found,) = read_protection(tmp_path / "b" / RECORDS)
    assert out_of_reach and found.chosen is None and "tried within the budget none keeps 100.0%" in found.verdict()


def test_clipping_helps_against_floats_that_explode(images, model, tmp_path):
    fault = {"name": "weight_bit_flip", "bit_error_rate": 3e-4, "dtype": "fp32"}
    study(tmp_path / "run", images, model, fault=fault, method="clip", devices=8)
    (found,) = read_protection(tmp_path / "run" / RECORDS)
    assert found.plans[-1].accuracy.mean > found.plans[0].accuracy.mean


def test_bounds_are_the_largest_features(images, model):
    bounds = feature_bounds(model, images, HARDWARE, batch_size=25)
    seen = {"0": 0.0, "2": 0.0, "5": 0.0}
    handles = []
    with HARDWARE.inject(model, seed=0), torch.no_grad():
        for name in seen:

            def keep(module, inputs, output, name=name):
                seen[name] = max(seen[name], float(output.abs().max()))

            handles.append(model[int(name)].register_forward_hook(keep))
        for x, _ in images.batches(25):
            model(x)
        for handle in handles:
            handle.remove()
    assert bounds == seen and all(value > 0 for value in seen.values())


def test_a_cut_study_goes_on_to_the_same_records(images, model, tmp_path):
    whole = study(tmp_path / "whole", images, model, fault=FLIPS)
    subject = Subject("net", 0, "clean", count(model, (1, 8, 8)), lambda: model)
    config = ProtectionConfig(fault=FLIPS, method="ecc", budget=1.0, devices=3, images=60)
    with RunDir.create(tmp_path / "cut", {}) as folder:
        for record in whole[:7]:
            folder.journal(RECORDS).append(record)
        run_protection([subject], images, images, config=config, hardware=HARDWARE, seed=0, folder=folder)
        assert folder.journal(RECORDS).records() == whole
