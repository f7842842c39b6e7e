"""`inject` on many kinds of modules: what it computes, what it counts, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from injected import ADSAF, FIXED, MIBB, MODELS, Residual, Spying, create, drawn, gen, images, rounded, run, snapshot
from torch import nn

from ftnas import FixedPoint, Quantization, inject
from ftnas.faults import MiBB, Plan, Site
from ftnas.rng import generator


@pytest.fixture(params=MODELS)
def model(request):
    return create(request.param)


# What it computes, against a version by hand


@pytest.mark.parametrize("fault", [None, MIBB])
def test_a_chain_agrees_with_a_version_by_hand(fault):
    model, x = create("plain"), images()
    first, norm, _, last = model

    def stored(feature, layer, macs):
        # the grid is the one of the values before rounding
        return rounded(feature) if fault is None else _faulty(feature, layer, macs)

    def _faulty(feature, layer, macs):
        stream = generator(7, "mibb", 0, 0, layer, 0)
        plan = fault.sample(Site(layer, tuple(feature.shape), macs, 8), generator=stream)
        return fault.apply(rounded(feature), plan, grid=FIXED.grid(feature))

    with torch.no_grad():
        f = stored(norm(F.conv2d(x, rounded(first.weight), padding=1)), "0", 27)
        expected = stored(F.conv2d(F.relu(f), rounded(last.weight), last.bias), "3", 36)
    assert torch.equal(run(model, x, *([] if fault is None else [fault]), seed=7), expected)


def test_a_residual_block_agrees_with_a_version_by_hand_and_its_skip_stays_clean():
    model, x = create(Residual), torch.randn(4, 4, 8, 8, generator=gen(1))
    every = MiBB(mac_error_rate=1.0)

    def stored(feature, layer):
        if layer == "conv2":
            return rounded(feature)
        stream = generator(0, "mibb", 0, 0, layer, 0)
        plan = every.sample(Site(layer, tuple(feature.shape), 36, 8), generator=stream)
        return every.apply(rounded(feature), plan, grid=FIXED.grid(feature))

    with torch.no_grad():
        f = stored(model.bn1(F.conv2d(x, rounded(model.conv1.weight), padding=1)), "conv1")
        f = stored(model.bn2(F.conv2d(F.relu(f), rounded(model.conv2.weight), padding=1)), "conv2")
        expected = F.relu(f + x)
    before = x.clone()
    assert torch.equal(run(model, x, every, layers="conv1"), expected)
    assert torch.equal(x, before)


def test_the_layers_own_output_is_not_written_to():
    """Whatever else holds the output of a convolution, e.g. a skip path, does not see the faults."""
    held = []

    class Keeping(nn.Conv2d):
        def forward(self, x):
            held.append(super().forward(x))
            return held[-1]

    model = nn.Sequential(Keeping(3, 4, 3), nn.ReLU(inplace=True)).eval()
    run(model, images(), MiBB(mac_error_rate=1.0))
    with torch.no_grad():
        assert torch.equal(held[-1], F.conv2d(images(), rounded(model[0].weight), model[0].bias))


def test_weight_faults_agree_with_a_version_by_hand():
    model, x = create("root"), images()
    form = FixedPoint(encoding="sign_magnitude")
    weight = rounded(model.weight.detach(), "sign_magnitude")
    plan = ADSAF.sample(Site("", tuple(weight.shape), 27, 8), generator=generator(3, "adsaf", 0, "device", "", 0))
    weight = ADSAF.apply(weight, plan, grid=form.grid(model.weight))
    expected = rounded(F.conv2d(x, weight, model.bias).detach())
    assert torch.equal(run(model, x, ADSAF, seed=3), expected)


def test_rram_weights_use_sign_magnitude_by_themselves_and_features_do_not():
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(-torch.eye(4))
    x = torch.eye(4)
    assert run(model, x, ADSAF.with_rate(0.0)).min() == -127 / 128
    assert run(model, x).min() == -1.0
    assert run(model, -128 / 127 * x, ADSAF.with_rate(0.0)).max() == 127 / 128  # of features: 128 LSB is clamped
    assert run(model, torch.eye(4) * 128 / 127, ADSAF.with_rate(0.0)).min() == -1.0  # of features: -128 LSB is there


@pytest.mark.parametrize("bits", [Quantization(weights=FixedPoint(bits=4), features=FixedPoint(bits=6))])
def test_weights_and_features_have_their_own_formats(bits):
    model, x = create("root"), images()
    with torch.no_grad(), inject(model, quantization=bits):
        assert torch.equal(model.weight, FixedPoint(bits=4).quantize(model.parametrizations.weight.original))
        weight, out = model.weight, model(x)
    assert torch.equal(out, FixedPoint(bits=6).quantize(F.conv2d(x, weight, model.bias)).detach())


def test_a_faulty_layer_with_a_batch_norm_is_hit_after_it():
    model, x = create("plain"), images()
    seen = {}
    model[1].register_forward_hook(lambda module, inputs, output: seen.update(before=output.clone()))
    model[2].register_forward_pre_hook(lambda module, inputs: seen.update(after=inputs[0].clone()))
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED, layers="0") as injection:
        model(x)
    changed = int((rounded(seen["before"]) != seen["after"]).sum())
    assert 0 < changed <= injection.record.hits


# Draws


@pytest.mark.parametrize("fault", [MIBB, ADSAF])
@pytest.mark.parametrize("errors", ["soft", "hard"])
def test_the_seed_decides(model, fault, errors):
    one, same, other = (run(model, images(), fault, seed=seed, errors=errors) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one, run(model, images()))


def test_weights_are_hard_by_default_and_features_soft(model):
    x = images()
    with torch.no_grad(), inject(model, ADSAF, quantization=FIXED):
        assert torch.equal(model(x), model(x))
    with torch.no_grad(), inject(model, ADSAF, quantization=FIXED, errors="soft"):
        assert not torch.equal(model(x), model(x))
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED):
        assert not torch.equal(model(x), model(x))
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED, errors="hard"):
        assert torch.equal(model(x), model(x))


def test_a_hard_feature_map_is_the_same_for_every_sample_and_batch_size(model):
    x = images(1).expand(4, -1, -1, -1)  # equal samples, so that the ranges agree, too
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED, errors="hard") as injection:
        out, smaller = model(x), model(x[:3])
        sites = injection.record.sites
    assert torch.allclose(out, out[:1].expand_as(out)) and torch.allclose(smaller, out[:3])
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED, errors="hard") as injection:
        model(x[:1])
    assert injection.record.sites == sites  # positions of one sample
    soft = run(model, x, MiBB(mac_error_rate=0.1))
    assert not torch.allclose(soft, soft[:1].expand_as(soft))


def test_a_hard_feature_map_fits_one_image_size():
    model = create("root")
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED, errors="hard"):
        model(images())
        with pytest.raises(ValueError, match="a defect map fits one shape"):
            model(torch.randn(4, 3, 9, 9))


def test_the_number_of_the_draw_brings_a_draw_back(model):
    with torch.no_grad(), inject(model, MIBB, ADSAF, quantization=FIXED, errors="soft") as injection:
        first, second = model(images()), model(images())
        assert injection.draw == 2
        injection.draw = 1
        assert torch.equal(model(images()), second) and not torch.equal(first, second)


def test_paused_is_quantization_alone(model):
    x = images()
    clean = run(model, x)
    with torch.no_grad(), inject(model, MIBB, ADSAF.with_rate(0.5), quantization=Quantization()) as injection:
        faulty = model(x)
        draw, hits = injection.draw, injection.record.hits
        with injection.paused():
            paused = model(x)
        assert (injection.draw, injection.record.hits) == (draw, hits)
        assert not torch.equal(model(x), paused)
    rram = Quantization(weights=FixedPoint(encoding="sign_magnitude"))
    assert torch.equal(paused, run(model, x, quantization=rram)) and not torch.equal(faulty, paused)
    assert torch.equal(clean, run(model, x, MIBB.with_rate(0.0)))


@pytest.fixture
def spy():
    Spying.seen.clear()
    return Spying(mac_error_rate=0.002)


def test_a_module_used_twice_meets_two_feature_plans_and_one_weight_plan(spy):
    model, x = create("twice"), images()
    with torch.no_grad(), inject(model, spy, quantization=FIXED):
        model(x)
    first, second = spy.seen["conv"]
    assert not torch.equal(first.sites, second.sites)
    for errors in (None, "soft"):
        with inject(model, ADSAF, quantization=FIXED, errors=errors, layers="conv") as injection:
            model(x)
        assert injection.record.sites == model.conv.weight.numel()
    form = FixedPoint(encoding="sign_magnitude")
    with torch.no_grad():
        weight, _ = drawn(ADSAF, form.quantize(model.conv.weight), "conv", 27, form=form)
        f = rounded(F.conv2d(x, weight, model.conv.bias, padding=1))
        f = rounded(F.conv2d(F.relu(f), weight, model.conv.bias, padding=1)).mean((2, 3))
        expected = rounded(F.linear(f, rounded(model.head.weight, "sign_magnitude"), model.head.bias))
    assert torch.equal(run(model, x, ADSAF, errors="soft", layers="conv"), expected)


def test_compared_models_share_draws_where_names_and_shapes_agree(spy):
    plans = []
    for last in ("mine", "yours"):
        spy.seen.clear()
        layers = {"stem": nn.Conv2d(3, 4, 3), "body": nn.Conv2d(4, 4, 3), last: nn.Conv2d(4, 4, 3)}
        run(nn.Sequential(OrderedDict(layers)), images(), spy, seed=9)
        plans.append({name: seen[0] for name, seen in spy.seen.items()})
    for shared in ("stem", "body"):
        assert torch.equal(plans[0][shared].sites, plans[1][shared].sites)
        assert torch.equal(plans[0][shared].codes, plans[1][shared].codes)
    assert not torch.equal(plans[0]["mine"].sites, plans[1]["yours"].sites)


# The record


def test_the_record_equals_an_independent_count(model, spy):
    x = images()
    sizes: dict[str, int] = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                handle = module.register_forward_hook(
                    lambda module, inputs, output, name=name: sizes.update({name: sizes.get(name, 0) + output.numel()})
                )
                stack.callback(handle.remove)
        model(x)
        model(x[:3])  # a smaller last batch
    with torch.no_grad(), inject(model, spy, quantization=FIXED) as injection:
        model(x)
        model(x[:3])
    (record,) = injection.record.faults
    assert record.fault == "mibb" and {name: layer.sites for name, layer in record.layers.items()} == sizes
    for name, layer in record.layers.items():
        module = dict(model.named_modules())[name]
        macs = module.weight[0].numel()
        assert layer.hits == sum(len(plan.sites) for plan in spy.seen[name])
        assert layer.expected == pytest.approx(layer.sites * (1 - (1 - 0.002) ** macs))
        assert layer.rate == layer.hits / layer.sites
    assert record.hits == sum(layer.hits for layer in record.layers.values()) == injection.record.hits
    assert record.sites == sum(sizes.values()) == injection.record.sites
    assert set(injection.record.layers) == {name for name, layer in record.layers.items() if layer.hits}


def test_two_equal_fault_models_are_counted_apart():
    with torch.no_grad(), inject(model := create("root"), MIBB, MIBB, quantization=FIXED) as injection:
        model(images())
    one, two = injection.record.faults
    assert one.sites == two.sites == 4 * 4 * 6 * 6 and one.hits != two.hits


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("conv2d", {"0", "2", "3"}),
        ("Linear", {"7"}),
        ("[02]", {"0", "2"}),
        (lambda name, module: getattr(module, "groups", 1) > 1, {"2", "3"}),
        (["linear", "0"], {"0", "7"}),
        (None, {"0", "2", "3", "7"}),
    ],
)
def test_layers_are_selected_by_type_pattern_and_predicate(layers, expected):
    model = create("separable")
    for fault in (MiBB(mac_error_rate=0.05), ADSAF.with_rate(0.5)):
        with torch.no_grad(), inject(model, fault, quantization=FIXED, layers=layers) as injection:
            model(images())
        assert set(injection.record.layers) == expected


def test_no_hit_where_many_are_certain_is_an_error():
    class Broken(MiBB):
        def sample(self, site, *, generator):
            plan = super().sample(site, generator=generator)
            return Plan(plan.sites[:0], plan.codes[:0], plan.population, plan.rate, plan.shape)

    model = create("root")
    before = snapshot(model)
    with (
        pytest.raises(RuntimeError, match=r"mibb hit none of 576 sites where 30 hits"),
        torch.no_grad(),
        inject(model, Broken(mac_error_rate=0.002), quantization=FIXED),
    ):
        model(images())
    assert snapshot(model) == before
    run(model, images(), Broken(mac_error_rate=0.0005))  # 8 expected: too few to tell


def test_a_model_that_never_ran_is_a_warning(model):
    with pytest.warns(UserWarning, match="never ran"), inject(model, MIBB, quantization=FIXED):
        pass
    with warnings.catch_warnings(), pytest.raises(KeyError), inject(model, MIBB, quantization=FIXED):
        raise KeyError  # the exception says enough
