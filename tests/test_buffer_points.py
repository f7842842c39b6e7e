"""Which activation functions follow a feature point in the networks of a space: declared, and what a trace shows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from test_networks import all_of, images, make_supernet, small
from torch import nn

from ftnas import FixedPoint, inject, rng
from ftnas.dataflow import trace_feature_points
from ftnas.faults import FeatureBitFlip, NeuronCrash
from ftnas.space.genotype import Genotype
from ftnas.space.network import build_network
from ftnas.space.points import activated_points
from ftnas.space.supernet import copy_path


def genotypes(space):
    yield all_of(
        space,
        (0, 1, "sep_conv_3x3", "sep_conv_5x5"),
        (0, 2, "relu_conv_bn_3x3", "skip"),
        (1, 3, "dil_conv_3x3", "conv_1x1"),
    )
    for seed in range(4):
        yield Genotype.random(space, generator=rng.generator(seed, "points"))


def test_declared_points_are_those_that_a_trace_of_the_discrete_network_shows():
    space, found = small(), 0
    for genotype in genotypes(space):
        network = build_network(genotype, space, num_classes=5, in_channels=1).eval()
        trace = trace_feature_points(network, (images(),), {})
        points = {layer: point for (layer, _), (point, _) in trace.points.items() if point != layer}
        declared = network.feature_points()
        assert points == {layer: declared[layer] for layer in points}
        traced = {layer for layer, _ in trace.activated}
        # What a preprocess block gives is read by edges. Where a genotype has one edge alone that reads it, and begins
        # with a ReLU, a trace cannot tell it from the output of a convolution in front of its activation function.
        assert {name for name in traced if ".preprocess." not in name} == network.activated_points()
        assert not any(".preprocess." in name for name in network.activated_points())
        found += len(traced)
    assert found > 10


def test_of_a_separable_convolution_the_first_half_is_followed_by_an_activation_function():
    supernet = make_supernet(small())
    key = "cells.1.edges.2_0_sep_conv_3x3"
    assert {name for name in supernet.activated_points() if name.startswith(key)} == {f"{key}.2"}
    assert all("sep_conv" in name for name in supernet.activated_points())
    assert activated_points(nn.ModuleDict({"own": nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU())})) == {"own.0"}


@pytest.mark.parametrize("fault", [FeatureBitFlip(bit_error_rate=1.0), NeuronCrash(rate=1.0)])
def test_supernet_and_discrete_network_store_the_same_buffer_values(fault):
    space = small()
    for genotype in itertools.islice(genotypes(space), 2):
        supernet = make_supernet(space)
        network = build_network(genotype, space, num_classes=5, in_channels=1)
        copy_path(supernet, genotype, network)
        outs = []  # both normalise by the batch's own statistics
        # every bit flips, or every neuron dies: the same faults whatever the names of the layers
        for model, arguments in ((supernet, (images(), genotype)), (network, (images(),))):
            with torch.no_grad(), inject(model, fault, quantization=FixedPoint(bits=16)) as injection:
                outs.append(model(*arguments))
            assert injection.record.hits == injection.record.sites > 0
        assert torch.allclose(outs[0], outs[1], atol=1e-3)


OWN = """
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, *, in_channels, out_channels, stride, affine):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x):
        return self.bn(self.conv(F.relu(x)))


def within(*, in_channels, out_channels, stride, affine):
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(nn.Sequential(conv), nn.BatchNorm2d(out_channels, affine=affine))


def mish(*, in_channels, out_channels, stride, affine):
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, affine=affine), nn.Mish())
"""


@pytest.mark.parametrize("name", ["Block", "within", "mish"])
@pytest.mark.parametrize("build", ["network", "supernet"])
def test_feature_points_of_own_primitives_are_found_by_data_flow(name, build, tmp_path, monkeypatch):
    (tmp_path / "own_edges.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    op = f"own_edges:{name}"
    space = small(primitives=("skip", op), nodes=4)
    genotype = all_of(space, (0, 1, op, op), (1, 2, op, op))
    if build == "network":
        model = build_network(genotype, space, num_classes=5, in_channels=1).eval()
        forward = model
    else:
        model = make_supernet(space)
        forward = functools.partial(model, genotype=genotype)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    edges = {name for name in norms if not any(part in name for part in ("preprocess", "stem", "skip"))}
    assert edges and edges <= set(model.feature_points().values())
    seen = {}

    def look(name, _module, _inputs, output):
        seen[name] = len(output.unique())

    with torch.no_grad(), inject(model, quantization=FixedPoint(bits=4)):
        modules = dict(model.named_modules())
        for edge in edges:
            modules[edge].register_forward_hook(functools.partial(look, edge))
        forward(images())
    assert len(seen) >= 4 * len(model.cells) and set(seen) <= edges and max(seen.values()) <= 16
    activated = {edge for edge in edges if name == "mish"}
    assert {model.feature_points().get(layer) for layer in model.activated_points()} >= activated
