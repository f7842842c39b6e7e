"""Every guide is followed to the letter: its files are written, its code runs, its commands succeed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ftnas import cli

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))

NETS = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu()
        return self.fc(self.pool(self.conv2(x).relu()).flatten(1))


def make(num_classes, in_channels):
    return Net(num_classes, in_channels)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the guides take for granted: photos, my_package.nets, weights.pt."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for index, name in enumerate(("bird", "cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(60 * index, 60 * index + 80, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    from my_package.nets import make

    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(make(3, 3).state_dict(), "weights.pt")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        sys.modules.pop(name)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_guide_works(guide, place, monkeypatch, capsys):
    names = {"__name__": "guide"}
    blocks = re.findall(r"```(\w+)\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert {"python", "yaml"} <= {kind for kind, _ in blocks}
    for kind, text in blocks:
        if kind == "python":
            if "import pandas" in text:
                pytest.importorskip("pandas")
            exec(compile(text, str(guide), "exec"), names)
        elif kind == "yaml":
            (place / re.match(r"# (\S+\.yaml)\n", text)[1]).write_text(text)
        else:
            for line in text.splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                cli.main()
    assert capsys.readouterr().out
