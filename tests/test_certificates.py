"""The largest failure distributions within a budget, and the certificates that say so."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from ftnas import baselines
from ftnas.bounds import (
    BoxOfInputs,
    Cost,
    Failures,
    certify,
    certify_samples,
    even,
    largest,
    margins,
    neuron_costs,
    of_samples,
    read_certificate,
    summarize,
    synapse_costs,
    tolerances,
    total,
    verify,
    write_certificate,
)
from ftnas.bounds import search as searching
from ftnas.bounds.certificate import Certificate, model_digest
from ftnas.bounds.margins import _costs
from ftnas.bounds.ops import Box
from ftnas.bounds.search import asked
from ftnas.rng import generator, isolated
from ftnas.settings import parse


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
    costs = random_costs((5, 3, 6) if times == 1 else (3, 1, 4), seed=seed, times=times)
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


def equal_costs(*layers):
    """Layers of n components that cost the same each, one number for each of two rows."""
    one = torch.tensor([effects for _, effects in layers], dtype=torch.float64)[:, :, None]
    return [Cost(f"{i}", one[i] * torch.arange(n + 1, dtype=torch.float64)) for i, (n, _) in enumerate(layers)]


def test_greedy_fills_from_every_first_layer(monkeypatch):
    """4 of the first layer leave no room; 2 of the second leave it for 1 of the first and 2 of the third."""
    monkeypatch.setattr(searching, "MOST_TABLE", 0)
    costs = equal_costs((4, (0.25, 0.25)), (2, (0.34, 0.0)), (2, (0.0, 0.34)))
    assert largest(costs, torch.ones(2, dtype=torch.float64)).counts == (1, 2, 2)


def test_the_gap_holds_the_best_distribution_where_greedy_misses_it(monkeypatch):
    """Two failures each in the second and the third layer; greedy fills the second one."""
    costs, budgets = equal_costs((2, (2.0, 3.0)), (3, (1.0, 2.0)), (3, (2.0, 1.0))), 6.0 * torch.ones(2).double()
    assert largest(costs, budgets).counts == (0, 2, 2)
    monkeypatch.setattr(searching, "MOST_TABLE", 0)
    greedy = largest(costs, budgets)
    assert (sum(greedy.counts), greedy.at_most, greedy.gap, greedy.exact) == (3, 4, 1, False)


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


def test_even_shares_of_any_sizes_against_enumeration():
    """Layers whose sizes do not divide one another: the largest share may lie between two of the largest layer's."""
    random = np.random.default_rng(0)
    for case in range(60):
        sizes = random.integers(2, 10, size=random.integers(2, 4)).tolist()
        costs = random_costs(sizes, seed=case)
        budgets = torch.full((3,), float(random.uniform(0.5, 4.0)), dtype=torch.float64)
        shares = sorted({Fraction(j, n) for n in sizes for j in range(n + 1)})
        counts = [tuple(int(share * size) for size in sizes) for share in shares]
        fitting = [each for each in counts if (total(costs, each) <= budgets).all()]
        assert even(costs, budgets).counts == fitting[-1]


def test_no_budget_tolerates_what_costs_nothing_alone():
    costs = random_costs((3, 2))
    assert tolerances(costs, torch.zeros(3, dtype=torch.float64)) == [0, 0]
    assert largest(costs, torch.zeros(3, dtype=torch.float64)).counts == (0, 0)
    free = [Cost("free", torch.zeros(3, 5, dtype=torch.float64)), *costs]
    assert largest(free, torch.zeros(3, dtype=torch.float64)).counts == (4, 0, 0)


def chain(seed=0):
    with isolated(seed, "net"):
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"))


BOX = BoxOfInputs(low=(-1.0, -1.0, 0.0), high=(1.0, 1.0, 1.0))
SMALL = BoxOfInputs(low=(0.0,), high=(1.0,))


def crash(summary, x, chosen):
    changes = {
        layer.node: lambda value, dead=list(dead): value.index_fill(1, torch.tensor(dead, dtype=torch.int64), 0.0)
        for layer, dead in zip(summary.layers, chosen, strict=True)
    }
    return summary.run(x, changes)[-1]


def choices(summary, counts):
    layers = zip(summary.layers, counts, strict=True)
    return itertools.product(*(itertools.combinations(range(layer.shape[0]), n) for layer, n in layers))


@pytest.mark.parametrize("seed", range(4))
def test_a_certificate_holds_and_is_the_largest_of_its_method(seed):
    model = chain(seed)
    certificate = certify(model, BOX, shape=(3,), failures=Failures(), budget=2.0)
    verify(certificate, model)
    assert certificate.search == "exact" and certificate.gap == 0
    assert certificate.bound <= 2.0 and sum(certificate.counts) > 0
    assert [layer.needed for layer in certificate.layers] == [5 - certificate.counts[0], 4 - certificate.counts[1]]
    summary = summarize(model, (3,))
    x = torch.tensor([-1.0, -1.0, 0.0]) + torch.rand(50, 3, generator=generator(0, "x")) * torch.tensor([2.0, 2.0, 1.0])
    right = summary.run(x)[-1]
    for chosen in choices(summary, certificate.counts):
        assert float((crash(summary, x, chosen) - right).abs().max()) <= certificate.bound + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_are_certified_keep_their_answers(seed):
    model, x = chain(seed), 2.0 * normal(30, 3, seed=seed)
    summary = summarize(model, (3,))
    found = margins(summary, x, Failures())
    answers = summary.run(x)[-1].argmax(1)
    assert torch.equal(found.answers, answers)
    for number, (layer, tolerated) in enumerate(zip(summary.layers, found.tolerated(), strict=True)):
        for count in range(1, layer.shape[0] + 1):
            kept = tolerated >= count
            counts = [count if number == other else 0 for other in range(2)]
            for chosen in choices(summary, counts):
                assert torch.equal(crash(summary, x, chosen).argmax(1)[kept], answers[kept])
    for evenly in (True, False):
        certificate = certify_samples(model, x, failures=Failures(), share=0.2, spread_evenly=evenly)
        verify(certificate, model, x)
        kept = list(certificate.domain.certified)
        assert len(kept) >= 6
        assert evenly or sum(certificate.counts) > 0
        for chosen in choices(summary, certificate.counts):
            assert torch.equal(crash(summary, x, chosen).argmax(1)[kept], answers[kept])


def test_a_margin_is_tight_where_the_difference_is_linear():
    """Two logits that a neuron moves alike are not told apart by it: only the difference costs."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[5.0, 1.0], [5.0, 0.0]]))
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    found = margins(summarize(model, (2,)), torch.tensor([[1.0, 2.0]]), Failures())
    assert float(found.budgets) == pytest.approx(2.0, rel=1e-5)
    assert found.costs[0].sums[0].tolist() == pytest.approx([0.0, 2.0, 2.0])  # the second neuron alone matters


@pytest.mark.parametrize("failures", [Failures(unit="channel"), Failures(component="synapse")])
def test_certificates_of_a_residual_network(failures):
    with isolated(0, "net"):
        model = baselines.create("resnet20", width=0.25, image_size=8, in_channels=1).eval()
    box = BoxOfInputs(low=(-1.0,), high=(1.0,))
    certificate = certify(model, box, shape=(1, 8, 8), failures=failures, budget=1.0, spread_evenly=False)
    verify(certificate, model)
    assert certificate.search in ("exact", "greedy")
    assert len(certificate.layers) == (22 if failures.component == "synapse" else 21)


def test_files_are_read_as_they_were_written(tmp_path):
    model, x = chain(), normal(8, 3)
    for number, made in enumerate(
        (
            certify(model, BOX, shape=(3,), failures=Failures(kind="byzantine", capacity=0.5), budget=1.0),
            certify(model, BOX, shape=(3,), failures=Failures(), budget=1.0, spread_evenly=True),
            certify_samples(model, x, failures=Failures(), share=0.5),
        )
    ):
        write_certificate(tmp_path / f"{number}.json", made)
        again = read_certificate(tmp_path / f"{number}.json")
        assert again == made
        verify(again, model, x if again.domain.kind == "samples" else None)


def test_the_statement_in_a_line_says_what_holds():
    model = chain()
    lies = Failures(kind="byzantine", capacity=0.5, capacity_of="transmitted")
    made = certify(model, BOX, shape=(3,), failures=lies, budget=20.0)
    assert made.summary() == (
        f"{sum(made.counts)} failures (byzantine of a neuron, sending at most 0.5) in 2 layers, error at most "
        f"{made.bound:.6g} within a budget of 20, for every input of shape (3,) with channels from "
        "-1 to 1, -1 to 1, 0 to 1"
    )
    wide = BoxOfInputs(low=(0.0, 0.0, 0.0, 0.0, -1.0), high=(2.0,) * 5)
    assert wide.describe() == "from -1 to 2, each channel in an interval of its own"
    off = Failures(kind="byzantine", component="synapse", capacity=0.25)
    assert off.describe() == "byzantine of a synapse, off by at most 0.25"
    assert Failures(unit="channel").describe() == "crash of a channel"


def tampered(tmp_path, change, *, seal):
    """Write a certificate, change its data, and read it; with ``seal`` its hash is made anew."""
    model = chain()
    path = tmp_path / "certificate.json"
    write_certificate(path, certify(model, BOX, shape=(3,), failures=Failures(), budget=1.0))
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    if seal:
        from ftnas.bounds import certificate as module

        plain.pop("sha256")
        path.write_text(json.dumps({**plain, "sha256": module._hash(plain)}))
    return model, path


def more_failures(plain):
    plain["layers"][0]["failures"] += 1
    plain["layers"][0]["needed"] -= 1


CHANGES = {
    "failures": (more_failures, "can do more than the certificate allows|says that the bound is"),
    "needed": (lambda plain: plain["layers"][0].update(needed=0), "needed is not components less failures"),
    "box": (lambda plain: plain["domain"].update(high=[9.0, 9.0, 9.0]), "can do more than|says that the bound"),
    "bound": (lambda plain: plain.update(bound=plain["bound"] / 2), "says that the bound is"),
    "budget": (lambda plain: plain.update(budget=1e-3), "can do more than"),
    "model": (lambda plain: plain.update(model="0" * 64), "of another model"),
    "layer": (lambda plain: plain["layers"][0].update(name="other"), "names other layers"),
    "kind": (lambda plain: plain["failures"].update(kind="byzantine", capacity=50.0), "can do more than"),
}


SAMPLE_CHANGES = {
    "number": (lambda domain: domain.update(number=1000), "says 1000 samples, and there are 12"),
    "lost": (lambda domain: domain.update(certified=list(range(12))), "sample [0-9]+ is not certified"),
    "negative": (lambda domain: domain.update(certified=[-1]), "certified are positions of 12 samples"),
    "far": (lambda domain: domain.update(certified=[12]), "certified are positions of 12 samples"),
    "twice": (lambda domain: domain.update(certified=domain["certified"] * 2), "each once and in order"),
    "box": (lambda domain: domain.update(kind="box", low=[0.0] * 3, high=[1.0] * 3), "domain"),
}


@pytest.mark.parametrize("name", SAMPLE_CHANGES)
def test_a_tampered_certificate_over_samples_fails(tmp_path, name):
    change, message = SAMPLE_CHANGES[name]
    model, x = chain(), normal(12, 3)
    made = certify_samples(model, x, failures=Failures(), share=0.2)
    assert 0 < sum(made.counts) and 0 < len(made.domain.certified) < 12
    plain = made.model_dump(mode="json")
    change(plain["domain"])
    with pytest.raises(ValueError, match=message) as caught:
        verify(parse(Certificate, plain), model, x)
    assert "\n" not in str(caught.value)


def convolutional(seed=2):
    with isolated(seed, "net"):
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), *head)


def test_samples_of_another_shape_than_the_certificate_says_fail():
    """By a smaller shape a value of the summary would stand for a whole map, and each path for all of them."""
    model, x = convolutional(), normal(5, 1, 6, 6)
    made = certify_samples(model, x, failures=Failures(), share=0.5)
    small = model_digest(model, summarize(model, (1, 1, 1)))
    with pytest.raises(ValueError, match=r"samples of shape \(1, 1, 1\), got \(1, 6, 6\)"):
        verify(made.model_copy(update={"shape": (1, 1, 1), "model": small}), model, x)


@pytest.mark.parametrize("failures", [Failures(), Failures(component="synapse")])
def test_ranges_of_another_shape_are_refused(failures):
    model, x = convolutional(), normal(5, 1, 6, 6)
    small, whole = summarize(model, (1, 1, 1)), summarize(model, (1, 6, 6))
    costs = neuron_costs if failures.component == "neuron" else synapse_costs
    calls = [
        lambda: costs(small, of_samples(whole, x), failures),
        lambda: _costs(small, small, of_samples(whole, x), failures, torch.zeros(5, 2, dtype=torch.int64)),
        lambda: margins(small, x, Failures()),
        lambda: small.boxes(Box(x, x)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"shape \([12], 1, 1\)") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [0.5, None])
def test_a_box_has_a_budget_and_samples_have_none(budget):
    model = chain()
    box = certify(model, BOX, shape=(3,), failures=Failures(), budget=1.0)
    samples = certify_samples(model, normal(8, 3), failures=Failures(), share=0.5)
    with pytest.raises(ValueError, match="over samples each margin is the budget"):
        parse(Certificate, {**(samples if budget else box).model_dump(mode="json"), "budget": budget})


def test_a_share_is_not_rounded_up_by_what_no_float_is():
    """0.07 of 100 is 7: the 7 samples that bear a crash are enough."""
    assert [asked(*pair) for pair in ((0.07, 100), (0.55, 100), (0.5, 3), (1.0, 7), (1e-12, 5))] == [7, 55, 2, 7, 1]
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for layer, weight, bias in ((model[0], [[1.0]], [0.0]), (model[2], [[1.0], [0.0]], [0.0, 0.5])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    x = torch.ones(100, 1)
    x[::15] = 0.1  # the second class without the neuron too
    for evenly in (False, True):
        made = certify_samples(model, x, failures=Failures(), share=0.07, spread_evenly=evenly)
        assert made.counts == [1] and made.domain.certified == tuple(range(0, 100, 15))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Flatten()])
def test_a_network_without_neurons_before_its_outputs(model):
    calls = [
        lambda: certify(model, SMALL, shape=(1, 2, 2), failures=Failures(), budget=1.0),
        lambda: certify_samples(model, normal(5, 1, 2, 2), failures=Failures(), share=0.5),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no neurons before its outputs that could fail; take component: synapse"):
            call()
    synapses = Failures(component="synapse")
    if isinstance(model, nn.Flatten):
        with pytest.raises(ValueError, match="it has no synapses"):
            certify(model, SMALL, shape=(1, 2, 2), failures=synapses, budget=1.0)
    else:
        verify(certify(model, SMALL, shape=(1, 2, 2), failures=synapses, budget=1.0), model)


@pytest.mark.parametrize("name", CHANGES)
def test_a_tampered_certificate_fails(tmp_path, name):
    change, message = CHANGES[name]
    _, path = tampered(tmp_path, change, seal=False)
    with pytest.raises(ValueError, match="changed after it was written"):
        read_certificate(path)
    model, path = tampered(tmp_path, change, seal=True)
    with pytest.raises(ValueError, match=message) as caught:
        verify(read_certificate(path), model)
    assert "\n" not in str(caught.value)


def test_a_changed_model_or_other_samples_fail():
    model, x = chain(), normal(8, 3)
    box = certify(model, BOX, shape=(3,), failures=Failures(), budget=1.0)
    samples = certify_samples(model, x, failures=Failures(), share=0.5)
    with pytest.raises(ValueError, match="other samples"):
        verify(samples, model, x + 1.0)
    with pytest.raises(ValueError, match="about samples, and none are given"):
        verify(samples, model)
    with pytest.raises(ValueError, match="about every input of a box, and samples are given"):
        verify(box, model, x)
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    for certificate in (box, samples):
        with pytest.raises(ValueError, match="of another model"):
            verify(certificate, model, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: certify(m, BOX, shape=(3,), failures=Failures(), budget=0.0), "a budget is a largest error above 0"),
        (
            lambda m: certify(m, BoxOfInputs(low=(0.0,), high=(1.0,)), shape=(3,), failures=Failures(), budget=1.0),
            "of 3",
        ),
        (lambda m: certify_samples(m, normal(4, 3), failures=Failures(), share=0.0), "a share of the samples is in"),
        (
            lambda m: certify_samples(m, normal(4, 3), failures=Failures(component="synapse"), share=0.5),
            "under failures of neurons",
        ),
        (lambda m: read_certificate("/nowhere.json"), "no certificate /nowhere.json"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(chain())
    assert "\n" not in str(caught.value)


def test_a_file_that_reads_in_two_ways_is_refused(tmp_path):
    """The hash is over what is read, so that it fits a file whose first number is another one than its last."""
    path = tmp_path / "certificate.json"
    write_certificate(path, certify(chain(), BOX, shape=(3,), failures=Failures(), budget=1.0))
    text = path.read_text()
    bound = f'"budget": {read_certificate(path).budget}'
    for old, new, message in (
        ('"gap": 0', '"gap": 9,\n "gap": 0', "key 'gap' is given twice"),
        ('"components": 5', '"components": 7, "components": 5', "key 'components' is given twice"),
        (bound, '"budget": 1e999', "NaN or a number that is not finite"),
        (bound, '"budget": NaN', "NaN or a number that is not finite"),
        (bound, '"budget": ' + 9 * "999" * 999, "not JSON"),
        (text, 100_000 * "[", "not JSON"),
    ):
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message) as caught:
            read_certificate(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_other_files_are_no_certificates(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"version": 7}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no certificate"):
            read_certificate(path)
