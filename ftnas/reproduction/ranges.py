"""Weight magnitudes by kind of convolution (FTT-NAS section 5.5): the network, its measurement, its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftnas import rng
from ftnas.models import load_model
from ftnas.reproduction.jobs import cost, trained
from ftnas.reproduction.study import Planned, Study
from ftnas.rng import generator
from ftnas.space.ops import make_primitive, make_stem, relu_conv_bn
from ftnas.space.points import activated_points, feature_points
from ftnas.stats import Interval, paired_difference
from ftnas.storage import atomic_write
from ftnas.trainings import MODEL

CHANNELS = 20
STRIDES = (1, 1, 2, 1, 2, 1)
KINDS = ("conv 3x3", "conv 1x1", "depthwise 3x3")
PUBLISHED = {"conv 3x3": (0.036, 0.043), "conv 1x1": (0.112, 0.121), "depthwise 3x3": (0.140, 0.094)}


class OneOfThree(nn.Module):
    """A block that runs ReLU-Conv-BN 3x3, ReLU-Conv-BN 1x1 or SepConv 3x3; another one in each training step.

    The draw depends on the number of training steps so far, a buffer, so that a resumed training draws on. In
    evaluation it is the first one.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of each of the three.
        index: Of the block; it draws for itself.
    """

    steps: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.choices = nn.ModuleList(
            [
                relu_conv_bn(in_channels=in_channels, out_channels=out_channels, kernel=3, stride=stride),
                relu_conv_bn(in_channels=in_channels, out_channels=out_channels, kernel=1, stride=stride),
                make_primitive("sep_conv_3x3", in_channels=in_channels, out_channels=out_channels, stride=stride),
            ]
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        choice = 0
        if self.training:
            stream = generator(int(self.steps), "one of three", self.index)
            choice = int(torch.randint(len(self.choices), (), generator=stream))
            self.steps += 1
        result: Tensor = self.choices[choice](x)
        return result


class Mixed(nn.Sequential):
    """A network whose path changes: it says itself where its features are."""

    def feature_points(self) -> dict[str, str]:
        """Return the name of each convolution's BatchNorm."""
        return feature_points(self)

    def activated_points(self) -> frozenset[str]:
        """Return the convolutions whose features an activation function reads directly."""
        return activated_points(self)


def mixed(*, num_classes: int, in_channels: int) -> nn.Module:
    """Build a stack of such blocks that maps float images [B, in_channels, H, W] to logits [B, num_classes]."""
    layers: list[nn.Module] = [make_stem(in_channels=in_channels, out_channels=CHANNELS, affine=True)]
    channels = CHANNELS
    for index, stride in enumerate(STRIDES):
        layers.append(OneOfThree(channels, channels * stride, stride=stride, index=index))
        channels *= stride
    return Mixed(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Of all weights w of one kind: mean and standard deviation of abs(w), its maximum, averaged over layers."""

    mean: float
    std: float
    max: float


def magnitudes(model: nn.Module) -> dict[str, Magnitudes]:
    """Return the magnitudes by kind of convolution: 3x3, 1x1, depthwise 3x3. Kinds that are not there are left out."""
    weights: dict[str, list[Tensor]] = {}
    for block in model.modules():
        if isinstance(block, OneOfThree):
            for layer in block.modules():
                if isinstance(layer, nn.Conv2d):
                    weights.setdefault(_kind(layer), []).append(layer.weight.detach().abs().double())
    found = {}
    for kind in KINDS:
        if kind in weights:
            values = torch.cat([weight.flatten() for weight in weights[kind]])
            top = torch.stack([weight.max() for weight in weights[kind]]).mean()
            found[kind] = Magnitudes(mean=float(values.mean()), std=float(values.std()), max=float(top))
    return found


def _kind(layer: nn.Conv2d) -> str:
    size = layer.kernel_size[0]
    return f"depthwise {size}x{size}" if layer.groups > 1 else f"conv {size}x{size}"


def write(study: Study, planned: Sequence[Planned], out: Path) -> str:
    """Write ``table.md`` and ``runs.jsonl`` of the networks that are trained; return the Markdown."""
    runs: list[dict[str, Any]] = []
    seconds = 0.0
    for entry in planned:
        for job in entry.jobs:
            if trained(job):
                model, _ = load_model(job.folder / "train" / job.model / f"seed-{job.seed}" / MODEL, allow_factory=True)
                found = {kind: asdict(value) for kind, value in magnitudes(model).items()}
                spent = cost(job.folder)
                made = {"train_cpu_s": spent["cpu_s"], **{key: spent[key] for key in ("machines", "commit")}}
                runs.append({"row": entry.row.name, "seed": job.seed, "training": job.key, **made, "magnitudes": found})
                seconds += spent["cpu_s"]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs).encode())
    with rng.isolated(0, "fresh"):
        fresh = magnitudes(mixed(num_classes=10, in_channels=3))
    text = _markdown(study, [run["magnitudes"] for run in runs], fresh, seconds)
    atomic_write(out / "table.md", text.encode())
    return text


def _markdown(
    study: Study, runs: Sequence[dict[str, dict[str, float]]], fresh: dict[str, Magnitudes], seconds: float
) -> str:
    lines = [f"# {study.title}", "", study.small, ""]
    if not runs:
        return "\n".join([*lines, "Not run.", ""])
    lines += ["Mean of abs(w) ± its standard deviation, over all weights of a kind.", ""]
    lines += [
        "| weights | before training | trained | published | largest, before | largest, trained (mean over layers) |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for kind in KINDS:
        mean, std, top = (sum(run[kind][key] for run in runs) / len(runs) for key in ("mean", "std", "max"))
        theirs = "{:.3f} ± {:.3f}".format(*PUBLISHED[kind])
        first = fresh[kind]
        before = f"{first.mean:.3f} ± {first.std:.3f}"
        lines.append(f"| {kind} | {before} | {mean:.3f} ± {std:.3f} | {theirs} | {first.max:.3f} | {top:.3f} |")
    lines += ["", "| difference | mean of abs(w) | largest |", "|---|---:|---:|"]
    for kind in KINDS[1:]:
        gaps = (
            paired_difference(*([run[k][key] for run in runs] for k in (kind, KINDS[0]))) for key in ("mean", "max")
        )
        lines.append(f"| {kind} minus {KINDS[0]} | {' | '.join(_shown(gap) for gap in gaps)} |")
    lines += [
        "",
        f"{len(runs)} training seeds, paired Student's t over them. Processor time: {seconds / 60:.1f} minutes.",
        "",
    ]
    return "\n".join(lines)


def _shown(gap: Interval) -> str:
    return f"{gap.mean:+.3f}" if gap.num < 2 else f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
