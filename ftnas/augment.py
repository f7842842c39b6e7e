"""Augmentation of a whole batch at once, on its device, each sample by its own draws."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ftnas.settings import Settings

Pixels = Annotated[int, Field(ge=0)]

NUM_DRAWS = 5  # crop row, crop column, flip, cutout row, cutout column


class AugmentConfig(Settings):
    """What is done to a training image; the defaults do nothing.

    Attributes:
        crop_padding: Black pixels added on every side before a crop of the image's own size is taken at a position
            uniform over the (2 * crop_padding + 1)^2 possible ones.
        flip: Mirror left and right with probability 1/2.
        cutout: Side, in pixels, of a square set to the training mean; its centre is uniform over the image, and
            what lies outside is cut off (DeVries and Taylor, arXiv 1708.04552). 0 for none.
    """

    crop_padding: Pixels = 0
    flip: bool = False
    cutout: Pixels = 0

    @property
    def active(self) -> bool:
        """Whether it does anything."""
        return self.crop_padding > 0 or self.flip or self.cutout > 0

    def check(self, height: int, width: int) -> None:
        """Raise a ValueError when the settings leave nothing of an image of that size."""
        side = min(height, width)
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) >= side:
                raise ValueError(
                    f"augment.{name}: must be less than the image's shorter side, {side} pixels, "
                    f"got {getattr(self, name)}"
                )


def crop_and_flip(pixels: Tensor, draws: Tensor, augment: AugmentConfig) -> Tensor:
    """Crop, then mirror, each sample by its own draws.

    Args:
        pixels: [B, C, H, W], any dtype.
        draws: Uniform in [0, 1), [B, 5], on the same device: column 0 and 1 place the crop (0 is the topmost and the
            leftmost one), column 2 mirrors when it is below 1/2.
        augment: The settings.

    Returns:
        A new tensor like ``pixels``; ``pixels`` itself when there is nothing to do.
    """
    pad = augment.crop_padding
    if not (pad or augment.flip):
        return pixels
    batch, channels, height, width = pixels.shape
    offsets = (draws[:, :2] * (2 * pad + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=pixels.device)
    columns = offsets[:, 1:] + torch.arange(width, device=pixels.device)
    if augment.flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    # One gather over the flattened image takes a sixth of the time of indexing by four broadcast tensors.
    flat = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).reshape(batch, 1, height * width)
    return padded.flatten(2).gather(2, flat.expand(-1, channels, -1)).view_as(pixels)


def cutout_(images: Tensor, draws: Tensor, augment: AugmentConfig) -> Tensor:
    """Set a square of each normalised sample to 0, the training mean, in place.

    The square covers the rows r - s//2 <= row < r - s//2 + s for the side s and a centre row
    r = floor(draws[:, 3] * H), and the columns likewise from draws[:, 4].

    Args:
        images: Float [B, C, H, W].
        draws: Uniform in [0, 1), [B, 5], on the same device.
        augment: The settings.
    """
    side = augment.cutout
    if not side:
        return images
    height, width = images.shape[2:]
    top = (draws[:, 3:4] * height).long() - side // 2
    left = (draws[:, 4:5] * width).long() - side // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    return images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
