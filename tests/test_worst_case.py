"""Worst cases against brute force: every subset of failing parts and every corner of what they may send."""

import itertools
import math

import pytest
import torch
from torch import nn

import ftnas
from ftnas.bounds import (
    Failures,
    intervals,
    local_answers,
    local_errors,
    neuron_costs,
    observed,
    of_samples,
    precision,
    summarize,
    synapse_costs,
    total,
)
from ftnas.bounds import fep as paper
from ftnas.bounds.ops import Affine
from ftnas.quantize import Bounded, FixedPoint, Quantization
from ftnas.rng import generator, isolated
from ftnas.settings import parse

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"))


def chain(kind="relu", *, widths=(3, 4, 3, 2), seed=0):
    with isolated(seed, "net"):
        layers = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b)] + ([ACTIVATIONS[kind]()] if number < len(widths) - 2 else [])
        return nn.Sequential(*layers)


class Skip(nn.Module):
    """Joins on 4 neurons a layer: a sum, a concatenation, a slice."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.one(x))
        return self.out(torch.cat([x[:, 1:3], x + torch.relu(self.two(x))], dim=1))


class Images(nn.Module):
    """2 channels of 2x2, pooled: 4 neurons of 8 values, then 3."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.pool, self.mean = nn.MaxPool2d(2, stride=1), nn.AdaptiveAvgPool2d(1)
        self.mid, self.out = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.out(self.mean(torch.relu(self.mid(x))).flatten(1))


def make(name, seed):
    with isolated(seed, "net"):
        if name == "images":
            model, shape = Images(), (1, 3, 3)
            model.norm.running_var.uniform_(0.5, 2.0)
        else:
            model, shape = (Skip(), (3,)) if name == "skip" else (chain(name, seed=seed), (3,))
    return model.eval(), shape


def trained(seed):
    """A chain that was trained for a while to tell three blobs apart."""
    model, x = chain("relu", widths=(3, 4, 3, 3), seed=seed), normal(60, 3, seed=seed)
    labels = torch.arange(60) % 3
    x = x + 2.0 * torch.eye(3)[labels]
    weights = list(model.parameters())
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x), labels)
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.5 * gradient
    return model, (3,)


def subsets(summary, counts):
    """Yield every choice of failing values of each layer, as {node: indices}."""
    layers = [layer for layer, count in zip(summary.layers, counts, strict=True) if count]
    numbers = [count for count in counts if count]
    choices = [itertools.combinations(range(math.prod(x.shape)), n) for x, n in zip(layers, numbers, strict=True)]
    for chosen in itertools.product(*(list(choice) for choice in choices)):
        yield {layer.node: torch.tensor(indices) for layer, indices in zip(layers, chosen, strict=True)}


def put(summary, nominal, indices, sent):
    """Return the change of a node: given values are sent at flat indices."""

    def change(value):
        flat = value.flatten(1).clone()
        flat[:, indices] = sent(nominal, indices)
        return flat.view_as(value)

    return change


def attack(summary, x, counts, failures):
    """Return the largest error of each output that was found: over all subsets, and corners for Byzantine ones."""
    before = summary.run(x)
    found = torch.zeros_like(before[-1])
    signs_for = (lambda n: [None]) if failures.kind == "crash" else (lambda n: itertools.product((-1.0, 1.0), repeat=n))
    for chosen in subsets(summary, counts):
        number = sum(len(indices) for indices in chosen.values())
        for signs in signs_for(number):
            left = iter(signs or ())
            changes = {}
            for node, indices in chosen.items():
                nominal = before[node].flatten(1)[:, indices]
                if failures.kind == "crash":
                    sent = torch.zeros_like(nominal)
                else:
                    off = torch.tensor([next(left) for _ in indices], dtype=torch.float64) * failures.capacity
                    sent = off.expand_as(nominal) if failures.capacity_of == "transmitted" else nominal + off
                changes[node] = put(summary, nominal, indices, lambda nominal, indices, sent=sent: sent)
            found = torch.maximum(found, (summary.run(x, changes)[-1] - before[-1]).abs())
    return found


FAILURES = {
    "crash": Failures(),
    "deviation": Failures(kind="byzantine", capacity=0.7),
    "transmitted": Failures(kind="byzantine", capacity=1.5, capacity_of="transmitted"),
}


@pytest.mark.parametrize("failures", FAILURES)
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[pytest.mark.slow] if seed else [])
        for name in (*ACTIVATIONS, "skip", "images", "trained")
        for seed in range(2)
    ],
)
def test_no_attack_is_above_the_bound(name, seed, failures):
    """All subsets and corners: over a box of inputs, and for each sample with its own values."""
    failures = FAILURES[failures]
    model, shape = trained(seed) if name == "trained" else make(name, seed)
    summary = summarize(model, shape)
    x = normal(5, *shape, seed=seed)
    counts = [(1, 1), (2, 0), (0, 2), (1, 2)][seed::2]
    box = intervals(summary, x.amin(0), x.amax(0))
    for ranges in (box, of_samples(summary, x)):
        costs = neuron_costs(summary, ranges, failures)
        scalar = {layer.name: float(failures.deviation(box.boxes[layer.node]).amax()) for layer in summary.layers}
        for given in counts:
            found = attack(summary, x, given, failures)
            assert found.max() > 0
            bound = total(costs, given).view(-1, summary.num_outputs)
            assert (found <= bound + 1e-9).all()
            by_name = {layer.name: n for layer, n in zip(summary.layers, given, strict=True)}
            assert float(found.max()) <= paper.receptive(summary, by_name, scalar) + 1e-9


@pytest.mark.parametrize("failures", FAILURES)
@pytest.mark.parametrize("name", [*ACTIVATIONS, "skip", "images", "trained"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_attack_is_above_the_local_bound(name, seed, failures):
    """Signed effects, slopes and maxima: all subsets and corners, of one layer at a time."""
    failures = FAILURES[failures]
    model, shape = trained(seed) if name == "trained" else make(name, seed)
    summary, x = summarize(model, shape), normal(5, *shape, seed=seed)
    for number, layer in enumerate(summary.layers):
        for count in (1, 2):
            counts = [count if number == other else 0 for other in range(2)]
            found = attack(summary, x, counts, failures)
            bound = local_errors(summary, x, layer, count=count, failures=failures)
            loose = total(neuron_costs(summary, of_samples(summary, x), failures), counts).view_as(bound)
            assert (bound <= loose + 1e-9).all()
            assert found.max() > 0
            assert (found <= bound + 1e-9).all()
            if count == 1 and number == 1:  # what follows the last layer is linear
                torch.testing.assert_close(found, bound)


def test_local_bounds_are_exact_where_nothing_changes_its_sign_or_its_place():
    """Large biases: every ReLU stays on; one value of each window is far above the others."""
    model, shape = make("images", 1)
    with torch.no_grad():
        model.norm.bias.fill_(20.0)
        model.mid.bias.fill_(200.0)
    summary, x = summarize(model, shape), normal(3, *shape)
    first = summary.layers[0]
    for failures in (Failures(), Failures(kind="byzantine", capacity=1e-3)):
        found = attack(summary, x, (2, 0), failures)
        bound = local_errors(summary, x, first, count=2, failures=failures)
        loose = total(neuron_costs(summary, of_samples(summary, x), failures), (2, 0)).view_as(bound)
        assert (bound <= loose + 1e-9).all()
        if failures.kind == "byzantine":  # a crash of 20 moves the maximum
            torch.testing.assert_close(found, bound)
            assert float(loose.amax()) > 1.2 * float(bound.amax())


@pytest.mark.parametrize("name", ["skip", "images", "trained"])
def test_answers_that_are_kept_locally_are_kept(name):
    model, shape = trained(1) if name == "trained" else make(name, 1)
    summary, x, kept_at_all = summarize(model, shape), 2.0 * normal(12, *shape), 0
    before = summary.run(x)
    answers = before[-1].argmax(1)
    for number, layer in enumerate(summary.layers):
        errors, kept = local_answers(summary, x, layer, count=1, failures=Failures())
        torch.testing.assert_close(errors, local_errors(summary, x, layer, count=1, failures=Failures()))
        kept_at_all += int(kept.sum())
        for chosen in subsets(summary, [int(number == other) for other in range(2)]):
            dead = {node: lambda v, i=i: v.flatten(1).index_fill(1, i, 0.0).view_as(v) for node, i in chosen.items()}
            assert torch.equal(summary.run(x, dead)[-1].argmax(1)[kept], answers[kept])
    assert kept_at_all


def test_local_bounds_of_channels():
    model, shape = make("images", 3)
    summary, x = summarize(model, shape), normal(6, *shape)
    first, before = summary.layers[0], summary.run(x)
    bound = local_errors(summary, x, first, count=1, failures=Failures(unit="channel"))
    found = torch.zeros_like(bound)
    for channel in range(2):
        dead = {first.node: lambda value, c=channel: value.index_fill(1, torch.tensor([c]), 0.0)}
        found = torch.maximum(found, (summary.run(x, dead)[-1] - before[-1]).abs())
    assert (found <= bound + 1e-9).all() and found.max() > 0


def test_crashed_channels():
    model, shape = make("images", 3)
    summary, x = summarize(model, shape), normal(6, *shape)
    (first, *_), before = summary.layers, summary.run(x)
    bound = total(neuron_costs(summary, of_samples(summary, x), Failures(unit="channel")), (1, 0)).view(6, 2)
    for channel in range(2):
        dead = {first.node: lambda value, c=channel: value.index_fill(1, torch.tensor([c]), 0.0)}
        assert ((summary.run(x, dead)[-1] - before[-1]).abs() <= bound + 1e-9).all()


def positive(*, same):
    """A chain with weights > 0 and values > 0, all weights of a layer the same or not: every inequality is reached."""
    model = chain("relu", widths=(3, 4, 3, 1))
    with torch.no_grad():
        for number, module in enumerate(model):
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.full_like(module.weight, 0.3 + number) if same else module.weight.abs() + 0.1)
                module.bias.zero_()
    return model.double()


@pytest.mark.parametrize("counts", [(1, 0), (2, 0), (0, 2), (4, 0), (0, 3)])
def test_the_bound_is_reached(counts):
    """Crashes and deviations of neurons of one layer in a net of positive weights: the attack equals the bound."""
    summary, x = summarize(positive(same=False), (3,)), normal(1, 3).abs() + 0.5
    for failures in (Failures(), Failures(kind="byzantine", capacity=0.2)):
        bound = total(neuron_costs(summary, of_samples(summary, x), failures), counts)
        torch.testing.assert_close(bound, attack(summary, x, counts, failures)[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("counts", [(1, 0), (2, 0), (0, 2), (2, 1), (1, 2)])
def test_fep_is_reached_by_failures_in_several_layers_where_all_weights_are_the_same(counts):
    """Theorem 2 is tight: neurons that fail do not pass on the errors that arrive."""
    failures = Failures(kind="byzantine", capacity=5.0)
    summary, x = summarize(positive(same=True), (3,)), normal(1, 3).abs() + 0.5
    printed = paper.fep(paper.Chain.of(summary), counts, 5.0)
    assert printed == pytest.approx(float(attack(summary, x, counts, failures)))
    by_name = {layer.name: n for layer, n in zip(summary.layers, counts, strict=True)}
    receptive = paper.receptive(summary, by_name, dict.fromkeys(by_name, 5.0))
    assert receptive >= printed * (1 - 1e-12)
    assert printed <= float(total(neuron_costs(summary, of_samples(summary, x), failures), counts)) * (1 + 1e-12)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_fep_as_printed(kind):
    """The formula before Theorem 2 written out for two layers, and what `receptive` and the paths make of it."""
    summary = summarize(chain(kind, widths=(3, 6, 5, 2)), (3,))
    w = [float(node.op.weight.abs().max()) for node in summary.nodes if isinstance(node.op, Affine)]
    k, c = {"sigmoid": 0.25, "relu": 1.0, "tanh": 1.0}[kind], 40.0
    wanted = c * (2 * k * w[2] * (5 - 3) * w[1] + 3 * w[2])
    assert paper.fep(paper.Chain.of(summary), (2, 3), c) == pytest.approx(wanted)
    assert paper.receptive(summary, {"0": 2, "2": 3}, {"0": c, "2": c}) == pytest.approx(wanted)
    costs = neuron_costs(summary, observed(summary, normal(4, 3)), Failures(kind="byzantine", capacity=c))
    for counts in ((2, 0), (0, 3)):
        assert float(total(costs, counts).max()) <= paper.fep(paper.Chain.of(summary), counts, c) * (1 + 1e-12)


def test_receptive_counts_the_inputs_of_a_convolution():
    """One value of a 2x2 convolution's input that is off by C moves its output by at most w_m C, 4 by 4 w_m C."""
    with isolated(0, "net"):
        model = nn.Sequential(
            nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 1)
        )
    summary = summarize(model, (1, 4, 4))
    w = [float(node.op.weight.abs().max()) for node in summary.nodes if isinstance(node.op, Affine)]
    found = [paper.receptive(summary, {"0": n}, {"0": 1.0}) for n in (1, 4, 16)]
    assert found == pytest.approx([9 * w[2] * w[1] * n for n in (1, 4, 4)])


def test_theorem_1():
    """budget / w_m crashes are tolerated, one more is not where all weights are w_m and all neurons send 1."""
    weights = torch.full((8,), 0.25)
    assert paper.single_layer_tolerance(weights, 0.8) == 3
    assert paper.single_layer_tolerance(weights, 100.0) == 8
    model = nn.Sequential(nn.Linear(2, 8), nn.Hardtanh(0.0, 1.0), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[2].weight.fill_(0.25)
    summary, x = summarize(model, (2,)), torch.ones(1, 2)
    cost = neuron_costs(summary, intervals(summary, -x[0], x[0]), Failures())[0]
    assert cost.tolerance(torch.tensor([0.8], dtype=torch.float64)) == 3
    assert float(attack(summary, x, (4,), Failures())) == pytest.approx(1.0)


def test_lemma_1_without_a_limit_not_one_lying_neuron_is_tolerated():
    summary = summarize(make("skip", 0)[0], (3,))
    costs = neuron_costs(summary, of_samples(summary, normal(2, 3)), Failures(kind="byzantine"))
    assert [cost.tolerance(torch.full((4,), 1e9, dtype=torch.float64)) for cost in costs] == [0, 0]
    dead = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        dead[2].weight.copy_(torch.tensor([[1.0, 0.0]]))
    summary = summarize(dead, (2,))
    cost = neuron_costs(summary, of_samples(summary, normal(2, 2)), Failures(kind="byzantine"))[0]
    assert cost.sums[0].tolist() == [0.0, math.inf, math.inf]  # the neuron that no output reads is free


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_more_copies_of_each_neuron_divide_fep(kind):
    """Corollary 1: with enough neurons any distribution is tolerated."""
    model, x = chain(kind), normal(5, 3)
    wide = paper.replicate(model, 3)
    torch.testing.assert_close(wide(x), model(x))
    one, more = (paper.Chain.of(summarize(net, (3,))) for net in (model, wide))
    for counts in ((1, 0), (0, 1)):  # with failures in two layers N - f changes by less
        assert paper.fep(more, counts, 2.0) == pytest.approx(paper.fep(one, counts, 2.0) / 3)
    assert paper.fep(more, (2, 1), 2.0) <= paper.fep(one, (2, 0), 2.0) / 3 + paper.fep(one, (0, 1), 2.0) / 3


def synapse_attack(summary, x, per_point, failures):
    """Return the largest error over all choices of failing synapses of Linear layers: {point: count}."""
    before = summary.run(x)
    found = torch.zeros_like(before[-1])
    choices = []
    for point, count in per_point.items():
        out, into = summary.nodes[point].op.weight.shape
        every = list(itertools.product(range(out), range(into)))
        choices.append([(point, chosen) for chosen in itertools.combinations(every, count)])
    for combination in itertools.product(*choices):
        number = sum(len(chosen) for _, chosen in combination)
        for signs in [None] if failures.kind == "crash" else itertools.product((-1.0, 1.0), repeat=number):
            left, changes = iter(signs or ()), {}
            for point, chosen in combination:
                node, extra = summary.nodes[point], torch.zeros_like(before[point])
                for j, i in chosen:
                    sent = node.op.weight[j, i] * before[node.inputs[0]][:, i]
                    extra[:, j] += -sent if failures.kind == "crash" else next(left) * failures.capacity
                changes[point] = lambda value, extra=extra: value + extra
            found = torch.maximum(found, (summary.run(x, changes)[-1] - before[-1]).abs())
    return found


SYNAPSES = {
    "crash": Failures(component="synapse"),
    "byzantine": Failures(component="synapse", kind="byzantine", capacity=0.4),
}


@pytest.mark.parametrize("failures", SYNAPSES.values(), ids=SYNAPSES)
@pytest.mark.parametrize("kind", [*ACTIVATIONS, "skip"])
def test_no_attack_on_synapses_is_above_the_bound(kind, failures):
    model, shape = make(kind, 1)
    summary, x = summarize(model, shape), normal(4, *shape)
    points = [n for n, node in enumerate(summary.nodes) if isinstance(node.op, Affine)]
    costs = synapse_costs(summary, of_samples(summary, x), failures)
    for counts in ((1, 0, 0), (0, 2, 0), (0, 0, 2), (1, 0, 1)):
        found = synapse_attack(summary, x, dict(zip(points, counts, strict=True)), failures)
        assert found.max() > 0
        assert (found <= total(costs, counts).view(4, -1) + 1e-9).all()
        if failures.kind == "byzantine" and kind != "skip":
            assert float(found.max()) <= paper.synapses(paper.Chain.of(summary), counts, 0.4) + 1e-9


def test_theorem_4_is_no_bound_as_printed_and_is_reached_in_its_sound_form():
    """Weights below 1: one failing synapse does more than the printed formula allows."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[2].weight.fill_(0.5)
    summary, x = summarize(model, (1,)), torch.ones(1, 1)
    failures = Failures(component="synapse", kind="byzantine", capacity=1.0)
    points = [n for n, node in enumerate(summary.nodes) if isinstance(node.op, Affine)]
    numbers = paper.Chain.of(summary)
    for counts, printed, sound in (((1, 0), 0.1 * 0.5, 0.5), ((2, 0), 2 * 0.1 * 0.5, 1.0), ((0, 2), 2 * 0.5, 2.0)):
        found = float(synapse_attack(summary, x, dict(zip(points, counts, strict=True)), failures))
        assert paper.synapses_printed(numbers, counts, 1.0) == pytest.approx(printed)
        assert found > printed
        assert found == pytest.approx(sound) == paper.synapses(numbers, counts, 1.0)
        assert float(total(synapse_costs(summary, of_samples(summary, x), failures), counts)) == pytest.approx(sound)


def test_synapses_of_convolutions_one_at_a_time():
    """Every synapse of both convolutions of `Images` takes its product away."""
    model, shape = make("images", 2)
    summary, x = summarize(model, shape), normal(3, *shape)
    before, costs = summary.run(x), synapse_costs(summary, of_samples(summary, x), Failures(component="synapse"))
    for number, name in enumerate(("conv", "mid")):
        layer = summary.layer(name)
        op, source = summary.nodes[layer.point].op, before[summary.nodes[layer.point].inputs[0]]
        counts = [int(number == other) for other in range(3)]
        bound, hits = total(costs, counts).view(3, 2), 0
        out, into, rows, columns = op.weight.shape
        for o, c, a, b, i, j in itertools.product(*(range(n) for n in (out, into, rows, columns, *layer.shape[1:]))):
            lost = op.weight[o, c, a, b] * source[:, c, i + a, j + b]

            def change(value, o=o, i=i, j=j, lost=lost):
                value = value.clone()
                value[:, o, i, j] -= lost
                return value

            error = (summary.run(x, {layer.point: change})[-1] - before[-1]).abs()
            hits += int((error > 0).any())
            assert (error <= bound + 1e-9).all()
        assert hits


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "skip", "images", "trained"])
def test_rounding_costs_no_more_than_its_bound(name, bits):
    """`inject` rounds weights and features; each sample alone and all together, in a box and on the samples."""
    model, shape = trained(0) if name == "trained" else make(name, 0)
    form = Quantization(weights=FixedPoint(bits=bits), features=FixedPoint(bits=bits))
    summary, x = summarize(model, shape), normal(40, *shape)
    with torch.no_grad(), ftnas.inject(model, quantization=form):
        rounded = torch.cat([model(x), *(model(part) for part in x.split(1))]).double()
    error = (rounded - summary.run(x)[-1].repeat(2, 1)).abs().view(2, 40, -1)
    box = precision(summary, intervals(summary, x.amin(0), x.amax(0)), form)
    own = precision(summary, of_samples(summary, x), form)
    assert error.max() > 0
    for found in (box, own):
        assert (error <= found.error + 1e-5).all()
        assert found.features.max() > 0 and found.weights.max() > 0
    assert own.error.max() <= box.error.max()


def test_rounding_is_reached():
    """One weight of 1 and a bias that lies in the middle of two steps: half a step is lost, and nothing by weights."""
    model = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    form = Quantization(features=FixedPoint(bits=4), weights=FixedPoint(bits=8, range=Bounded(bound=2.0)))
    x = torch.tensor([[0.75 + 1 / 16], [0.5]])  # a step of 1/8, and half of one beside a multiple
    summary = summarize(model, (1,))
    found = precision(summary, of_samples(summary, x), form)
    with torch.no_grad(), ftnas.inject(model, quantization=form):
        error = (model(x) - x).abs()
    assert found.layers[0].step == 1 / 8
    assert found.weights.max() == 0
    assert float(found.error[0]) == float(error[0]) == 1 / 16


def test_values_above_the_largest_code_are_clipped_to_it():
    """1 itself has no code in [-1, 7/8]: a whole step is lost, which the bound says."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    form = Quantization(features=FixedPoint(bits=4), weights=FixedPoint(bits=8, range=Bounded(bound=2.0)))
    x, summary = torch.ones(1, 1), summarize(model, (1,))
    with torch.no_grad(), ftnas.inject(model, quantization=form):
        assert float((model(x) - x).abs()) == 1 / 8
    assert float(precision(summary, of_samples(summary, x), form).error) == 1 / 8


def test_theorem_5_is_reached_where_all_weights_are_the_same():
    summary, x, off = summarize(positive(same=True), (3,)), normal(1, 3).abs() + 0.5, (0.1, 0.2)
    changes = {layer.node: lambda value, e=e: value + e for layer, e in zip(summary.layers, off, strict=True)}
    error = float(summary.run(x, changes)[-1] - summary.run(x)[-1])
    assert paper.precision(paper.Chain.of(summary), off) == pytest.approx(error)


def chain_of(after, last):
    """Read the printed formulas' numbers of two layers with activation functions."""
    return paper.Chain.of(summarize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), after, nn.Linear(2, 1), last), (2,)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, r: parse(Failures, {"capacity": 1.0}), "capacity has no effect on kind crash"),
        (lambda s, r: parse(Failures, {"component": "synapse", "unit": "channel"}), "unit has no effect on synapses"),
        (lambda s, r: total(neuron_costs(s, r, Failures()), (1,)), "one count for each of 2 layers, got 1"),
        (lambda s, r: total(neuron_costs(s, r, Failures()), (9, 0)), "layer 'one' has 4 components, so that 9 cannot"),
        (lambda s, r: intervals(s, torch.tensor(1.0), torch.tensor(0.0)), "a box of inputs has finite ends"),
        (lambda s, r: paper.Chain.of(s), "for chains of Linear layers"),
        (lambda s, r: chain_of(nn.Identity(), nn.LeakyReLU(3.0)), "none after the last"),
        (lambda s, r: chain_of(nn.LeakyReLU(3.0), nn.Identity()), "at most one activation function between"),
        (
            lambda s, r: local_errors(s, normal(1, 3), s.layers[0], count=1, failures=Failures(component="synapse")),
            "local bounds are of single neurons",
        ),
        (lambda s, r: s.layer("three"), "no layer 'three'; the layers are one, two"),
        (lambda s, r: paper.replicate(nn.Sequential(nn.Conv2d(1, 1, 1)), 2), "only chains of Linear layers"),
    ],
)
def test_bad_input_is_one_line(call, message):
    summary = summarize(make("skip", 0)[0], (3,))
    with pytest.raises(ValueError, match=message) as caught:
        call(summary, of_samples(summary, normal(2, 3)))
    assert "\n" not in str(caught.value)


def test_saturated_weights_have_no_bound_of_rounding():
    model = chain()
    ftnas.saturate(model, "tanh")
    summary = summarize(model, (3,))
    with pytest.raises(ValueError, match="layer '0' has saturated weights"):
        precision(summary, of_samples(summary, normal(1, 3)), FixedPoint())


def test_observed_extremes_are_an_estimate():
    summary, x = summarize(chain(), (3,)), normal(9, 3)
    ranges = observed(summary, x)
    assert not ranges.certified
    assert intervals(summary, x.amin(0), x.amax(0)).certified
    values = summary.run(x)[2]
    torch.testing.assert_close(ranges.boxes[2].low[0], values.amin(0))
    torch.testing.assert_close(ranges.boxes[2].high[0], values.amax(0))
