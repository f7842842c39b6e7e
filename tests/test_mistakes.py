"""Mistakes on the command lines of scripts: one line and exit code 2, before the work."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from ftnas.mistakes import positive, to_write, told

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    for error in (ValueError("rate: at most 1,\n got 2"), FileNotFoundError(2, "No such file", "runs/x")):
        with pytest.raises(SystemExit) as ended, told():
            raise error
        assert ended.value.code == 2
        assert capsys.readouterr().err == "error: " + " ".join(str(error).split()) + "\n"
    with pytest.raises(KeyError), told():  # a bug shows where it is
        raise KeyError("x")


def test_numbers_and_files_of_arguments(tmp_path):
    assert positive("3") == 3 and to_write(str(tmp_path / "a.json")) == tmp_path / "a.json"
    for read, text in ((positive, "0"), (positive, "-2"), (to_write, str(tmp_path)), (to_write, "/nowhere/x.json")):
        with pytest.raises(argparse.ArgumentTypeError, match="got"):
            read(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench_step.py", "--cells", "0"], "argument --cells: a number of 1 or more, got 0"),
        (["bench_step.py", "--rounds", "0"], "argument --rounds: a number of 1 or more, got 0"),
        (["bench_step.py", "--json", "/nowhere/x.json"], "argument --json: cannot be written"),
        (["count_operations.py", "--top", "-1"], "argument --top: a number of 1 or more, got -1"),
        (["step_memory.py", "--steps", "0"], "argument --steps: a number of 1 or more, got 0"),
        (["step_memory.py", "--steps", "9", "--size", "8", "--cells", "3"], "leave out --cells, --size"),
        (["seeds_table.py", "/nowhere"], "no records"),
        (["compare_rankings.py", "/nowhere/*"], "names 0 run folders"),
        (["fault_scores.py", "/nowhere", "--out", "OUT"], "error: "),
        (["crash_training.py", "/nowhere", "--out", "OUT"], "no run folder named crash-nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_scripts_tell_mistakes_before_they_work(arguments, message, tmp_path):
    arguments = [str(tmp_path / part) if part == "OUT" else part for part in arguments]
    command = [sys.executable, str(SCRIPTS / arguments[0]), *arguments[1:]]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and message in found.stderr.splitlines()[-1], found.stderr
    assert "Traceback" not in found.stderr
