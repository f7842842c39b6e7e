"""A run and the images that it was begun with; a model and the images that it was trained on."""

import json

import pytest
import torch
from PIL import Image
from test_cli import TRAIN as SMALL
from test_cli import ftnas

from ftnas import rng

TRAIN = [*SMALL, "train.recipe.batch_size=8", "campaign.devices=1", "campaign.images=10"]


def folder_of(path, seed, size=8):
    """Write two classes of 12 images for training and 6 for testing: noise, brighter in the second class."""
    stream = rng.generator(seed, "images")
    for part, number in (("train", 12), ("test", 6)):
        for label in range(2):
            folder = path / part / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(number):
                pixels = torch.randint(0, 128, (size, size), generator=stream, dtype=torch.uint8) + 100 * label
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return path


@pytest.fixture
def started(tmp_path):
    """A run whose net is trained, and the folder of its images."""
    root = folder_of(tmp_path / "images", 1)
    data = f"data={{name: image_folder, root: '{root}'}}"
    assert ftnas("train", "quickstart", *TRAIN, data, "--out", tmp_path / "run") == 0
    return tmp_path / "run", root


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_run_does_not_go_on_with_other_images(started, capsys, part):
    run, root = started
    assert ftnas("campaign", "--resume", run) == 0
    before = json.loads((run / "run.json").read_text())
    assert before["dataset_digest"] != before["test_digest"]
    other = folder_of(root.parent / "other", 2)
    (root / part).rename(root / "away")
    (other / part).rename(root / part)
    capsys.readouterr()
    (run / "records.jsonl").unlink()
    assert ftnas("campaign", "--resume", run) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    name = {"train": "training", "test": "test"}[part]
    assert f"the {name} images are not those that" in said and "begin another run with --out" in said
    assert json.loads((run / "run.json").read_text()) == before
    (root / part).rename(other / part)
    (root / "away").rename(root / part)
    assert ftnas("campaign", "--resume", run) == 0


def test_a_model_meets_images_of_its_own_size_and_normalisation(started, tmp_path, capsys):
    run, root = started
    given = [
        *[s for s in TRAIN if s.startswith(("search", "control", "threads", "campaign"))],
        "train=null",
        f"models={{net: {{file: '{run / 'train' / 'net' / 'seed-0' / 'model.pt'}'}}}}",
        f"data={{name: image_folder, root: '{root}'}}",
    ]
    capsys.readouterr()
    assert ftnas("campaign", "quickstart", *given, "--out", tmp_path / "same") == 0
    assert "another mean" not in capsys.readouterr().err
    assert ftnas("campaign", "quickstart", *given, "data.image_size=12", "--out", tmp_path / "larger") == 2
    assert "trained on images of 1x8x8, and image_folder has 1x12x12; set data.image_size=8" in capsys.readouterr().err
    other = folder_of(tmp_path / "brighter", 3)
    for file in other.glob("*/*/*.png"):
        Image.open(file).point(lambda value: 200 + value // 5).save(file)
    given[-1] = f"data={{name: image_folder, root: '{other}'}}"
    assert ftnas("campaign", "quickstart", *given, "--out", tmp_path / "brighter-run") == 0
    assert "note: net was trained on images of another mean and deviation" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_images_that_are_left_out_or_not_there_are_told_in_one_line(tmp_path, capsys):
    root = folder_of(tmp_path / "images", 1)
    (root / "train" / "a" / "0.png").write_bytes(b"no image")
    data = f"data={{name: image_folder, root: '{root}', unreadable: skip}}"
    more = ["campaign.images=100", "bounds=null"]
    assert ftnas("run", "quickstart", *TRAIN, *more, data, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().err.splitlines()
    (line,) = (line for line in said if "unreadable images were skipped" in line)
    assert line.startswith("warning: 1 unreadable images were skipped: ") and "UserWarning" not in "".join(said)
    assert "note: 100 images are asked for, and there are 12; all are taken" in said


def test_a_test_image_that_cannot_be_read_is_told_before_anything_is_trained(tmp_path, capsys):
    root = folder_of(tmp_path / "images", 1)
    (root / "test" / "b" / "3.png").write_bytes(b"no image")
    data = f"data={{name: image_folder, root: '{root}'}}"
    assert ftnas("run", "quickstart", *TRAIN, data, "--out", tmp_path / "run") == 2
    assert "b/3.png: cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (root / "test" / "b" / "3.png").unlink()
    assert ftnas("train", "quickstart", *TRAIN, data, "--out", tmp_path / "run") == 0
    Image.new("L", (8, 8)).save(root / "test" / "b" / "3.png")
    assert ftnas("campaign", "--resume", tmp_path / "run") == 2
    assert "the test images are not those that" in capsys.readouterr().err
