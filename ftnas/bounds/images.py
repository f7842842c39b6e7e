"""Every image that there can be, as a network receives it, and whether a certificate is about all of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftnas.bounds.certificate import BoxOfInputs, Certificate

AGREE = 1e-6
"""Difference of the ends of a box that float32 makes when it normalises images, as a share of the larger one."""


def every_image(mean: Sequence[float], std: Sequence[float]) -> BoxOfInputs:
    """Return the box of all images: every pixel from black to white, less the mean and by the deviation of its channel.

    Args:
        mean: Per channel, for pixels in [0, 1].
        std: Likewise.
    """
    low, high = ([(end - m) / s for m, s in zip(mean, std, strict=True)] for end in (0.0, 1.0))
    return BoxOfInputs(low=tuple(low), high=tuple(high))


def about_images(certificate: Certificate, metadata: Mapping[str, Any]) -> str:
    """Check that a certificate over a box holds for every image of the model that it is about.

    Args:
        certificate: Any; one over samples has its own images, and nothing is checked.
        metadata: Of the model's file: ``shape``, ``mean`` and ``std`` of its images.

    Returns:
        What follows `Certificate.summary` in a line; empty for samples.

    Raises:
        ValueError: One line: the images have another shape, or are not all in the box.
    """
    box = certificate.domain
    if not isinstance(box, BoxOfInputs):
        return ""
    shape, mean, std = (metadata.get(key) for key in ("shape", "mean", "std"))
    if shape is not None and list(certificate.shape) != list(shape):
        raise ValueError(
            f"the certificate is about inputs of shape {certificate.shape}, and the model's images are {tuple(shape)}; "
            "make it anew with ftnas bounds"
        )
    if shape is None or not mean or not std or not len(mean) == len(std) == len(box.low):
        return "; the model file does not say how its images are normalised, so see that the box holds them"
    images = every_image(mean, std)
    for channel, (low, high, least, most) in enumerate(zip(box.low, box.high, images.low, images.high, strict=True)):
        slack = AGREE * max(1.0, abs(least), abs(most))
        if low > least + slack or high < most - slack:
            raise ValueError(
                f"the certificate is not about every image: channel {channel} of its box is {low:.6g} to {high:.6g}, "
                f"and the model's images are {least:.6g} to {most:.6g}; make it with data of the model's mean and std"
            )
    return ", which is every image there can be"
