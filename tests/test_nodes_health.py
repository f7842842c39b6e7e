"""Sensor readings in the form of the MHEALTH files: read, split, standardised, trained on; clear errors."""

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from test_nodes_study import SMALL

from ftnas.cli import cli
from ftnas.nodes.samples import HealthConfig, load_samples

ROWS = 20  # of each activity, and of none


def rows():
    """Return float64 [13 * ROWS, 24]: each activity around a centre of its own, far from the others; the last is 0."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 5, (13, 23))
    labels = np.repeat(np.arange(13), ROWS)
    return np.column_stack([centres[labels] + random.normal(0, 1, (len(labels), 23)), labels])


def write(folder, table, name="mHealth_subject1.log"):
    folder.mkdir(exist_ok=True)
    separator = "," if name.endswith("csv") else "\t"
    lines = [separator.join(f"{value:.5g}" for value in row[:-1]) + f"{separator}{int(row[-1])}" for row in table]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def config(folder, **changed):
    return HealthConfig(name="health", root=str(folder), **changed)


def test_readings_are_split_and_standardised(tmp_path):
    table = rows()
    write(tmp_path / "h", table[::2])
    write(tmp_path / "h", table[1::2], "mHealth_subject2.log")
    train, test = (load_samples(config(tmp_path / "h"), which) for which in ("train", "test"))
    assert (len(train), len(test), train.shape, train.num_classes) == (216, 24, (23,), 12)
    assert torch.bincount(test.labels).tolist() == [2] * 12
    torch.testing.assert_close(train.values.mean(0), torch.zeros(23), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.values.std(0, correction=0), torch.ones(23), atol=1e-4, rtol=0)
    kept = {tuple(np.round(row[:-1], 2)) for row in table if row[-1] != 0}
    raw = torch.cat([train.values, test.values])
    assert len({tuple(row) for row in raw.tolist()}) == len(kept) == 240


def test_commas_with_names_and_one_file_are_the_same_rows(tmp_path):
    plain = write(tmp_path / "h", rows())
    folder = write(tmp_path / "c", rows(), "all.csv")
    file = folder / "all.csv"
    file.write_text(",".join(f"sensor_{i}" for i in range(23)) + ",activity\n" + file.read_text())
    a, b, c = (load_samples(config(where), "train") for where in (plain, folder, file))
    assert torch.equal(a.values, b.values) and torch.equal(b.values, c.values) and torch.equal(a.labels, c.labels)
    assert len(load_samples(config(plain, subset=48), "train")) == 48


def test_batches_follow_seed_and_epoch(tmp_path):
    train = load_samples(config(write(tmp_path / "h", rows())), "train")
    first, again, other = (
        torch.cat([y for _, y in train.batches(50, seed=s, epoch=e, drop_last=True)])
        for s, e in [(1, 0), (1, 0), (1, 1)]
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == 200
    assert torch.equal(torch.cat([y for _, y in train.batches(50)]), train.labels)


def test_a_study_of_readings_from_the_command_line(tmp_path):
    data = {"name": "health", "root": str(write(tmp_path / "h", rows()))}
    path, out = tmp_path / "c.yaml", ["--out", str(tmp_path / "run")]
    path.write_text(yaml.safe_dump(SMALL | {"data": data, "epochs": 20, "seeds": 1, "batch_size": 24}))
    runner = CliRunner()
    assert runner.invoke(cli, ["nodes", "train", str(path), *out]).exit_code == 0
    result = runner.invoke(cli, ["nodes", "evaluate", str(path), *out])
    # centres lie far apart: the 24 test rows are told apart with all nodes up; 1 / 12 is a guess
    assert result.exit_code == 0 and float(result.output.split("| vanilla | ")[1].split(" |")[0]) > 90
    assert "| 8.33 (guess) |" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("\t", " ", 1).replace("\t", "\tx", 1), "not a table of numbers: .* at row"),
        (lambda text: text.replace("\t", "\n", 1), "not a table of numbers: .*columns"),
        (lambda text: "\n".join(line.rsplit("\t", 2)[0] for line in text.splitlines()), "24 columns; got 22"),
        (lambda text: "nan" + text[text.index("\t") :], "row 1: a value is not finite"),
        (lambda text: text.replace("\t5\n", "\t13\n", 1), "row 101: the last column is the activity, 0 to 12; got 13"),
        (lambda text: text.replace("\t5\n", "\t0\n"), r"activity 5 \(climbing stairs\) has 0 rows"),
        (lambda text: "", "24 columns; got"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, message):
    file = write(tmp_path / "h", rows()) / "mHealth_subject1.log"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        load_samples(config(tmp_path / "h"), "train")
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("FTNAS_HEALTH", raising=False)
    for root, message in [("$FTNAS_HEALTH", "is not set"), (str(tmp_path), r"no \*.log or \*.csv files")]:
        with pytest.raises(ValueError, match=message):
            load_samples(HealthConfig(name="health", root=root), "train")
    with pytest.raises(ValueError, match="there are 216 training rows, got 500"):
        load_samples(config(write(tmp_path / "h", rows()), subset=500), "train")


@pytest.mark.parametrize("change", ["value", "activity"])
def test_a_study_does_not_go_on_with_other_readings(tmp_path, change):
    table = rows()
    data = {"name": "health", "root": str(write(tmp_path / "h", table))}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL | {"data": data, "seeds": 1, "epochs": 1}))
    command = ["nodes", "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(cli, command).exit_code == 0
    if change == "value":
        table[30, 4] += 0.5
    else:
        table[[30, 50], -1] = table[[50, 30], -1]
    write(tmp_path / "h", table)
    command[1] = "evaluate"
    assert "readings are not those that" in str(CliRunner().invoke(cli, command).exception)
