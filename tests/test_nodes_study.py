"""Studies of split networks: training with failout, records, table, the command line."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from test_images_of_a_run import folder_of

from ftnas.cli import cli
from ftnas.data import load
from ftnas.nodes import Failout, patterns
from ftnas.nodes.fitting import Fit, build, split, train_all, trained
from ftnas.nodes.measuring import evaluate_all, table
from ftnas.nodes.study import FOLDER, NodesConfig, Variant, open_study, read_nodes_config
from ftnas.rundir import RunDir
from ftnas.settings import parse
from ftnas.shipped import shipped_names

SMALL = {
    "name": "small",
    "seeds": 2,
    "data": {"name": "digits", "subset": 256},
    "model": {"name": "mlp", "hidden": 2, "units": 16},
    "partition": {
        "nodes": [
            {"name": "a", "blocks": [0], "to": "b"},
            {"name": "b", "blocks": [1], "to": "c"},
            {"name": "c", "blocks": [2]},
        ],
        "skips": [{"source": "input", "to": "b"}, {"source": "a", "to": "c"}],
    },
    "settings": {"normal": {"a": 0.1, "b": 0.05, "c": 0}},
    "variants": {"vanilla": {"mode": "vanilla"}, "resilinet": {"mode": "resilinet", "failout": {"rate": 0.2}}},
    "epochs": 2,
    "batch_size": 64,
}


ONE = {
    "seeds": 1,
    "variants": {"resilinet": SMALL["variants"]["resilinet"]},
    "selection": {"share": 0.25, "setting": "normal"},
}


def write(path, **changed):
    path.write_text(yaml.safe_dump(SMALL | changed))
    return str(path)


@pytest.mark.parametrize("name", shipped_names(FOLDER, ".yaml"))
def test_shipped_configs_fit_their_models(name):
    config = read_nodes_config(name)
    assert config.name == f"nodes-{name}"
    shape = {"cifar10": (3, 32, 32), "digits": (1, 8, 8), "health": (23,)}[name.split("-")[0]]
    config.partition.check_covers(len(config.model.blocks(shape, num_classes=10)))


def test_train_and_evaluate_from_the_command_line_and_again(tmp_path):
    config, out = write(tmp_path / "c.yaml"), str(tmp_path / "run")
    runner = CliRunner()
    early = runner.invoke(cli, ["nodes", "evaluate", config, "--out", out])
    assert isinstance(early.exception, ValueError) and "not trained yet" in str(early.exception)
    assert runner.invoke(cli, ["nodes", "train", config, "--out", out]).exit_code == 0
    first = (tmp_path / "run" / "resilinet-1.pt").stat().st_mtime_ns
    result = runner.invoke(cli, ["nodes", "evaluate", config, "--out", out])
    assert result.exit_code == 0 and "| vanilla |" in result.output and "(guess)" in result.output
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert records.count(b"\n") == 2 * 2 * 8
    assert "epochs" not in runner.invoke(cli, ["nodes", "train", config, "--out", out]).output
    assert runner.invoke(cli, ["nodes", "evaluate", config, "--out", out]).output == result.output
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "resilinet-1.pt").stat().st_mtime_ns == first
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records
    other = runner.invoke(cli, ["nodes", "train", write(tmp_path / "d.yaml", epochs=3), "--out", out])
    assert isinstance(other.exception, ValueError) and "another config" in str(other.exception)


def test_vanilla_guesses_and_the_average_is_the_weighted_sum(tmp_path):
    config, run = open_study(write(tmp_path / "c.yaml", seeds=1), tmp_path / "run")
    with run:
        train_all(config, run)
        records = evaluate_all(config, run)
        text = table(config, records)
    vanilla = {tuple(r["down"]): r["accuracy"] for r in records if r["variant"] == "vanilla"}
    assert all(value == 0.1 for down, value in vanilla.items() if down)
    expected = 100 * (0.9 * 0.95 * vanilla[()] + (1 - 0.9 * 0.95) * 0.1)
    assert f"| vanilla | {100 * vanilla[()]:.2f} | {expected:.2f} |" in text


def test_differences_are_paired_by_seed(tmp_path):
    variants = {name: {"mode": "dfg"} for name in ("one", "other")}
    config = read_nodes_config(write(tmp_path / "c.yaml", variants=variants, compare="other", seeds=3))
    accuracy = {"one": [0.9, 0.8, 0.6], "other": [0.8, 0.6, 0.5]}
    records = [
        {"variant": name, "seed": seed, "down": list(down), "accuracy": value - 0.1 * len(down), "informed": True}
        for name, values in accuracy.items()
        for seed, value in enumerate(values)
        for down in patterns(config.partition)
    ]
    # the differences are 0.1, 0.2 and 0.1 in every pattern, so in every setting: t of 2 degrees of freedom is 4.303
    mean, half = 100 * 0.4 / 3, 100 * 4.302653 * np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3)
    row = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    assert f"| points above other | no failure | normal |\n|---|---|---|\n| one | {row} | {row} |" in table(
        config, records
    )
    with pytest.raises(ValueError, match="did you mean 'other'"):
        read_nodes_config(tmp_path / "c.yaml", ["compare=others"])


def test_batches_without_information_change_nothing(tmp_path):
    config = read_nodes_config(write(tmp_path / "c.yaml"))
    images = load(config.data, "train")
    failout = Failout(rate=1.0)  # a and b are always down: nothing ever reaches c
    network = build(config, Variant(mode="resilinet", failout=failout), images, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert Fit(network, config, images, failout=failout, seed=0).run().left_out == 2 * 4
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_folder_in_which_nothing_is_trained_is_replaced(tmp_path):
    path, out = write(tmp_path / "c.yaml"), tmp_path / "run"
    open_study(path, out)[1].close()
    config, run = open_study(path, out, overrides=["epochs=1", "seeds=1"])
    with run:
        assert run.config["epochs"] == 1
        train_all(config, run)
    with pytest.raises(ValueError, match="holds a run of another config, epochs differs"):
        open_study(path, out, overrides=["seeds=1"])


def test_another_run_is_never_replaced(tmp_path):
    path, out = write(tmp_path / "c.yaml"), tmp_path / "run"
    RunDir.create(out, {"version": 1, "name": "campaign"}).close()
    with pytest.raises(ValueError, match="holds a run that is no study of nodes; give another --out"):
        open_study(path, out)
    study = open_study(path, tmp_path / "study")[1]
    study.write_text("records.jsonl", "")
    study.close()
    with pytest.raises(ValueError, match="holds a run of another config, seeds differs"):
        open_study(path, tmp_path / "study", overrides=["seeds=3"])
    assert (out / "config.yaml").exists() and (tmp_path / "study" / "records.jsonl").exists()


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "run").mkdir()
    _, run = open_study(write(tmp_path / "c.yaml"), tmp_path / "run")
    run.close()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_an_interrupted_training_goes_on_to_the_same_model(tmp_path, monkeypatch):
    config, whole = open_study(write(tmp_path / "c.yaml", **ONE, epochs=4), tmp_path / "whole")
    _, cut = open_study(tmp_path / "c.yaml", tmp_path / "cut")
    with whole, cut:
        train_all(config, whole)
        epoch, done = Fit._epoch, []

        def stop(fit):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(epoch(fit))
            return done[-1]

        monkeypatch.setattr(Fit, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train_all(config, cut, checkpoint_every_s=0.0)
        monkeypatch.setattr(Fit, "_epoch", lambda fit: done.append(fit.progress.epoch) or epoch(fit))
        train_all(config, cut, checkpoint_every_s=0.0)
        assert done[2:] == [2, 3]
        states = [run.load("resilinet-0.pt") for run in (whole, cut)]
        assert not list(cut.path.glob("*.part.pt"))
    assert all(torch.equal(value, states[1]["state"][name]) for name, value in states[0]["state"].items())
    assert states[0]["epoch"] == states[1]["epoch"] and states[0]["left_out"] == states[1]["left_out"]


def test_the_best_epoch_on_validation_images_is_kept(tmp_path):
    config = read_nodes_config(write(tmp_path / "c.yaml", **ONE, epochs=4))
    images, validation = split(config, load(config.data, "train"))
    assert (len(images), len(validation)) == (192, 64)
    failout = config.variants["resilinet"].failout
    rates = config.settings["normal"]
    scores, states = [], []

    def look(fit, _):
        with torch.no_grad():  # the average, in the plainest way
            fit.network.eval()
            inputs, labels = next(validation.batches(64))
            score = 0.0
            for a in (0, 1):
                for b in (0, 1):
                    down = ["a"] * a + ["b"] * b
                    logits = fit.network(inputs, down)
                    chance = abs(1 - a - rates["a"]) * abs(1 - b - rates["b"])
                    score += chance * (0.1 if logits is None else (logits.argmax(1) == labels).float().mean().item())
        scores.append(score)
        states.append({name: value.clone() for name, value in fit.network.state_dict().items()})

    network = build(config, config.variants["resilinet"], images, seed=0)
    progress = Fit(network, config, images, validation=validation, failout=failout, seed=0).run(look)
    best = scores.index(max(scores))
    assert progress.kept == best + 1 and progress.score == pytest.approx(max(scores), abs=1e-6)
    assert all(torch.equal(value, states[best][name]) for name, value in network.state_dict().items())


def test_variants_that_run_the_models_of_another(tmp_path):
    skips = SMALL["partition"]["skips"]
    others = {
        "always": {"mode": "dfg", "models": "resilinet"},
        "first": {"mode": "resilinet", "models": "resilinet", "skips": skips[:1]},
        "none": {"mode": "dfg", "models": "resilinet", "skips": []},
        "survival": {"mode": "resilinet", "models": "resilinet", "survival": True},
    }
    config, run = open_study(write(tmp_path / "c.yaml", seeds=1, variants=SMALL["variants"] | others), tmp_path / "run")
    images = load(config.data, "test")
    inputs, _ = next(images.batches(32))
    with run:
        train_all(config, run)
        assert len(list(run.path.glob("*.pt"))) == 2
        net = {name: trained(config, name, images, seed=0, folder=run) for name in config.variants}
    with torch.no_grad():
        for down in ((), ("a",), ("b",)):
            assert (net["first"](inputs, down) is None) == (down == ("b",))
            assert (net["none"](inputs, down) is None) == (down != ())
        assert torch.equal(net["none"](inputs), net["resilinet"](inputs))
        assert torch.equal(net["first"](inputs, ("a",)), net["resilinet"](inputs, ("a",)))
        assert torch.equal(net["always"](inputs, ("a",)), net["resilinet"](inputs, ("a",)))
        assert not torch.equal(net["always"](inputs), net["resilinet"](inputs))
        # by hand, without failures: failout left a and b alive with probability 0.8 each; the input never fails
        a, b, c = net["survival"].nodes
        torch.testing.assert_close(net["survival"](inputs), c(0.8 * b(0.8 * a(inputs))))
    for name in ("resilinet", "survival"):
        assert net[name].weights == pytest.approx([1.0, 0.8, 0.8, 1.0, 0.8] if name == "survival" else [1.0] * 5)


def nodes(command, config, out):
    """Run a command; return its exit code, or the message of a user's mistake."""
    result = CliRunner().invoke(cli, ["nodes", command, config, "--out", str(out)])
    if result.exception is None:
        return result.exit_code
    assert isinstance(result.exception, ValueError), result.exception
    return str(result.exception)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("command", ["train", "evaluate", "run", "search"])
def test_a_study_does_not_go_on_with_other_images(part, command, tmp_path):
    root, out = folder_of(tmp_path / "images", 1), tmp_path / "run"
    data = {"name": "image_folder", "root": str(root)}
    search = {"mode": "resilinet", "failout": {"rate": 0.2}, "setting": "normal", "budget": 1e9, "trials": 1}
    small = {"data": data, "epochs": 1, "batch_size": 8, "search": search, "live": {"images": 2}}
    config = write(tmp_path / "c.yaml", **(ONE | small))
    assert nodes("train", config, out) == 0
    before = json.loads((out / "run.json").read_text())
    assert before["dataset_digest"] == load(read_nodes_config(config).data, "train").digest != before["test_digest"]
    if command == "train":
        (out / "resilinet-0.pt").unlink()  # as in a study that was cut
    (root / part).rename(root / "away")
    (folder_of(tmp_path / "other", 2) / part).rename(root / part)
    name = {"train": "training", "test": "test"}[part]
    assert f"data: the {name} images are not those that {out} was begun with" in nodes(command, config, out)
    assert json.loads((out / "run.json").read_text()) == before


def test_a_study_from_before_digests_gets_them(tmp_path):
    config, out = write(tmp_path / "c.yaml", **ONE, epochs=1), tmp_path / "run"
    assert nodes("train", config, out) == 0
    info = json.loads((out / "run.json").read_text())
    digests = {key: info.pop(key) for key in ("dataset_digest", "test_digest")}
    (out / "run.json").write_text(json.dumps(info))
    assert nodes("evaluate", config, out) == 0
    assert json.loads((out / "run.json").read_text()) == info | digests


def test_what_a_training_would_be_for_nothing_by_is_told_before_it(tmp_path):
    leaves = [
        {"name": "a", "blocks": [0], "to": "c"},
        {"name": "b", "blocks": [1], "to": "c"},
        {"name": "c", "blocks": [2]},
    ]
    several = {"nodes": leaves, "skips": [{"source": "input", "to": "c"}]}
    for changed, message in (
        ({"test_images": 400}, "test_images: there are 359 test images, got 400"),
        ({"partition": several}, r"node 'b' cannot take what 'input' sends, of shape \(1, 8, 8\)"),
    ):
        config = write(tmp_path / "c.yaml", **changed)
        assert re.search(message, str(nodes("train", config, tmp_path / "run")))
        assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"normal": {"a": 0.1}}}, "no rate for"),
        ({"settings": {"normal": {"a": 1.1, "b": 0, "c": 0}}}, "less than or equal to 1"),
        ({"variants": {"v": {"mode": "vanilla", "failout": {"rate": 0.1}}}}, "no effect on mode vanilla"),
        ({"variants": {"v": {"mode": "resilinet"}}}, "needs failout"),
        ({"variants": {"v": {"mode": "on_failure"}}}, "needs failout"),
        ({"variants": {"v": {"mode": "dfg", "models": "w"}}}, "no trained variant 'w'"),
        ({"variants": {"v": {"mode": "dfg", "models": "v"}}}, "no trained variant 'v'"),
        ({"variants": {"v": {"mode": "dfg", "survival": True}}}, "no effect without failout"),
        ({"variants": {"v": {"mode": "dfg", "skips": []}}}, "is mode vanilla"),
        ({"variants": {"v": {"mode": "dfg", "skips": [{"source": "input", "to": "c"}]}}}, "no skip input -> c; it has"),
        ({"model": {"name": "mlp", "hidden": 3, "units": 16}}, "on no node: .3.; the model has blocks 0 to 3"),
        ({"model": {"name": "mlp", "hidden": 1, "units": 16}}, "has no blocks .2., only 0 to 1"),
        ({"model": {"name": "mlp", "hidden": 2, "width": 0.5}}, "width has no effect on mlp"),
        ({"partition": SMALL["partition"] | {"skips": []}}, "failout has no effect, the map has no skips"),
        ({"variants": {"v": {"mode": "dfg", "weights": {"scheme": "one", "high": 9}}}}, "high has no effect"),
        ({"variants": {"v": {"mode": "dfg", "weights_setting": "poor"}}}, "weights_setting has no effect"),
        ({"variants": {"../v": {"mode": "dfg"}}}, "should match pattern"),
        ({"selection": {"setting": "norml"}}, "did you mean 'normal'"),
        ({"selection": {"share": 0}}, "greater than 0"),
        ({"data": {"name": "health"}}, "root: required"),
        ({"data": {"name": "health", "root": "x"}, "augment": {"flip": True}}, "no effect on sensor readings"),
    ],
)
def test_bad_configs_are_one_line(changed, message):
    with pytest.raises(ValueError, match=message):
        parse(NodesConfig, SMALL | changed)


def test_a_study_of_nodes_is_told_from_a_run(tmp_path):
    _, run = open_study(write(tmp_path / "c.yaml"), tmp_path / "run")
    run.close()
    result = CliRunner().invoke(cli, ["run", "--resume", str(tmp_path / "run")])
    assert "this is a study of nodes; the command of `ftnas nodes` that began it goes on" in str(result.exception)
