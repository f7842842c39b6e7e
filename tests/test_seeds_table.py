"""scripts/seeds_table.py: numbers by hand."""

import importlib.util
import math
from pathlib import Path

import pytest

from ftnas.records import read_comparison
from ftnas.storage import Journal

SPEC = importlib.util.spec_from_file_location(
    "seeds_table", Path(__file__).parent.parent / "scripts" / "seeds_table.py"
)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_the_threshold_lies_on_the_line_between_two_rates():
    rates = [1e-6, 1e-5, 1e-4]
    assert script.threshold(rates, [0.5, 0.5, 0.3], floor=0.4) == pytest.approx(10**-4.5)
    assert script.threshold(rates, [0.5, 0.1, 0.3], floor=0.4) == pytest.approx(10 ** (-6 + 0.25))
    assert script.threshold(rates, [0.4, 0.1, 0.3], floor=0.4) == pytest.approx(1e-6)
    assert script.threshold(rates, [0.3, 0.1, 0.3], floor=0.4) == 0.0  # below it at the first rate: at most that
    assert math.isnan(script.threshold(rates, [0.5, 0.5, 0.4], floor=0.4))


def test_thresholds_outside_the_measured_rates_say_on_which_side():
    assert script.found_at([math.nan, 2e-4, 0.0, 1e-6], [1e-6, 1e-3]) == "at most 1e-06, 1e-06, 2e-04, above 0.001"


def test_models_that_stopped_early_are_compared_on_all_their_devices(tmp_path):
    values = {("a", 0): (0.2, 0.4), ("a", 1): (0.4, 0.6), ("b", 0): (0.6,), ("b", 1): (0.8,)}
    journal = Journal(tmp_path / "records.jsonl")
    for (model, seed), row in values.items():
        for device, value in enumerate(row):
            journal.append(
                {"schema": 1, "model": model, "train_seed": seed, "training": "clean", "fault": "f", "rate_name": "r",
                 "rate": 0.1, "device": device, "accuracy": value, "num_images": 100, "flops": 1, "params": 1}
            )  # fmt: skip
    run = read_comparison(tmp_path / "records.jsonl")
    assert script.difference(run, "f", "b", "a", 0.1).startswith("+30.0 ± ")  # 70 - 40, and not 70 - 30


def test_tables_hold_means_losses_and_differences(tmp_path):
    accuracy = {("a", 0.0): (0.4, 0.6), ("a", 0.1): (0.2, 0.2), ("b", 0.0): (0.5, 0.5), ("b", 0.1): (0.45, 0.55)}
    journal = Journal(tmp_path / "records.jsonl")
    for (model, rate), values in accuracy.items():
        for seed, value in enumerate(values):
            journal.append(
                {"schema": 1, "model": model, "train_seed": seed, "training": "clean", "fault": "f", "rate_name": "r",
                 "rate": rate, "device": 0 if rate else None, "accuracy": value, "num_images": 100, "flops": 1,
                 "params": 1}
            )  # fmt: skip
    found = script.tables(read_comparison(tmp_path / "records.jsonl"), lost=0.1)
    # two seeds: half = t_1 s / sqrt(2) = 12.706 * 0.1414 / 1.4142 = 127.1 points, and half of that
    assert "| a | 50.0 ± 127.1 | 20.0 ± 0.0 | at most 0.1, at most 0.1 |" in found
    assert "| b | 50.0 ± 0.0 | 50.0 ± 63.5 | above 0.1, above 0.1 |" in found
    assert "| b | +0.0 ± " in found and "| +30.0 ± " in found
