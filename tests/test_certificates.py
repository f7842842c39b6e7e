"""The largest failure distributions within a budget."""

import itertools

import pytest
import torch

from ftnas.bounds import Cost, even, largest, tolerances
from ftnas.bounds import search as searching
from ftnas.rng import generator


def random_costs(sizes, *, rows=3, seed=0, times=1):
    """Sums of effects that fall off, one list for each row and layer."""
    draws = generator(seed, "costs")
    made = []
    for number, size in enumerate(sizes):
        effects = (
            torch.rand(rows, size, generator=draws, dtype=torch.float64).pow(3).sort(dim=1, descending=True).values
        )
        sums = torch.cat([torch.zeros(rows, 1, dtype=torch.float64), effects.cumsum(1)], dim=1)
        made.append(Cost(f"layer{number}", sums, times))
    return made


def naive(costs, budgets):
    """Return the most failures of all distributions, by a loop over all of them."""
    best = 0
    for counts in itertools.product(*(range(cost.components + 1) for cost in costs)):
        used = sum(cost.at(torch.tensor([n]))[:, 0] for cost, n in zip(costs, counts, strict=True))
        if (used <= budgets).all():
            best = max(best, sum(counts))
    return best


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_exact_and_greedy_is_within_its_gap(seed, times, monkeypatch):
    costs = random_costs((5, 3, 6), seed=seed, times=times)
    budgets = torch.tensor([0.4, 0.8, 1.6], dtype=torch.float64) * (1 + seed)
    found = largest(costs, budgets)
    assert found.exact and found.gap == 0
    assert sum(found.counts) == naive(costs, budgets)
    monkeypatch.setattr(searching, "MOST_TABLE", 0)
    greedy = largest(costs, budgets)
    assert sum(greedy.counts) <= sum(found.counts) <= greedy.at_most
    for counts in (found.counts, greedy.counts):
        used = sum(cost.at(torch.tensor([n]))[:, 0] for cost, n in zip(costs, counts, strict=True))
        assert (used <= budgets).all()


@pytest.mark.parametrize("times", [1, 3])
def test_a_cost_is_the_naive_sum_of_the_largest_effects(times):
    (cost,) = random_costs((4,), times=times)
    effects = (cost.sums[:, 1:] - cost.sums[:, :-1]).repeat_interleave(times, dim=1)
    for count in range(4 * times + 1):
        torch.testing.assert_close(cost.at(torch.tensor([count]))[:, 0], effects[:, :count].sum(1))
    budgets = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    alone = max(n for n in range(4 * times + 1) if (effects[:, :n].sum(1) <= budgets).all())
    assert cost.tolerance(budgets) == alone


def test_even_shares():
    costs, budgets = random_costs((40, 20)), torch.full((3,), 2.0, dtype=torch.float64)
    found = even(costs, budgets)
    assert found.counts[1] == found.counts[0] // 2

    def used(step):
        return sum(cost.at(torch.tensor([n]))[:, 0] for cost, n in zip(costs, (step, step // 2), strict=True))

    assert (used(found.counts[0]) <= budgets).all() and not (used(found.counts[0] + 1) <= budgets).all()


def test_no_budget_tolerates_what_costs_nothing_alone():
    costs = random_costs((3, 2))
    assert tolerances(costs, torch.zeros(3, dtype=torch.float64)) == [0, 0]
    assert largest(costs, torch.zeros(3, dtype=torch.float64)).counts == (0, 0)
    free = [Cost("free", torch.zeros(3, 5, dtype=torch.float64)), *costs]
    assert largest(free, torch.zeros(3, dtype=torch.float64)).counts == (4, 0, 0)
