"""Bytes of hyperconnections, subsets of skips within a budget, and the search among them."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from test_nodes_study import SMALL, write
from torch import nn

from ftnas import rng
from ftnas.cli import cli
from ftnas.controllers import EvolutionConfig, RandomConfig, ReinforceConfig, create_controller
from ftnas.nodes import Failout, Node, Partition, Skip, SplitNetwork, searching
from ftnas.nodes.bandwidth import SkipSubsets, expected_bytes, link_bytes
from ftnas.nodes.searching import SharedFit, run_search
from ftnas.nodes.study import SkipSearch, Variant, open_study, read_nodes_config

SKIPS = tuple(Skip(source=s, to=t) for s, t in [("input", "b"), ("input", "c"), ("a", "c"), ("a", "d"), ("b", "d")])
COSTS = dict(zip(SKIPS, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True))


def total_of(subset):
    return sum(COSTS[skip] for skip in subset)


SPACE = SkipSubsets(SKIPS, cost=total_of, budget=8.0)
SEARCH = {
    "search": {"setting": "normal", "budget": 300, "failout": {"rate": 0.2}, "trials": 6, "exhaustive": True},
    "selection": {"share": 0.25, "setting": "normal"},
}


def chain(mode):
    nodes = (Node(name="a", blocks=(0,), to="b"), Node(name="b", blocks=(1,), to="c"), Node(name="c", blocks=(2,)))
    blocks = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 10), nn.Linear(10, 3))
    partition = Partition(nodes=nodes, skips=(Skip(source="input", to="b"), Skip(source="a", to="c")))
    return SplitNetwork(blocks, partition=partition, shape=(4,), mode=mode)


def test_bytes_by_hand():
    # input 4 values, a sends 6, b sends 10; a skip costs what its source sends
    assert list(link_bytes(chain("dfg")).values()) == [16, 24, 40, 16, 24]
    rates = {"a": 0.1, "b": 0.2, "c": 0.05}
    down_a, down_b, up_c = 0.1, 0.2, 0.95
    # input->a, a->b, b->c (b sends when it lives and a or the skip feeds it), input->b, a->c
    always = [16 * 0.9, 24 * 0.9 * 0.8, 40 * 0.8 * up_c, 16 * 0.8, 24 * 0.9 * up_c]
    assert list(expected_bytes(chain("dfg"), failure_rates=rates).values()) == pytest.approx(always)
    on_failure = [*always[:3], 16 * down_a * 0.8, 24 * down_b * 0.9 * up_c]
    for mode in ("on_failure", "resilinet"):
        network = chain(mode).train()
        assert list(expected_bytes(network, failure_rates=rates).values()) == pytest.approx(on_failure)
        assert network.training


def test_a_subset_costs_what_it_carries_itself():
    """Whether a skip's source has anything to send depends on the other skips that are kept."""
    nodes = [Node(name=f"n{i}", blocks=(i - 1,), to=f"n{i + 1}" if i < 4 else None) for i in range(1, 5)]
    first, second = Skip(source="input", to="n2"), Skip(source="n2", to="n4")
    partition = Partition(nodes=tuple(nodes), skips=(first, second))
    blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    network = SplitNetwork(blocks, partition=partition, shape=(4,), mode="on_failure").train()
    rates = {"n1": 0.4, "n2": 0.3, "n3": 0.3, "n4": 0.0}
    config = SimpleNamespace(rates={"poor": rates})
    search = SkipSearch(setting="poor", budget=10.0, counted="expected", failout=Failout(rate=0.1))
    space = searching.subsets(search, network, config)
    # 16 bytes: input -> n2 while n1 is down and n2 lives; n2 -> n4 while n3 is down, n2 lives and something feeds it
    assert space.cost((first,)) == pytest.approx(16 * 0.4 * 0.7)
    assert space.cost((second,)) == pytest.approx(16 * 0.3 * 0.7 * 0.6)
    assert space.cost((first, second)) == pytest.approx(16 * 0.4 * 0.7 + 16 * 0.3 * 0.7)
    assert len(space.all()) == 4 and space.cost(()) == 0.0
    assert network.training and network.absent == frozenset()
    reserved = searching.subsets(search.model_copy(update={"counted": "reserved", "budget": 16.0}), network, config)
    assert [reserved.cost(subset) for subset in reserved.all()] == [0, 16, 16]


def test_subsets_stay_within_the_budget_and_all_can_be_drawn():
    every = SPACE.all()
    # by hand: 2^5 subsets of the costs 1..5, those with a sum of at most 8
    assert len(every) == sum(sum(c for c in range(1, 6) if bits >> c & 1) <= 8 for bits in range(0, 64, 2))
    generator = rng.generator(0, "subsets")
    drawn = [SPACE.random(generator=generator) for _ in range(600)]
    children = [SPACE.mutate(subset, generator=generator) for subset in drawn]
    assert set(drawn) == set(every)
    for parent, child in zip(drawn, children, strict=True):
        SPACE.validate(parent)
        SPACE.validate(child)
        assert parent != child and SPACE.from_decisions(SPACE.to_decisions(child)) == child


@pytest.mark.parametrize("config", [RandomConfig(), EvolutionConfig(population_size=6, sample_size=3)])
def test_controllers_choose_subsets_and_go_on_from_a_state(config):
    first, second = (create_controller(config, SPACE, seed=3) for _ in range(2))
    told = []
    for _ in range(10):
        asked = first.ask(2)
        first.tell(asked, [SPACE.cost(subset) for subset in asked])
        told += asked
    second.load_state_dict(first.state_dict())
    assert first.ask(5) == second.ask(5)
    with pytest.raises(ValueError, match="above the budget"):
        first.tell([SKIPS], [1.0])
    with pytest.raises(ValueError, match="controller state: budget must be 9.0, got 8.0"):
        other = SkipSubsets(SKIPS, cost=total_of, budget=9.0)
        create_controller(config, other, seed=3).load_state_dict(first.state_dict())


def test_evolution_finds_what_enumeration_finds():
    worth = dict(zip(SKIPS, [3.0, 1.0, 5.0, 2.0, 4.0], strict=True))
    best = max(SPACE.all(), key=lambda subset: sum(worth[skip] for skip in subset))
    controller = create_controller(EvolutionConfig(population_size=8, sample_size=4), SPACE, seed=0)
    seen = []
    for _ in range(120):
        subset = controller.ask(1)[0]
        controller.tell([subset], [sum(worth[skip] for skip in subset)])
        seen.append(subset)
    assert best in seen


def test_reinforce_and_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="decides on cells only"):
        create_controller(ReinforceConfig(), SPACE, seed=0)
    with pytest.raises(ValueError, match="the cheapest skip costs 1 bytes"):
        SkipSubsets(SKIPS, cost=total_of, budget=0.5)
    for decisions in ([1, 0], [2, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="0 or 1 for each of 5"):
            SPACE.from_decisions(decisions)


def test_the_command_searches_and_trains_the_winner(tmp_path):
    path = write(tmp_path / "c.yaml", **SEARCH, seeds=2)
    result = CliRunner().invoke(cli, ["nodes", "search", path, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.exception
    # the input has 256 bytes, a sends 64: both skips take 320, so three subsets are within 300
    assert "| every subset | 3 |" in result.output and "trained by itself from 2 seeds" in result.output
    assert "All 2 skips would take 320 bytes per image." in result.output
    stage = tmp_path / "run" / "search"
    assert {"trials.json", "exhaustive.json", "winner.json", "search.md", "shared-0.pt"} <= {
        file.name for file in stage.iterdir()
    }
    again = CliRunner().invoke(cli, ["nodes", "search", path, "--out", str(tmp_path / "run")])
    assert again.stdout == result.stdout


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path, monkeypatch):
    config, whole = open_study(write(tmp_path / "c.yaml", **SEARCH, seeds=1, epochs=3), tmp_path / "whole")
    _, cut = open_study(tmp_path / "c.yaml", tmp_path / "cut")
    epoch = SharedFit._epoch

    def stop(fit):
        if fit.progress.epoch == 2:
            raise KeyboardInterrupt
        return epoch(fit)

    with whole, cut:
        text = run_search(config, whole)
        monkeypatch.setattr(SharedFit, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_search(config, cut, checkpoint_every_s=0.0)
        monkeypatch.setattr(SharedFit, "_epoch", epoch)
        assert run_search(config, cut) == text
        states = [run.stage("search").load("shared-0.pt")["state"] for run in (whole, cut)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_rates_of_single_nodes_count_while_a_skip_that_is_kept_bypasses_the_node(tmp_path):
    failout = Failout(rate=0.1, rates={"a": 1.0, "b": 1.0})
    partition, generator = chain("dfg").partition, rng.generator(0, "failout")
    for skip, node in zip(partition.skips, "ab", strict=True):  # input -> b bypasses a, a -> c bypasses b
        fewer = partition.with_skips([skip])
        assert failout.within(fewer) == Failout(rate=0.1, rates={node: 1.0})
        assert failout.within(fewer).sample(fewer, generator=generator) == {node}
    search = SEARCH["search"] | {"failout": {"rate": 0.1, "rates": {"a": 0.3, "b": 0.3}}, "trials": 3}
    path = write(tmp_path / "c.yaml", **SEARCH | {"search": search}, seeds=1)  # both skips together are too dear
    result = CliRunner().invoke(cli, ["nodes", "search", path, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.stderr
    assert "trained by itself from 1 seeds" in result.output


def test_no_skips_at_all_may_win(tmp_path, monkeypatch):
    config, run = open_study(write(tmp_path / "c.yaml", **SEARCH, seeds=1, epochs=1), tmp_path / "run")
    monkeypatch.setattr(searching, "choose", lambda search, space, scorer, *, seed: [scorer(())])
    with run:
        assert "trained by itself from 1 seeds" in run_search(config, run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"setting": "norml"}, "did you mean 'normal'"),
        ({"mode": "vanilla", "failout": None}, "has no skips to search"),
        ({"failout": None}, "needs failout"),
        ({"failout": {"rates": {"c": 0.3}}}, "failout.rates.c = 0.3 has no effect, no skip bypasses that node; set 0"),
        ({"controller": {"name": "reinforce"}}, "decides on cells only"),
        ({"budget": 0}, "greater than 0"),
    ],
)
def test_bad_searches_are_one_line(tmp_path, changed, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL | SEARCH | {"search": SEARCH["search"] | changed}))
    with pytest.raises(ValueError, match=message):
        read_nodes_config(path)


def test_a_search_needs_validation_samples_and_skips(tmp_path):
    with pytest.raises(ValueError, match="search needs skips"):
        read_nodes_config(write(tmp_path / "c.yaml", search=SEARCH["search"]))
    config, run = open_study(write(tmp_path / "d.yaml"), tmp_path / "run")
    with run, pytest.raises(ValueError, match="needs the section search"):
        run_search(config, run)
    assert Variant(mode="dfg").skips is None
