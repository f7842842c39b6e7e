"""A sweep of a study as a picture: accuracy over the rate, one curve a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftnas import plots
from ftnas.stats import Interval

Points = Mapping[str, Sequence[tuple[float, Interval]]]
"""By network, what was measured: rates, 0 for fault-free, and accuracies in [0, 1]."""


def stem(label: str) -> str:
    """Return the name of a sweep's files, without their endings."""
    return re.sub(r"[^a-z0-9-]+", "-", label.lower())


def worth_drawing(points: Points) -> bool:
    """Tell whether some network was measured at two faulty rates or more."""
    return any(sum(rate > 0 for rate, _ in found) > 1 for found in points.values())


def draw(points: Points, label: str, folder: Path) -> list[Path]:
    """Write a sweep's picture into a folder, as PNG and SVG; return the files."""
    curves = [
        plots.Curve(
            name=name,
            rates=[rate for rate, _ in found],
            mean=[interval.mean for _, interval in found],
            low=[interval.low for _, interval in found],
            high=[interval.high for _, interval in found],
        )
        for name, found in points.items()
        if any(rate > 0 for rate, _ in found)
    ]
    return plots.save(plots.accuracy_curves(curves, rate_label="rate", title=label), folder / stem(label))
