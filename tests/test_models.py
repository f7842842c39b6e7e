import re
import sys

import pytest
import torch
from torch import nn

from ftnas import models, rng
from ftnas.models import ModelConfig, build, count, describe, load_model, save_model
from ftnas.settings import parse
from ftnas.space.genotype import Genotype
from ftnas.space.space import load_space

SIZES = {"num_classes": 5, "in_channels": 1, "image_size": 8}


@pytest.fixture
def small_genotype(tmp_path):
    genotype = Genotype.random(load_space("small-8x8"), generator=rng.generator(0, "test-models"))
    genotype.save(tmp_path / "g.json")
    return str(tmp_path / "g.json")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))\n"
        "def text(**_):\n"
        "    return 'no module'\n"
        "class Wide(nn.Conv2d):\n"
        "    def __init__(self, in_channels, out_channels, stride, affine):\n"
        "        super().__init__(in_channels, out_channels, 3, stride, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_models", None)


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=rng.generator(0, "images"))


def make(config: ModelConfig, seed: int = 0) -> nn.Module:
    return build(config, seed=seed, **SIZES)


# Configs


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({}, "exactly one of genotype, baseline, factory, got none"),
        ({"genotype": "a", "baseline": "resnet20"}, "got genotype and baseline"),
        ({"baseline": "resnet20", "space": "ftt-weights"}, "space belongs to a genotype"),
        ({"baseline": "resnet20", "channels": 8}, "channels belongs to a genotype"),
        ({"genotype": "w-ftt-net", "width": 0.5}, "width belongs to a baseline"),
        ({"factory": "a:b", "cells": 3}, "cells belongs to a genotype"),
        ({"baseline": "resnet200"}, "did you mean 'resnet20'"),
        ({"baseline": "resnet20", "width": -1}, "greater than 0, got -1"),
        ({"factory": "net"}, "package.module:Name, got 'net'"),
        ({"genotpye": "a"}, "did you mean 'genotype'"),
    ],
)
def test_rules_of_a_config(data, rule):
    with pytest.raises(ValueError, match=re.escape(rule)) as error:
        parse(ModelConfig, data, where="model")
    assert "\n" not in str(error.value)


def test_genotype_brings_its_space_and_sizes_override(small_genotype):
    spec = describe(ModelConfig(genotype=small_genotype, channels=4, cells=5), **SIZES)
    assert (spec["space"]["channels"], spec["space"]["cells"], spec["space"]["reductions"]) == (4, 5, [2])
    with pytest.raises(ValueError, match="has 6 nodes in a cell, got 4"):
        describe(ModelConfig(genotype=small_genotype, space="ftt-weights"), **SIZES)
    without = Genotype(items=Genotype.load(small_genotype).items)
    without.save(small_genotype)
    with pytest.raises(ValueError, match="names no space"):
        describe(ModelConfig(genotype=small_genotype), **SIZES)


def test_seed_decides_the_weights_and_nothing_else(small_genotype):
    for config in (ModelConfig(genotype=small_genotype), ModelConfig(baseline="resnet20", width=0.25)):
        before = torch.get_rng_state()
        first, again, other = make(config), make(config), make(config, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
        differ = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
        assert all(same) and any(differ)


def test_factory_of_the_user(own_module):
    assert make(ModelConfig(factory="own_models:net"))(images()).shape == (4, 5)
    with pytest.raises(ValueError, match="must return a torch.nn.Module, got str"):
        make(ModelConfig(factory="own_models:text"))
    with pytest.raises(ValueError, match="has no 'missing'"):
        make(ModelConfig(factory="own_models:missing"))


# Counting


@pytest.mark.parametrize("size", [8, 7])
def test_flops_of_each_kind_of_convolution(size):
    for arguments in (
        {"groups": 1},
        {"groups": 2},
        {"groups": 4},
        {"groups": 4, "dilation": 2, "padding": 2},
        {"stride": 2, "padding": 1},
        {"groups": 4, "stride": 2, "dilation": 2, "padding": 2, "bias": False},
    ):
        conv = nn.Conv2d(4, 8, 3, **arguments)
        out = conv(torch.zeros(1, 4, size, size))
        macs = out.shape[2] * out.shape[3] * 8 * (4 // conv.groups) * 9
        assert count(conv, (4, size, size)).flops == 2 * macs
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4 * size * size, 3))
    assert count(linear, (4, size, size)) == (12 * size * size + 3, 2 * 12 * size * size)


def test_counting_leaves_no_trace(small_genotype):
    model = make(ModelConfig(genotype=small_genotype))
    model.cells[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    result = count(model, (1, 8, 8))
    assert result.params == sum(p.numel() for p in model.parameters()) and result.flops > 0
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError):
        count(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == training


# Files


def saved(path, config, **metadata):
    model = make(config)
    for _ in range(2):
        model(images())  # running statistics worth keeping
    save_model(path, model, describe(config, **SIZES), metadata)
    return model


def test_model_files_are_self_contained(tmp_path, small_genotype, own_module):
    configs = [
        ModelConfig(genotype=small_genotype, channels=4),
        ModelConfig(baseline="mobilenet_v2", width=0.125),
        ModelConfig(factory="own_models:net"),
    ]
    for config in configs:
        model = saved(tmp_path / "model.pt", config, accuracy=0.5, classes=["a", "b"])
        if config.genotype is not None:
            (tmp_path / "g.json").unlink()
        before = torch.get_rng_state()
        loaded, metadata = load_model(tmp_path / "model.pt", allow_factory=config.factory is not None)
        assert torch.equal(torch.get_rng_state(), before)
        assert metadata == {"accuracy": 0.5, "classes": ["a", "b"]}
        assert not loaded.training and torch.equal(loaded(images()), model.eval()(images()))


def test_a_file_imports_nothing_unasked(tmp_path, own_module):
    saved(tmp_path / "model.pt", ModelConfig(factory="own_models:net"))
    sys.modules.pop("own_models", None)
    with pytest.raises(ValueError, match="it would import 'own_models:net'") as error:
        load_model(tmp_path / "model.pt")
    assert "own_models" not in sys.modules and "\n" not in str(error.value)

    space = load_space("small-8x8").model_dump(mode="json")
    space["primitives"] = ["own_models:Wide"]
    data = torch.load(tmp_path / "model.pt", weights_only=True)
    data["spec"] = {**data["spec"], "kind": "genotype", "space": space, "genotype": {}}
    torch.save(data, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="it would import 'own_models:Wide'"):
        load_model(tmp_path / "model.pt")
    assert "own_models" not in sys.modules


def test_broken_model_files(tmp_path, small_genotype):
    path = tmp_path / "model.pt"
    saved(path, ModelConfig(genotype=small_genotype))
    whole = path.read_bytes()
    data = torch.load(path, weights_only=True)
    other = make(ModelConfig(baseline="resnet20", width=0.25)).state_dict()
    narrower = dict(data["state"])
    key = "cells.1.preprocess.0.1.weight"
    narrower[key] = narrower[key][:-1]
    missing = {name: value for name, value in data["state"].items() if name != "classifier.bias"}
    cases = [
        ({"schema": 7}, "reads model files of schema 1, got 7"),
        ({"state": other}, "state of another architecture: 'stem.0.weight' should be [8, 1, 3, 3], got nothing"),
        ({"state": narrower}, f"'{key}' should be"),
        ({"state": missing}, "'classifier.bias' should be [5], got nothing"),
        ({"state": {**data["state"], "extra": torch.zeros(2)}}, "'extra' should be nothing, got [2]"),
        ({"state": {**data["state"], key: data["state"][key] * float("nan")}}, f"'{key}' holds NaN"),
        ({"state": {**data["state"], key: "text"}}, f"'{key}' should be"),
        ({"state": [1, 2]}, "tensors by name, got list"),
        ({"spec": {**data["spec"], "kind": "net"}}, "kind is one of genotype, baseline, factory, got 'net'"),
        ({"spec": {"kind": "genotype", "num_classes": 5, "in_channels": 1}}, "needs 'space'"),
    ]
    for changes, rule in cases:
        torch.save({**data, **changes}, path)
        with pytest.raises(ValueError, match=re.escape(rule)) as error:
            load_model(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            load_model(path)
        assert "\n" not in str(error.value)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a model file"):
        load_model(path)
    with pytest.raises(ValueError, match="no such"):
        load_model(tmp_path / "missing.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt"
    config = ModelConfig(baseline="resnet20", width=0.25)
    model = saved(path, config)
    whole = path.read_bytes()
    for metadata in ({"accuracy": float("nan")}, {"tensor": torch.zeros(1)}):
        with pytest.raises(ValueError, match="metadata must be JSON"):
            save_model(path, model, describe(config, **SIZES), metadata)
    assert path.read_bytes() == whole


def test_shipped_genotype_by_name():
    model = models.build(ModelConfig(genotype="w-ftt-net"), num_classes=10, in_channels=3, image_size=32, seed=0)
    assert round(count(model, (3, 32, 32)).params / 1e6, 4) == 2.7126
