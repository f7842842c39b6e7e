"""The function of a cell's weights as one more decision: space, genotype, controllers, supernet, network, files."""

import copy
import itertools
import pickle

import pytest
import torch
import yaml
from test_search import SPACE, make_search
from torch import nn

from ftnas import FixedPoint, inject, plots, rng
from ftnas.controllers import EvolutionConfig, RandomConfig, ReinforceConfig, create_controller
from ftnas.faults import WeightBitFlip
from ftnas.faults.saturation import saturations
from ftnas.models import ModelConfig, build, build_spec, describe, load_model, save_model
from ftnas.rundir import RunDir
from ftnas.settings import parse
from ftnas.space.genotype import Genotype
from ftnas.space.network import build_network
from ftnas.space.space import Space, load_space
from ftnas.space.supernet import Supernet, copy_path

FUNCTIONS = ("none", "tanh", "softsign")
SCALE = 0.25


def plain_space(**changes) -> Space:
    small = load_space("small-8x8").model_dump()
    primitives = ["none", "skip", "conv_1x1", "sep_conv_3x3"]
    return parse(Space, {**small, "name": "s", "channels": 4, "primitives": primitives, **changes})


@pytest.fixture(scope="module")
def space():
    return plain_space(saturation={"functions": list(FUNCTIONS), "scale": SCALE})


def with_functions(space, normal, reduce):
    drawn = Genotype.random(space, generator=rng.generator(3, "cosearch"))
    return Genotype(items=drawn.items, space=drawn.space, functions=(normal, reduce))


def images(batch=6):
    return torch.randn(batch, 1, 8, 8, generator=rng.generator(0, "images"))


# Values


def test_files_decisions_and_keys_go_round(space, tmp_path):
    seen = set()
    for genotype in itertools.starmap(lambda a, b: with_functions(space, a, b), itertools.product(FUNCTIONS, repeat=2)):
        genotype.validate(space)
        genotype.save(tmp_path / "g.json")
        assert Genotype.load(tmp_path / "g.json") == genotype
        assert Genotype.from_decisions(space, genotype.to_decisions(space)) == genotype
        assert f"normal weights: {genotype.saturation['normal']}" in genotype.describe()
        seen.add((genotype.canonical_key(), hash(genotype)))
    assert len({key for key, _ in seen}) == len(seen) == 9


def test_spaces_without_functions_know_nothing_of_them():
    old = plain_space()
    genotype = Genotype.random(old, generator=rng.generator(0, "old"))
    assert genotype.functions == () and "saturation" not in genotype.to_dict() and "@" not in genotype.canonical_key()
    assert {len(row) for rows in genotype.to_decisions(old).values() for row in rows} == {4}
    network = build_network(genotype, old, num_classes=3, in_channels=1)
    assert not saturations(network) and not saturations(Supernet(old, num_classes=3, in_channels=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"functions": ["tanh"]}, "at least 2"),
        ({"functions": ["tanh", "tan"]}, "tan"),
        ({"functions": ["tanh", "none", "tanh"]}, "each function once, 'tanh' is there twice"),
        ({"functions": ["tanh", "none"], "scale": 0.0}, "greater than 0"),
    ],
)
def test_rules_of_the_space(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        plain_space(saturation=changes)
    assert "\n" not in str(caught.value)


def test_a_genotype_of_the_wrong_kind_is_one_line(space):
    drawn = with_functions(space, "tanh", "none")
    for genotype, where, message in (
        (drawn, plain_space(), "has no such decision, and the genotype has saturation {'normal': 'tanh'"),
        (Genotype(items=drawn.items), space, "decides on the function .* and the genotype has no saturation"),
        (with_functions(space, "arctan", "none"), space, "normal: space 's' has no function 'arctan'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            genotype.validate(where)
        assert "\n" not in str(caught.value)
    for given in ({"normal": "tanh"}, "tanh", {"normal": "tanh", "reduce": 1}):
        with pytest.raises(ValueError, match="saturation: a function for each of"):
            Genotype.from_dict({**drawn.to_dict(), "saturation": given})


def test_random_draws_each_function_equally_often(space):
    """2 x 900 draws of 3: 300 +- 14.1 each; 6 standard deviations are 85, false alarm under 6 x 2e-9."""
    stream = rng.generator(5, "uniform")
    drawn = [Genotype.random(space, generator=stream) for _ in range(900)]
    for cell_type in ("normal", "reduce"):
        counts = [sum(one.saturation[cell_type] == name for one in drawn) for name in FUNCTIONS]
        assert all(abs(count - 300) < 85 for count in counts)


def test_mutation_reaches_functions(space):
    parent, stream = with_functions(space, "tanh", "none"), rng.generator(0, "mutate")
    children = [parent.mutate(space, generator=stream) for _ in range(200)]
    changed = [child for child in children if child.functions != parent.functions]
    # 2 of 18 decisions; none among 200 has probability (16 / 18)^200 = 6e-11
    assert changed and all(child.items == parent.items for child in changed)
    assert all(sum(a != b for a, b in zip(c.functions, parent.functions, strict=True)) == 1 for c in changed)


# Controllers


@pytest.mark.parametrize(
    "config", [RandomConfig(), ReinforceConfig(hidden_units=8), EvolutionConfig(population_size=4, sample_size=2)]
)
def test_controllers_ask_tell_and_go_on(space, config):
    controller = create_controller(config, space, seed=1)
    for _ in range(3):
        asked = controller.ask(4)
        for genotype in asked:
            genotype.validate(space)
        controller.tell(asked, [0.1, 0.2, 0.3, 0.4])
    other = create_controller(config, space, seed=2)
    other.load_state_dict(controller.state_dict())
    assert other.ask(5) == controller.ask(5)
    with pytest.raises(ValueError, match="functions must be None, got"):
        create_controller(config, plain_space(), seed=1).load_state_dict(controller.state_dict())


def test_the_better_function_becomes_likelier(space):
    """A bandit as in the suite of primitives, whose analysis of the bound holds for this decision too."""
    controller = create_controller(ReinforceConfig(hidden_units=16, lr=0.02), space, seed=0)
    before = controller.policy_summary()
    for _ in range(60):
        asked = controller.ask(8)
        controller.tell(asked, [sum(name == "softsign" for name in one.functions) / 2 for one in asked])
    after = controller.policy_summary()
    for cell in ("normal", "reduce"):
        shares = [before[f"saturation/{cell}/{name}"] for name in FUNCTIONS]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5) and shares == pytest.approx([1 / 3] * 3, abs=0.05)
        assert after[f"saturation/{cell}/softsign"] > 0.6


def test_scores_agree_with_what_was_sampled(space):
    controller = create_controller(ReinforceConfig(hidden_units=8, softmax_temperature=0.1), space, seed=0)
    choices, rows = controller.policies.sample(6, generator=rng.generator(0, "x"))
    log_probs, _ = controller.policies.score(choices)
    for step, row in enumerate(rows):
        expected = row.gather(-1, choices[..., step : step + 1]).squeeze(-1)
        torch.testing.assert_close(log_probs[..., step], expected)
    assert choices.shape[-1] == 4 * 2 + 1 and rows[-1].shape[-1] == len(FUNCTIONS)


# Networks


def applied(name, weight):
    exact = {"none": lambda x: x, "tanh": torch.tanh, "softsign": lambda x: x / (1 + x.abs())}[name]
    return weight if name == "none" else exact(weight / SCALE) * SCALE


@pytest.mark.parametrize(("normal", "reduce"), [("tanh", "softsign"), ("none", "tanh"), ("softsign", "none")])
def test_network_and_supernet_apply_the_function_of_each_cell(space, normal, reduce):
    genotype = with_functions(space, normal, reduce)
    with rng.isolated(0, "n"):
        network = build_network(genotype, space, num_classes=3, in_channels=1)
        supernet = Supernet(space, num_classes=3, in_channels=1)
    copy_path(supernet, genotype, network)
    for index, kind in enumerate(("normal", "reduce", "normal")):
        name = genotype.saturation[kind]
        for layer in (m for m in network.cells[index].modules() if isinstance(m, nn.Conv2d)):
            stored = layer.parametrizations.weight.original if name != "none" else layer.weight
            torch.testing.assert_close(layer.weight, applied(name, stored))
    assert "weight" in network.stem[0]._parameters and "weight" in network.classifier._parameters
    # the same with the functions folded by hand into plain weights
    bare = Genotype(items=genotype.items)
    plain = build_network(bare, plain_space(), num_classes=3, in_channels=1)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("saturation")}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            state[f"{path}.weight"] = module.weight.detach().clone()
    plain.load_state_dict(state)
    torch.testing.assert_close(network.train()(images()), plain.train()(images()))
    torch.testing.assert_close(supernet.train()(images(), genotype), network.train()(images()))


def test_the_supernet_switches_copies_and_pickles(space):
    with rng.isolated(0, "n"):
        supernet = Supernet(space, num_classes=3, in_channels=1)
    pair = with_functions(space, "tanh", "none"), with_functions(space, "softsign", "tanh")
    with torch.no_grad():
        first, second = (supernet(images(), one) for one in pair)
        assert not torch.equal(first, second)
        for twin in (supernet, copy.deepcopy(supernet), pickle.loads(pickle.dumps(supernet))):
            assert torch.equal(twin(images(), pair[0]), first) and torch.equal(twin(images(), pair[1]), second)
        with inject(supernet, quantization=FixedPoint()):  # weights are quantized once, and switched after that
            found = [supernet(images(), one) for one in (*pair, pair[0])]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_faults_hit_stored_values_before_the_function(space):
    genotype = with_functions(space, "tanh", "tanh")
    network = build_network(genotype, space, num_classes=3, in_channels=1).eval()
    with torch.no_grad(), inject(network, WeightBitFlip(bit_error_rate=0.02, dtype="fp32"), seed=1) as injection:
        network(images())
        largest = max(float(m.weight.abs().max()) for m in network.cells.modules() if isinstance(m, nn.Conv2d))
    assert injection.record.hits > 0 and largest <= SCALE


# Searches and files


def test_a_search_finds_functions(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"saturation": {"functions": list(FUNCTIONS)}}))
    with RunDir.create(tmp_path / "run", {}) as run:
        search = make_search(path, run.stage("search"), epochs=2, derive={"samples": 2, "finalists": 1})
        winner = search.run()
        assert Genotype.load(run.stage("search").file("genotype.json")).functions == winner.functions
        epochs = list(run.stage("search").journal("epochs.jsonl").records())
    assert set(winner.functions) <= set(FUNCTIONS) and len(winner.functions) == 2
    assert any(key.startswith("controller/") for key in epochs[-1])


def test_model_files_and_starts_keep_the_functions(space, tmp_path):
    genotype = with_functions(space, "softsign", "tanh")
    genotype.save(tmp_path / "g.json")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(space.model_dump(mode="json")))
    config = ModelConfig(genotype=str(tmp_path / "g.json"), space=str(tmp_path / "s.yaml"))
    sizes = {"num_classes": 3, "in_channels": 1, "image_size": 8}
    model = build(config, **sizes, seed=0).eval()
    save_model(tmp_path / "m.pt", model, describe(config, **sizes), {})
    again, _ = load_model(tmp_path / "m.pt")
    assert torch.equal(again(images()), model(images()))
    assert torch.equal(
        build_spec(describe(config, **sizes), seed=9, start=tmp_path / "m.pt").eval()(images()), model(images())
    )
    with_functions(space, "tanh", "tanh").save(tmp_path / "g.json")
    with pytest.raises(ValueError, match="was trained with another function") as caught:
        build(config.model_copy(update={"start": str(tmp_path / "m.pt")}), **sizes, seed=0)
    assert "\n" not in str(caught.value)


def test_drawings_say_the_functions(space):
    figure = plots.draw_genotype(with_functions(space, "softsign", "tanh").to_dict())
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"normal cell, weights: softsign", "reduction cell, weights: tanh"} <= set(texts)
