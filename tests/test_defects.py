"""Defect maps: the stuck cells of a known device."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from injected import FIXED, create, gen, images
from test_plans import rewrite
from torch import nn

from ftnas import FixedPoint, Quantization, inject
from ftnas.faults import AdSAF, BitAdSAF, DefectMap, MiBB, PlanSet, Where
from ftnas.faults.hardware import Hardware

FAULTS = {
    "logical": AdSAF(sa0_rate=0.2, sa1_rate=0.1, stuck_at="max"),
    "differential": AdSAF(sa0_rate=0.2, sa1_rate=0.1, cells="differential"),
    "bit": BitAdSAF(sa0_rate=0.2, sa1_rate=0.1),
}
ROWS = {"logical": (), "differential": (2,), "bit": (7,)}
RRAM = FixedPoint(encoding="sign_magnitude")


@pytest.mark.parametrize("kind", FAULTS)
def test_a_map_is_what_its_plans_are(tmp_path, kind):
    fault, model = FAULTS[kind], create("plain")
    with torch.no_grad(), inject(model, fault, quantization=FIXED, seed=4) as injection:
        out = model(images())
    defects = DefectMap.of(injection.plans())
    assert {layer: tuple(cells.shape) for layer, cells in defects.cells.items()} == {
        "0": (*ROWS[kind], 4, 3, 3, 3),
        "3": (*ROWS[kind], 2, 4, 3, 3),
    }
    for (_, layer, _), plan in injection.plans().plans.items():
        flat = defects.cells[layer].reshape(-1)
        assert flat[plan.sites].tolist() == (plan.codes + 1).tolist() and int((flat > 0).sum()) == len(plan.sites)
    defects.save(tmp_path / "device.npz")
    loaded = DefectMap.load(tmp_path / "device.npz")
    assert loaded.fault == fault and all(torch.equal(loaded.cells[name], defects.cells[name]) for name in defects.cells)
    with torch.no_grad(), inject(model, plans=loaded.plans(), quantization=FIXED) as injection:
        assert torch.equal(model(images()), out)
    assert injection.record.hits == sum(int((cells > 0).sum()) for cells in defects.cells.values())
    with np.load(tmp_path / "device.npz", allow_pickle=False) as archive:  # NumPy alone reads it
        assert json.loads(archive["header"].tobytes())["layers"] == ["0", "3"]
        assert archive["0.cells"].dtype == np.int8


def test_a_map_made_by_hand_from_numpy():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[64.0, -32.0, 0.0], [5.0, -6.0, 127.0]]) / 128)
    cells = np.array([[1, 2, 2], [0, 1, 0]], dtype=np.uint8)
    differential = np.zeros((2, 2, 3), dtype=np.int64)
    differential[0, 0] = [1, 2, 0]  # positive cells
    differential[1, 0] = [0, 0, 2]  # negative ones
    bits = np.zeros((7, 2, 3))
    bits[6, 0, 0], bits[0, 0, 1], bits[5, 0, 2] = 1, 2, 2
    expected = {
        "logical": [[0, -127, 127], [5, 0, 127]],
        "differential": [[0, 127 - 32, -127], [5, -6, 127]],
        "bit": [[0, -33, 32], [5, -6, 127]],
    }
    for kind, array in {"logical": cells, "differential": differential, "bit": bits}.items():
        plans = DefectMap(
            FAULTS[kind].model_copy(update={"stuck_at": "range"} if kind == "logical" else {}), {"": array}
        )
        with torch.no_grad(), inject(model, plans=plans.plans(), quantization=FIXED):
            model(torch.zeros(1, 3))
            assert (model.weight * 128).tolist() == expected[kind]


def test_training_on_a_known_device_has_the_gradients_of_its_weights():
    model, x = create(lambda: nn.Linear(6, 4, bias=False)), torch.randn(5, 6, generator=gen())
    cells = torch.zeros(4, 6, dtype=torch.int8)
    cells[0, :3], cells[1, 2:4] = 1, 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with inject(model, plans=DefectMap(AdSAF(), {"": cells}).plans(), quantization=FIXED):
        for _ in range(3):
            optimizer.zero_grad()
            before = model.parametrizations.weight.original.detach().clone()
            out = model(x)
            held = RRAM.quantize(before)
            bound = RRAM.grid(before).bound
            held[cells == 1] = 0.0
            held[cells == 2] = torch.where(held < 0, -bound, bound)[cells == 2]
            assert torch.equal(model.weight, held)
            upstream = torch.randn(out.shape, generator=gen(1))
            (out * upstream).sum().backward()
            raw = x @ held.T
            passes = (raw / FIXED.grid(raw).lsb).round() <= 127
            inside = (before / RRAM.grid(before).lsb).round().abs() <= 127
            gradient = model.parametrizations.weight.original.grad
            assert torch.allclose(gradient, (upstream * passes).T @ x * inside, atol=1e-6)  # straight through
            optimizer.step()


def test_bounds_hold_on_a_known_device_too(tmp_path):
    model = create(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with torch.no_grad(), inject(model, AdSAF(), quantization=FIXED, seed=3) as injection:
        free = model(images())
        injection.plans().save(tmp_path / "device.npz")
    hardware = Hardware(defects=str(tmp_path / "device.npz"))
    with torch.no_grad(), hardware.inject(model, seed=0, bounds={"0": 0.1}):
        assert model(images()).abs().max() <= 0.1 < free.abs().max()


@pytest.mark.parametrize(
    ("cells", "fault", "message"),
    [
        (torch.full((2, 2), 3), AdSAF(), "cells are 0, 1 or 2, got 3..3"),
        (torch.tensor([256, 0]), AdSAF(), "cells are 0, 1 or 2, got 0..256"),
        (torch.tensor([0.5, 0]), AdSAF(), "cells are 0, 1 or 2, got 0..0.5"),
        (torch.zeros(3, 4, 4), AdSAF(cells="differential"), r"expected cells of shape \[2, weight\], got \[3, 4, 4\]"),
        (torch.zeros(7), BitAdSAF(), r"expected cells of shape \[bits - 1, weight\], got \[7\]"),
    ],
)
def test_a_map_that_cannot_be_is_refused(tmp_path, cells, fault, message):
    defects = DefectMap(fault, {"": cells})
    for use in (defects.plans, lambda: defects.save(tmp_path / "device.npz")):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "device.npz").exists()


@pytest.mark.parametrize(
    ("cells", "fault", "message"),
    [
        (torch.zeros(4, 3, 3, 2), AdSAF(), r"the plan is for the shape \(4, 3, 3, 2\), the tensor has \(4, 3, 3, 3\)"),
        (torch.zeros(3, 3, 3), AdSAF(), r"the plan is for the shape \(3, 3, 3\), the tensor has \(4, 3, 3, 3\)"),
        (torch.ones(8, 4, 3, 3, 3), BitAdSAF(), "words of another width than the 8 bits"),
    ],
)
def test_a_map_of_another_device_is_refused(cells, fault, message):
    model = create("root")
    plans = DefectMap(fault, {"": cells}).plans()
    with pytest.raises(ValueError, match=message), torch.no_grad(), inject(model, plans=plans, quantization=FIXED):
        model(images())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a: h.pop("layers"), "the header must hold a list of layers"),
        (lambda h, a: h.update(layers=[3]), "the names of the layers must be distinct strings"),
        (lambda h, a: h.update(layers=["a", "a"]), "the names of the layers must be distinct strings"),
        (lambda h, a: h.update(layers=["a", "b"]), "the cells of 'b' are missing; the file is not whole"),
        (
            lambda h, a: h.update(faults=[{"name": "mibb", "mac_error_rate": 0.1}]),
            "a defect map is of adsaf or bit_ads",
        ),
        (
            lambda h, a: h["faults"][0].update(name="ftnas.faults.stuck:AdSAF"),
            "names to import are accepted from a config only",
        ),
        (lambda h, a: h.update(kind="ftnas plans"), "not a file of ftnas defect map"),
        (lambda h, a: h.update(schema="1"), "this release reads schema 1"),
        (lambda h, a: a.update({"0.cells": a["0.cells"] * 0.5}), "must be integers, got float64"),
        (lambda h, a: a.update({"0.cells": a["0.cells"].astype(int) + 256}), "are 0, 1 or 2, got 257..257"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused_in_one_line(tmp_path, change, message):
    file = tmp_path / "device.npz"
    DefectMap(AdSAF(), {"a": torch.ones(2, 3)}).save(file)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as error:
        DefectMap.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_map_is_made_of_the_plans_of_one_stuck_at_model():
    for faults in ((), (MiBB(mac_error_rate=0.1),), (AdSAF(), BitAdSAF())):
        with pytest.raises(
            ValueError, match="a defect map holds the stuck cells of one model, adsaf or bit_adsaf, got"
        ):
            DefectMap.of(PlanSet(faults, {}))


def test_a_known_device_at_rest_keeps_its_words(tmp_path):
    model, narrow = create("plain"), Quantization(weights=FixedPoint(bits=2), features=FIXED)
    with torch.no_grad(), inject(model, AdSAF(), quantization=narrow, seed=4) as injection:
        model(images())
    plans = injection.plans()
    plans.save(tmp_path / "plans.npz")
    DefectMap.of(plans).save(tmp_path / "map.npz")
    for file in ("plans.npz", "map.npz"):
        hardware = Hardware(defects=str(tmp_path / file), quantization=narrow)
        assert hardware.formats() == (FixedPoint(bits=2, encoding="sign_magnitude"), FIXED)
        with torch.no_grad():
            with inject(model, plans=plans, quantization=narrow) as faulty, faulty.paused():
                expected = model(images())
            with hardware.at_rest().inject(model, seed=0) as resting:
                assert torch.equal(model(images()), expected) and resting.record.hits == 0
            with hardware.without_faults().inject(model, seed=0):
                assert not torch.equal(model(images()), expected)


def test_a_device_without_plans_is_at_rest_as_it_was_asked_for(tmp_path):
    PlanSet((), {}).save(tmp_path / "none.npz")
    hardware = Hardware(defects=str(tmp_path / "none.npz"), layers="linear")
    assert hardware.at_rest().fault is None and hardware.formats() == (FIXED, FIXED)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_cells_of_a_map_are_hit_wherever_its_fault_model_was_aimed(tmp_path, kind):
    fault = FAULTS[kind].model_copy(update={"where": Where(layers="0")})
    shapes = {"0": (4, 3, 3, 3), "3": (2, 4, 3, 3)}
    defects = DefectMap(fault, {layer: torch.ones(*ROWS[kind], *shape) for layer, shape in shapes.items()})
    defects.save(tmp_path / "device.npz")
    for plans in (defects.plans(), DefectMap.load(tmp_path / "device.npz").plans()):
        model = create("plain")
        with torch.no_grad(), inject(model, plans=plans, quantization=FIXED) as injection:
            model(images())
        assert injection.record.hits == plans.hits() == sum(cells.numel() for cells in defects.cells.values())


def test_plans_that_the_aim_of_their_fault_model_leaves_out_are_refused():
    model, aimed = create("plain"), AdSAF(where=Where(layers="0"))
    plans = dict(DefectMap(AdSAF(), {"0": torch.ones(4, 3, 3, 3), "3": torch.ones(2, 4, 3, 3)}).plans().plans)
    message = "the plans hit layer '3', which where.layers of their adsaf leaves out; remove where, or that plan"
    with pytest.raises(ValueError, match=message):
        inject(model, plans=PlanSet((aimed,), plans), quantization=FIXED)
    other = plans.pop((0, "3", 0))
    with torch.no_grad(), inject(model, plans=PlanSet((aimed,), plans), quantization=FIXED) as injection:
        model(images())
        with pytest.raises(ValueError, match=message):
            injection.replay(PlanSet((aimed,), {(0, "3", 0): other}))
    assert injection.record.hits == 108


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", ">i2", "uint16", "uint32", "int64", "float16", "float64"])
def test_any_array_of_numbers_is_a_map(dtype):
    plain = np.array([[1, 0, 0], [1, 1, 0]]).astype(dtype)
    fixed = plain.copy()
    fixed.flags.writeable = False
    expected = DefectMap(AdSAF(), {"": torch.tensor([[1, 0, 0], [1, 1, 0]])}).plans().plans[0, "", 0]
    for array in (plain, plain[::-1].copy()[::-1], np.asfortranarray(plain), fixed):
        plan = DefectMap(AdSAF(), {"": array}).plans().plans[0, "", 0]
        assert torch.equal(plan.sites, expected.sites) and torch.equal(plan.codes, expected.codes)
        assert plan.shape == (2, 3)


@pytest.mark.parametrize("array", [np.array([[1, None]]), np.array(["1"]), np.ones((2, 2), dtype=complex)])
def test_an_array_of_something_else_is_no_map(array):
    with pytest.raises(ValueError, match="cells are 0, 1 or 2, got an array of .*; give numbers"):
        DefectMap(AdSAF(), {"": array})
