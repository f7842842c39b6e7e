import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ftnas.heatmaps import _COLORS, Protection, protection_curve, ranking, sensitivity_map
from ftnas.layout import free_place, meet, round_ticks, shorten
from ftnas.plots import save
from ftnas.stats import Interval

LONG = "features.stage3.block2.separable.depthwise.conv3x3.weight"


def interval(mean: float, half: float = math.nan) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, num=20, method="Student t")


def drawn(figure: Figure) -> list[Text]:
    """Draw it; return its texts, all of which must lie inside, be of at least 8 points, and overlap no other."""
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    inside = []
    for axes in figure.axes:  # ticks beyond the limits of an axis are there but not drawn
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
                if not low - 1e-9 <= tick <= high + 1e-9:
                    texts = [text for text in texts if text is not label]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
        assert text.get_fontsize() >= 8
        inside.append((text.get_text(), box))
    assert not [(a[0], b[0]) for a, b in itertools.combinations(inside, 2) if a[1].overlaps(b[1])]
    return texts


def words(figure: Figure) -> set[str]:
    return {text.get_text().strip() for text in drawn(figure)}


def luminance(color: object) -> float:
    """Relative luminance of WCAG 2.2."""
    rgb = np.array(to_rgb(color))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


# Heat maps


def test_map_writes_its_values_and_hatches_what_is_missing() -> None:
    values = [[0.6, 0.0, 3e-5], [math.nan, 0.0123, 0.25]]
    figure = sensitivity_map(["conv1", LONG], ["7", "6", "0"], values, title="By layer", value_label="SDC $p_1$")
    shown = words(figure)
    assert {"0.60", "0", "3e-5", "0.012", "0.25", "By layer", "SDC $p_1$", "hatched: not measured"} <= shown
    assert {"conv1", shorten(LONG, longest=36), "7", "6"} <= shown
    hatched = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert [patch.get_xy() for patch in hatched] == [(0, 1)] and hatched[0].get_hatch()
    mesh = figure.axes[0].collections[0]
    assert mesh.get_clim() == (0.0, 0.6)
    assert np.ma.getmaskarray(mesh.get_array()).ravel().tolist() == [False] * 3 + [True] + [False] * 2
    assert figure.axes[0].get_ylim() == (2, 0)  # the first row on top


@pytest.mark.parametrize(
    ("shape", "name"), [((1, 1), "c"), ((1, 32), LONG), ((18, 8), "c"), ((18, 8), LONG), ((60, 32), LONG)]
)
def test_maps_of_all_sizes_are_legible(shape: tuple[int, int], name: str) -> None:
    random = np.random.default_rng(0)
    rows = [f"{name}{i}" for i in range(shape[0])]
    columns = [f"bit {i}" if name == LONG else str(i) for i in range(shape[1])]
    figure = sensitivity_map(rows, columns, random.random(shape), title="A title that is long enough to be wide")
    texts = drawn(figure)
    written = [text for text in texts if text.axes is figure.axes[0] and text in figure.axes[0].texts]
    assert len(written) == (shape[0] * shape[1] if shape[0] * shape[1] <= 150 else 0)
    assert len(figure.axes[0].get_yticklabels()) == shape[0] and len(figure.axes[0].get_xticklabels()) == shape[1]
    assert "hatched: not measured" not in {text.get_text() for text in texts}


def test_limits_of_the_colours() -> None:
    names = ["a", "b"]
    limits = [
        sensitivity_map(["x"], names, [values], limits=given).axes[0].collections[0].get_clim()
        for values, given in (([0.2, 0.8], None), ([-0.1, 0.8], None), ([0.0, 0.0], None), ([0.2, 0.8], (0.5, 0.6)))
    ]
    assert limits == [(0.0, 0.8), (-0.1, 0.8), (0.0, 1.0), (0.5, 0.6)]


def test_colours_darken_evenly_and_values_stand_out() -> None:
    ramp = [luminance(_COLORS(i / 255)) for i in range(256)]
    lightness = 116 * np.cbrt(np.array(ramp).clip(0.008856)) - 16  # CIE L*
    assert (np.diff(ramp) <= 0).all()
    steps = -np.diff(lightness[::16])
    assert steps.min() > 0.5 * steps.mean() and steps.max() < 1.5 * steps.mean()
    values = np.linspace(0, 1, 100)[None]
    figure = sensitivity_map(["x"], [str(i) for i in range(100)], values)
    for text, value in zip(figure.axes[0].texts, values[0], strict=True):
        pair = sorted([luminance(text.get_color()), luminance(_COLORS(value))])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) > 3.6  # WCAG asks 3 of large text and 4.5 of small


# Rankings


def test_ranking_is_sorted_and_counts_the_rest() -> None:
    names = [f"layer{i}" for i in range(9)]
    means = [0.3, 0.1, 0.9, 0.2, 0.8, 0.05, 0.7, 0.01, 0.6]
    figure = ranking(names, [interval(m, 0.04) for m in means], title="Layers", value_label="SDC", top=4)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer2", "layer4", "layer6", "layer8"]
    assert {"and 5 more below, at most 0.30", "0.900 [0.860, 0.940]", "SDC", "Layers"} <= words(figure)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the largest on top
    assert axes.lines[0].get_xdata() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    ends = axes.collections[0].get_segments()
    assert [end[0][0] for end in ends] == pytest.approx([0.86, 0.76, 0.66, 0.56])
    assert [end[1][0] for end in ends] == pytest.approx([0.94, 0.84, 0.74, 0.64])


@pytest.mark.parametrize(("count", "half"), [(1, math.nan), (1, 0.0), (2, 1e-7), (30, 0.3), (44, 0.3), (44, 0.0)])
def test_rankings_of_all_sizes_are_legible(count: int, half: float) -> None:
    names = [f"{LONG}{i}" for i in range(count)]
    means = np.linspace(0.001, 0.95, count)
    figure = ranking(names, [interval(m, half) for m in means], title="t", value_label="accuracy drop", top=30)
    shown = words(figure)
    assert ("and 14 more below, at most 0.29" in shown) == (count == 44)
    assert len(figure.axes[0].get_yticklabels()) == min(count, 30)


# Accuracy over overhead


PLANS = [
    Protection(name="none", overhead=0, accuracy=interval(0.61, 0.03)),
    Protection(name="first layer", overhead=4, accuracy=interval(0.74, 0.02)),
    Protection(name="3 layers", overhead=11, accuracy=interval(0.845, 0.012)),
    Protection(name="5 layers", overhead=19, accuracy=interval(0.902, 0.008), chosen=True),
    Protection(name="all", overhead=200, accuracy=interval(0.921, 0.004)),
]
GUESSES = [
    Protection(name=f"plan {i}", overhead=x, accuracy=interval(0.6 + 0.004 * x)) for i, x in enumerate((2, 9, 70))
]


def test_protection_curve_tells_measured_from_predicted() -> None:
    figure = protection_curve(PLANS[::-1], predicted=GUESSES, target=0.9, title="Cost", overhead_label="extra MACs (%)")
    shown = words(figure)
    assert {"Cost", "extra MACs (%)", "accuracy (%)"} <= shown
    assert {"measured, 95% interval", "predicted", "chosen", "target 90%"} <= shown
    assert {"none", "first layer", "3 layers", "5 layers", "all"} <= shown
    axes = figure.axes[0]
    lines = {tuple(line.get_xdata()): line for line in axes.lines if line.get_marker() == "o"}
    measured, guessed, chosen = lines[0, 4, 11, 19, 200], lines[2, 9, 70], lines[19,]
    assert measured.get_ydata() == pytest.approx([61, 74, 84.5, 90.2, 92.1])
    assert measured.get_markerfacecolor() != guessed.get_markerfacecolor() == "#ffffff"
    assert chosen.get_ydata() == pytest.approx([90.2]) and chosen.get_markerfacecolor() == "none"
    segments = axes.collections[0].get_segments()
    assert [segment[:, 1].tolist() for segment in segments][0] == pytest.approx([58, 64])
    low, high = axes.get_ylim()
    assert low < 58 and 92.5 < high <= 101.5


@pytest.mark.parametrize(
    ("points", "predicted", "target"),
    [(PLANS[:1], None, None), ([], GUESSES, 0.99), (PLANS[:2], [], 0.2), (PLANS * 4, GUESSES * 4, 0.9)],
)
def test_protection_curves_are_legible(points: list, predicted: list | None, target: float | None) -> None:
    figure = protection_curve(points, predicted=predicted, target=target, title="A title " * 12)
    shown = words(figure)
    assert ("predicted" in shown) == bool(predicted)
    assert any(text.startswith("measured") for text in shown) == bool(points)
    assert any(text.startswith("target") for text in shown) == (target is not None)


def test_axes_of_protection_end_where_accuracy_and_overhead_do() -> None:
    axes = protection_curve([Protection(name="0 layers", overhead=0, accuracy=interval(0.4, 1.3))], target=0.9).axes[0]
    assert axes.get_ylim() == (-1.5, 101.5)
    low, high = axes.get_xlim()
    assert -0.1 < low < 0 and high > 1 and not [tick for tick in axes.get_xticks() if low <= tick < 0]
    narrow = protection_curve([Protection(name="", overhead=5, accuracy=interval(0.5, 0.1))]).axes[0]
    assert narrow.get_ylim() == pytest.approx((38.2, 61.8)) and narrow.get_xlim() == pytest.approx((4.65, 5.35))


# Geometry


def test_a_name_finds_a_free_place() -> None:
    page, size = (0.0, 0.0, 4.0, 4.0), (1.0, 0.2)
    right = free_place((2.0, 2.0), size=size, inside=page, taken=[])
    assert right == pytest.approx((2.13, 1.9, 3.13, 2.1))
    left = free_place((2.0, 2.0), size=size, inside=page, taken=[right])
    assert left == pytest.approx((0.87, 1.9, 1.87, 2.1))
    assert free_place((3.5, 2.0), size=size, inside=page, taken=[])[2] < 3.5  # it would leave the page at the right
    assert free_place((2.0, 2.0), size=size, inside=page, taken=[(0.0, 0.0, 4.0, 4.0)]) is None
    assert not meet((0, 0, 1, 1), (1, 0, 2, 1)) and meet((0, 0, 1, 1), (0.9, 0.9, 2, 2))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.6), (-3, 45), (1e-9, 9e-9), (0.123, 0.124), (0, 23.7)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    ticks = round_ticks(low, high=high)
    assert 3 <= len(ticks) <= 7 and low - 1e-12 <= ticks[0] and ticks[-1] <= high + 1e-12
    step = ticks[1] - ticks[0]
    assert np.diff(ticks) == pytest.approx(step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-6), 6) in (1, 2, 5)


def test_long_names_lose_their_middle() -> None:
    assert shorten("conv1", longest=5) == "conv1"
    assert shorten("abcdefgh", longest=6) == "abc…gh"


# All


def test_pictures_are_saved_the_same_each_time(tmp_path: Path) -> None:
    figures = [
        lambda: sensitivity_map(["a"], ["b", "c"], [[0.1, math.nan]]),
        lambda: ranking(["a"], [interval(0.1, 0.02)]),
        lambda: protection_curve(PLANS, predicted=GUESSES, target=0.9),
    ]
    for make in figures:
        first, again = (save(make(), tmp_path / name) for name in ("first", "again"))
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sensitivity_map(["a"], ["b"], [[1.0, 2.0]]), "[1, 1], got [1, 2]"),
        (lambda: sensitivity_map([], [], np.zeros((0, 0))), "[0, 0], got [0, 0]"),
        (lambda: sensitivity_map(["a"], ["b"], [[math.nan]]), "at least one value"),
        (lambda: sensitivity_map(["a"], ["b"], [[math.inf]]), "infinite"),
        (lambda: sensitivity_map(["a"], ["b"], [[1.0]], limits=(1.0, 1.0)), "low < high, got 1.0 and 1.0"),
        (lambda: ranking([], []), "got 0 names and 0 intervals"),
        (lambda: ranking(["a"], []), "got 1 names and 0 intervals"),
        (lambda: ranking(["a"], [interval(math.nan)]), "a: a ranking needs finite means, got nan"),
        (lambda: ranking(["a"], [interval(0.1)], top=0), "top must be at least 1, got 0"),
        (lambda: protection_curve([]), "at least one plan"),
        (lambda: protection_curve([Protection(name="x", overhead=math.inf, accuracy=interval(0.5))]), "plan x"),
    ],
)
def test_mistakes_get_one_line(call, message) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
