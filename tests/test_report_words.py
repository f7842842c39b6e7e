"""What a report calls things, and the numbers in its sentences."""

import base64
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from ftnas.report import build_report, make_report
from ftnas.stats import Interval
from ftnas.tables import certainty, chance_of, spellings, to_markdown


def single(fault, changed, trials=4):
    """Return a line of single.jsonl: one stratum of a model with one layer."""
    place = {"layer": "fc", "call": 0, "bit": 0, "code": None, "depth": 0, "operator": "linear"}
    counts = {"population": 100, "trials": trials, "changed": changed, "nonfinite": 0, "num_images": 3}
    return {"schema": 1, "model": "p", "train_seed": 0, "fault": fault, **place, **counts}


def swept(fault, name="p", seed=0, device=0, correct=(1, 0)):
    """Return a line of records.jsonl at one rate."""
    bits = np.array(correct, dtype=bool)
    line = {"schema": 1, "model": name, "train_seed": seed, "training": "clean", "fault": fault}
    line |= {"rate_name": "sa_rate", "rate": 0.1, "device": device, "accuracy": float(bits.mean())}
    packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
    return {**line, "num_images": len(bits), "flops": 1, "params": 1, "correct": packed}


def write(folder, **journals):
    for name, lines in journals.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made(folder):
    """Return a run's page and what the terminal shows of it."""
    out = io.StringIO()
    make_report(folder, console=Console(file=out, width=160))
    return (folder / "report" / "report.html").read_text(), out.getvalue()


def test_faults_that_are_spelt_alike_have_pictures_headings_and_rows_of_their_own(tmp_path):
    labels = ["weight_bit_flip", "weight bit flip", "adsaf", "adSAF"]
    write(tmp_path, single=[single(label, changed) for changed, label in enumerate(labels)])
    page, shown = made(tmp_path)
    assert re.findall("<h3>(.*)</h3>", page) == [f"p, {label}" for label in labels]
    assert all(f"p, {label} " in shown for label in labels)
    maps = re.findall(r'<svg[^>]*aria-label="Probability[^"]*changes the answer of (p, [^"]*), by layer', page)
    assert maps == [f"p, {label}" for label in labels]
    files = {path.name.casefold(): path for path in (tmp_path / "report").glob("map-*.svg")}
    assert len(files) == len({path.read_bytes() for path in files.values()}) == 4


def test_sweeps_that_are_spelt_alike_have_pictures_and_headings_of_their_own(tmp_path):
    labels = ["weight_bit_flip", "Weight bit flip"]
    write(tmp_path, records=[swept(label, device=device) for label in labels for device in (0, 1)])
    page, shown = made(tmp_path)
    assert [head for head in re.findall("<h2>(.*)</h2>", page) if "bit" in head] == labels
    assert all(f"Under {label} faults" in shown and f"under {label} by" in shown for label in labels)
    assert all(f"## {label} by" in to_markdown(build_report(tmp_path)).replace("\\", "") for label in labels)
    assert len({path.name.casefold() for path in (tmp_path / "report").glob("curves-*.png")}) == 2


def test_a_label_stays_as_it_is_only_where_another_is_spelt_alike():
    assert spellings(["adsaf", "log_normal_variation"]) == {
        "adsaf": "adSAF",
        "log_normal_variation": "log normal variation",
    }
    assert spellings(["a_b", "a__b", "A b", "c_d"]) == {"a_b": "a_b", "a__b": "a__b", "A b": "A b", "c_d": "c d"}


def test_the_interval_that_is_given_is_the_one_that_decides(tmp_path):
    # Two seeds a side that agree: Welch's t is narrow, and the bootstrap over devices and images includes zero.
    right = {("a", 0): [70, 10], ("a", 1): [71, 10], ("b", 0): [20, 20], ("b", 1): [20, 21]}
    lines = [
        swept("adsaf", name, seed, device, [image < number for image in range(80)])
        for (name, seed), numbers in right.items()
        for device, number in enumerate(numbers)
    ]
    report = build_report(write(tmp_path, records=lines))
    (gap,) = [found for found in report.differences if found.rate == 0.1]
    assert gap.over_seeds.high < 0 < gap.interval.high and gap.verdict == 0
    low, high = (f"{100 * bound:+.1f}" for bound in (gap.interval.low, gap.interval.high))
    assert certainty(gap) == f"95% interval {low} to {high}: zero is not excluded"
    other = report.comparison.difference("adsaf", "a", "b", None)
    assert f"({certainty(other)})" in report.headline("adsaf") and certainty(other).endswith("zero is not excluded")


def uneven(folder, **accuracies):
    """Build a report of models that were measured on as many devices as they have accuracies of 100 images."""
    folder.mkdir()
    lines = [
        swept("adsaf", name, 0, device, [image < right for image in range(100)])
        for name, numbers in accuracies.items()
        for device, right in enumerate(numbers)
    ]
    return build_report(write(folder, records=lines))


def test_the_first_sentence_gives_the_difference_on_the_devices_of_both(tmp_path):
    """b is ahead on its own devices, of which the second half is easier, and behind on each that both have."""
    report = uneven(tmp_path / "a", a=[53, 55, 51, 53, 54], b=[50, 52, 48, 50, 52, 70, 70, 70, 70, 70], c=[30] * 5)
    said = report.headline("adsaf")
    assert said.startswith(
        "The order depends on the devices under adSAF faults: at rate 0.1, b (60.2%) and a (53.2%), each on its own "
        "devices; a is 2.8 points above b on the devices that both have (95% interval -3.4 to -2.2: zero is excluded)."
    )
    assert "5 to 10 devices a rate" in report.method()
    third = uneven(tmp_path / "c", c=[52, 54, 50, 52, 53], a=[53, 55, 51, 53, 54], b=[50, 52, 48, 50, 52, *[70] * 5])
    assert re.search(r" c is 1\.8 points above b \(95% interval -2.* to -1.*excluded\)", third.headline("adsaf"))
    clear = uneven(tmp_path / "d", a=[53, 55, 51, 53, 54], b=[50, 52, 48, 50, 52, *[20] * 5])
    best = "a is the most accurate: 53.2%, 2.8 points above b, the next best on the devices that both have"
    assert best in clear.headline("adsaf")
    same = uneven(tmp_path / "e", a=[53, 55, 51], b=[53, 51, 55])
    assert "a (53.0%) and b (53.0%) differ by 0.0 points (95%" in same.headline("adsaf")
    assert " 3 devices a rate" in same.method()


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (1.0, 0.22, 1.0, "100 (22 to 100)"),
        (0.996, 0.994, 0.9999, "100 (99 to 100)"),
        (0.00123, 0.0, 0.05, "0.12 (0 to 5)"),
    ],
)
def test_a_probability_near_one_is_a_plain_number(mean, low, high, text):
    assert chance_of(Interval(mean=mean, low=low, high=high, num=4, method="stratified")) == text
