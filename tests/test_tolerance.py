"""`ftnas bounds`: numbers, certificates and pictures of trained models; what was seen is below every bound."""

import json
import sys

import pytest
import torch
import yaml

from ftnas import baselines, boundplots, cli
from ftnas.bounds import (
    BoxOfInputs,
    Failures,
    about_images,
    certify,
    neuron_costs,
    of_samples,
    read_certificate,
    summarize,
    verify,
    write_certificate,
)
from ftnas.bounds.attack import Attack
from ftnas.campaign import Subject
from ftnas.config import read_config
from ftnas.data import load
from ftnas.models import ModelConfig, count, describe, load_model, save_model
from ftnas.plots import pixels
from ftnas.rng import generator, isolated
from ftnas.rundir import Folder
from ftnas.tolerance import ToleranceConfig, bound_model, box_of, table

CONFIG = {
    "version": 1,
    "name": "mine",
    "threads": 1,
    "data": {"name": "digits", "subset": 400},
    "hardware": {"layers": "linear"},
    "train": {
        "recipe": {"epochs": 2, "batch_size": 64, "lr": 0.05, "alpha_l": 0.0},
        "models": {"perceptron": {"factory": "ftnas.baselines:perceptron"}},
    },
    "bounds": {"images": 12, "failing": [1, 3], "draws": 3, "bits": [8, 4], "local_images": 2},
}


def ftnas(*arguments):
    """Run the command line in this process; return its exit code."""
    saved, sys.argv = sys.argv, ["ftnas", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code
    finally:
        sys.argv = saved
    return 0


def write(tmp_path, data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tolerance")
    assert ftnas("run", write(folder, CONFIG), "--out", folder / "run") == 0
    return folder / "run"


def numbers_of(run, name="perceptron"):
    return json.loads((run / "bounds" / name / "seed-0" / "bounds.json").read_text())


def test_what_was_seen_is_below_every_bound(run):
    numbers = numbers_of(run)
    assert [layer["name"] for layer in numbers["layers"]] == ["2", "4"]
    for layer in numbers["layers"]:
        assert 0 < layer["measured"][0]["error"] <= layer["on_images"] * (1 + 1e-9)
        assert layer["on_images"] <= layer["paths"] <= layer["fep"] * (1 + 1e-9)
        for entry in layer["measured"]:
            assert entry["error"] <= entry["bound"] * (1 + 1e-9)
            assert entry["certified"] <= entry["kept"] + 1e-9
            assert 0 < entry["error_first"] <= entry["local"] * (1 + 1e-9)
            assert entry["local"] <= entry["bound"] * (1 + 1e-9)
    assert [line["bits"] for line in numbers["bits"]] == [8, 4]
    assert numbers["bits"][0]["images"] < numbers["bits"][1]["images"] <= numbers["bits"][1]["box"]


def test_files_and_the_table(run):
    folder = run / "bounds" / "perceptron" / "seed-0"
    assert (folder / "bounds.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "bounds.svg").stat().st_size > 1000
    table = (run / "bounds" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| layer |", "| 2 |", "| 4 | 64"))]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 3
    assert "| 2 | 64 |" in table and "| bits |" in table
    certificate = read_certificate(folder / "certificate.json")
    assert certificate.budget == pytest.approx(numbers_of(run)["budget"])
    assert [layer.components for layer in certificate.layers] == [64, 64]


def test_a_certificate_is_verified_on_the_command_line(run, capsys):
    model, folder = run / "train" / "model.pt", run / "bounds" / "perceptron" / "seed-0"
    assert ftnas("verify", folder / "certificate.json", model, "--allow-factory") == 0
    made = read_certificate(folder / "certificate.json")
    line = capsys.readouterr().out
    assert line == f"holds: {made.summary()}, which is every image there can be\n"
    assert "(crash of a neuron) in 2 layers, error at most" in line
    assert f"within a budget of {made.budget:.6g}, for every input of shape (1, 8, 8) from " in line
    assert ftnas("verify", folder / "certificate.json", model) == 2
    error = capsys.readouterr().err
    assert "ftnas verify: --allow-factory" in error and error.count("\n") == 1


def test_a_certificate_that_is_not_about_every_image_is_told_on_the_command_line(run, tmp_path, capsys):
    model, folder = run / "train" / "model.pt", run / "bounds" / "perceptron" / "seed-0"
    network, metadata = load_model(model, allow_factory=True)
    made = read_certificate(folder / "certificate.json")
    black = BoxOfInputs(low=made.domain.low, high=made.domain.low)
    write_certificate(
        tmp_path / "black.json", certify(network, black, shape=(1, 8, 8), failures=Failures(), budget=1.0)
    )
    assert ftnas("verify", tmp_path / "black.json", model, "--allow-factory") == 2
    error = capsys.readouterr().err
    assert "not about every image: channel 0 of its box is" in error and error.count("\n") == 1
    config = ModelConfig(factory="ftnas.baselines:perceptron")
    spec = describe(config, num_classes=10, in_channels=1, image_size=8)
    save_model(tmp_path / "bare.pt", network, spec, {})
    assert ftnas("verify", tmp_path / "black.json", tmp_path / "bare.pt", "--allow-factory") == 0
    assert "the model file does not say how its images are normalised" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 8, 8\), and the model's images are \(1, 4, 4\)"):
        about_images(made, {**metadata, "shape": [1, 4, 4]})
    low, high = (end * (1 + 1e-7) for end in (made.domain.low[0], made.domain.high[0]))
    rounded = made.model_copy(update={"domain": BoxOfInputs(low=(low / (1 + 2e-7),), high=(high / (1 + 2e-7),))})
    assert about_images(rounded, metadata) == ", which is every image there can be"


def test_a_certificate_of_images_is_verified_with_the_config_that_names_them(run, tmp_path, capsys):
    claim = run / "bounds" / "perceptron" / "seed-0" / "images.json"
    given = ("verify", claim, run / "train" / "model.pt", "--allow-factory")
    assert ftnas(*given, "--config", run / "config.yaml") == 0
    certified = len(read_certificate(claim).domain.certified)
    assert capsys.readouterr().out.endswith(f"the answers of {certified} of 12 samples stay\n")
    assert 6 <= certified <= 12
    for wrong, told in {
        (): "name the config it was made by",
        ("bounds.images=11",): "bounds.images=11 changes a config, and none is given",
        ("--config", run / "config.yaml", "bounds.images=11"): "about other samples than those given",
        ("--config", run / "config.yaml", "bounds=null"): "has no bounds section",
        ("--config", "quickstart"): "has no bounds section",
        ("--config", tmp_path / "none.yaml"): "none.yaml",
    }.items():
        assert ftnas(*given, *wrong) == 2, wrong
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error
    assert ftnas(*given[:1], claim.with_name("certificate.json"), *given[2:], "--config", run / "config.yaml") == 2
    assert "remove --config: it has no effect" in capsys.readouterr().err


def test_a_certificate_imports_nothing_that_its_config_names(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["hardware"]["fault"] = {"name": "evil:Fault"}
    claim = run / "bounds" / "perceptron" / "seed-0" / "images.json"
    given = ("verify", claim, run / "train" / "model.pt", "--allow-factory", "--config", write(tmp_path, config))
    assert ftnas(*given) == 0
    assert "evil" not in sys.modules and "holds: " in capsys.readouterr().out


def test_finished_numbers_are_kept(run, capsys):
    path = run / "bounds" / "perceptron" / "seed-0" / "bounds.json"
    before = path.stat().st_mtime_ns
    assert ftnas("bounds", "--resume", run) == 0
    assert path.stat().st_mtime_ns == before
    assert "written to" in capsys.readouterr().out


def test_damaged_numbers_are_told_with_their_file(run, capsys):
    path = run / "bounds" / "perceptron" / "seed-0" / "bounds.json"
    whole, first = path.read_text(), numbers_of(run)
    layer = {key: value for key, value in first["layers"][0].items() if key != "fep"}
    damaged = [{"a": 1}, {**first, "schema": 2}, {**first, "layers": [layer]}, {**first, "layers": 3}, [1]]
    try:
        for text in (whole[: len(whole) // 2], "[" * 100_000, *map(json.dumps, damaged)):
            path.write_text(text)
            assert ftnas("bounds", "--resume", run) == 2
            error = capsys.readouterr().err
            assert f"error: {path}: damaged, or not of schema 1" in error and "remove it and go on" in error
            assert error.count("\n") == 1
    finally:
        path.write_text(whole)
    assert ftnas("bounds", "--resume", run) == 0


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param({"kind": "byzantine", "capacity": 0.5}, marks=pytest.mark.slow),
        {"kind": "byzantine", "capacity": 2.0, "capacity_of": "transmitted"},
        {"component": "synapse"},
    ],
)
def test_other_failures(tmp_path, failures):
    with isolated(0, "net"):
        model = baselines.create("resnet20", width=0.25, image_size=8, in_channels=1).eval()
    images = load(read_config("tolerance").data, "test").subset(torch.arange(2))
    runs = {} if "component" in failures else {"failing": (1,), "draws": 2}
    config = ToleranceConfig(failures=Failures(**failures), bits=(8,), **runs)
    subject = Subject("net", 0, "none", count(model, images.shape), lambda: model)
    folder = Folder(tmp_path)
    numbers = bound_model(subject, images, config=config, seed=0, folder=folder)
    assert len(numbers["layers"]) == (22 if "component" in failures else 21)
    assert "## net, seed 0" in table(numbers)
    assert boundplots.bound_against_truth(numbers).axes[0].lines
    verify(read_certificate(folder.file("certificate.json")), model)
    for layer in numbers["layers"]:
        for entry in layer.get("measured", ()):
            assert 0 < entry["error"] <= entry["bound"] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failures": {"kind": "byzantine"}}, "without a capacity no network tolerates a byzantine component"),
        ({"failures": {"capacity": 1.0}}, "capacity has no effect on kind crash"),
        ({"shares": 0.5}, "bounds.shares: unknown key; did you mean 'share'?"),
        ({"budget": 0.0}, "bounds.budget"),
        ({"bits": [40]}, "bits"),
        ({"failures": {"component": "synapse"}, "local_images": 0}, "failing has no effect on failing synapses"),
        (
            {"failures": {"unit": "channel", "kind": "byzantine", "capacity": 1.0}},
            "local_images are for single neurons",
        ),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, capsys, changes, message):
    path = write(tmp_path, {**CONFIG, "bounds": {**CONFIG["bounds"], **changes}})
    assert ftnas("bounds", path, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_config_without_bounds_is_one_line(tmp_path, capsys):
    path = write(tmp_path, {key: value for key, value in CONFIG.items() if key != "bounds"})
    assert ftnas("bounds", path, "--out", tmp_path / "run") == 2
    assert "has no bounds section" in capsys.readouterr().err


def test_a_model_that_is_not_bounded_is_named(tmp_path, capsys):
    models = {"net": {"factory": "test_tolerance:gelu"}}
    train = {"recipe": {**CONFIG["train"]["recipe"], "epochs": 1}, "models": models}
    path = write(tmp_path, {**CONFIG, "train": train})
    assert ftnas("run", path, "--out", tmp_path / "run") == 2
    assert "net: layer '2' is a GELU, which is not bounded" in capsys.readouterr().err


def gelu(num_classes, in_channels):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, 8), torch.nn.GELU(), torch.nn.Linear(8, num_classes)
    )


def test_the_shipped_configs_have_bounds():
    for name in ("tolerance", "quickstart-bounds"):
        assert read_config(name).bounds is not None


def test_the_box_holds_all_images():
    images = load(read_config("tolerance").data, "test")
    inputs, _ = next(images.batches(images.num_images))
    low, high = box_of(images).ends(images.shape)
    assert (inputs >= low - 1e-5).all() and (inputs <= high + 1e-5).all()
    assert inputs.amax() == pytest.approx(float(high), abs=1e-5)


def test_the_attack_is_what_it_says():
    """One neuron: the worst of all single crashes is found where the bound is exact (no layer in between)."""
    with isolated(0, "net"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    summary, x = summarize(model, (4,)), torch.randn(5, 4, generator=generator(0, "x"))
    attack, (layer,) = Attack(summary, x, Failures()), summary.layers
    found = attack.run(layer, 1, draws=0, generator=generator(0, "draws"))
    bound = neuron_costs(summary, of_samples(summary, x), Failures())[0].sums[:, 1].amax()
    assert found["error"] == pytest.approx(float(bound))
    one = Attack(summary, x, Failures(kind="byzantine", capacity=3.0)).run(
        layer, 6, draws=1, generator=generator(0, "d")
    )
    weights = summary.nodes[-1].op.weight
    assert one["error"] == pytest.approx(3.0 * float(weights.sum(1).abs().amax()))


def test_legends_of_bounds_lie_beside_the_curves():
    entry = {"local": 0.1, "error_first": 0.1, "error": 0.1, "kept": 0.9, "certified": 0.5, "local_certified": 0.6}
    measured = [{"failing": count, **entry} for count in (1, 4, 16)]
    layers = [{"fep": 10.0**-depth, "paths": 2.0, "on_images": 1.0, "measured": measured} for depth in range(2)]
    numbers = {"layers": layers, "local_images": 1000, "budget": 0.01, "model": "m", "failures": {"kind": "crash"}}
    figure = boundplots.bound_against_truth(numbers)
    pixels(figure)  # places what is in it
    top, bottom = (axes.get_legend().get_window_extent() for axes in figure.axes)
    assert top.y0 > bottom.y1 and bottom.y0 > 0 and max(top.x1, bottom.x1) < figure.bbox.x1
    assert min(top.x0, bottom.x0) > max(axes.get_window_extent().x1 for axes in figure.axes)


def test_pictures_of_errors_over_k():
    series = [{"name": f"net {n}", "lipschitz": [0.1, 1.0], "error": [0.1, 1.0], "bound": [1.0, 9.0]} for n in range(8)]
    figure = boundplots.error_over_lipschitz(series, title="t")
    assert len(figure.axes[0].lines) == 16
