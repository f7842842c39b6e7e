"""Whole physical nodes that are down: what they host gives zero, all at once, draw by draw."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ftnas import rng
from ftnas.cli import cli
from ftnas.faults import MiBB, NodeDown, Site, create_fault, inject
from ftnas.faults.hardware import Hardware
from ftnas.quantize import FixedPoint
from ftnas.space import Genotype, build_network, load_space

IMAGES = torch.randn(4, 1, 8, 8, generator=rng.generator(0, "images"))


class Branches(nn.Module):
    """The sum of two branches and of the input's mean."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())

    def forward(self, images):
        return self.left(images) + self.right(images) + images.mean()


@pytest.fixture
def model():
    with rng.isolated(0, "branches"):
        return Branches().eval()


def down(rate, **nodes):
    return NodeDown(rate=rate, nodes=nodes or {"a": ["left"], "b": ["right"]})


@torch.no_grad()
def test_what_a_dead_node_hosts_gives_zero(model):
    left, right, rest = model.left(IMAGES), model.right(IMAGES), IMAGES.mean()
    whole = model(IMAGES)
    cases = {"a": right + rest, "b": left + rest, "ab": (rest * torch.ones(4, 2, 8, 8))}
    for which, expected in cases.items():
        nodes = {name: {"a": ["left"], "b": ["right"]}[name] for name in which}
        with inject(model, down(1.0, **nodes)) as injection:
            assert torch.equal(model(IMAGES), expected)
            with injection.paused():
                assert torch.equal(model(IMAGES), whole)
        assert (injection.record.sites, injection.record.hits) == (len(which), len(which))
    with inject(model, down(1.0, both=["left", "right"])) as injection:
        assert torch.equal(model(IMAGES), cases["ab"])
    assert injection.record.hits == 1
    assert torch.equal(model(IMAGES), whole) and not any(module._forward_hooks for module in model.modules())


class InPlace(nn.Module):
    """An activation in place, the return value of which is read or not, after a convolution."""

    def __init__(self, function, read):
        super().__init__()
        self.conv, self.function, self.read = nn.Conv2d(1, 2, 3, padding=1, bias=False), function, read

    def forward(self, images):
        x = self.conv(images)
        y = self.function(x) if self.read else self.function(input=x)
        return (y if self.read else x) + images.mean()


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("function", [nn.ReLU, nn.ELU, nn.SiLU, nn.Hardtanh])
def test_a_dead_activation_in_place_reaches_who_reads_its_input(function, read):
    model = InPlace(function(inplace=True), read)
    alive = model(IMAGES)
    rest = (IMAGES.mean() * torch.ones_like(alive)).detach()
    with inject(model, down(1.0, a=["function"]), seed=0) as injection:
        dead = model(IMAGES)
        assert torch.equal(dead, rest)
        dead.sum().backward()
        assert not model.conv.weight.grad.any()
        with injection.paused():
            assert torch.equal(model(IMAGES), alive)
            model(IMAGES).square().sum().backward()
    assert model.function.inplace and torch.equal(model(IMAGES), alive)
    gradient, model.conv.weight.grad = model.conv.weight.grad, None
    model(IMAGES).square().sum().backward()
    torch.testing.assert_close(gradient, model.conv.weight.grad)


@torch.no_grad()
def test_nodes_fail_each_on_its_own_at_the_rate_and_a_seed_repeats_it(model):
    def draws(seed, num, **options):
        seen = []
        with inject(model, down(0.3), seed=seed, **options) as injection:
            for _ in range(num):
                before = injection.record.hits
                out = model(IMAGES)
                seen.append((injection.record.hits - before, out.sum().item()))
        return seen, injection.record

    seen, record = draws(1, 2000)
    assert record.sites == 4000 and record.faults[0].layers.keys() == {"a", "b"}
    for node in record.faults[0].layers.values():
        # Hoeffding: P(|share - 0.3| > 0.0603) <= 2 exp(-2 * 2000 * 0.0603^2) < 1e-6
        assert abs(node.hits / 2000 - 0.3) < 0.0603
    both = sum(hits == 2 for hits, _ in seen) / 2000
    assert abs(both - 0.09) < 0.0603 and len({value for _, value in seen}) == 4
    assert draws(1, 50)[0] == seen[:50] != draws(2, 50)[0]
    hard, record = draws(3, 20, errors="hard")
    assert len({value for _, value in hard}) == 1 and record.sites == 2


@torch.no_grad()
def test_a_draw_that_is_met_again_counts_once(model):
    fault = down(0.2)
    seed = next(  # one whose first two draws leave every node up
        seed
        for seed in range(100)
        if not any(
            len(fault.sample(site, generator=rng.generator(seed, "node_down", 0, draw, node)).sites)
            for draw in (0, 1)
            for node in ("a", "b")
            for site in [Site(node, (1,), 0, None)]
        )
    )
    with inject(model, fault, seed=seed) as injection:
        for _ in range(
            60
        ):  # as candidates of a search, which share their draws: 48 hits were expected, if these were new
            for injection.draw in (0, 1):
                model(IMAGES)
    assert (injection.record.sites, injection.record.hits) == (4, 0)


def test_no_gradient_passes_a_dead_node(model):
    model.train()
    with inject(model, down(1.0, a=["left"])):
        model(IMAGES).sum().backward()
    assert model.left.weight.grad is None or not model.left.weight.grad.any()
    assert model.right[0].weight.grad.any()


@torch.no_grad()
def test_beside_other_faults_and_fixed_point(model):
    faults = (MiBB(mac_error_rate=1e-2), down(1.0, a=["left"]))
    with inject(model, *faults, quantization=FixedPoint(bits=8), seed=0) as injection:
        model(IMAGES)
    assert [fault.fault for fault in injection.record.faults] == ["mibb", "node_down"]
    assert injection.record.faults[0].hits > 0 and injection.record.faults[1].hits == 1
    with pytest.raises(ValueError, match="no plans that could be kept"):
        injection.plans()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"a": ["lft"]}, "no module 'lft'; did you mean 'left'"),
        ({"a": ["left"], "b": ["*"]}, "left is on a and on b"),
        ({"a": ["right", "right.0"]}, "right.0 is part of right"),
    ],
)
def test_nodes_that_do_not_fit_the_model_are_one_line(model, nodes, message):
    with pytest.raises(ValueError, match=message):
        inject(model, NodeDown(rate=0.1, nodes=nodes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 1.5}, "less than or equal to 1"),
        ({"nodes": {}}, "at least 1 item"),
        ({"where": {"channels": [0]}}, "where has no effect on node_down"),
    ],
)
def test_bad_settings_are_one_line(changed, message):
    with pytest.raises(ValueError, match=message):
        create_fault({"name": "node_down", "rate": 0.1, "nodes": {"a": ["left"]}} | changed)


@torch.no_grad()
@pytest.mark.parametrize(("source", "survives"), [(0, True), (1, False)])
def test_a_cell_that_reads_the_cell_before_the_last_survives_the_loss_of_one(source, survives):
    space = load_space("small-8x8")
    node = [["conv_1x1", source], ["conv_1x1", source]]
    cell = {"2": node, "3": node}
    genotype = Genotype.from_dict({"version": 1, "name": "t", "normal": cell, "reduce": cell})
    with rng.isolated(0, "cells"):
        network = build_network(genotype, space, num_classes=10, in_channels=1).eval()
    hardware = Hardware(fault=down(1.0, n2=["cells.1"]))
    with hardware.inject(network, seed=0):
        logits = network(IMAGES)
    assert (logits.std(0).max() > 0).item() == survives  # else every image gets the same answer


@pytest.mark.slow
def test_a_search_under_node_failures_from_the_command_line(tmp_path):
    small = {
        "search.epochs": 2, "search.warmup_epochs": 1, "search.controller_steps": 1, "search.derive.samples": 3,
        "search.derive.finalists": 2, "train.recipe.epochs": 1, "train.seeds": "[0]", "campaign.devices": 3,
        "control": "null", "train.models": "{searched: {genotype: search}}", "data.subset": 256,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in small.items()]
    result = CliRunner().invoke(cli, ["run", "node-failures-small", *overrides, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.exception
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {record["fault"] for record in records if record["rate"]} == {"node_down"}
    assert sum(record["hits"] for record in records if record["rate"] == 0.4) > 0
    assert all(record["sites"] == 2 for record in records if record["rate"])
