"""Which layers are worth their cost within a budget: what is predicted of sets of them, and which sets to measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

ROUNDING = 1e-9
"""Difference of two accuracies that the rounding of their means can make."""
_GONE = 7.0
"""Decay of an accuracy of which 0.1% or less is left above chance."""
_SLACK = 1e-9
"""Share of a budget by which sums of costs may be above it, by rounding."""
_MOST_SETS = 2_000


def decay(accuracy: float, *, clean: float, chance: float) -> float:
    """Return -log of the share of the accuracy above chance that is left, >= 0; at most `_GONE`."""
    if clean <= chance or clean - accuracy < ROUNDING:
        return 0.0
    return max(0.0, -math.log(max(math.exp(-_GONE), (accuracy - chance) / (clean - chance))))


Foresee = Callable[[Sequence[str]], float]  # the accuracy with some layers protected


def sets_to_try(
    decays: Mapping[str, float], costs: Mapping[str, float], budget: float, foresee: Foresee, target: float | None
) -> list[tuple[str, ...]]:
    """Return the sets of layers to measure, from none, the cheapest first.

    On the way to the target (without one: to the budget), layers by decay per cost, as `steps_of` says. Besides, of all
    sets the cheapest that is predicted to reach the target, the best that the budget allows, and that one with the
    layers that do nothing alone, as many of them as the budget has left.

    Args:
        decays: What faults in a layer alone do, as `decay` measures it.
        costs: What protecting the layer costs, > 0, in the unit of the budget.
        budget: Largest sum of costs.
        foresee: Predicts the accuracy of a set.
        target: Accuracy to keep.
    """
    order = chosen_order(decays, costs, budget)
    prefixes = [tuple(order[:size]) for size in range(1, len(order) + 1)]
    sizes = steps_of([foresee(names) for names in prefixes], target)
    best = best_sets(decays, costs, budget)
    found = [(), *(prefixes[size - 1] for size in sizes), best[-1]]
    found += next(([names] for names in best if target is not None and foresee(names) >= target), [])
    left = budget - sum(costs[name] for name in best[-1])
    filled = [*best[-1]]
    for name in sorted((layer for layer in decays if decays[layer] == 0.0), key=lambda layer: (costs[layer], layer)):
        if costs[name] <= left + budget * _SLACK:
            filled.append(name)
            left -= costs[name]
    unique = {frozenset(names): names for names in reversed([*found, tuple(filled)])}
    return sorted(unique.values(), key=lambda names: (sum(costs[name] for name in names), len(names)))


def chosen_order(decays: Mapping[str, float], costs: Mapping[str, float], budget: float) -> list[str]:
    """Return layers by decay per cost, the best first, each that still fits into the budget; none without a decay."""
    order: list[str] = []
    left = budget
    for name in _by_worth(decays, costs):
        if costs[name] <= left + budget * _SLACK:
            order.append(name)
            left -= costs[name]
    return order


def best_sets(decays: Mapping[str, float], costs: Mapping[str, float], budget: float) -> list[tuple[str, ...]]:
    """Return the sets of layers within a budget that no cheaper set matches in their sum of decays, cheapest first.

    All of them, as long as there are no more than `_MOST_SETS`; then the best in each of as many steps of the budget.
    """
    names = _by_worth(decays, costs)
    sets = [(0.0, 0.0, 0)]  # cost, gain, bits of the layers
    for place, name in enumerate(names):
        more = [(cost + costs[name], gain + decays[name], bits | 1 << place) for cost, gain, bits in sets]
        both = sorted(
            sets + [one for one in more if one[0] <= budget * (1 + _SLACK)], key=lambda one: (one[0], -one[1])
        )
        sets = []
        for one in both:
            if not sets or one[1] > sets[-1][1]:
                sets.append(one)
        if len(sets) > _MOST_SETS:  # of each step the dearest, which gains most
            sets = list({int(_MOST_SETS * one[0] / budget): one for one in sets}.values())
    return [tuple(name for place, name in enumerate(names) if bits >> place & 1) for _, _, bits in sets]


def _by_worth(decays: Mapping[str, float], costs: Mapping[str, float]) -> list[str]:
    worth = (layer for layer in decays if decays[layer] > 0.0)
    return sorted(worth, key=lambda layer: (-decays[layer] / costs[layer], layer))


def predict(
    protected: Sequence[str], decays: Mapping[str, float], *, clean: float, unprotected: float, chance: float
) -> float:
    """Return the accuracy that protecting some layers should give, if every layer takes its share of what is left.

    chance + (clean - chance) * exp(-k * sum of the other layers' decays), with k such that protecting nothing gives
    what was measured without protection.
    """
    total = sum(decays.values())
    if total == 0.0:
        return unprotected
    rest = sum(value for layer, value in decays.items() if layer not in set(protected))
    whole = decay(unprotected, clean=clean, chance=chance)
    return chance + (clean - chance) * math.exp(-whole * rest / total)


def steps_of(predicted: Sequence[float], target: float | None) -> list[int]:
    """Return which protections to measure, as numbers of layers, the cheapest first.

    Up to three on the way to the first that is predicted to reach the target (without one: to all), that one, and
    then one layer more at a time.

    Args:
        predicted: Accuracy with the first 1, 2, ... layers of the order protected.
        target: Accuracy to keep.
    """
    sizes = range(1, len(predicted) + 1)
    first = next((n for n in sizes if target is not None and predicted[n - 1] >= target), len(predicted))
    on_the_way = {max(1, round(first * share)) for share in (0.25, 0.5, 0.75)}
    return [n for n in sizes if n >= first or n in on_the_way]
