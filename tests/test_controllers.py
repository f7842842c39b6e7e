import io
import math

import pytest
import torch

from ftnas.controllers import (
    CONTROLLERS,
    Controller,
    ControllerChoice,
    ControllerConfig,
    EvolutionConfig,
    RandomConfig,
    RandomController,
    ReinforceConfig,
    create_controller,
)
from ftnas.rng import generator
from ftnas.settings import Settings, parse
from ftnas.space.genotype import Genotype
from ftnas.space.space import Space

CONFIGS = {
    "random": RandomConfig(),
    "reinforce": ReinforceConfig(hidden_units=8),
    "evolution": EvolutionConfig(population_size=6, sample_size=3),
}


def make_space(*, nodes=4, primitives=("none", "skip_connect", "conv"), reductions=(1,)):
    known = {"none": "none", "skip_connect": "skip", "conv": "conv_1x1", "pool": "avg_pool_3x3"}
    return Space(
        version=1,
        name="tiny",
        nodes=nodes,
        primitives=tuple(known[name] for name in primitives),
        cells=2,
        reductions=reductions,
        channels=4,
        preprocess="relu_conv_bn_1x1",
    )


def reward_of(genotype):
    return len(set(genotype.canonical_key())) / 40


def play(controller, rounds, *, num=3):
    """Run a little search; return all genotypes asked and all scalars logged."""
    seen = []
    for _ in range(rounds):
        controller.ask(2)  # as the weight steps of a search: asked, never told
        genotypes = controller.ask(num)
        seen.append((genotypes, controller.tell(genotypes, [reward_of(one) for one in genotypes])))
    return seen


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# The contract, for every controller


@pytest.fixture(params=sorted(CONFIGS))
def config(request):
    return CONFIGS[request.param]


def test_the_suite_covers_every_registered_controller():
    assert set(CONFIGS) == set(CONTROLLERS.names())


@pytest.mark.parametrize("reductions", [(1,), ()])
def test_asks_for_legal_genotypes_in_the_number_wanted(config, reductions):
    space = make_space(reductions=reductions)
    controller = create_controller(config, space, seed=0)
    for genotypes, _ in play(controller, 8, num=4):
        assert len(genotypes) == 4
        for genotype in genotypes:
            genotype.validate(space)
    assert len(controller.ask(1)) == 1


def test_same_seed_same_run_and_other_seed_another(config):
    first, again, other = (play(create_controller(config, make_space(), seed=seed), 6) for seed in (3, 3, 4))
    assert first == again
    assert [genotypes for genotypes, _ in first] != [genotypes for genotypes, _ in other]


def test_a_resumed_controller_equals_one_that_never_stopped(config):
    space = make_space()
    straight = create_controller(config, space, seed=5)
    play(straight, 4)
    state = through_a_file(straight.state_dict())
    resumed = create_controller(config, space, seed=99)
    resumed.load_state_dict(state)
    assert play(straight, 5) == play(resumed, 5)
    assert_equal(straight.state_dict(), resumed.state_dict())


def test_a_state_may_be_loaded_twice(config):
    """A controller that goes on from a state leaves the state as it is."""
    space = make_space()
    controller = create_controller(config, space, seed=5)
    play(controller, 4)
    state = controller.state_dict()
    first, second = (create_controller(config, space, seed=seed) for seed in (1, 2))
    first.load_state_dict(state)
    played = play(first, 5)
    second.load_state_dict(state)
    assert play(second, 5) == played
    assert_equal(first.state_dict(), second.state_dict())


def assert_equal(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_a_state_is_a_copy_of_plain_values(config):
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for one in value.values() for leaf in leaves(one)]
        return [leaf for one in value for leaf in leaves(one)] if isinstance(value, list) else [value]

    controller = create_controller(config, make_space(), seed=0)
    play(controller, 2)
    state = controller.state_dict()
    before = through_a_file(state)
    play(controller, 3)
    assert_equal(state, before)
    assert {type(leaf) for leaf in leaves(state)} <= {torch.Tensor, int, float, str}


def test_told_genotypes_need_not_have_been_asked(config):
    space = make_space()
    controller = create_controller(config, space, seed=0)
    foreign = [Genotype.random(space, generator=generator(7, "foreign", index)) for index in range(9)]
    logged = controller.tell(foreign, [0.25] * 9)
    assert logged["reward"] == pytest.approx(0.25)
    assert all(isinstance(value, float) and math.isfinite(value) for value in logged.values())


@pytest.mark.parametrize(
    ("count", "rewards", "words"),
    [(2, [0.5], "as many rewards"), (0, [], "at least one"), (1, [math.nan], "finite"), (1, [math.inf], "finite")],
)
def test_wrong_rewards_are_refused_and_change_nothing(config, count, rewards, words):
    controller = create_controller(config, make_space(), seed=0)
    genotypes = controller.ask(3)[:count]
    before = controller.state_dict()
    with pytest.raises(ValueError, match=words) as error:
        controller.tell(genotypes, rewards)
    assert "\n" not in str(error.value)
    assert_equal(controller.state_dict(), before)


def test_genotypes_of_another_space_are_refused(config):
    controller = create_controller(config, make_space(), seed=0)
    foreign = Genotype.random(make_space(nodes=5), generator=generator(0, "foreign"))
    with pytest.raises(ValueError, match="nodes"):
        controller.tell([foreign], [0.5])


@pytest.mark.parametrize("num", [0, -1])
def test_asking_for_none_is_refused(config, num):
    with pytest.raises(ValueError, match=f"at least 1, got {num}"):
        create_controller(config, make_space(), seed=0).ask(num)


def test_the_global_random_state_is_left_alone(config):
    before = torch.random.get_rng_state()
    controller = create_controller(config, make_space(), seed=0)
    play(controller, 4)
    create_controller(config, make_space(), seed=1).load_state_dict(controller.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["missing", "space", "controller", "generator"])
def test_a_state_of_something_else_is_refused(config, damage):
    controller = create_controller(config, make_space(), seed=0)
    state = dict(controller.state_dict())
    if damage == "missing":
        del state["generator"]
    elif damage == "space":
        state = create_controller(config, make_space(nodes=5), seed=0).state_dict()
    elif damage == "controller":
        state["controller"] = "another"
    else:
        state["generator"] = torch.zeros(3)
    with pytest.raises(ValueError, match="controller state") as error:
        controller.load_state_dict(state)
    assert "\n" not in str(error.value)


# Choosing a controller in a config


class Composed(Settings):
    controller: ControllerChoice


class ConstantConfig(ControllerConfig):
    speed: float = 1.0


class ConstantController(RandomController):
    Config = ConstantConfig


def test_a_config_chooses_by_name_and_keeps_all_fields():
    composed = parse(Composed, {"controller": {"name": "reinforce", "hidden_units": 7}})
    assert composed.controller == ReinforceConfig(hidden_units=7)
    assert parse(Composed, composed.model_dump(mode="json")) == composed
    assert composed.model_dump()["controller"]["softmax_temperature"] == 5.0


def test_a_user_brings_a_controller_with_its_own_settings():
    name = f"{__name__}:ConstantController"
    composed = parse(Composed, {"controller": {"name": name, "speed": 2.0}})
    controller = create_controller(composed.controller, make_space(), seed=0)
    assert type(controller).__name__ == "ConstantController"
    assert controller.config.speed == 2.0
    assert parse(Composed, composed.model_dump(mode="json")) == composed


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "reinforc"}, "controller: unknown controller 'reinforc'; did you mean 'reinforce'?"),
        ({"name": "reinforce", "hiden_units": 3}, "controller: hiden_units: unknown key; did you mean 'hidden_units'?"),
        ({"hidden_units": 3}, "controller: name: required"),
        ({"name": "reinforce", "lr": 0}, "controller: lr: input should be greater than 0, got 0"),
        ({"name": "evolution", "population_size": 4}, "sample_size must be at most population_size=4, got 25"),
        ({"name": "os.path:join"}, "expected a subclass of"),
    ],
)
def test_mistakes_get_one_line(section, message):
    with pytest.raises(ValueError) as error:
        parse(Composed, {"controller": section})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_contract_has_four_methods():
    assert Controller.__abstractmethods__ == {"ask", "tell", "state_dict", "load_state_dict"}


# Evolution


def num_changes(left, right, space):
    rows = [one.to_decisions(space) for one in (left, right)]
    flat = [[value for cell in row.values() for node in cell for value in node] for row in rows]
    return sum(a != b for a, b in zip(*flat, strict=True))


def test_evolution_draws_uniformly_until_it_is_full_and_mutates_the_best_then():
    space = make_space(nodes=6)
    config = EvolutionConfig(population_size=5, sample_size=5)
    controller = create_controller(config, space, seed=0)
    uniform = create_controller(RandomConfig(), space, seed=0)
    uniform.generator = generator(0, "controller", "evolution")
    first = controller.ask(5)
    assert first == uniform.ask(5)
    controller.tell(first[:4], [0.1, 0.2, 0.3, 0.4])
    assert controller.ask(1) == uniform.ask(1)
    controller.tell(first[4:], [0.9])
    # The best is missed by 5 draws with replacement with probability 0.8^5; its child is one decision away.
    children = controller.ask(60)
    from_best = sum(num_changes(first[4], child, space) == 1 for child in children)
    assert all(min(num_changes(parent, child, space) for parent in first) == 1 for child in children)
    # Binomial(60, 1 - 0.8^5 = 0.672): under 20 or over 58 with probability below 1e-6.
    assert 20 <= from_best <= 58


def test_evolution_forgets_the_oldest_however_good():
    space = make_space()
    controller = create_controller(EvolutionConfig(population_size=3, sample_size=2), space, seed=0)
    genotypes = [Genotype.random(space, generator=generator(0, "age", index)) for index in range(5)]
    logged = controller.tell(genotypes[:4], [0.9, 0.1, 0.2, 0.3])
    assert list(controller.population) == list(zip(genotypes[1:4], [0.1, 0.2, 0.3], strict=True))
    assert logged["best_reward"] == 0.3
    controller.tell(genotypes[4:], [0.05])
    assert [reward for _, reward in controller.population] == [0.2, 0.3, 0.05]


def test_evolution_refuses_a_larger_population_and_a_torn_one():
    state = create_controller(EvolutionConfig(population_size=9, sample_size=2), make_space(), seed=0)
    play(state, 3)
    small = create_controller(EvolutionConfig(population_size=3, sample_size=2), make_space(), seed=0)
    with pytest.raises(ValueError, match="at most population_size=3"):
        small.load_state_dict(state.state_dict())
    torn = state.state_dict()
    torn["rewards"] = torn["rewards"][:-1]
    with pytest.raises(ValueError, match="as many rewards"):
        state.load_state_dict(torn)
