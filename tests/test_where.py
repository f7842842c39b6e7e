"""Targets and protection: what can be hit, and that the hits which remain are those of the unrestricted draw."""

from __future__ import annotations

import itertools

import pytest
import torch
from faulty import CASES, VARIATIONS, codes_per_site, float_word, gen, padded, site_of
from injected import ADSAF, FIXED, MIBB, create, images
from torch import nn

from ftnas import inject
from ftnas.faults import AdSAF, MiBB, NeuronCrash, Plan, Site, WeightBitFlip, Where
from ftnas.faults.where import restrict

RESTRICTIONS = {
    "channels": Where(channels=(1, 3)),
    "positions": Where(positions=((0, 0), (2, 1), (1, 2))),
    "both": Where(channels=(0, 2), positions=((1, 1), (2, 0))),
    "bits": Where(bits=(0, 5)),
    "all": Where(channels=(0, 1, 3), positions=((0, 1), (1, 0), (2, 2)), bits=(1, 4, 6)),
}


def applies(fault, where: Where) -> bool:
    by_channel = getattr(fault, "unit", None) == "channel"
    return not ((where.bits and fault.num_bits(site_of(fault)) is None) or (where.positions and by_channel))


def covers(where: Where, site: Site, value: int, bit: int | None) -> bool:
    """Tell whether a target covers a value (row-major) and bit, by its index."""
    axes: list[int] = []
    for size in reversed(site.shape):
        axes.insert(0, value % size)
        value //= size
    weight = len(site.shape) == 4 and site.shape[0] == site.channels
    channel, position = axes[0 if weight else -3], tuple(axes[-2:])
    inside = where.channels is None or channel in where.channels
    inside &= where.positions is None or position in where.positions
    return inside and (where.bits is None or bit in where.bits)


def hits_of(plan: Plan, fault, site: Site) -> list[tuple]:
    """Return (site, codes, first value, bit) for every hit."""
    bits = fault.bits_hit(plan).tolist() if fault.num_bits(site) is not None else [None] * len(plan.sites)
    codes = plan.codes.reshape(len(plan.sites), -1).tolist() if len(plan.sites) else []
    first = [unit * plan.span % plan.num_values for unit in plan.sites.tolist()]
    return [
        (unit, tuple(code), value, bit)
        for unit, code, value, bit in zip(plan.sites.tolist(), codes, first, bits, strict=True)
    ]


def allowed(value: int, bit: int | None, site: Site, only: Where | None, never: list[Where]) -> bool:
    return (only is None or covers(only, site, value, bit)) and not any(covers(w, site, value, bit) for w in never)


def enumerated(plan: Plan, fault, site: Site, only: Where | None, never: list[Where]) -> tuple[int, float]:
    """Count units that remain at risk, and the hits expected of them, one by one."""
    num_bits = fault.num_bits(site)
    at_risk, expected = 0, 0.0
    per_bit = num_bits is not None and plan.population * plan.span == num_bits * plan.num_values
    for unit in range(plan.population):
        value = unit * plan.span % plan.num_values
        if num_bits is None or per_bit:
            good = allowed(value, unit // plan.num_values if per_bit else None, site, only, never)
            at_risk, expected = at_risk + good, expected + plan.rate * good
        else:
            good = sum(allowed(value, bit, site, only, never) for bit in range(num_bits))
            at_risk, expected = at_risk + (good > 0), expected + plan.rate * good / num_bits
    return at_risk, expected


@pytest.mark.parametrize("protecting", [False, True])
@pytest.mark.parametrize("name", RESTRICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_hits_that_remain_are_those_of_the_whole_draw_inside_the_target(case, name, protecting):
    fault, where = CASES[case], RESTRICTIONS[name]
    if not applies(fault, where):
        pytest.skip("the model does not tell these apart")
    shape = (4, 3, 3, 3) if fault.target == "weight" else (2, 4, 3, 3)
    site = site_of(fault, shape, macs=5)
    if not isinstance(fault, VARIATIONS):
        fault = fault.with_rate((0.5 if getattr(fault, "unit", None) == "channel" else 0.1) / fault.persistence)
    plan = fault.sample(site, generator=gen(2))
    only, never = (None, [where]) if protecting else (where, [])
    kept = restrict(plan, site, fault, only=only, never=never)
    expected = [hit for hit in hits_of(plan, fault, site) if allowed(*hit[2:], site, only, never)]
    assert hits_of(kept, fault, site) == expected and 0 < len(expected) < len(plan.sites)
    at_risk, hits = enumerated(plan, fault, site, only, never)
    assert kept.num_at_risk == at_risk and kept.num_at_risk * kept.rate == pytest.approx(hits, rel=1e-9)
    assert (kept.population, kept.shape, kept.span) == (plan.population, plan.shape, plan.span)
    # of a padded draw, as on a GPU, the same remain
    again = restrict(padded(plan), site, fault, only=only, never=never).compact()
    assert torch.equal(again.sites, kept.sites) and torch.equal(again.codes, kept.codes)
    assert codes_per_site(again) == codes_per_site(kept)


def test_a_target_and_two_protections_together():
    fault = WeightBitFlip(bit_error_rate=0.2)
    site = site_of(fault, (4, 3, 3, 3))
    plan = fault.sample(site, generator=gen())
    only, never = Where(channels=(0, 1)), [Where(bits=(6, 7)), Where(channels=(1,), positions=((1, 1),))]
    kept = restrict(plan, site, fault, only=only, never=never)
    assert hits_of(kept, fault, site) == [h for h in hits_of(plan, fault, site) if allowed(*h[2:], site, only, never)]
    assert kept.num_at_risk == enumerated(plan, fault, site, only, never)[0] == 6 * (27 + 24)


def test_nothing_left_is_no_hit():
    for fault in (MIBB, WeightBitFlip(bit_error_rate=0.2)):
        site = site_of(fault, (4, 3, 3, 3))
        plan = fault.sample(site, generator=gen())
        kept = restrict(plan, site, fault, only=None, never=[Where(bits=tuple(range(8)))])
        assert len(kept.sites) == kept.num_at_risk == 0 and kept.num_at_risk * kept.rate == 0.0


# In a model


@pytest.mark.parametrize("errors", ["soft", "hard"])
@pytest.mark.parametrize("case", CASES)
def test_faults_stay_inside_where_and_out_of_what_is_protected(case, errors):
    fault, model, x = CASES[case], create("separable"), images()
    fault = fault if isinstance(fault, VARIATIONS) else fault.with_rate(0.4 / fault.persistence)
    quantization = None if float_word(fault) else FIXED
    aimed = fault.model_copy(update={"where": Where(layers=("conv2d",), channels=(0, 1, 2))})
    plans = []
    for model_fault, options in ((fault, {}), (aimed, {"protect": ["3", Where(layers="2", channels=(1,))]})):
        with (
            torch.no_grad(),
            inject(model, model_fault, quantization=quantization, errors=errors, seed=2, **options) as found,
        ):
            model(x)
        plans.append(found.plans())
    whole, kept = plans
    assert kept.layers() == ("0", "2") and kept.hits() > 0
    for (_, layer, _), plan in kept.plans.items():
        full = whole.plans[0, layer, 0]
        site = site_of(fault, plan.shape)
        channels = {0, 1, 2} - ({1} if layer == "2" else set())
        stride = site.channel_stride
        inside = [h for h in hits_of(full, fault, site) if h[2] // stride % site.channels in channels]
        assert hits_of(plan, fault, site) == inside
        assert plan.num_at_risk == full.num_at_risk * len(channels) // site.channels
    record = found.record
    assert record.sites == sum(plan.num_at_risk for plan in kept.plans.values())
    assert record.expected == pytest.approx(sum(plan.num_at_risk * plan.rate for plan in kept.plans.values()))
    assert record.hits == kept.hits()


def test_protected_bits_do_not_help_where_whole_values_fail():
    model, plain = create("root"), NeuronCrash(rate=0.2)
    plans = []
    for protect in ((), Where(bits=(7, 6))):
        with torch.no_grad(), inject(model, plain, protect=protect) as injection:
            model(images())
        plans.append(injection.plans())
    assert torch.equal(plans[0].plans[0, "", 0].sites, plans[1].plans[0, "", 0].sites)


def test_two_models_on_different_layers_and_features_and_weights_together():
    model, x = create("separable"), images()
    faults = (
        MiBB(mac_error_rate=0.01, where={"layers": "conv2d"}),
        AdSAF(where={"layers": "linear"}),
        MiBB(mac_error_rate=0.02, where={"layers": ["7", "depth:0"]}),
        AdSAF(where={"layers": "depth:1-2", "channels": [0]}),
    )
    with torch.no_grad(), inject(model, *faults, quantization=FIXED, seed=5) as injection:
        model(x)
    hit = [set(fault.layers) for fault in injection.record.faults]
    assert hit == [{"0", "2", "3"}, {"7"}, {"0", "7"}, {"2", "3"}]
    assert [fault.layers["2"].sites for fault in injection.record.faults if "2" in fault.layers] == [4 * 8 * 64, 9]
    # each has its own stream, that of its place in the call, whatever stands beside it
    with torch.no_grad(), inject(model, faults[0], quantization=FIXED, seed=5) as alone:
        model(x)
    for key, plan in alone.plans().plans.items():
        assert torch.equal(plan.sites, injection.plans().plans[key].sites)


@pytest.mark.parametrize(
    ("selector", "layers"),
    [("depth:0", {"0"}), ("depth:1-2", {"2", "3"}), ("depth:3-9", {"7"}), (["depth:0-1", "linear"], {"0", "2", "7"})],
)
def test_layers_by_depth(selector, layers):
    model = create("separable")
    with torch.no_grad(), inject(model, ADSAF, quantization=FIXED, layers=selector) as injection:
        model(images())
    assert set(injection.record.layers) == layers
    others = set("0237") - layers
    with torch.no_grad(), inject(model, ADSAF, quantization=FIXED, protect=selector) as injection:
        model(images())
    assert set(injection.record.layers) == others


# Mistakes

BITS = {"where": {"bits": [1]}}


@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        (MiBB(mac_error_rate=0.1, where={"channels": [1, 9]}), {}, "'0': where.channels must be in 0..7, got 9"),
        (MIBB, {"protect": Where(channels=(5,))}, "'3': where.channels must be in 0..3, got 5"),
        (MiBB(mac_error_rate=0.1, where={"bits": [8]}), {}, "'0': where.bits must be in 0..7, got 8"),
        (AdSAF(where={"bits": [1]}), {}, "adsaf hits whole values, so that where.bits has no effect; remove it"),
        (NeuronCrash(rate=0.1, **BITS), {}, "neuron_crash hits whole values, so that where.bits has no effect"),
        (
            MiBB(mac_error_rate=0.1, where={"positions": [[8, 0]]}),
            {},
            r"'0': where.positions must lie in 8 x 8, got \[8, 0\]",
        ),
        (
            MiBB(mac_error_rate=0.1, where={"positions": [[0, 0]], "layers": "linear"}),
            {},
            "'7': mibb has no positions to tell apart here; remove where.positions",
        ),
        (
            NeuronCrash(rate=0.1, unit="channel", where={"positions": [[0, 0]]}),
            {},
            "'0': neuron_crash has no positions to tell apart here",
        ),
        (AdSAF(where={"positions": [[0, 0]], "layers": "0"}), {}, "adsaf has no positions"),  # a 1x1 kernel
        (
            MiBB(mac_error_rate=0.1, where={"layers": "linear"}),
            {"layers": "conv2d"},
            r"mibb could hit nothing: where.layers=\('linear',\) has no layer of layers='conv2d'",
        ),
        (MIBB, {"protect": ["conv2d", "7"]}, "mibb could hit nothing: all its 4 layers are protected"),
        (
            MIBB,
            {"layers": "0", "protect": Where(layers="depth:0")},
            "could hit nothing: all its 1 layers are protected",
        ),
        (MIBB, {"protect": "features.*"}, "'features.*' matches no layer"),
        (MiBB(mac_error_rate=0.1, where={"layers": "depth:4"}), {}, "matches no layer; there are depths 0..3"),
        (MIBB, {"layers": "depth:a"}, "a depth is written depth:3 or depth:0-4"),
    ],
)
def test_a_mistake_is_one_line(fault, options, message):
    model = create("separable")
    with pytest.raises(ValueError, match=message) as error, torch.no_grad():  # noqa: SIM117
        with inject(model, fault, quantization=FIXED, **options):
            model(images())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protect", [Where(bits=tuple(range(8))), [Where(channels=(0, 1)), Where(channels=(2, 3))]])
def test_a_fault_that_could_hit_nothing_is_an_error_with_the_reason(protect):
    model = create("root")
    with (
        pytest.raises(RuntimeError, match="mibb could hit nothing: what is targeted is protected"),
        torch.no_grad(),
        inject(model, MIBB, quantization=FIXED, protect=protect),
    ):
        model(images())


def test_a_target_on_a_layer_that_does_not_run_is_an_error_with_the_reason():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.used(x)

    model = Idle().eval()
    with (
        pytest.raises(RuntimeError, match="could hit nothing: none of the layers that it was put on has run"),
        torch.no_grad(),
        inject(model, MIBB, quantization=FIXED, layers="idle"),
    ):
        model(images())


def test_where_is_settings_like_any_other():
    where = Where(layers="conv2d", channels=[3, 1], positions=[[0, 2]], bits=[7])
    assert where.layers == ("conv2d",) and where == Where.model_validate(where.model_dump(mode="json"))
    for field, value in itertools.product(("layers", "channels", "positions", "bits"), ((), [])):
        with pytest.raises(ValueError, match=f"{field} is empty"):
            Where(**{field: value})
