"""Whether what the paper says of two networks holds in our records, as paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ftnas.records import Comparison
from ftnas.reproduction.study import Ordering, PublishedTable, Reference, Study, StudySweep, rates_at
from ftnas.stats import Interval, decisive, hierarchical_paired_difference, paired_difference, seed_difference

Verdict = Literal["holds", "reversed", "undecided", "not run"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison: ``better`` minus ``worse``, in accuracy (or in accuracy lost, the other way round).

    Attributes:
        better: Row that is said to be above.
        worse: Row that is said to be below.
        verdict: ``holds`` and ``reversed`` where every interval excludes zero; for a claim of no difference ``holds``
            never occurs: no difference that is seen is ``undecided``.
        interval: Paired over devices with one training seed a side, else the hierarchical bootstrap; None: not run.
        over_seeds: With several training seeds on either side: Welch's t over their means, whose bounds are NaN where
            the other has one, so that nothing is decided.
        published: The same difference in the published figures, where there are any.
    """

    better: str
    worse: str
    verdict: Verdict
    interval: Interval | None
    over_seeds: Interval | None
    published: float | None

    @property
    def shown(self) -> Interval | None:
        """The interval that tables give: over training seeds, unless the other alone includes zero."""
        if self.over_seeds is None or self.interval is None:
            return self.interval
        return decisive((self.over_seeds, self.interval))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A claim with its comparisons."""

    ordering: Ordering
    pairs: tuple[Pair, ...]

    @property
    def verdict(self) -> Verdict:
        """``holds`` where all comparisons do, ``reversed`` where one is, ``not run`` where one was not."""
        verdicts = [pair.verdict for pair in self.pairs]
        worst: tuple[Verdict, ...] = ("not run", "reversed", "undecided")
        return next((verdict for verdict in worst if verdict in verdicts), "holds")


def check(study: Study, comparison: Comparison, *, scale: str, published: Mapping[str, PublishedTable]) -> list[Result]:
    """Check every ordering of a study.

    Args:
        study: The study; the models of the comparison are called as its rows.
        comparison: What was measured, perhaps not yet of all rows.
        scale: ``small`` or ``full``.
        published: The published tables.
    """
    sweeps = {sweep.label: sweep for sweep in study.sweeps}
    references = {row.name: row.published for row in study.rows}
    results = []
    for ordering in study.orderings:
        sweep = sweeps[ordering.sweep or study.sweeps[0].label]
        table = published[sweep.published] if sweep.published is not None else None
        pairs = []
        for better, worse in ordering.pairs:
            rates = rates_at(sweep, scale, ordering.rates if ordering.rates is not None else sweep.rates)
            first, second = _scores(comparison, ordering, sweep, rates, (better, worse))
            sides = [_published(table, references[name], ordering, sweep) for name in (better, worse)]
            gap = None if sides[0] is None or sides[1] is None else sides[0] - sides[1]
            pairs.append(_pair(better, worse, first, second, same=ordering.measure == "same", published=gap))
        results.append(Result(ordering=ordering, pairs=tuple(pairs)))
    return results


def _scores(
    comparison: Comparison, ordering: Ordering, sweep: StudySweep, rates: Sequence[float], names: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Return what is compared of both rows, more is better, on the devices that both have; None if not there.

    Each is float64 [seed, device] or [seed, device, image].
    """
    loss = ordering.measure == "loss"
    # what a training loses is told by its own accuracy without faults
    seeds = {name: comparison.seeds(sweep.label, name, [*rates, 0.0]) if loss else None for name in names}
    found = [comparison.values(sweep.label, name, rates, seeds=seeds[name]) for name in names]
    common = set.intersection(*(set(values[1]) if values is not None else set() for values in found))
    sides = []
    for name in names:
        values = comparison.values(sweep.label, name, rates, devices=common, seeds=seeds[name]) if common else None
        clean = comparison.values(sweep.label, name, [0.0], seeds=seeds[name])
        if values is None or clean is None:
            return None, None
        # one device without faults, and many with
        sides.append(values[0] - clean[0] if loss else values[0])
    return sides[0], sides[1]


def _published(
    table: PublishedTable | None, reference: Reference | None, ordering: Ordering, sweep: StudySweep
) -> float | None:
    if table is None or reference is None:
        return None
    rates: Sequence[float] = ordering.rates if ordering.rates is not None else sweep.rates
    values = [table.accuracy(reference, rate) for rate in rates]
    if any(value is None for value in values):
        return None
    mean = float(np.mean([value for value in values if value is not None]))
    if ordering.measure != "loss":
        return mean
    clean = table.accuracy(reference, 0.0)
    return None if clean is None else mean - clean


def _pair(
    better: str,
    worse: str,
    first: np.ndarray | None,
    second: np.ndarray | None,
    *,
    same: bool,
    published: float | None,
) -> Pair:
    if first is None or second is None:
        return Pair(better=better, worse=worse, verdict="not run", interval=None, over_seeds=None, published=published)
    over_seeds = None
    if first.shape[1:] != second.shape[1:]:  # the images of one side were not kept
        first, second = (side.reshape(*side.shape[:2], -1).mean(axis=2) for side in (first, second))
    if len(first) == len(second) == 1:
        means = (side[0].reshape(side.shape[1], -1).mean(axis=1) for side in (first, second))
        interval = paired_difference(*means)
    else:
        interval = hierarchical_paired_difference(first, second)
        over_seeds = seed_difference(first, second)
    intervals = [interval] if over_seeds is None else [interval, over_seeds]
    sides = {found.side for found in intervals}
    verdict: Verdict = "holds" if sides == {1} else "reversed" if sides == {-1} else "undecided"
    if same and verdict != "undecided":  # two trainings differ by chance, whatever distinguishes them
        verdict = "undecided" if over_seeds is None else "reversed"
    return Pair(
        better=better, worse=worse, verdict=verdict, interval=interval, over_seeds=over_seeds, published=published
    )
