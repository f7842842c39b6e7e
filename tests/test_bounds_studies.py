"""The scripts behind docs/results/crash-estimates.md: what they compute, and that they run."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ftnas.faults import MiBB, NeuronCrash

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rank_loss_is_the_share_of_pairs_in_the_wrong_order():
    study, random = load("bounds_study"), np.random.default_rng(0)
    values, truth = random.normal(size=(2, 3, 7))
    wrong = [
        (values[row, i] < values[row, j]) != (truth[row, i] < truth[row, j])
        for row in range(3)
        for i, j in itertools.combinations(range(7), 2)
    ]
    assert study.rank_loss(values, truth) == pytest.approx(np.mean(wrong))
    assert study.rank_loss(truth, truth) == 0.0 and study.rank_loss(-truth, truth) == 1.0


def test_margins_are_kept_with_the_probability_of_a_normal_error():
    scores = load("fault_scores")
    found = scores.kept(torch.tensor([1.0, 0.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.841345, 0.5, 0.022750, 1.0]), rtol=1e-5, atol=1e-6)


def test_the_variance_of_faults_at_one_convolution():
    """A gradient of one: a crash takes the value; MiBB adds +-2^k steps with the probability of 9 MACs."""
    scores, conv = load("fault_scores"), nn.Conv2d(1, 1, 3)
    value, gradient = torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)
    crash = scores._spread(NeuronCrash(rate=0.1), conv, value, gradient)
    assert crash.tolist() == pytest.approx([0.1 * 4 * 9.0])
    mibb = scores._spread(MiBB(mac_error_rate=1e-3), conv, value, gradient)
    step = 4.0 / 128  # the range of 3 is 4
    square = np.mean([(step * 2**k) ** 2 for k in range(8)])
    assert mibb.tolist() == pytest.approx([(1 - 0.999**9) * 4 * square], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["width", "superposition", "decay", "ranking"])
def test_a_study_runs(study, tmp_path):
    command = [sys.executable, SCRIPTS / "bounds_study.py", study, "--quick", "--out", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / f"{study}.json").read_text()) and (tmp_path / f"{study}.png").exists()
