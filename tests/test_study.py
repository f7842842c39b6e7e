"""The study script: its figures against SciPy, and what it says about runs that do not belong together."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from test_report import make_records, write

SCRIPT = Path(__file__).parent.parent / "scripts" / "study.py"


def study(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def configure(path, *, seed, **changes):
    """Write the config of a run."""
    config = {"name": path.name, "seed": seed, "data": {"name": "digits", "root": str(path)}, **changes}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    made = []
    for number, gap in enumerate((0.02, 0.05, 0.09)):
        lines = make_records(seeds=2, devices=4, gap=gap, names=("found", "res_net"), images=40)
        made.append((write(folder / str(number), lines), lines))
        (folder / str(number) / "run.json").write_text(json.dumps({"num_classes": 10}))
        configure(folder / str(number), seed=number)
    return made


def mean_of(lines, model):
    return np.mean([line["accuracy"] for line in lines if line["model"] == model and line["rate"] > 0])


def test_differences_are_students_over_runs(runs, tmp_path):
    result = study(*(path for path, _ in runs), "--picture", tmp_path / "curves")
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("| res\\_net |") and line.count("|") == 5)
    differences = [100 * (mean_of(lines, "found") - mean_of(lines, "res_net")) for _, lines in runs]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d", row)]
    assert numbers[:6] == pytest.approx([*differences, np.mean(differences), low, high], abs=0.051)
    bootstrap = numbers[6:]
    assert bootstrap[0] == numbers[3] and low < bootstrap[1] < bootstrap[0] < bootstrap[2] < high
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and (tmp_path / "curves.svg").exists()


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path, monkeypatch, capsys):
    path, lines = runs[0]
    other = write(tmp_path / "other", [line for line in lines if line["model"] == "found"])
    short = write(tmp_path / "short", [line for line in lines if line["train_seed"] == 0])
    again, longer = (write(tmp_path / name, lines) for name in ("again", "longer"))
    for folder, seed, changes in (
        (other, 1, {}),
        (short, 2, {}),
        (again, 0, {}),
        (longer, 3, {"train": {"epochs": 9}}),
    ):
        configure(folder, seed=seed, **changes)
    for arguments, message in [
        ([path], "at least two runs"),
        ([path, tmp_path], "config.yaml"),
        ([path, path], "have the same seed, 0"),
        ([path, again], "have the same seed, 0"),
        ([path, longer], "no runs of one config: train differs"),
        ([path, other], "res_net has no measurement under mibb"),
        ([path, short], "must agree in training seeds"),
    ]:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
