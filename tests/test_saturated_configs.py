"""The shipped configs of the saturation study at the paper's sizes run, on small made-up data of their formats."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import no_checksums, write_cifar  # noqa: F401
from torchvision.models import resnet18

from ftnas.config import read_config
from ftnas.faults.saturation import saturations
from ftnas.models import load_model
from ftnas.pipeline import Pipeline
from ftnas.records import read_comparison
from ftnas.rundir import RunDir

pytestmark = pytest.mark.slow
QUICK = ["train.recipe.epochs=1", "campaign.devices=1", "campaign.half_width=null", "threads=1", "device=cpu"]
RATES = [1e-6, 1e-5, 1e-4, 1e-3]


def run(name, folder, *overrides):
    config = read_config(name, [*QUICK, *overrides])
    with RunDir.create(folder, config.model_dump(mode="json")) as open_run:
        pipeline = Pipeline(config, open_run)
        pipeline.train()
        pipeline.campaign()
    comparison = read_comparison(folder / "records.jsonl")
    assert list(comparison.faults) == ["fp32", "fp16", "q2.5"]
    assert all(comparison.rates[fault] == RATES for fault in comparison.faults)
    return config, [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_checksums")
def test_resnet20_on_files_of_cifar100(tmp_path):
    write_cifar(tmp_path / "data", "cifar100")
    config, records = run(
        "train-resnet20-saturated-cifar100",
        tmp_path / "run",
        f"data.root={tmp_path / 'data'}",
        "train.recipe.batch_size=3",
        "campaign.batch_size=3",
    )
    assert set(config.train.models) == {"plain", "tanh", "arctan", "softsign"}
    assert len(records) == 4 * 3 * (1 + len(RATES))
    for name in config.train.models:
        model, metadata = load_model(tmp_path / "run" / "train" / name / "seed-0" / "model.pt")
        assert {found.function for found in saturations(model).values()} == ({name} if name != "plain" else set())
        assert metadata["shape"] == [3, 32, 32] and len(metadata["classes"]) == 3


def test_resnet18_on_folders_as_imagenet_has_them(tmp_path, monkeypatch):
    """Photos of several sizes under train/<wnid>/ and val/<wnid>/, and torchvision's file of weights as the start."""
    stream = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = stream.integers(0, 256, (48 + 8 * index, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{index}.JPEG")
    torch.save(resnet18(num_classes=2).state_dict(), tmp_path / "resnet18-f37072fd.pth")
    monkeypatch.setenv("FTNAS_IMAGENET_FOLDERS", str(tmp_path / "imagenet"))
    monkeypatch.chdir(tmp_path)  # the config names the file of weights by itself
    _, records = run(
        "finetune-resnet18-saturated",
        tmp_path / "run",
        "data.image_size=32",
        "train.recipe.batch_size=6",
        "campaign.images=null",
        "campaign.batch_size=4",
    )
    assert len(records) == 3 * 3 * (1 + len(RATES))
    weights = torch.load(tmp_path / "resnet18-f37072fd.pth", weights_only=True)["layer1.0.conv1.weight"]
    for name in ("plain", "tanh", "softsign"):
        model, _ = load_model(tmp_path / "run" / "train" / name / "seed-0" / "model.pt", allow_factory=True)
        assert len(saturations(model)) == (0 if name == "plain" else 21)
        moved = (model.state_dict()["layer1.0.conv1.weight"] - weights).abs().max()
        assert 0.0 < float(moved) < 1e-4  # one step of AdamW at lr 1e-5
