import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from PIL import Image

from ftnas.layout import CHIP, CHIP_PITCH, edges, ends, half_width, plan_cell, spread
from ftnas.plots import PALETTE, Curve, accuracy_curves, draw_genotype, save, search_history

OPS = ("none", "skip", "avg_pool_3x3", "conv_1x1", "relu_conv_bn_5x5", "sep_conv_3x3", "dil_conv_3x3")
RATES = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def curve(name: str, shift: float = 0.0) -> Curve:
    mean = [0.97, 0.95 - shift, 0.9 - shift, 0.8 - shift, 0.5 - shift, 0.2]
    low = [math.nan, *(value - 0.02 for value in mean[1:])]
    high = [math.nan, *(value + 0.02 for value in mean[1:])]
    return Curve(name=name, rates=RATES, mean=mean, low=low, high=high)


def random_cell(random: np.random.Generator, inner: int = 4) -> dict[str, list[list[Any]]]:
    return {
        str(node): [[str(random.choice(OPS)), int(random.integers(node))] for _ in range(2)]
        for node in range(2, 2 + inner)
    }


def overlaps(texts: list[Text], figure: Figure) -> list[tuple[str, str]]:
    FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])]


def test_curves_show_percent_names_and_the_clean_device() -> None:
    names = ["found", "resnet20", "a_b $x$ <b>", "日本 \U0001f600", "vgg16", "m", "n"]
    figure = accuracy_curves([curve(name, 0.01 * i) for i, name in enumerate(names)], rate_label="bit rate", chance=0.1)
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"found", "resnet20", "a_b $x$ <b>", "chance"} <= set(texts)
    assert not overlaps(list(axes.texts), figure)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "0" and len(labels) == len(RATES)
    assert axes.get_xscale() == "log" and axes.get_xticks()[0] < RATES[1]
    low, high = axes.get_ylim()
    assert low < 10 and 97 < high <= 101.5
    lines = [line for line in axes.lines if list(line.get_xdata()) == list(RATES[1:])]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([95 - i for i in range(len(names))])
    assert len({line.get_color() for line in lines}) == len(names) == len({line.get_marker() for line in lines})
    for text in [*axes.texts, *axes.get_xticklabels()]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_curves_need_a_rate() -> None:
    with pytest.raises(ValueError, match="above 0"):
        accuracy_curves([Curve(name="a", rates=[0.0], mean=[0.9], low=[0.9], high=[0.9])])


def test_curves_of_one_rate_and_of_many() -> None:
    single = accuracy_curves([Curve(name="a", rates=[0.01], mean=[0.9], low=[math.nan], high=[math.nan])])
    FigureCanvasAgg(single).draw()
    many = [10 ** (-5 + i / 10) for i in range(40)]
    flat = [0.5] * 40
    figure = accuracy_curves([Curve(name="a", rates=many, mean=flat, low=flat, high=flat)])
    assert not overlaps(list(figure.axes[0].get_xticklabels()), figure)


@pytest.mark.parametrize(
    ("rates", "known", "barred"),
    [
        ([0.01], [0.01], [0.01]),  # there is nothing to shade between
        ([0.0, 0.01], [0.0, 0.01], [0.0, 0.01]),
        ([0.0, 0.01, 0.02], [0.01, 0.02], []),
        ([0.01, 0.02, 0.04, 0.08], [0.01, 0.04, 0.08], [0.01]),  # its neighbour has no interval
        ([0.01, 0.02, 0.04], [0.02], [0.02]),
    ],
)
def test_an_interval_that_no_band_shows_has_an_error_bar(
    rates: list[float], known: list[float], barred: list[float]
) -> None:
    low, high = ([0.5 + side if rate in known else math.nan for rate in rates] for side in (-0.2, 0.3))
    curves = [Curve(name=name, rates=rates, mean=[0.5] * len(rates), low=low, high=high) for name in "ab"]
    axes = accuracy_curves(curves).axes[0]
    FigureCanvasAgg(axes.get_figure()).draw()
    for bars in (found for found in axes.collections if isinstance(found, LineCollection)):
        ends = np.array(bars.get_segments()).reshape(-1, 2, 2)
        assert [x if x in rates else 0.0 for x in ends[:, 0, 0]] == barred
        assert ends[..., 1] == pytest.approx(np.full((len(barred), 2), [30, 80]))
    assert len(axes.containers) == len(curves)


def test_palette_differs_in_lightness_or_hue_for_dichromats() -> None:
    # Machado et al. (2009), "A physiologically-based model for simulation of color vision deficiency", severity 1.
    matrices = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    colors = np.array([matplotlib.colors.to_rgb(color) for color in PALETTE])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for matrix in matrices.values():
        seen = (linear @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2)
        gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
        assert min(gaps) > 0.12


@pytest.mark.parametrize("seed", range(3))
def test_cells_labels_never_meet(seed: int) -> None:
    random = np.random.default_rng(seed)
    genotype = {"name": "x $y", "normal": random_cell(random), "reduce": random_cell(random)}
    figure = draw_genotype(genotype)
    for axes, name in zip(figure.axes, ("normal", "reduce"), strict=True):
        labels = [text.get_text() for text in axes.texts]
        assert sorted(label for label in labels if label in OPS) == sorted(
            op for n in genotype[name].values() for op, _ in n
        )
        assert {"2", "3", "4", "5", "out", "$c_{k-2}$", "$c_{k-1}$"} <= set(labels)
        assert not overlaps(list(axes.texts), figure)
        boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
        assert len(boxes) == 8 + 7
        inside = axes.get_window_extent()
        for a, b in itertools.combinations(boxes, 2):
            assert not a.get_window_extent().padded(-1).overlaps(b.get_window_extent().padded(-1))
        for box in boxes:
            extent = box.get_window_extent()
            assert inside.x0 <= extent.x0 and extent.x1 <= inside.x1
            assert inside.y0 <= extent.y0 and extent.y1 <= inside.y1
        for text in axes.texts:
            if text.get_text() in OPS:
                chip = min(boxes, key=lambda box: abs(box.get_window_extent().x0 - text.get_window_extent().x0))
                assert text.get_window_extent().width < chip.get_window_extent().width


@pytest.mark.parametrize("inner", [1, 2, 4, 6])
def test_plan_runs_left_to_right(inner: int) -> None:
    cell = random_cell(np.random.default_rng(inner), inner)
    plan = plan_cell(cell)
    assert set(plan) == {-1, 0, 1, *range(2, 2 + inner)}
    assert plan == plan_cell(cell)
    for edge in edges(cell):
        (x0, y0), (x1, y1) = ends(plan, cell, edge)
        assert x0 == pytest.approx(plan[edge.source][0] + half_width(edge.source)) and y0 == plan[edge.source][1]
        assert x0 < x1 and x1 + CHIP < plan[edge.node][0] - half_width(edge.node)
        assert abs(y1 - plan[edge.node][1]) <= CHIP_PITCH
    assert all(plan[-1][0] > x for node, (x, _) in plan.items() if node != -1)


@pytest.mark.parametrize("far", [0, 1])
def test_edges_pass_beside_the_labels_of_other_nodes(far: int) -> None:
    cell = {"2": [["max_pool_3x3", 0], ["max_pool_3x3", 1]], "3": [["conv_1x1", far], ["conv_1x1", 2]]}
    (axes,) = draw_genotype({"normal": cell}).axes
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    drawn = [patch for patch in axes.patches if not isinstance(patch, FancyBboxPatch)]
    for patch in drawn[2:]:  # the first two lead to the output
        path = patch.get_transform().transform_path(patch.get_path()).interpolated(1)
        points = np.concatenate([part for part in path.to_polygons(closed_only=False)])[1:-1]
        start, end = points[0], points[-1]
        for box in boxes:
            at_an_end = any(box.padded(4).contains(*point) for point in (start, end))
            assert at_an_end or not any(box.contains(*point) for point in points)


def test_genotype_without_cells() -> None:
    with pytest.raises(ValueError, match="cells named normal and reduce"):
        draw_genotype({"name": "x"})


@pytest.mark.parametrize(
    ("heights", "gap", "expected"),
    [
        ([], 0.1, []),
        ([0.2, 0.8], 0.1, [0.2, 0.8]),
        ([0.5, 0.5], 0.1, [0.45, 0.55]),
        ([0.0, 0.0, 0.0], 0.1, [0.0, 0.1, 0.2]),
        ([0.1, 1.0, 1.0], 0.2, [0.1, 0.8, 1.0]),
        ([0.3, 0.32, 0.5], 0.1, [0.26, 0.36, 0.5]),
    ],
)
def test_spread(heights: list[float], gap: float, expected: list[float]) -> None:
    assert spread(heights, gap=gap) == pytest.approx(expected)


def test_search_history_averages_steps() -> None:
    trials = [{"update": u, "reward": r} for u in range(40) for r in (0.01 * u, 0.01 * u + 0.2)]
    trials.append({"update": 40, "reward": None})
    figure = search_history(trials, updates=[{"update": u, "entropy": 1 - u / 40} for u in range(40)])
    upper, lower = figure.axes
    average = upper.lines[1].get_ydata()
    step = np.arange(40)
    expected = [0.1 + 0.01 * np.mean([u, max(0, u - 1)]) for u in step]  # the last two steps
    assert average == pytest.approx(expected)
    assert lower.lines[0].get_ydata() == pytest.approx(1 - step / 40)
    assert len(search_history(trials).axes) == 1
    with pytest.raises(ValueError, match="with a reward"):
        search_history([{"reward": None}])


def test_save_is_deterministic_and_changes_no_settings(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    random = np.random.default_rng(0)
    genotype = {"normal": random_cell(random), "reduce": random_cell(random)}
    for folder in ("a", "b"):
        files = save(draw_genotype(genotype), tmp_path / folder / "cells.v1")
    assert [path.name for path in files] == ["cells.v1.png", "cells.v1.svg"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    assert "<dc:date>" not in files[1].read_text()
    assert dict(matplotlib.rcParams) == before
    with Image.open(files[0]) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 10
