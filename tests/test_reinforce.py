"""REINFORCE against torch's own LSTM cell, finite differences, enumeration and a bandit."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2
from test_controllers import assert_equal, make_space, reward_of
from torch import nn

from ftnas.controllers import ReinforceConfig, create_controller
from ftnas.rng import generator
from ftnas.space.genotype import Genotype


def reference_scores(controller, genotype):
    """Log-probabilities and entropies [C][T], with torch's own LSTM cell, one cell type at a time."""
    policies, config = controller.policies, controller.config
    scores = []
    for index, cell_type in enumerate(controller.space.cell_types):
        lstm = nn.LSTMCell(config.hidden_units, config.hidden_units)
        order = torch.arange(4 * config.hidden_units).view(4, -1)[[1, 0, 3, 2]].flatten()  # f i o g -> i f g o
        with torch.no_grad():
            lstm.weight_ih.copy_(policies.input_weight[index].T[order])
            lstm.weight_hh.copy_(policies.hidden_weight[index].T[order])
            lstm.bias_ih.copy_(policies.bias[index, 0][order])
            lstm.bias_hh.zero_()
        state, token, chosen = None, 0, []
        for number, row in enumerate(genotype.to_decisions(controller.space)[cell_type], start=2):
            for slot, choice in enumerate(row):
                state = lstm(policies.embedding[index, token].unsqueeze(0), state)
                head = policies.source_head[index][:, :number] if slot < 2 else policies.primitive_head[index]
                logits = (state[0][0] @ head) / config.softmax_temperature
                if config.tanh_constant is not None:
                    logits = config.tanh_constant * torch.tanh(logits)
                distribution = torch.distributions.Categorical(logits=logits)
                chosen.append((distribution.log_prob(torch.tensor(choice)), distribution.entropy()))
                token = 1 + choice if slot < 2 else controller.space.nodes + choice
        scores.append(chosen)
    return torch.stack([torch.stack([torch.stack(pair) for pair in cell]) for cell in scores])


def peaked(space, *, seed=0, **settings):
    """A controller far from uniform, so that log-probabilities differ."""
    return create_controller(
        ReinforceConfig(hidden_units=6, init_range=2.0, softmax_temperature=1.0, **settings), space, seed=seed
    )


@pytest.mark.parametrize("tanh_constant", [None, 1.5])
def test_teacher_forcing_agrees_with_sampling_and_with_a_plain_lstm(tanh_constant):
    controller = peaked(make_space(nodes=5), tanh_constant=tanh_constant)
    choices, rows = controller.policies.sample(7, generator=generator(0, "test"))
    at_sampling = torch.stack(
        [row.gather(-1, choices[..., step, None]).squeeze(-1) for step, row in enumerate(rows)], dim=-1
    )
    log_probs, entropies = controller.policies.score(choices)
    assert torch.equal(log_probs, at_sampling)
    genotypes = [
        Genotype.from_decisions(controller.space, dict(zip(("normal", "reduce"), cells, strict=True)))
        for cells in choices.unflatten(-1, (-1, 4)).transpose(0, 1).tolist()
    ]
    assert torch.equal(controller.encode(genotypes), choices)
    for index, genotype in enumerate(genotypes):
        expected = reference_scores(controller, genotype)
        torch.testing.assert_close(log_probs[:, index], expected[..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropies[:, index], expected[..., 1], rtol=1e-4, atol=1e-5)


def every_genotype(space):
    """All genotypes of a space with normal cells only."""
    sizes = [size for node in range(2, space.nodes) for size in (node, node, *[len(space.primitives)] * 2)]
    for choices in itertools.product(*map(range, sizes)):
        rows = [list(choices[start : start + 4]) for start in range(0, len(choices), 4)]
        yield Genotype.from_decisions(space, {"normal": rows})


@pytest.fixture
def tiny():
    """576 genotypes: one cell type, two inner nodes, two primitives."""
    return make_space(primitives=("skip_connect", "conv"), reductions=())


def test_probabilities_of_all_genotypes_sum_to_one_and_are_those_of_the_draws(tiny):
    controller = peaked(tiny)
    genotypes = list(every_genotype(tiny))
    assert len(genotypes) == 576
    log_probs, _ = controller.policies.score(controller.encode(genotypes))
    probabilities = log_probs.double().sum(dim=(0, 2)).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
    # Chi-square over genotypes expected 5 times or more; false alarm 1e-7.
    draws = 5_000
    index = {genotype: number for number, genotype in enumerate(genotypes)}
    counts = torch.zeros(len(genotypes), dtype=torch.float64)
    for genotype in controller.ask(draws):
        counts[index[genotype]] += 1
    expected = probabilities.detach() * draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None] + 1e-9])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert len(expected) > 20
    assert statistic < chi2.isf(1e-7, len(expected) - 1)


def captured_gradient(controller, genotypes, rewards):
    """Gradient that one tell gives the optimizer, flattened."""
    controller.optimizer.step = lambda: None
    controller.tell(genotypes, rewards)
    return torch.cat([parameter.grad.flatten() for parameter in controller.policies.parameters()])


def test_gradient_is_that_of_the_stated_loss():
    controller = peaked(make_space(nodes=3), entropy_coefficient=0.3, grad_clip=None)
    controller.policies.double()
    controller.num_updates, controller.baseline = 1, 0.4
    genotypes, rewards = controller.ask(3), [0.9, 0.1, 0.5]
    gradient = captured_gradient(controller, genotypes, rewards)

    def loss():
        scores = [reference_double(controller, genotype) for genotype in genotypes]
        gain = sum((r - 0.4) * s[..., 0].sum() for r, s in zip(rewards, scores, strict=True)) / 3
        return -gain - 0.3 * sum(s[..., 1].sum() for s in scores) / 3

    finite, step = [], 1e-5
    coordinates = [(p, i) for p in controller.policies.parameters() for i in range(0, p.numel(), 29)]
    for parameter, position in coordinates:
        flat = parameter.data.view(-1)
        kept = flat[position].item()
        flat[position] = kept + step
        above = loss().item()
        flat[position] = kept - step
        below = loss().item()
        flat[position] = kept
        finite.append((above - below) / (2 * step))
    parameters = list(controller.policies.parameters())
    offsets = dict(zip(map(id, parameters), itertools.accumulate([0, *(p.numel() for p in parameters)]), strict=False))
    picked = torch.stack([gradient[offsets[id(parameter)] + position] for parameter, position in coordinates])
    torch.testing.assert_close(picked, torch.tensor(finite, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    assert picked.abs().max() > 1e-2


def reference_double(controller, genotype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return reference_scores(controller, genotype)
    finally:
        torch.set_default_dtype(previous)


def test_expected_gradient_is_that_of_the_expected_reward(tiny):
    """The policy gradient theorem by enumeration: sum of pi(a) grad_a = grad of sum of pi(a) R(a), any baseline."""
    controller = peaked(tiny, entropy_coefficient=0.0, grad_clip=None)
    controller.policies.double()
    genotypes = list(every_genotype(tiny))
    rewards = torch.tensor([reward_of(genotype) for genotype in genotypes], dtype=torch.float64)
    encoded = controller.encode(genotypes)
    log_probs, _ = controller.policies.score(encoded)
    probabilities = log_probs.sum(dim=(0, 2)).exp()
    parameters = list(controller.policies.parameters())
    exact = torch.autograd.grad((probabilities * rewards).sum(), parameters)
    # One tell weights rollouts equally, so rewards carry pi(a): R' - b = n pi(a) (R - 0.7).
    weights = len(genotypes) * probabilities.detach()
    controller.num_updates, controller.baseline = 1, 0.0
    gradient = captured_gradient(controller, genotypes, (weights * (rewards - 0.7)).tolist())
    torch.testing.assert_close(-gradient, torch.cat([one.flatten() for one in exact]), rtol=1e-8, atol=1e-10)


def test_the_better_arm_becomes_likelier():
    """A bandit: the reward is the share of edges that carry the convolution.

    Over 25 seeds the share of the worse cell rose from 1/3 to a median of 0.94 and at least 0.90; its logit had mean
    2.86 and standard deviation 0.34. The bound 0.6 lies 7 of those below: false alarm under 1e-10 should another
    machine's arithmetic send the run another way. A policy that does not learn, or learns downwards, stays under it.
    """
    controller = create_controller(ReinforceConfig(hidden_units=16, lr=0.02), make_space(), seed=0)
    before = controller.policy_summary()
    for _ in range(60):
        genotypes = controller.ask(8)
        shares = [
            sum(edge.op == "conv_1x1" for cell in one.cells.values() for node in cell for edge in node) / 8
            for one in genotypes
        ]
        controller.tell(genotypes, shares)
    after = controller.policy_summary()
    for cell in ("normal", "reduce"):
        assert before[f"operator/{cell}/conv_1x1"] == pytest.approx(1 / 3, abs=0.05)
        assert after[f"operator/{cell}/conv_1x1"] > 0.6


def test_an_untrained_controller_is_nearly_uniform():
    controller = create_controller(ReinforceConfig(), make_space(nodes=6), seed=0)
    summary = controller.policy_summary()
    assert summary["entropy"] == pytest.approx(1.0, abs=1e-3)
    for cell in ("normal", "reduce"):
        shares = [summary[f"operator/{cell}/{primitive}"] for primitive in controller.space.primitives]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        assert shares == pytest.approx([1 / 3] * 3, abs=0.01)


def test_the_summary_moves_nothing():
    controller = create_controller(ReinforceConfig(hidden_units=8), make_space(), seed=0)
    before = controller.state_dict()
    assert controller.policy_summary() == controller.policy_summary()
    assert_equal(controller.state_dict(), before)


def test_logged_entropy_is_per_decision_and_relative():
    space = make_space(primitives=("conv",))
    controller = peaked(space)
    genotype = controller.ask(1)[0]
    expected = reference_scores(controller, genotype)[..., 1].detach()
    # Nodes 2 and 3 choose between 2 and 3 sources, twice each; the one primitive is no choice.
    relative = expected[:, [0, 1, 4, 5]] / torch.tensor([2.0, 2.0, 3.0, 3.0]).log()
    logged = controller.tell([genotype], [0.5])
    assert logged["entropy_normal"] == pytest.approx(relative[0].mean().item(), abs=1e-5)
    assert logged["entropy_reduce"] == pytest.approx(relative[1].mean().item(), abs=1e-5)
    assert logged["entropy"] == pytest.approx(relative.mean().item(), abs=1e-5)


def test_the_baseline_starts_at_the_first_reward_and_moves_after_the_advantage():
    controller = create_controller(ReinforceConfig(hidden_units=4, baseline_momentum=0.9), make_space(), seed=0)
    genotypes = controller.ask(2)
    logged = [controller.tell(genotypes, rewards) for rewards in ([0.2, 0.4], [0.8, 1.0], [0.0, 0.2])]
    # By hand: b = 0.3; then 0.9 * 0.3 + 0.1 * 0.3 = 0.3; then 0.9 * 0.3 + 0.1 * 0.9 = 0.36.
    assert [one["baseline"] for one in logged] == pytest.approx([0.3, 0.3, 0.36])
    assert [one["advantage"] for one in logged] == pytest.approx([0.0, 0.6, -0.26])
    assert controller.baseline == pytest.approx(0.9 * 0.36 + 0.1 * 0.1)


def test_a_zero_advantage_without_entropy_bonus_moves_nothing():
    controller = create_controller(ReinforceConfig(hidden_units=4, entropy_coefficient=0.0), make_space(), seed=0)
    before = {name: value.clone() for name, value in controller.policies.state_dict().items()}
    assert controller.tell(controller.ask(1), [0.7])["grad_norm"] == 0.0
    assert_equal(dict(controller.policies.state_dict()), before)


def test_the_gradient_is_clipped_to_its_norm():
    gradients = []
    for clip in (None, 0.01):
        controller = peaked(make_space(), grad_clip=clip)
        genotypes = controller.ask(2)
        gradients.append(captured_gradient(controller, genotypes, [0.0, 5.0]))
    free, clipped = gradients
    assert free.norm() > 0.02
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-4, atol=1e-6)


def test_cell_types_do_not_touch_each_other():
    controller = peaked(make_space())
    encoded = controller.encode(controller.ask(4))
    log_probs, entropies = controller.policies.score(encoded)
    (log_probs[0].sum() + entropies[0].sum()).backward()
    for parameter in controller.policies.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_parameters_start_uniform_in_the_range():
    """Mean and variance of U(-0.1, 0.1) over all 200,000 values, at 6 standard errors: false alarm 4e-9."""
    controller = create_controller(ReinforceConfig(), make_space(), seed=0)
    values = torch.cat([parameter.detach().flatten() for parameter in controller.policies.parameters()]).double()
    assert values.abs().max() <= 0.1
    assert values.mean().abs() < 6 * 0.1 / math.sqrt(3 * len(values))
    assert ((values**2).mean() - 0.01 / 3).abs() < 6 * 0.01 * math.sqrt(4 / 45 / len(values))


def test_a_state_of_other_hidden_units_is_refused():
    state = create_controller(ReinforceConfig(hidden_units=5), make_space(), seed=0).state_dict()
    with pytest.raises(ValueError, match="must have shape"):
        create_controller(ReinforceConfig(hidden_units=6), make_space(), seed=0).load_state_dict(state)
