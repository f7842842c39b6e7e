"""Settings, registry, random streams, and an import that does nothing."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import Field

from ftnas.registry import Registry, import_name
from ftnas.rng import generator, isolated, seed_for
from ftnas.settings import Count, Positive, Rate, Settings, did_you_mean, parse


class Inner(Settings):
    rate: Rate = 0.5
    epochs: Count


class Outer(Settings):
    inner: Inner
    many: tuple[Inner, ...] = ()
    scale: Positive = 1.0
    name: str | None = Field(default=None, max_length=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"epochs": 1}, "scael": 2}, "run.scael: unknown key; did you mean 'scale'?"),
        ({"inner": {"epochs": 1, "epoch": 2}}, "run.inner.epoch: unknown key; did you mean 'epochs'?"),
        (
            {"inner": {"epochs": 1}, "many": [{"epochs": 1, "rat": 1}]},
            "run.many.0.rat: unknown key; did you mean 'rate'?",
        ),
        ({"inner": {"epochs": 1}, "zzz": 2}, "run.zzz: unknown key; there is: inner, many, name, scale"),
        ({"inner": {}}, "run.inner.epochs: required, and not given"),
        ({}, "run.inner: required, and not given"),
        ({"inner": {"epochs": 0}}, "run.inner.epochs: input should be greater than or equal to 1, got 0"),
        ({"inner": {"epochs": 1, "rate": 1.5}}, "run.inner.rate: input should be less than or equal to 1, got 1.5"),
        ({"inner": {"epochs": 1, "rate": float("nan")}}, "run.inner.rate: input should be a finite number, got nan"),
        ({"inner": {"epochs": 1}, "scale": "x" * 200}, "..."),
        (["inner"], "run: expected keys and values, got ['inner']"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(data, message):
    with pytest.raises(ValueError) as error:
        parse(Outer, data, where="run")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_settings_are_frozen_and_whole():
    settings = parse(Outer, {"inner": {"epochs": 3, "rate": 0}, "scale": 2})
    assert settings == Outer(inner=Inner(epochs=3, rate=0.0), scale=2.0)
    with pytest.raises(ValueError, match="frozen"):
        settings.scale = 3.0
    assert parse(Outer, settings.model_dump()) == settings


def test_the_nearest_name_is_offered():
    assert did_you_mean("resnet81", ["resnet18", "vgg16"]) == "did you mean 'resnet18'?"
    assert did_you_mean("q", ["b", "a"]) == "there is: a, b"
    assert did_you_mean("q", []) == "there is: nothing"


def test_registry():
    colours: Registry[type] = Registry("colour")
    assert colours.register("red")(int) is int
    colours.register("blue")(str)
    assert colours.get("red") is int and colours.names() == ["red", "blue"] == list(colours)
    assert "red" in colours and "green" not in colours
    with pytest.raises(ValueError, match="colour 'red' is registered already"):
        colours.register("red")(float)
    assert colours.get("red") is int
    with pytest.raises(ValueError, match=r"unknown colour 'rde'; did you mean 'red'\?"):
        colours.get("rde")


def test_names_are_imported_only_when_allowed():
    colours: Registry[type] = Registry("colour")
    assert colours.get("collections:OrderedDict", allow_import=True).__name__ == "OrderedDict"
    with pytest.raises(ValueError, match="accepted from a config only"):
        colours.get("collections:OrderedDict")
    with pytest.raises(ValueError, match="cannot import module 'no_such_module'"):
        import_name("no_such_module:Thing")
    with pytest.raises(ValueError, match="module 'collections' has no 'Thing'"):
        import_name("collections:Thing")


def test_seeds_are_those_of_the_documented_hash():
    text = "\x1f".join(["7", "str:faults", "int:3"])
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    assert seed_for(7, "faults", 3) == expected


def test_streams_differ_by_seed_and_by_every_label():
    keys = [
        (0,),
        (1,),
        (0, "a"),
        (0, "a", "b"),
        (0, "ab"),
        (0, "a", 1),
        (0, "a", "1"),
        (0, 1, "a"),
        (0, "1a"),
        (10,),
        (1, 0),
    ]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    draws = [torch.randint(2**62, (4,), generator=generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert torch.randint(2**62, (4,), generator=generator(0, "a")).tolist() == draws[2]


def test_generators_leave_the_global_state_alone_and_isolated_puts_it_back():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator(1, "x"))
    assert torch.equal(torch.get_rng_state(), state)
    with isolated(1, "x"):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), isolated(1, "x"):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


IMPORT = """
import random, sys
before = random.getstate()
import ftnas
heavy = {"torch", "torchvision", "ray", "matplotlib", "tensorboard", "sklearn", "scipy", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert random.getstate() == before
import logging
assert not logging.getLogger().handlers
assert set(ftnas.__all__) <= set(dir(ftnas))
try:
    ftnas.injekt
except AttributeError as error:
    assert "injekt" in str(error)
else:
    raise AssertionError
"""


def test_import_loads_nothing_heavy_and_seeds_nothing():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


USE = """
import sys
import tomllib
from pathlib import Path
import torch
torch.manual_seed(1234)
state = torch.get_rng_state()
import ftnas
ftnas.inject, ftnas.FixedPoint
assert torch.equal(torch.get_rng_state(), state)
assert not torch.cuda.is_initialized()
assert not {"ray", "matplotlib", "tensorboard"} & set(sys.modules)
assert torch.are_deterministic_algorithms_enabled() is False and torch.get_default_dtype() == torch.float32
"""


def test_use_of_the_core_seeds_nothing_and_touches_no_gpu():
    subprocess.run([sys.executable, "-c", USE], check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_memory_that_is_freed_stays_with_the_process():
    """Page faults of forwards with features of 0.5 to 2 MB, with and without."""
    program = """
import resource, sys, torch
from ftnas import baselines
from ftnas.heap import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
torch.set_num_threads(1)
model, images = baselines.create("resnet20").eval(), torch.zeros(32, 3, 32, 32)
with torch.no_grad():
    for number in range(5):
        if number == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(images)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", program, way], check=True, capture_output=True, text=True).stdout)
        for way in ("keep", "usual")
    )
    assert kept < 0.2 * usual and usual > 1000, (kept, usual)


def test_every_package_is_in_the_wheel():
    root = Path(__file__).parents[1]
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "ftnas").rglob("__init__.py")}
    for folder, name in (("configs", "_configs"), ("search_spaces", "_search_spaces")):
        holders = {path.parent.relative_to(root / folder) for path in (root / folder).rglob("*.*") if path.is_file()}
        found |= {".".join(["ftnas", name, *holder.parts]) for holder in holders}
    assert listed == found
