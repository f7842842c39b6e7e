"""Summaries of traced networks: the same values, intervals that hold, errors through joins, refusals by name."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftnas
from ftnas import baselines
from ftnas.bounds import (
    BoxOfInputs,
    Cut,
    Failures,
    absolute,
    certify,
    neuron_costs,
    norm,
    of_samples,
    summarize,
)
from ftnas.bounds.expected import gain
from ftnas.bounds.ops import Box
from ftnas.faults import NeuronCrash
from ftnas.rng import generator, isolated
from ftnas.space import Genotype, build_network, load_space


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"))


def settled(model, seed=0):
    """Give every BatchNorm statistics of its own."""
    with isolated(seed, "norms"):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


class Joined(nn.Module):
    """Residual, concatenation, slice, padding, numbers: 9 positions of 2 channels to 3 outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh())
        self.odd = nn.Conv2d(4, 3, 1, stride=2)
        self.pool = nn.MaxPool2d(2, stride=1, padding=1)
        self.out = nn.Linear(4 * 16 + 12, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        y = 0.5 * (x + self.branch(x)) - 1.0
        rows, columns = y.shape[2] % 2, y.size(3) % 2
        shifted = F.pad(y, (0, columns, 0, rows))[:, :, 1:, 1:]
        z = self.odd(shifted)
        return self.out(torch.cat([self.pool(y).flatten(1), z.view(z.shape[0], -1)], dim=1))


class Plain(nn.Module):
    """A fully connected net with a skip and a shared activation function."""

    def __init__(self, width=5):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(2 * width, 2)
        self.act = nn.Sigmoid()

    def forward(self, x):
        x = self.act(self.one(x))
        return self.out(torch.cat([x, x[:, :] + self.act(self.two(x))], dim=1))


def joined(seed=0):
    with isolated(seed, "net"):
        return settled(Joined(), seed)


def plain(seed=0, width=5):
    with isolated(seed, "net"):
        return Plain(width).eval()


def searched(space, seed):
    space = load_space(space)
    with isolated(seed, "net"):
        genotype = Genotype.random(space, generator=generator(seed, "genotype"))
        return settled(build_network(genotype, space, num_classes=10, in_channels=3, channels=4, cells=3), seed)


def baseline(name):
    with isolated(0, "net"):
        return settled(baselines.create(name, width=0.25, image_size=16))


NETS = {
    "joined": (joined, (2, 3, 3)),
    "plain": (plain, (4,)),
    **{f"searched {seed}": (lambda seed=seed: searched("ftt-weights", seed), (3, 9, 9)) for seed in range(3)},
    "f-ftt": (lambda: searched("ftt-features", 5), (3, 8, 8)),
    **{name: (lambda name=name: baseline(name), (3, 16, 16)) for name in baselines.names()},
}


LARGE = ("resnet18", "vgg16", "mobilenet_v1")
SOME = [pytest.param(net, marks=pytest.mark.slow) if net in LARGE else net for net in NETS]


@pytest.mark.parametrize("net", SOME)
def test_a_summary_gives_the_same_outputs_and_leaves_the_model_alone(net):
    make, shape = NETS[net]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = normal(3, *shape)
    model.train()
    summary = summarize(model, shape)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        wanted = model.eval().double()(x.double())
    torch.testing.assert_close(summary.run(x)[-1], wanted, rtol=1e-6, atol=1e-7)
    unfolded = summarize(model, shape, fold=False)
    torch.testing.assert_close(unfolded.run(x)[-1], wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("net", SOME)
def test_intervals_hold_every_value(net):
    """40 inputs of the box, half of them corners, stay in every node's interval."""
    make, shape = NETS[net]
    summary = summarize(make(), shape)
    middle = normal(1, *shape).double()
    box = Box(middle - 0.1, middle + 0.3)
    shares = torch.rand(40, *shape, generator=generator(2, "x"))
    shares[::2] = shares[::2].round()
    values = summary.run(box.low + shares * (box.high - box.low))
    for node, value, (low, high) in zip(summary.nodes, values, summary.boxes(box), strict=True):
        assert (value >= low - 1e-9).all() and (value <= high + 1e-9).all(), node.name


def test_intervals_of_one_layer_are_reached():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    box = Box(torch.full((1, 3), -1.0), torch.full((1, 3), 2.0))
    corners = torch.tensor(list(itertools.product((-1.0, 2.0), repeat=3)))
    summary = summarize(model, (3,))
    values, boxes = summary.run(corners), summary.boxes(box)
    for number in (1, 2):
        torch.testing.assert_close(boxes[number].low[0], values[number].amin(0))
        torch.testing.assert_close(boxes[number].high[0], values[number].amax(0))


def test_layers_are_what_neurons_send():
    summary = summarize(joined(), (2, 3, 3))
    assert [(layer.name, layer.shape) for layer in summary.layers] == [
        ("first", (4, 3, 3)),
        ("branch.0", (4, 3, 3)),
        ("odd", (3, 2, 2)),
    ]
    kinds = [type(summary.nodes[layer.node].op).__name__ for layer in summary.layers]
    assert kinds == ["Activation", "Activation", "Affine"]


@pytest.mark.parametrize("net", ["joined", "plain", "searched 0", "resnet20"])
def test_neurons_are_those_that_faults_hit(net):
    """Crash every neuron of one layer by `inject` and in the summary: the same outputs."""
    make, shape = NETS[net]
    model, x = make().double(), normal(2, *shape).double()
    summary = summarize(model, shape)
    for layer in summary.layers[:: max(1, len(summary.layers) // 3)]:
        with torch.no_grad(), ftnas.inject(model, NeuronCrash(rate=1.0), layers=layer.name, seed=0):
            wanted = model(x)
        found = summary.run(x, {layer.node: torch.zeros_like})[-1]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("net", "layer"), [("joined", "first"), ("joined", "branch.1"), ("plain", "one"), ("plain", "two")]
)
@pytest.mark.parametrize("seed", range(3))
def test_expected_errors_through_joins_are_below_the_bounds(net, layer, seed):
    """E|Delta| over every pattern of crashes is below b2, and E of its norms below b1."""
    make, shape = (joined, (2, 3, 3)) if net == "joined" else (plain, (4,))
    model, x, p = make(seed), normal(3, *shape, seed=seed), [0.05, 0.4, 0.9][seed]
    cut = Cut(model, layer, unit="channel")
    values = cut.values(x)
    units = cut.num_units(values)
    alive = torch.tensor(list(itertools.product((False, True), repeat=units)))
    dead = units - alive.sum(1).double()
    weight = p**dead * (1 - p) ** (units - dead)
    with torch.no_grad():
        after = cut.rest(x)(cut.masked(values, alive).flatten(0, 1)).unflatten(0, (len(alive), -1))
        delta = (after - cut.rest(x)(values)).double()
    expected = (weight[:, None, None] * delta.abs()).sum(0)
    assert expected.max() > 0
    assert (expected <= absolute(cut, x, p=p) * (1 + 1e-5)).all()
    for order in (1, 2, "inf"):
        sizes = (weight[:, None] * delta.norm(p=float(order), dim=2)).sum(0)
        assert (sizes <= norm(cut, x, p=p, order=order) * (1 + 1e-5)).all(), order


def test_what_bypasses_the_cut_has_no_error():
    """out = x + two(x) through weights that are one: only the branch is lost, and b2 says exactly that."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return x + self.two(x)

    model, x = Skip(), normal(2, 3)
    with torch.no_grad():
        values = model.two(x).double()
    torch.testing.assert_close(absolute(Cut(model, "two"), x, p=0.25), 0.25 * values.abs())


@pytest.mark.parametrize("name", ["conv", "max", "average"])
def test_gains_are_those_of_the_matrix(name):
    """Largest sums of rows and columns, against the matrix made column by column."""
    model = {
        "conv": nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
        "max": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        "average": nn.AvgPool2d(3, stride=2, padding=1),
    }[name]
    whole = nn.Sequential(model, nn.Flatten())
    op = summarize(whole, (2, 6, 5)).nodes[1].op
    unit = torch.eye(60, dtype=torch.float64).view(60, 2, 6, 5)
    matrix = op.spread(unit).flatten(1).abs()
    assert gain(op, (2, 6, 5), order=1) == pytest.approx(float(matrix.sum(1).amax()))
    rows = 1.0 if name == "max" else float(matrix.sum(0).amax())
    assert gain(op, (2, 6, 5), order="inf") == pytest.approx(rows)
    assert gain(op, (2, 6, 5), order=2) >= float(torch.linalg.matrix_norm(matrix, 2)) * (1 - 1e-9) or name == "max"


def test_the_sum_over_windows_is_the_naive_one():
    op = (
        summarize(nn.Sequential(nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True), nn.Flatten()), (2, 6, 6))
        .nodes[1]
        .op
    )
    x = normal(1, 2, 6, 6).double().abs()
    found, shape = op.spread(x), op.run(x).shape
    assert found.shape == shape
    for c, i, j in itertools.product(*(range(n) for n in shape[1:])):
        window = [(2 * i - 1 + a, j + 2 * b) for a in range(3) for b in range(2)]
        inside = [float(x[0, c, r, s]) for r, s in window if 0 <= r < 6 and 0 <= s < 6]
        assert float(found[0, c, i, j]) == pytest.approx(sum(inside))


class Refusing(nn.Module):
    def __init__(self, forward, *modules):
        super().__init__()
        self.layers = nn.ModuleList(modules)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def overwriting(net, x):
    y = net.layers[0](x)
    z = torch.relu_(y)
    return y * 2.0 + z


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.GELU()), "layer '1' is a GELU"),
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "layer '1' is a LayerNorm"),
        (nn.Sequential(nn.Linear(4, 3), nn.PReLU()), "layer '1' is a PReLU"),
        (nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(-0.5)), "layer '1' has negative_slope -0.5"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softplus(threshold=1)), "layer '1' has threshold 1, where it jumps down"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), "layer '0' normalises by the batch"),
        (Refusing(lambda net, x: torch.softmax(x, dim=1)), "function 'softmax' \\(softmax\\) is not bounded"),
        (Refusing(lambda net, x: x * x), "joins two values by mul"),
        (Refusing(lambda net, x: x - torch.relu(x)), "joins two values by sub"),
        (Refusing(lambda net, x: x if x.sum() > 0 else -x), "cannot be summarised"),
        (Refusing(lambda net, x: x.reshape(-1, 2)), "mixes the batch"),
        (Refusing(lambda net, x: x[0:1]), "no plain slice"),
        (Refusing(lambda net, x: torch.cat([x, x])), "concatenates over the batch"),
        (Refusing(lambda net, x: F.pad(x, (1, 1), value=2.0)), "pads by 'constant' 2.0"),
        (Refusing(overwriting, nn.Linear(4, 4)), "overwrites in place"),
        (Refusing(lambda net, x: (x, x)), "must give one vector"),
        (Refusing(lambda net, x: net.layers[0](x, x, x)[0], nn.MultiheadAttention(4, 1)), "MultiheadAttention"),
        (nn.Linear(5, 3), "Linear cannot be summarised for samples of shape \\(4,\\)"),
    ],
)
def test_everything_else_is_refused_by_name_in_one_line(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        summarize(model, (4,))
    assert "\n" not in str(caught.value)


def test_only_plain_convolutions():
    with pytest.raises(ValueError, match="layer '0' pads by 'reflect'"):
        summarize(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), (1, 4, 4))


def test_values_that_are_overwritten_and_not_read_again_are_fine():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Hardtanh(inplace=True), nn.Linear(4, 2)
    )
    x = normal(3, 4)
    torch.testing.assert_close(summarize(model, (4,)).run(x)[-1].float(), model(x), rtol=1e-5, atol=1e-6)


def test_saturated_weights_are_those_that_are_used():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ftnas.saturate(model, "tanh")
    x = normal(3, 4)
    torch.testing.assert_close(summarize(model, (4,)).run(x)[-1].float(), model(x), rtol=1e-5, atol=1e-6)


def test_the_structure_tells_networks_apart():
    one = summarize(plain(0), (4,)).structure()
    assert one == summarize(plain(1), (4,)).structure()
    assert one != summarize(plain(0, width=6), (4,)).structure()


class Calls(nn.Module):
    """A perceptron on [4] whose hidden values pass through a function."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def layers(module):
    return nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 2))


def images(*modules):
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *modules, nn.Flatten(), nn.LazyLinear(2))


def saturated(function):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ftnas.saturate(model, function)
    return model


CONSTANTS_OF_A_NETWORK = {
    "slope": (lambda c: layers(nn.LeakyReLU(c)), 0.01, 0.9),
    "limit": (lambda c: layers(nn.Hardtanh(-1.0, c)), 1.0, 2.0),
    "beta": (lambda c: layers(nn.Softplus(beta=c)), 1.0, 2.0),
    "eps": (lambda c: layers(nn.BatchNorm1d(4, eps=c)), 1e-5, 1e-3),
    "factor": (lambda c: Calls(lambda x: x * c), 2.0, 3.0),
    "shift": (lambda c: Calls(lambda x: x + c), 0.0, 7.0),
    "slice": (lambda c: Calls(lambda x: torch.cat([x[:, c : c + 2]] * 2, dim=1)), 0, 1),
    "pad": (lambda c: Calls(lambda x: nn.functional.pad(x[:, :3], c)), (1, 0), (0, 1)),
    "average": (lambda c: images(nn.AvgPool2d(2, 1, 1, count_include_pad=c)), True, False),
    "saturation": (saturated, "tanh", "softsign"),
}


@pytest.mark.parametrize("name", CONSTANTS_OF_A_NETWORK)
def test_a_certificate_is_not_of_a_network_with_other_constants(name):
    """What changes outputs and is neither a weight nor a shape: the state alone fits both networks."""
    make, one, other = CONSTANTS_OF_A_NETWORK[name]
    first, again, second = make(one), make(one), make(other)
    box = BoxOfInputs(low=(-1.0,) * 4, high=(1.0,) * 4)
    failures = Failures(component="synapse", kind="byzantine", capacity=0.1)
    for model in (first, again, second):
        model.eval()(normal(2, 4))
    digests = []
    for model in (first, again, second):
        with torch.no_grad():
            for own, value in zip(model.parameters(), first.parameters(), strict=True):
                own.copy_(value)
        certificate = certify(model, box, shape=(4,), failures=failures, budget=9.0)
        digests.append(certificate.model)
    assert digests[0] == digests[1] != digests[2]
    assert not torch.equal(first(normal(50, 4)), second(normal(50, 4)))


def steep(dtype, **options):
    """A network that reads a Softplus on both sides of its threshold, and multiplies what it gives by 1e6."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Softplus(**options), nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        for layer, weight, bias in ((0, 1.0, 0.0), (1, 1e-12, 20.0), (3, 1e6, 0.0)):
            net[layer].weight.fill_(weight)
            net[layer].bias.fill_(bias)
    return net


def test_a_softplus_is_bounded_where_its_jump_is_lost_in_rounding():
    """By its threshold of 20 torch's falls by 2e-9: less than half a step of float32, and many steps of float64."""
    with pytest.raises(ValueError, match="layer '2' has threshold 20.0, .* bound below a threshold of 40 in float64"):
        summarize(steep(torch.float64), (1,))
    for net in (steep(torch.float64, threshold=40), steep(torch.float32)):
        summary = summarize(net, (1,))
        ranges = of_samples(summary, torch.ones(1, 1))
        (cost, _) = neuron_costs(summary, ranges, Failures())
        x = torch.ones(1, 1, dtype=torch.float64)
        (first, _) = summary.layers
        changed = summary.run(x, {first.node: torch.zeros_like})[-1] - summary.run(x)[-1]
        assert float(changed.abs()) <= float(cost.sums[0, 1]) + 1e-8
    x = torch.linspace(15, 25, 4001)
    assert bool((nn.Softplus()(x).diff() >= 0).all())
    assert float(nn.Softplus()(torch.tensor([20.0, 20.0 + 1e-12], dtype=torch.float64)).diff()) < -1e-9
    with pytest.raises(ValueError, match="has threshold 1, .* below a threshold of 20 in float32"):
        summarize(steep(torch.float32, threshold=1), (1,))


def test_working_in_place_is_no_other_network():
    digests = [summarize(layers(nn.LeakyReLU(0.1, inplace=inplace)), (4,)).structure() for inplace in (False, True)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("net", ["plain", "joined", "resnet20"])
def test_a_head_maps_the_outputs(net):
    make, shape = NETS[net]
    summary, x = summarize(make(), shape), normal(3, *shape)
    matrix = normal(4, summary.num_outputs, seed=3)
    torch.testing.assert_close(summary.with_head(matrix).run(x)[-1], summary.run(x)[-1] @ matrix.double().T)
