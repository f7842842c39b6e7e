"""Rows of marks: what is drawn is what was given."""

import pytest

from ftnas.charts import dot_rows
from ftnas.stats import seed_interval

ROWS = {
    "one": [seed_interval([0.5, 0.6, 0.7]), seed_interval([0.2])],
    "two": [seed_interval([0.9, 0.9, 0.9]), seed_interval([0.1, 0.3])],
}


def test_each_mark_lies_at_its_mean_and_each_bar_spans_its_interval():
    axes = dot_rows(ROWS, ["clean", "faulty"], title="t", chance=0.1).axes[0]
    lines = [line.get_xydata() for line in axes.lines]
    marks = sorted(round(float(xy[0][0]), 6) for xy in lines if len(xy) == 1)
    assert marks == [20.0, 20.0, 60.0, 90.0]
    bars = {tuple(round(float(x), 3) for x in xy[:, 0]) for xy in lines if len(xy) == 2}
    interval = ROWS["one"][0]
    assert (round(100 * interval.low, 3), round(100 * interval.high, 3)) in bars
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="no rows"):
        dot_rows({}, ["clean"])
    with pytest.raises(ValueError, match="2 values, and there are 1 conditions"):
        dot_rows(ROWS, ["clean"])


def test_the_axis_ends_where_accuracy_does():
    wide = {"few seeds": [seed_interval([0.1, 0.9])], "more": [seed_interval([0.5, 0.6, 0.7])]}
    assert dot_rows(wide, ["clean"]).axes[0].get_xlim() == (-1.5, 101.5)
    low, high = dot_rows({"more": wide["more"]}, ["clean"]).axes[0].get_xlim()
    assert 20 < low < 40 and 80 < high < 100
