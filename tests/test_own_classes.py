"""Fault models, controllers and networks of the user's own, named ``package.module:Name`` in a config."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_cli import ftnas
from torch import nn

from ftnas import cli
from ftnas.config import config_from
from ftnas.controllers.base import controller_class
from ftnas.faults import FAULTS, MiBB, create_fault
from ftnas.faults.base import config_data
from ftnas.faults.hardware import Hardware
from ftnas.models import load_model, save_model
from ftnas.registry import import_name
from ftnas.settings import parse
from ftnas.single import SingleFaultConfig

OWN = """
from typing import ClassVar

from ftnas.faults import FAULTS, WeightBitFlip


@FAULTS.register("own_flip")
class OwnFlip(WeightBitFlip):
    name: ClassVar[str] = "own_flip"
"""
FAULT = {"name": "own_package.faults:OwnFlip", "bit_error_rate": 0.01}
CONFIG = {
    "version": 1,
    "name": "own",
    "threads": 1,
    "data": {"name": "digits", "subset": 200},
    "hardware": {"fault": FAULT, "also": [FAULT]},
    "train": {
        "recipe": {"epochs": 1, "batch_size": 50, "lr": 0.1, "alpha_l": 0.5},
        "models": {"net": {"baseline": "resnet8", "width": 0.25}},
    },
    "campaign": {"sweeps": [{"fault": FAULT, "also": [FAULT], "rates": [0.01]}], "devices": 1},
    "single_faults": [{"fault": {"name": FAULT["name"]}, "images": 2, "margin": 0.4, "minimum": 1}],
    "protections": [{"fault": FAULT, "method": "ecc", "budget": 0.5, "devices": 2, "images": 20}],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with own_package.faults; ``forget`` makes this process like one that has not imported it."""
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "faults.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(FAULTS, "_entries", dict(FAULTS._entries))
    yield tmp_path
    forget()


def forget():
    FAULTS._entries.pop("own_flip", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "own_package"]:
        sys.modules.pop(name)


def names_in(data):
    """Return the name of every fault in a config."""
    sections = [data["hardware"], *data["campaign"]["sweeps"], *data["single_faults"], *data["protections"]]
    faults = [fault for section in sections for fault in (section["fault"], *section.get("also", ()))]
    return {fault["name"] for fault in faults}


def test_a_run_with_an_own_fault_model_goes_on_to_the_same_result(place):
    assert ftnas("run", "own.yaml", "--out", "whole") == 0
    forget()
    assert ftnas("train", "own.yaml", "--out", "cut") == 0
    forget()
    assert ftnas("run", "--resume", "cut") == 0
    for name in ("records.jsonl", "single.jsonl", "protection.jsonl"):
        text = (place / "cut" / name).read_text()
        assert text == (place / "whole" / name).read_text() and '"own_flip' in text and "own_package" not in text
    assert names_in(yaml.safe_load((place / "cut" / "config.yaml").read_text())) == {FAULT["name"]}


def test_a_config_names_an_own_class_by_its_path_and_a_shipped_one_by_its_name(place):
    assert names_in(config_from(CONFIG).model_dump(mode="json")) == {FAULT["name"]}
    shipped = Hardware(fault={"name": "ftnas.faults:MiBB", "mac_error_rate": 0.1})
    assert shipped.model_dump()["fault"]["name"] == "mibb"
    for name in set(FAULTS) - {"own_flip"}:
        assert config_data(FAULTS.get(name).model_construct())["name"] == name


def test_an_own_class_that_nothing_can_import_keeps_its_name():
    class Local(MiBB):
        pass

    assert Hardware(fault=Local(mac_error_rate=0.1)).model_dump()["fault"]["name"] == "mibb"


def test_the_rate_of_an_own_single_fault_may_be_left_out(place):
    single = SingleFaultConfig(fault={"name": FAULT["name"]})
    assert single.fault.bit_error_rate == 0.0 and single.label == "own_flip"
    with pytest.raises(ValueError, match="fault: unknown fault model 'own_flop'; did you mean 'own_flip'"):
        parse(SingleFaultConfig, {"fault": {"name": "own_flop"}})


MISTAKES = {
    "no subclass": ("own_package.wrong:Other", "expected a subclass of ftnas."),
    "function": ("own_package.wrong:function", "expected a subclass of ftnas."),
    "relative": (".wrong:Other", "write package.module:Name"),
    "no module": (":Other", "write package.module:Name"),
    "raises": ("own_package.raises:Any", "importing module 'own_package.raises' raised ZeroDivisionError: division by"),
    "exits": ("own_package.exits:Any", "importing module 'own_package.exits' raised SystemExit: 3"),
}
WRONG = """
from ftnas.controllers import Controller
from ftnas.faults import Fault

class Other: pass
class HalfFault(Fault): pass
class HalfController(Controller): pass
def function(): pass
"""


@pytest.fixture
def wrong(place):
    for name, text in (("wrong", WRONG), ("raises", "1 / 0"), ("exits", "raise SystemExit(3)")):
        (place / "own_package" / f"{name}.py").write_text(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [*MISTAKES.values(), ("own_package.wrong:HalfFault", "HalfFault lacks apply_, sample, name, target, rate_name;")],
)
def test_what_is_no_fault_model_is_told_in_one_line(name, message, wrong):
    with pytest.raises(ValueError, match=f"fault model '{name}': .*{message}") as error:
        create_fault({"name": name})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [*MISTAKES.values(), ("own_package.wrong:HalfController", "HalfController lacks ask, .*, Config; define what")],
)
def test_what_is_no_controller_is_told_in_one_line(name, message, wrong):
    with pytest.raises(ValueError, match=f"controller '{name}': .*{message}") as error:
        controller_class(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["relative", "raises", "exits"])
def test_a_factory_that_cannot_be_imported_leaves_no_run_behind(kind, place, wrong, capsys):
    name, message = MISTAKES[kind]
    assert ftnas("train", "own.yaml", f"train.models={{net: {{factory: '{name}'}}}}", "--out", "run") == 2
    printed = capsys.readouterr().err
    assert f"error: factory '{name}': {message}" in printed and "Traceback" not in printed
    assert not (place / "run").exists()


# The current folder


def test_the_program_imports_from_the_current_folder(place):
    small = {key: value for key, value in CONFIG.items() if key not in ("single_faults", "protections")}
    (place / "own.yaml").write_text(yaml.safe_dump(small))
    program = [sys.executable, "-P", "-m", "ftnas.cli"]  # -P: without the current folder, as the installed program
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    for command in (["train", "own.yaml", "--out", "run"], ["campaign", "--resume", "run"]):
        done = subprocess.run(
            [*program, *command], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert '"own_flip' in (place / "run" / "records.jsonl").read_text()


def test_what_is_installed_comes_before_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("rgb_to_hls = 1")
    (tmp_path / "own_module.py").write_text("thing = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert callable(import_name("colorsys:rgb_to_hls")) and import_name("own_module:thing") == 1


def test_a_model_file_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    spec = {"kind": "factory", "num_classes": 2, "in_channels": 1, "factory": "only_here:make"}
    save_model("model.pt", nn.Linear(1, 2), spec, {})
    with pytest.raises(ValueError, match="it would import 'only_here:make'"):
        load_model("model.pt")
    assert "only_here" not in sys.modules and str(tmp_path) not in sys.path
