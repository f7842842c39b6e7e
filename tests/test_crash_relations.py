"""Layers together, liars, weights, losses, tails: against enumeration, other ways to the same number, and by order."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftnas import bounds
from ftnas.bounds import Cut, Moments, WithLoss, exact, linear, single
from ftnas.rng import generator, isolated


def dense(*, widths=(5, 6, 4, 3), seed=0, kind=nn.Sigmoid):
    with isolated(seed, "net"):
        layers = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(a, b)] + ([kind()] if number < len(widths) - 2 else [])
        return nn.Sequential(*layers).double()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed, "x"), dtype=torch.float64)


def slope(xs, errors):
    return float(np.polyfit(np.log(xs), np.log([float(error) for error in errors]), 1)[0])


@torch.no_grad()
def test_all_patterns_over_two_layers_against_a_loop():
    net, x, (p, r) = dense(widths=(3, 2, 2)), normal(2, 3), (0.2, 0.3)
    found = bounds.exact_jointly([(Cut(net), p), (Cut(net, "1"), r)], x)
    mean = square = 0.0
    for first in itertools.product((0.0, 1.0), repeat=3):
        for second in itertools.product((0.0, 1.0), repeat=2):
            weight = np.prod([1 - p if alive else p for alive in first] + [1 - r if alive else r for alive in second])
            error = net[2](net[1](net[0](x * torch.tensor(first))) * torch.tensor(second)) - net(x)
            mean, square = mean + weight * error, square + weight * error**2
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, square - mean**2)


def test_sampling_over_layers_meets_the_exact_moments():
    net, x, samples = dense(kind=nn.ReLU), normal(2, 5), 20_000
    failing = [(Cut(net), 0.2), (Cut(net, "1"), 0.1), (Cut(net, "3"), 0.3)]
    truth = bounds.exact_jointly(failing, x)
    found = bounds.sampled_jointly(failing, x, samples=samples, generator=generator(0, "crashes"))
    assert ((found.mean - truth.mean).abs() < 5.5 * found.mean_error).all()  # 6 normal figures: 3e-7
    assert torch.allclose(found.variance, truth.variance, rtol=0.15, atol=1e-6)


def test_channels_of_two_convolutions_crash_together():
    with isolated(0, "net"):
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = normal(2, 1, 6, 6).float()
    cuts = [Cut(net, "1", unit="channel"), Cut(net, "3", unit="channel")]
    found = bounds.exact_jointly([(cut, 0.5) for cut in cuts], x)
    errors = []
    with torch.no_grad():
        for first, second in itertools.product(
            itertools.product((0.0, 1.0), repeat=3), itertools.product((0, 1), repeat=2)
        ):
            hidden = net[1](net[0](x)) * torch.tensor(first)[None, :, None, None]
            hidden = net[3](net[2](hidden)) * torch.tensor(second)[None, :, None, None]
            errors.append(net[5](net[4](hidden)) - net(x))
    torch.testing.assert_close(found.mean, torch.stack(errors).double().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimate", [exact, single])
def test_what_superposition_misses_falls_as_the_square_of_p(estimate):
    net, x, ps = dense(), normal(3, 5), [0.04, 0.02, 0.01, 0.005]
    cuts = [Cut(net), Cut(net, "1"), Cut(net, "3")]
    for what in ("mean", "variance"):
        errors = []
        for p in ps:
            failing = list(zip(cuts, (p, p / 2, p), strict=True))
            truth = bounds.exact_jointly(failing, x)
            sums = bounds.superposed(failing, x, estimate=estimate)
            errors.append((getattr(sums, what) - getattr(truth, what)).abs().mean())
        assert 1.9 < slope(ps, errors) < 2.1, (what, errors)


def test_one_layer_superposed_is_the_layer():
    net, x = dense(), normal(2, 5)
    alone = bounds.superposed([(Cut(net, "1"), 0.1)], x, estimate=exact)
    torch.testing.assert_close(alone.mean, exact(Cut(net, "1"), x, p=0.1).mean)
    torch.testing.assert_close(alone.mean, bounds.exact_jointly([(Cut(net, "1"), 0.1)], x).mean)


@torch.no_grad()
def test_a_liar_is_searched_unit_by_unit():
    net, x = dense(kind=nn.Tanh), normal(2, 5)
    found = bounds.byzantine(Cut(net), x, delta=0.5, steps=4)
    for sample, unit in itertools.product(range(2), range(5)):
        errors = []
        for move in np.linspace(-0.5, 0.5, 9):
            lie = x[sample].clone()
            lie[unit] += move
            errors.append((net(lie) - net(x[sample])).abs())
        torch.testing.assert_close(found[sample, :, unit], torch.stack(errors).amax(0))
    assert (found >= bounds.byzantine(Cut(net), x, delta=0.5) - 1e-12).all()


@pytest.mark.parametrize("layer", ["input", "1"])
def test_crash_variance_bounds_liars_up_to_the_square_of_delta(layer):
    """Proposition 5, in the limit of a small p and with the variance of b3: what is above it falls as delta^2."""
    net, x, p = dense(), normal(4, 5), 1e-3
    cut, deltas = Cut(net, layer), [0.2, 0.1, 0.05, 0.025]
    excess = []
    for delta in deltas:
        bound = bounds.byzantine_from_variance(cut, x, linear(cut, x, p=p).variance, p=p, delta=delta)
        excess.append((bounds.byzantine(cut, x, delta=delta, steps=4) - bound).clamp(min=0.0).amax() + 1e-30)
        assert excess[-1] <= 0.2 * delta**2
    one = dense(widths=(1, 4, 1))  # one unit: equality to first order
    x, cut = normal(6, 1), Cut(one)
    errors = [
        (
            bounds.byzantine_from_variance(cut, x, linear(cut, x, p=p).variance, p=p, delta=delta)
            - bounds.byzantine(cut, x, delta=delta, steps=4)
        )
        .abs()
        .mean()
        for delta in deltas
    ]
    assert 1.9 < slope(deltas, errors) < 2.1


def test_liars_bound_the_crash_variance_and_meet_it_as_delta_falls():
    """Proposition 6: above the variance of b3, by an amount of the order of delta."""
    net, x, p, deltas = dense(), normal(4, 5), 1e-3, [0.2, 0.1, 0.05, 0.025]
    cut = Cut(net)
    errors = []
    for delta in deltas:
        bound = bounds.variance_from_byzantine(cut, x, bounds.byzantine(cut, x, delta=delta), p=p, delta=delta)
        gap = bound - linear(cut, x, p=p).variance
        assert (gap >= -p * delta**2).all()
        errors.append(gap.mean())
    assert 0.9 < slope(deltas, errors) < 1.1


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_weights_tell_what_the_data_jacobian_tells(layer):
    net, x, p = dense(kind=nn.Tanh), normal(20, 5), 0.1
    found = bounds.from_weights(net, layer, x, p=p)
    before = {"0": "input", "2": "1", "4": "3"}[layer]
    truth = linear(Cut(net, before), x, p=p)
    torch.testing.assert_close(found.moments.mean, truth.mean)
    torch.testing.assert_close(found.moments.variance, truth.variance)
    assert (truth.mean.norm(dim=1) <= found.norm_bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_of_a_convolution_tell_it_by_input_channel(groups, padding):
    with isolated(0, "net"):
        conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, padding_mode=padding)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
        )
    net, x = net.double(), normal(3, 1, 8, 8)
    found = bounds.from_weights(net, "2", x, p=0.1)
    truth = linear(Cut(net, "1", unit="channel"), x, p=0.1)
    torch.testing.assert_close(found.moments.mean, truth.mean)
    torch.testing.assert_close(found.moments.variance, truth.variance)
    assert (truth.mean.norm(dim=1) <= found.norm_bound).all()


def test_the_bound_by_weights_is_reached_where_they_are_collinear_with_their_gradient():
    net, x = nn.Sequential(nn.Linear(3, 1, bias=False)).double(), normal(1, 3)
    with torch.no_grad():
        net[0].weight.copy_(2.0 * x)
    found = bounds.from_weights(net, "0", x, p=0.2)
    torch.testing.assert_close(found.moments.mean.abs()[:, 0], found.norm_bound)


@pytest.mark.parametrize("layer", ["input", "1"])
def test_three_ways_to_r_agree(layer):
    net, x, p = dense(kind=nn.Tanh), normal(6, 5), 0.1
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    by_outputs = bounds.loss_shift(net, x, labels, linear(Cut(net, layer), x, p=p).mean).mean()
    name = {"input": "0", "1": "2"}[layer]
    by_weights = bounds.loss_shift_from_weights(net, name, x, labels, p=p)
    whole = linear(Cut(WithLoss(net, labels), layer if layer == "input" else f"model.{layer}"), x, p=p).mean.mean()
    torch.testing.assert_close(by_weights, by_outputs)
    torch.testing.assert_close(whole, by_outputs)


def test_the_loss_under_crashes_is_that_of_dropout_masks():
    net, x, labels, p = dense(), normal(2, 5), torch.tensor([0, 2]), 0.3
    found = exact(Cut(WithLoss(net, labels), "model.1"), x, p=p).mean[:, 0]
    with torch.no_grad():
        hidden, truth = net[1](net[0](x)), torch.zeros(2, dtype=torch.float64)
        for pattern in itertools.product((0.0, 1.0), repeat=6):
            weight = np.prod([1 - p if alive else p for alive in pattern])
            loss = F.cross_entropy(net[2:](hidden * torch.tensor(pattern)), labels, reduction="none")
            truth += weight * (loss - F.cross_entropy(net(x), labels, reduction="none"))
    torch.testing.assert_close(found, truth)


def test_dropout_is_r_to_first_order_of_the_error_alone():
    """Proposition 9 states a remainder of O(p^2 + q^2). That of a fixed network is of the order of p.

    The expected squared error is of the order of p as the mean is, so that the curvature of the loss stays: R and the
    true change differ by a share of p. All single crashes of the loss itself are off by p^2, as Proposition 3 says.
    """
    net, x, ps = dense(), normal(8, 5), [0.04, 0.02, 0.01, 0.005]
    labels = torch.arange(8) % 3
    cut, with_loss = Cut(net, "1"), Cut(WithLoss(net, labels), "model.1")
    by_outputs, by_loss = [], []
    for p in ps:
        truth = exact(with_loss, x, p=p).mean[:, 0]
        by_outputs.append((truth - bounds.loss_shift(net, x, labels, exact(cut, x, p=p).mean)).abs().mean())
        by_loss.append((truth - single(with_loss, x, p=p).mean[:, 0]).abs().mean())
    assert 0.9 < slope(ps, by_outputs) < 1.1
    assert 1.9 < slope(ps, by_loss) < 2.1


def test_r_is_zero_where_the_gradient_is():
    """Corollary 4: an ordinary minimum of the average loss; the outputs' own mean error is not zero there."""
    x, labels = normal(12, 4), torch.arange(12) % 3
    with isolated(0, "net"):
        net = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1.0, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    mean = exact(Cut(net), x, p=0.1).mean
    assert bounds.loss_shift(net, x, labels, mean).mean().abs() < 1e-6
    assert mean.abs().mean() > 1e-3


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_tails_hold_for_the_exact_distribution(p):
    net, x = dense(kind=nn.ReLU), normal(3, 5)
    cut = Cut(net, "1")
    truth = exact(cut, x, p=p)
    values = cut.values(x)
    errors, weights = [], []
    with torch.no_grad():
        for pattern in itertools.product((False, True), repeat=6):
            errors.append(cut.rest(x)(cut.masked(values, torch.tensor([pattern]))[0]) - net(x))
            weights.append(p ** pattern.count(False) * (1 - p) ** pattern.count(True))
    errors, weights = torch.stack(errors), torch.tensor(weights, dtype=torch.float64)
    for epsilon in (0.02, 0.1, 0.3, 1.0):
        share = weights[:, None, None]
        assert ((share * (errors.abs() >= epsilon)).sum(0) <= bounds.tail(truth, epsilon) + 1e-12).all()
        assert ((share * (errors >= epsilon)).sum(0) <= bounds.tail_above(truth, epsilon) + 1e-12).all()
        size = (weights[:, None] * (errors.norm(dim=2) >= epsilon)).sum(0)
        assert (size <= bounds.tail_norm(truth, epsilon) + 1e-12).all()
    assert (bounds.tail(truth, 5.0) < 1.0).all()


def test_tails_are_reached_by_one_unit():
    """Two values, 0 and -w x, each with its probability: Cantelli's extreme case, and Markov's."""
    net, x, p = nn.Sequential(nn.Linear(1, 1, bias=False)).double(), torch.full((1, 1), -2.0, dtype=torch.float64), 0.2
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    moments = exact(Cut(net), x, p=p)  # the error is 2 with probability p, else 0
    torch.testing.assert_close(bounds.tail_above(moments, 2.0), torch.full((1, 1), p, dtype=torch.float64))
    torch.testing.assert_close(bounds.tail(moments, 2.0), torch.full((1, 1), p, dtype=torch.float64))
    torch.testing.assert_close(bounds.tail_norm(moments, 2.0), torch.full((1,), p, dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [1e-170, 1e200])
def test_tails_whose_squares_no_float_holds(epsilon):
    zero, some = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), epsilon / 10, dtype=torch.float64)
    for found in (bounds.tail, bounds.tail_above):
        assert found(Moments(zero, zero), epsilon).tolist() == [[0.0, 0.0]]
    assert bounds.tail_norm(Moments(zero, zero), epsilon).tolist() == [0.0]
    assert bounds.tail_norm(Moments(some, zero), epsilon).tolist() == pytest.approx([0.02])
    assert bounds.tail(Moments(some, zero), epsilon).tolist() == [[0.0, 0.0]]  # a sure error below epsilon
    assert bounds.tail(Moments(10 * some, zero), epsilon).tolist() == [[1.0, 1.0]]


def test_a_sure_error_has_no_tail():
    none = Moments(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
    assert bounds.tail(none, 1.0).tolist() == [[0.0, 1.0]]
    assert bounds.tail_above(none, 1.0).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Tanh])
def test_with_width_b3_nears_b4_in_the_variance_and_not_in_the_mean(kind):
    """Random nets: q^2 = 1 / n. What b3 misses of the variance falls as 1 / n; of the mean n terms of it stay."""
    widths, errors = [16, 64, 256], {"mean": [], "variance": []}
    for n in widths:
        found = {"mean": [], "variance": []}
        for seed in range(5):
            net, x = dense(widths=(n, n, n, 1), seed=seed, kind=kind), normal(4, n, seed=seed)
            with torch.no_grad():
                for layer in (net[0], net[2], net[4]):
                    layer.weight.mul_(3**0.5)  # N(0, 1 / inputs) in variance
            cut = Cut(net, "1")
            for what, values in found.items():
                b3, b4 = (getattr(estimate(cut, x, p=1e-3), what) for estimate in (linear, single))
                values.append(float((b3 - b4).abs().mean() / b4.abs().mean()))
        for what, values in found.items():
            errors[what].append(np.mean(values))
    assert -1.25 < slope(widths, errors["variance"]) < -0.75, errors
    assert slope(widths, errors["mean"]) > -0.35, errors


def test_b3_and_b4_are_within_five_percent_of_monte_carlo_where_they_should_be():
    """Small p, many units, weak curvature: 400 units, p n = 0.4. Beside the 5%, 5.5 standard errors of the sampling."""
    net, x, p, samples = dense(widths=(400, 20, 1), kind=nn.Tanh), normal(3, 400).abs(), 1e-3, 16_000
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.abs_().mul_(0.1)
    cut = Cut(net)
    truth = bounds.sampled(cut, x, p=p, samples=samples, generator=generator(0, "crashes"))
    fourth = 5.0 * truth.variance / samples**0.5 * (1.0 + 1.0 / (p * 400)) ** 0.5  # of a compound Poisson sum, amply
    for found in (linear(cut, x, p=p), single(cut, x, p=p)):
        assert ((found.mean - truth.mean).abs() < 0.05 * truth.mean.abs() + 5.5 * truth.mean_error).all()
        assert ((found.variance - truth.variance).abs() < 0.05 * truth.variance + 1.1 * fourth).all()
        assert (5.5 * truth.mean_error < 0.1 * truth.mean.abs()).all()  # the sampling could tell


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: bounds.superposed([], x), "no layer fails"),
        (lambda net, x: bounds.superposed([(Cut(net), 0.1), (Cut(dense(), "1"), 0.1)], x), "of different models"),
        (lambda net, x: bounds.superposed([(Cut(net), 0.1), (Cut(net), 0.2)], x), "layer 'input' is named twice"),
        (lambda net, x: bounds.exact_jointly([(Cut(net), 2.0)], x), "a crash probability is in"),
        (
            lambda net, x: bounds.exact_jointly([(Cut(nn.Flatten()), 0.1)], torch.ones(1, 21)),
            "21 units have 2\\^21 patterns",
        ),
        (
            lambda net, x: bounds.sampled_jointly([(Cut(net), 0.1)], x, samples=1, generator=None),
            "samples must be at least 2",
        ),
        (
            lambda net, x: bounds.byzantine(Cut(net, unit="channel"), x, delta=0.1),
            "a Byzantine failure is of one value",
        ),
        (lambda net, x: bounds.byzantine(Cut(net), x, delta=0.0), "delta must be above 0"),
        (lambda net, x: bounds.byzantine(Cut(net), x, delta=0.1, steps=0), "steps must be at least 1"),
        (
            lambda net, x: bounds.byzantine_from_variance(Cut(net), x, x, p=0.0, delta=0.1),
            "a crash probability is in \\(0, 1\\] here",
        ),
        (lambda net, x: bounds.from_weights(net, "1", x, p=0.1), "layer '1' is a Sigmoid; name a Linear or a Conv2d"),
        (lambda net, x: bounds.from_weights(net, "7", x, p=0.1), "no layer '7'"),
        (lambda net, x: bounds.from_weights(net, "0", x, p=1.1), "a crash probability is in"),
        (lambda net, x: bounds.tail(Moments(x, x), 0.0), "epsilon must be above 0"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(dense(), normal(1, 5))
    assert "\n" not in str(caught.value)


def test_a_layer_that_runs_twice_has_no_weight_form():
    shared = nn.Linear(5, 5).double()
    with pytest.raises(ValueError, match="layer '0' runs 2 times"):
        bounds.from_weights(nn.Sequential(shared, shared), "0", normal(1, 5), p=0.1)
