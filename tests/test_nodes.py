"""Networks split over physical nodes: maps, hyperconnections, modes, failout, exact averages."""

import pytest
import torch
from torch import nn

from ftnas import baselines, rng
from ftnas.nodes import Failout, Node, Partition, Skip, SplitNetwork, Weighting, average, evaluate, patterns
from ftnas.nodes.exact import HEALTH_RATES, probability
from ftnas.nodes.matching import Match

CHAIN = (Node(name="a", blocks=(0,), to="b"), Node(name="b", blocks=(1,), to="c"), Node(name="c", blocks=(2,)))
SKIPS = (Skip(source="input", to="b"), Skip(source="a", to="c"))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, values):
        return values * self.factor


def split(mode, *, skips=SKIPS, weights=None):
    blocks = nn.Sequential(Times(2.0), Times(3.0), Times(5.0))
    partition = Partition(nodes=CHAIN, skips=skips)
    return SplitNetwork(blocks, partition=partition, shape=(1,), mode=mode, weights=weights)


# x = 1. Chain: a = 2x, b = 3(in), c = 5(in); skips input -> b and a -> c.
EXPECTED = {
    "vanilla": {(): 30.0, ("a",): None, ("b",): None, ("a", "b"): None, ("c",): None},
    # b = 3(2 + 1) = 9, c = 5(9 + 2); a down: b = 3, c = 15; b down: c = 5 * 2
    "dfg": {(): 55.0, ("a",): 15.0, ("b",): 10.0, ("a", "b"): None, ("c",): None},
    "on_failure": {(): 30.0, ("a",): 15.0, ("b",): 10.0, ("a", "b"): None, ("c",): None},
    "resilinet": {(): 30.0, ("a",): 15.0, ("b",): 10.0, ("a", "b"): None, ("c",): None},
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_answers_by_hand(mode):
    network = split(mode).eval()
    for down, value in EXPECTED[mode].items():
        answer = network(torch.ones(1, 1), down)
        assert network.carries(down) == (value is not None)
        assert (None if answer is None else answer.item()) == value


def test_resilinet_trains_with_all_skips():
    assert split("resilinet").train()(torch.ones(1, 1)).item() == 55.0
    assert split("on_failure").train()(torch.ones(1, 1)).item() == 30.0


def test_weights_scale_each_hyperconnection():
    # input->a, a->b, b->c, input->b, a->c: a = 2 * .5 = 1, b = 3(1 * 1 + 4) = 15, c = 5(15 * 2 + 1 * 3)
    assert split("dfg", weights=[0.5, 1.0, 2.0, 4.0, 3.0])(torch.ones(1, 1)).item() == 165.0


def test_a_tree_adds_its_children_and_survives_one():
    nodes = (Node(name="a", blocks=(0,), to="c"), Node(name="b", blocks=(1,), to="c"), Node(name="c", blocks=(2,)))
    network = SplitNetwork(
        nn.Sequential(Times(2.0), Times(3.0), Times(5.0)), partition=Partition(nodes=nodes), shape=(1,), mode="vanilla"
    ).eval()
    answers = [network(torch.ones(1, 1), down) for down in [(), ("a",), ("b",), ("a", "b")]]
    assert [None if a is None else a.item() for a in answers] == [25.0, 15.0, 10.0, None]


def test_without_failures_the_split_network_is_the_model():
    model = baselines.create("mobilenet_v1", num_classes=10, width=0.25).eval()
    parts = [block for child in model for block in (child if isinstance(child, nn.Sequential) else [child])]
    nodes = (
        Node(name="m1", blocks=tuple(range(4)), to="m2"),
        Node(name="m2", blocks=tuple(range(4, 9)), to="m3"),
        Node(name="m3", blocks=tuple(range(9, len(parts)))),
    )
    skips = (Skip(source="input", to="m2"), Skip(source="m1", to="m3"))
    network = SplitNetwork(
        nn.Sequential(*parts), partition=Partition(nodes=nodes, skips=skips), shape=(3, 32, 32)
    ).eval()
    images = torch.randn(2, 3, 32, 32, generator=rng.generator(0, "images"))
    assert torch.equal(network(images), model(images))
    assert network(images, ("m1",)).shape == network(images, ("m2",)).shape == (2, 10)


def test_matching_by_zero_padding_and_projection():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    padded = Match((1, 4, 4), (3, 2, 2), matching="zero_padding")(maps)
    assert padded[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert padded[0, 1:].abs().sum() == 0
    assert Match((2,), (4,), matching="zero_padding")(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 2.0, 0.0, 0.0]]
    project = Match((1, 4, 4), (3, 2, 2), matching="projection")
    kernel = project.project.weight.view(3, 1, 1)
    torch.testing.assert_close(project(maps)[0], kernel * maps[0, :, ::2, ::2])
    assert Match((1, 4, 4), (7,), matching="projection")(maps).shape == (1, 7)


def test_failout_hits_only_what_is_bypassed_at_its_rate():
    partition = Partition(nodes=CHAIN, skips=(Skip(source="input", to="b"),))
    generator = rng.generator(0, "failout")
    draws = [Failout(rate=0.3).sample(partition, generator=generator) for _ in range(4000)]
    assert set().union(*draws) == {"a"}
    # Hoeffding: P(|mean - 0.3| > 0.0426) <= 2 exp(-2 * 4000 * 0.0426^2) < 1e-6
    assert abs(sum("a" in down for down in draws) / 4000 - 0.3) < 0.0426


def test_weight_schemes_by_hand():
    links = Partition(nodes=CHAIN, skips=SKIPS).links()
    rates = {"a": 0.2, "b": 0.5, "c": 0.0}
    given = {"failure_rates": rates, "seed": 0}
    assert Weighting(scheme="reliability").weights(links, **given) == [1.0, 0.8, 0.5, 1.0, 0.8]
    relative = Weighting(scheme="relative").weights(links, **given)
    assert relative == pytest.approx([1.0, 0.8 / 1.8, 0.5 / 1.3, 1 / 1.8, 0.8 / 1.3])
    uniform = Weighting(scheme="uniform", high=10.0).weights(links, **given)
    assert all(0 <= value <= 10 for value in uniform) and max(uniform) > 1
    assert uniform == Weighting(scheme="uniform", high=10.0).weights(links, **given)


def test_exact_average_by_hand():
    # One-hot inputs: with every node up, every answer is right; the labels of the two images are 0 and 1.
    nodes = tuple(Node(name=n, blocks=(i,), to=t) for i, (n, t) in enumerate([("a", "b"), ("b", "c"), ("c", None)]))
    network = SplitNetwork(
        nn.Sequential(Times(1.0), Times(-1.0), Times(-1.0)), partition=Partition(nodes=nodes, skips=SKIPS), shape=(2,)
    )
    results = evaluate(network, [(torch.eye(2), torch.tensor([0, 1]))], num_classes=2)
    found = {result.down: result.accuracy for result in results}
    # b down: one minus is lost, every answer is wrong; a and b down, or c down: a guess between two classes
    assert found[()] == found[("a",)] == 1.0 and found[("b",)] == 0.0 and found[("a", "b")] == 0.5
    assert len(found) == 8 and all(found[down] == 0.5 for down in found if "c" in down)
    value = average(results, failure_rates={"a": 0.1, "b": 0.2, "c": 0.0})
    assert value == pytest.approx(0.9 * 0.8 + 0.1 * 0.8 + 0.1 * 0.2 * 0.5)


def test_probabilities_sum_to_one_and_agree_with_the_paper():
    names = ("n1", "n2", "n3", "n4")
    nodes = tuple(Node(name=n, blocks=(i,), to=names[i + 1] if i < 3 else None) for i, n in enumerate(names))
    rates = dict(zip(names, HEALTH_RATES["normal"], strict=True))
    chances = {down: probability(down, failure_rates=rates) for down in patterns(Partition(nodes=nodes))}
    assert sum(chances.values()) == pytest.approx(1.0, abs=1e-12)
    # Table 2, in percent as printed; its row for n1 says 7.01, with which the column sums to 99.4, not to 100.
    printed = {(): 87.43, ("n2",): 3.64, ("n3",): 0.88, ("n1", "n2"): 0.32, ("n1", "n3"): 0.08, ("n2", "n3"): 0.04}
    for down, percent in printed.items():
        assert 100 * chances[down] == pytest.approx(percent, abs=0.01)
    assert 100 * chances[("n1",)] == pytest.approx(7.6032)
    assert 100 * chances[("n1", "n2", "n3")] == pytest.approx(0.0032)


BAD = {
    "twice": ([("a", (0,), "b"), ("a", (1,), None)], [], "there twice"),
    "cycle": ([("a", (0,), "b"), ("b", (1,), "a")], [], "cycle"),
    "tops": ([("a", (0,), None), ("b", (1,), None)], [], "exactly one node is the top"),
    "unknown": ([("a", (0,), "x")], [], "unknown 'x'"),
    "empty": ([("a", (), None)], [], "no blocks"),
    "order": ([("a", (1,), "b"), ("b", (0,), None)], [], "from low blocks to high"),
    "idle skip": ([("a", (0,), "b"), ("b", (1,), None)], [("a", "b")], "bypasses no node"),
    "skip to input": ([("a", (0,), "b"), ("b", (1,), None)], [("a", "input")], "no node 'input'; there is: a, b"),
    "skip from nowhere": ([("a", (0,), "b"), ("b", (1,), None)], [("x", "b")], "no node 'x'; there is: a, b, input"),
    "skip twice": (
        [("a", (0,), "b"), ("b", (1,), "c"), ("c", (2,), None)],
        [("a", "c"), ("a", "c")],
        "a -> c is there twice",
    ),
    "self": ([("a", (0,), "a")], [], "cycle: a -> a"),
    "no nodes": ([], [], "exactly one node is the top"),
    "down skip": ([("a", (0,), "b"), ("b", (1,), None)], [("b", "a")], "bypasses no node"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_maps_are_one_line(case):
    nodes, skips, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Partition(
            nodes=tuple(Node(name=n, blocks=b, to=t) for n, b, t in nodes),
            skips=tuple(Skip(source=s, to=t) for s, t in skips),
        )


@pytest.mark.parametrize(
    ("blocks", "message"), [((0, 1), "on no node: \\[2\\]"), ((0, 1, 1, 2), "twice"), ((0, 1, 2, 3), "no blocks")]
)
def test_maps_that_do_not_cover_the_model(blocks, message):
    with pytest.raises(ValueError, match=message):
        Partition(nodes=(Node(name="a", blocks=blocks),)).check_covers(3)


def test_bad_rates():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Failout(rate=1.5)
    with pytest.raises(ValueError, match="no skip bypasses"):
        Failout(rates={"c": 0.5}).rates_of(Partition(nodes=CHAIN, skips=SKIPS))
