"""Sequential models to split: the MLP and the MobileNet-V1 of ResiliNet."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from torch import nn

from ftnas import baselines
from ftnas.settings import Count, Positive, Settings

MOBILENET_BLOCKS = 17
"""The first convolution, 13 stacked layers, pooling, flattening, the last layer."""


class SplitModel(Settings):
    """A model as a list of blocks.

    Attributes:
        name: ``mlp`` (``hidden`` layers of ``units`` with ReLU, then the output layer: hidden + 1 blocks) or
            ``mobilenet_v1`` (the first convolution, 13 stacked layers, then what comes after them).
        hidden: Of ``mlp`` only.
        units: Of ``mlp`` only.
        width: Of ``mobilenet_v1`` only: the multiplier of its channels.
    """

    name: Literal["mlp", "mobilenet_v1"]
    hidden: Count = 10
    units: Count = 250
    width: Positive = 0.75

    @model_validator(mode="after")
    def _effective(self) -> SplitModel:
        idle = {"mlp": ("width",), "mobilenet_v1": ("hidden", "units")}[self.name]
        for key in idle:
            if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect on {self.name}; leave it out")
        return self

    @property
    def num_blocks(self) -> int:
        """How many blocks there are to host."""
        return self.hidden + 1 if self.name == "mlp" else MOBILENET_BLOCKS

    def blocks(self, shape: tuple[int, ...], *, num_classes: int) -> nn.Sequential:
        """Build the blocks for samples of a shape; the caller seeds the initialisation."""
        if self.name == "mobilenet_v1":
            if len(shape) != 3:
                raise ValueError(f"mobilenet_v1 takes images, and a sample here has shape {shape}; take mlp")
            model = baselines.create("mobilenet_v1", num_classes=num_classes, in_channels=shape[0], width=self.width)
            return flat(model)
        features = 1
        for size in shape:
            features *= size
        layers = []
        for position in range(self.hidden):
            first = [nn.Flatten()] if position == 0 else []
            linear = nn.Linear(features if position == 0 else self.units, self.units)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers.append(nn.Sequential(*first, linear, nn.ReLU()))
        return nn.Sequential(*layers, nn.Linear(self.units, num_classes))


def flat(model: nn.Module) -> nn.Sequential:
    """Return the children of a sequential model as blocks; those of its sequential children one by one.

    Raises:
        ValueError: The model is not sequential.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"only a sequential model can be split by blocks, got {type(model).__name__}; wrap it in one")
    blocks: list[nn.Module] = []
    for child in model:
        blocks += list(child) if isinstance(child, nn.Sequential) else [child]
    return nn.Sequential(*blocks)
