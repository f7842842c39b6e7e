"""Saturation and bounds from a config to a model file, a campaign and a search."""

import pytest
import torch
from test_search import contents, make_search, space  # noqa: F401
from torch import nn
from torchvision.models import resnet18

from ftnas.campaign import CampaignConfig, Subject, run_campaign
from ftnas.config import read_config
from ftnas.data import DataConfig, load
from ftnas.faults import MiBB
from ftnas.faults.bounds import bound_of, rule_of
from ftnas.faults.hardware import Hardware
from ftnas.faults.saturation import saturations
from ftnas.models import ModelConfig, build, count, describe, load_model, save_model
from ftnas.recipe import SgdConfig, TrainConfig
from ftnas.rundir import RunDir
from ftnas.settings import parse
from ftnas.trainings import Training

SIZES = {"num_classes": 10, "in_channels": 1, "image_size": 8}
NET = {"baseline": "resnet20", "width": 0.25}
LIMITS = {
    "saturation": {"function": "tanh", "std_multiple": 2.0},
    "weight_bound": {"std_multiple": 2.0, "learned": True},
    "feature_bound": {"value": 2.0},
}


@pytest.fixture(scope="module")
def images():
    return load(DataConfig(name="digits"), "train").subset(torch.arange(96))


def training(folder, model, **recipe):
    config = ModelConfig.model_validate(model)
    return Training(
        name="net",
        spec=describe(config, **SIZES),
        recipe=TrainConfig(**({"epochs": 1, "batch_size": 32, "lr": 0.05, "alpha_l": 0.5} | recipe)),
        hardware=Hardware(fault=MiBB(mac_error_rate=0.001)),
        data=DataConfig(name="digits"),
        train_seed=0,
        seed=7,
        holdout_seed=0,
        folder=folder,
        title="t",
        start=config.start,
    )


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    training(folder, NET | LIMITS).run(images)
    return folder / "model.pt"


def test_a_model_file_remembers_scales_and_bounds(trained, images, tmp_path):
    model, metadata = load_model(trained)
    assert saturations(model).keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    first = build(parse(ModelConfig, NET | LIMITS), **SIZES, seed=7)
    moved = []
    for name, found in saturations(model).items():
        layer, untrained = model.get_submodule(name), first.get_submodule(name)
        assert found.scale == saturations(first)[name].scale  # of the weights before training
        moved.append(not torch.equal(bound_of(layer, "weight_bound"), bound_of(untrained, "weight_bound")))
        assert isinstance(layer.weight_bound, nn.Parameter)
        assert (bound_of(layer, "feature_bound") is not None) == isinstance(layer, nn.Conv2d)
    assert any(moved)  # those that clip a weight; the others have no gradient
    assert len({found.scale for found in saturations(model).values()}) > 1
    load = lambda: load_model(trained)[0]  # noqa: E731
    config = parse(CampaignConfig, {"sweeps": [{"fault": {"name": "mibb", "mac_error_rate": 1e-3}, "rates": [1e-3]}]})
    with RunDir.create(tmp_path / "run", {}) as run:
        subject = Subject("net", 0, "mibb", count(model, images.shape), load)
        records = run_campaign([subject], images, config=config, hardware=Hardware(), seed=0, folder=run)
    assert len(records) == 11
    assert records[0]["accuracy"] == pytest.approx(metadata["train_accuracy"], abs=1.5 / 96)


def test_a_bound_changes_what_faults_do_in_training(trained, images, tmp_path):
    training(tmp_path, NET).run(images)
    plain, bounded = (load_model(path)[0] for path in (tmp_path / "model.pt", trained))
    assert not torch.equal(plain.state_dict()["conv1.weight"], bounded.state_dict()["conv1.weight"])


@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_fine_tuning_starts_from_a_file(images, tmp_path, method):
    source = tmp_path / "source"
    source.mkdir()
    training(source, NET).run(images)
    plain, _ = load_model(source / "model.pt")
    torch.save(plain.state_dict(), tmp_path / "state.pth")
    for start in (source / "model.pt", tmp_path / "state.pth"):
        config = ModelConfig.model_validate(NET | {"saturation": {"function": "tanh"}, "start": str(start)})
        model = build(config, **SIZES, seed=3)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    folder = tmp_path / "tuned"
    folder.mkdir()
    training(folder, config.model_dump(exclude_unset=True), method=method, lr=1e-5).run(images)
    tuned, _ = load_model(folder / "model.pt")
    drift = (tuned.state_dict()["conv1.weight"] - plain.state_dict()["conv1.weight"]).abs().max()
    assert 0.0 < float(drift) < 1e-3 and saturations(tuned)


def test_a_start_of_another_function_or_architecture_is_refused(trained, tmp_path):
    for changes, message in (
        ({"saturation": {"function": "softsign"}}, r"model.pt: the state was trained with another function: layer"),
        ({}, r"model.pt: layer 'conv1' was trained saturated by tanh scale=[\d.]+, and here it is not"),
        ({"width": 0.5}, r"model.pt: state of another architecture: 'conv1.weight'"),
        ({"start": str(tmp_path / "none.pt")}, "none.pt"),
    ):
        config = ModelConfig.model_validate(NET | {"start": str(trained)} | changes)
        with pytest.raises(ValueError, match=message) as caught:
            build(config, **SIZES, seed=0)
        assert "\n" not in str(caught.value)


def test_learned_bounds_go_on_from_the_file(trained, tmp_path):
    source, _ = load_model(trained)
    bounds = {key: value for key, value in source.state_dict().items() if key.endswith("_bound")}
    for learned in (True, False):  # frozen for what comes next, by the same settings without it
        weights = {"std_multiple": 2.0, "learned": learned}
        limits = LIMITS | {"saturation": load_scales(source), "weight_bound": weights}
        model = build(ModelConfig.model_validate(NET | limits | {"start": str(trained)}), **SIZES, seed=3)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in bounds.items())
        assert isinstance(model.conv1.weight_bound, nn.Parameter) == learned


def load_scales(model):
    return {"function": "tanh", "scale": {name: found.scale for name, found in saturations(model).items()}}


def test_bounds_that_contradict_the_file_are_refused(trained):
    scales = load_scales(load_model(trained)[0])
    for changes, message in (
        ({"feature_bound": None}, "layer 'conv1' was trained with a feature_bound of 2, and here it has none"),
        ({"weight_bound": None}, "was trained with a weight_bound of .*, and here it has none"),
        ({"feature_bound": {"value": 4.0}}, "'conv1' was trained with a feature_bound of 2, and here it is 4; give"),
        ({"feature_bound": {"value": 2.0, "function": "tanh"}}, "bounded by clip nan=keep, and here by tanh nan=keep"),
    ):
        config = ModelConfig.model_validate(NET | LIMITS | {"saturation": scales, "start": str(trained)} | changes)
        with pytest.raises(ValueError, match=message) as caught:
            build(config, **SIZES, seed=0)
        assert "\n" not in str(caught.value) and str(trained) in str(caught.value)


def test_features_by_a_function_survive_the_file(images, tmp_path):
    feature = {"value": 2.0, "function": "softsign", "nan": "zero"}
    training(tmp_path, NET | {"feature_bound": feature}).run(images)
    model, _ = load_model(tmp_path / "model.pt")
    assert rule_of(model.conv1) == ("softsign", True) and rule_of(model.fc) == ("clip", False)
    again = {"feature_bound": feature | {"function": "arctan"}, "start": str(tmp_path / "model.pt")}
    with pytest.raises(ValueError, match="bounded by softsign nan=zero, and here by arctan nan=zero; give the same"):
        build(ModelConfig.model_validate(NET | again), **SIZES, seed=0)
    again["feature_bound"] = feature
    assert rule_of(build(ModelConfig.model_validate(NET | again), **SIZES, seed=0).conv1) == ("softsign", True)


def test_torchvision_weights_are_a_start(tmp_path):
    """A file as torchvision's own ResNet-18 has it, saturated on the way in."""
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "resnet18.pth")
    shipped = read_config("finetune-resnet18-saturated", [f"train.models.tanh.start={tmp_path / 'resnet18.pth'}"])
    model = build(shipped.train.models["tanh"], num_classes=10, in_channels=3, image_size=32, seed=0).eval()
    weights = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    assert torch.equal(model.state_dict()["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    assert len(saturations(model)) == 21
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"'fc.weight' should be \[7, 512\], got \[10, 512\]"):
        build(shipped.train.models["tanh"], num_classes=7, in_channels=3, image_size=32, seed=0)


def test_adamw_takes_no_momentum():
    config = SgdConfig(method="adamw", batch_size=2, lr=1e-5, weight_decay=0.02)
    optimizer = config.optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-5, 0.02)
    with pytest.raises(ValueError, match="no effect on adamw"):
        SgdConfig(method="adamw", batch_size=2, lr=1e-5, momentum=0.5)
    with pytest.raises(ValueError, match="function"):
        ModelConfig.model_validate(NET | {"saturation": {"function": "tan"}})


def test_a_saved_model_says_no_scales_that_it_has_not(tmp_path):
    model = build(parse(ModelConfig, NET), **SIZES, seed=0)
    spec = describe(parse(ModelConfig, NET), **SIZES)
    assert "limits" not in spec
    save_model(tmp_path / "m.pt", model, spec, {})
    assert not saturations(load_model(tmp_path / "m.pt")[0])


def test_a_search_within_limits(space, tmp_path):  # noqa: F811
    limits = {**LIMITS, "derive": {"samples": 3, "finalists": 2, "final_draws": 1, "train_epochs": 1}}
    found = []
    for name in ("a", "b"):
        with RunDir.create(tmp_path / name, {}) as run:
            search = make_search(space, run.stage("search"), epochs=2, **limits)
            search.run()
            found.append(contents(tmp_path / name / "search"))
    assert found[0] == found[1]
    layers = saturations(search.supernet)
    assert layers and all(hasattr(search.supernet.get_submodule(name), "weight_bound") for name in layers)
