"""Every fault model where fault injectors break: batches, layouts, training, state, copies, compiled models, GPUs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from faulty import CASES, VARIATIONS, codes_per_site, float_word, gen, keeps_grid, never_waits, same, site_of
from injected import ADSAF, FIXED, MIBB, Residual, create, images, run, snapshot
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ftnas import inject
from ftnas.faults import (
    FeatureBitFlip,
    NeuronByzantine,
    NeuronCrash,
    Plan,
    ReciprocalNormalVariation,
    WeightBitFlip,
    Where,
)
from ftnas.rng import generator

FLIPS = FeatureBitFlip(bit_error_rate=0.03)


@pytest.fixture(params=CASES)
def fault(request):
    return CASES[request.param]


def quantization_of(fault):
    return None if float_word(fault) else FIXED


def tame(fault):
    """Return the fault model without hits that give NaN: those of exponents and signs."""
    if not float_word(fault):
        return fault
    return fault.model_copy(
        update={"where": Where(bits=tuple(range({"fp32": 23, "fp16": 10, "bf16": 7}[fault.dtype])))}
    )


# Batches and layouts


@pytest.mark.parametrize("errors", ["soft", "hard"])
def test_forwards_one_after_the_other_and_a_smaller_last_batch(fault, errors):
    model = create("separable")
    per_sample = {"0": 8 * 64, "2": 8 * 64, "3": 4 * 64, "7": 3}
    with torch.no_grad(), inject(model, fault, quantization=quantization_of(fault), errors=errors) as injection:
        for batch in (4, 4, 3):
            assert model(images(batch)).shape == (batch, 3)
    record = injection.record
    if fault.target == "feature":
        plans = injection.plans().plans
        for name, values in per_sample.items():
            plan = plans[0, name, 0]
            units = plan.population // (3 if errors == "soft" else 1)  # of the last batch, or of one sample
            assert values % plan.span == 0 and units % (values // plan.span) == 0
            assert record.faults[0].layers[name].sites == units * (11 if errors == "soft" else 1)
    elif errors == "hard":
        assert record.sites == sum(plan.population for plan in injection.plans().plans.values())
    else:
        assert record.sites == 3 * sum(plan.population for plan in injection.plans().plans.values())


@pytest.mark.parametrize("case", [name for name, fault in CASES.items() if keeps_grid(fault)])
def test_channels_last_and_grouped_and_depthwise_give_the_same_result(case):
    fault = CASES[case]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
    ).eval()  # fmt: skip
    with torch.no_grad():  # small integers: sums are exact in any order
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=gen(2)))
    x = torch.randint(-3, 4, (4, 3, 8, 8), generator=gen(3)).float()
    expected = run(model, x, fault)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(run(model, x.contiguous(memory_format=torch.channels_last), fault), expected)


def test_a_module_used_twice_and_defined_after_its_reader_meets_two_buffer_plans():
    model, x = create("twice"), images()
    with torch.no_grad(), inject(model, FLIPS, quantization=FIXED, layers="conv"):
        out = model(x)
    weight, f = FIXED.quantize(model.conv.weight.detach()), x
    with torch.no_grad():
        for call in (0, 1):
            raw = F.conv2d(f, weight, model.conv.bias, padding=1)
            f = F.relu(FIXED.quantize(raw)) if call == 0 else FIXED.quantize(raw)
            site = site_of(shape=raw.shape, layer="conv")
            plan = FLIPS.sample(site, generator=generator(0, FLIPS.name, 0, 0, "conv", call))
            f = FLIPS.apply(f, plan, grid=FIXED.grid(raw))
        head = F.linear(f.mean((2, 3)), FIXED.quantize(model.head.weight), model.head.bias)
    assert torch.equal(out, FIXED.quantize(head))


# Leaving no trace, under every model


@pytest.mark.parametrize("training", [False, True])
def test_the_model_the_batch_and_the_statistics_are_as_before(fault, training):
    model, x = create(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual())).train(training), images()
    before, batch = snapshot(model), x.clone()
    state = torch.get_rng_state()
    with torch.no_grad(), inject(model, fault, quantization=quantization_of(fault)):
        model(x)
        model(x)
    assert torch.equal(x, batch) and torch.equal(torch.get_rng_state(), state)
    after = snapshot(model)
    if not training:
        assert after == before
        return
    moved = {name for (name, one), (_, other) in zip(before["values"], after["values"], strict=True) if one != other}
    assert moved == {
        f"1.bn{n}.{name}" for n in (1, 2) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert int(model[1].bn1.num_batches_tracked) == 2  # the two real forwards, and not the one that was traced
    assert {**after, "values": None} == {**before, "values": None}


def test_weights_are_back_bit_for_bit_after_an_exception(fault):
    model = create("residual")
    before = snapshot(model)
    with pytest.raises(RuntimeError), inject(model, fault, quantization=quantization_of(fault)):
        model(images())
        model(torch.randn(2, 5))
    assert snapshot(model) == before and not _get_current_function_mode_stack()


# Training


@pytest.mark.parametrize("name", ["separable", "residual", "twice"])
def test_training_under_every_model_has_finite_gradients_and_learns(fault, name):
    model, x = create(name).train(), images()
    fault = tame(fault)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with inject(model, fault, quantization=quantization_of(fault), errors="soft") as injection:
        for step in range(2):
            injection.draw = step
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
            optimizer.step()
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert injection.record.hits > 0 and injection.record.nonfinite == 0


def test_gradients_pass_variation_unchanged():
    model, x = create(lambda: nn.Linear(6, 4, bias=False)), torch.randn(5, 6, generator=gen())
    upstream = torch.randn(5, 4, generator=gen(1))
    with inject(model, CASES["log normal"], errors="hard"):
        held = model.weight.detach()
        (model(x) * upstream).sum().backward()
    assert torch.allclose(model.weight.grad, upstream.T @ x)  # straight through, not times the factor
    assert not torch.equal(held, model.weight)


def test_floored_cells_are_counted():
    model = nn.Linear(100, 100, bias=False).eval()
    fault = ReciprocalNormalVariation(sigma=1.0)
    with torch.no_grad(), inject(model, fault) as injection:
        model(torch.zeros(1, 100))
    noise = injection.plans().plans[0, "", 0].codes
    floored = int(((1.0 + noise).abs() < 0.01).sum())
    assert injection.record.faults[0].floored == floored > 0 and injection.record.nonfinite == 0


# State and copies


def test_state_inside_the_block_has_plain_names_and_goes_round():
    model = create("separable")
    plain, x = {name: value.clone() for name, value in model.state_dict().items()}, images()
    other = create("separable", seed=5)
    with torch.no_grad(), inject(model, ADSAF, FLIPS, quantization=FIXED) as injection:
        inside = model.state_dict()
        assert set(inside) == set(plain) and all(torch.equal(inside[name], plain[name]) for name in plain)
        out = model(x)
        file = io.BytesIO()
        torch.save(inside, file)  # a checkpoint in the middle of training
        file.seek(0)
        assert not model.load_state_dict(other.state_dict()).missing_keys
        assert not same(model(x), out)
        model.load_state_dict(torch.load(file, weights_only=True))
        injection.draw = 0
        assert torch.equal(model(x), out)
        with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
            model.load_state_dict({name: value for name, value in plain.items() if name != "0.weight"})
        nested = nn.ModuleDict({"net": model}).state_dict()
        assert set(nested) == {f"net.{name}" for name in plain}
    assert list(model.state_dict()) == list(plain)


@pytest.mark.parametrize("faults", [(MIBB,), (ADSAF,), (FLIPS,), (NeuronCrash(rate=0.1),)])
def test_copies_inside_the_block_are_refused_and_fine_after_it(faults):
    model = create("plain")
    with torch.no_grad(), inject(model, *faults, quantization=FIXED):
        model(images())
        with pytest.raises(
            ValueError, match=r"inside inject\(...\) and cannot be copied there; copy it outside of the block"
        ):
            copy.deepcopy(model)
    assert snapshot(copy.deepcopy(model))["values"] == snapshot(model)["values"]


# Models that no injection can work on


def compiled_in_place():
    model = create("plain")
    model.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(create("plain"), backend="eager"), "is compiled, .* before torch.compile"),
        (lambda: nn.Sequential(torch.compile(create("plain"), backend="eager")), "or a part of it, is compiled"),
        (compiled_in_place, "is compiled, .* before torch.compile"),
        (lambda: torch.jit.script(create("root")), "a scripted model has no hooks"),
        (lambda: nn.Sequential(torch.jit.trace(create("root"), images())), "a scripted model has no hooks"),
        (lambda: create("plain").to("meta"), "the model is on the meta device and has no values to fault"),
    ],
)
def test_models_that_cannot_be_faulted_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        inject(make(), MIBB, quantization=FIXED)
    assert "\n" not in str(error.value)


def test_formats_that_exclude_each_other_are_one_line():
    model = create("plain")
    for faults in ((ADSAF, CASES["flip"]), (CASES["flip fp16"], CASES["flip q2.5"])):
        with pytest.raises(
            ValueError, match="these faults need weights in different formats: .*; inject them one at a"
        ):
            inject(model, *faults, quantization=FIXED)
    with torch.no_grad(), inject(model, ADSAF, CASES["bit_adsaf"], CASES["log normal"], quantization=FIXED):
        model(images())


# Other machines

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu(test):
    for marker in on_gpu:
        test = marker(test)
    return test


@gpu
def test_a_seed_gives_the_same_plans_on_a_gpu(fault):
    kept: list[dict[tuple[int, str, int], Plan]] = []
    for device in ("cpu", "cuda"):
        model, x = create("plain").to(device), images().to(device)
        with torch.no_grad(), inject(model, fault, quantization=quantization_of(fault), seed=3) as injection:
            model(x)
        kept.append(dict(injection.plans().plans))
    assert kept[0].keys() == kept[1].keys()
    for key, plan in kept[0].items():
        assert torch.equal(plan.sites, kept[1][key].sites) and torch.equal(plan.codes, kept[1][key].codes)


@gpu
@pytest.mark.parametrize("where", [None, Where(channels=(0, 1))])
def test_training_on_a_gpu_never_waits(fault, where):
    model, x = create("plain").cuda().train(), images().cuda()
    fault = fault.model_copy(update={"where": where})
    options = {"quantization": quantization_of(fault), "errors": "soft", "draw_on": "device"}
    with inject(model, fault, **options) as injection:
        model(x).sum().backward()  # the first step finds the feature points
        with never_waits():
            model(x).sum().backward()
    assert injection.record.hits > 0


@gpu
def test_a_padded_plan_of_a_gpu_gives_what_the_compact_one_gives(fault):
    site = site_of(fault)
    plan = fault.sample(site, generator=torch.Generator("cuda").manual_seed(0))
    values = torch.randn(site.shape, generator=gen()).mul(20).round().div(128)
    grid = None if float_word(fault) else FIXED.grid(torch.ones(1))
    compact = plan.to(torch.device("cpu")).compact()
    assert isinstance(fault, VARIATIONS) or codes_per_site(compact) == codes_per_site(plan)
    on_device = None if grid is None else FIXED.grid(torch.ones(1, device="cuda"))
    assert torch.allclose(
        fault.apply(values.cuda(), plan, grid=on_device).cpu(), fault.apply(values, compact, grid=grid), equal_nan=True
    )


def test_neurons_of_a_linear_layer_are_its_outputs_whatever_the_unit():
    model = create("linear")
    plans = []
    for unit in ("position", "channel"):
        fault = NeuronByzantine(rate=0.4, capacity=1.0, unit=unit)
        with torch.no_grad(), inject(model, fault, layers="1") as injection:
            model(images())
        plans.append(injection.plans().plans[0, "1", 0])
    assert plans[0].population == plans[1].population == 4 * 16 and torch.equal(plans[0].codes, plans[1].codes)


def test_bits_of_double_and_half_models():
    for dtype, bits in ((torch.float64, 64), (torch.float16, 16), (torch.bfloat16, 16)):
        model = create("root").to(dtype)
        with torch.no_grad(), inject(model, WeightBitFlip(bit_error_rate=0.01)) as injection:
            model(images().to(dtype))
        assert injection.record.sites == bits * model.weight.numel()
