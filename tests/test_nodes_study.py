"""Studies of split networks: training with failout, records, table, the command line."""

import pytest
import torch
import yaml
from click.testing import CliRunner

from ftnas.cli import cli
from ftnas.data import load
from ftnas.nodes import Failout
from ftnas.nodes.fitting import build, fit, train_all
from ftnas.nodes.measuring import evaluate_all, table
from ftnas.nodes.study import NodesConfig, Variant, open_study, read_nodes_config
from ftnas.settings import parse

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


def write(path, **changed):
    path.write_text(yaml.safe_dump(SMALL | changed))
    return str(path)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-mlp-failout", "cifar10-mobilenet-v1"])
def test_shipped_configs_fit_their_models(name, request):
    config = read_nodes_config(request.config.rootpath / "configs" / "nodes" / f"{name}.yaml")
    shape = (3, 32, 32) if "cifar" in name else (1, 8, 8)
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
    assert "trained" not in runner.invoke(cli, ["nodes", "train", config, "--out", out]).output
    assert runner.invoke(cli, ["nodes", "evaluate", config, "--out", out]).output == result.output
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


def test_batches_without_information_change_nothing(tmp_path):
    config = read_nodes_config(write(tmp_path / "c.yaml"))
    images = load(config.data, "train")
    failout = Failout(rate=1.0)  # a and b are always down: nothing ever reaches c
    network = build(config, Variant(mode="resilinet", failout=failout), images, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert fit(network, images, config, failout=failout, seed=0) == 2 * 4
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"normal": {"a": 0.1}}}, "no rate for"),
        ({"settings": {"normal": {"a": 1.1, "b": 0, "c": 0}}}, "less than or equal to 1"),
        ({"variants": {"v": {"mode": "vanilla", "failout": {"rate": 0.1}}}}, "no effect on mode vanilla"),
        ({"variants": {"v": {"mode": "resilinet"}}}, "needs failout"),
    ],
)
def test_bad_configs_are_one_line(changed, message):
    with pytest.raises(ValueError, match=message):
        parse(NodesConfig, SMALL | changed)
