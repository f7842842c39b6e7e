"""Image sets: held as one uint8 tensor or decoded batch by batch, normalised and augmented on their device."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ftnas import rng
from ftnas.augment import NUM_DRAWS, AugmentConfig, crop_and_flip, cutout_
from ftnas.datasets import SOURCES, DataConfig, Source, Split, read_source, stratified_split
from ftnas.images import PROGRESS_AFTER_S, Images, Shape, check_files, first_shape, load_pixels, usable_cores
from ftnas.progress import track

__all__ = ["SOURCES", "AugmentConfig", "DataConfig", "ImageSet", "Source", "load", "stratified_split"]

STATISTICS_SAMPLE = 10_000  # images that mean and std of a training set that is not held are taken from
PASS_BATCH = 256  # images a batch in passes over the whole set, for its digest or statistics
MAX_DEFAULT_WORKERS = 8
SKIPPED_SHOWN = 5

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std per channel, of pixels in [0, 1]."""


class ImageSet:
    """Labelled images of one shape, in a fixed order.

    Attributes:
        labels: int64 [N], on the CPU.
        classes: Names of the classes; a label is an index into them.
        shape: (C, H, W).
        mean: Per channel, of the training set, for pixels in [0, 1].
        std: Likewise; the population's, and 1 for a channel that is constant.
        device: Where batches come out.
    """

    def __init__(
        self,
        images: Images,
        pixels: Tensor | None,
        *,
        labels: Tensor,
        classes: tuple[str, ...],
        statistics: Statistics | None = None,
        workers: int = 0,
    ) -> None:
        """Join images and labels.

        Args:
            images: The images, to decode when asked for; of held ones only the shape is used.
            pixels: The same, uint8 [N, C, H, W], when they are held in memory.
            labels: int64 [N].
            classes: Names of the classes.
            statistics: Mean and std; None takes them from these images.
            workers: Processes of the DataLoader that decodes images that are not held.
        """
        self.labels = labels
        self.classes = classes
        self.shape: Shape = images.shape
        self.device = torch.device("cpu")
        self._images = images
        self._pixels = pixels
        self._index: Tensor | None = None  # of a subset that shares its pixels with the whole set, on their device
        self._workers = workers
        self.mean, self.std = statistics or self._statistics()

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def held(self) -> bool:
        """Whether the pixels are in memory; else they are decoded for each batch."""
        return self._pixels is not None

    def __len__(self) -> int:
        return self.num_images

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of shape, classes, labels and pixels in order, the same whether held or not.

        Takes one pass over the images, at the first call.
        """
        digest = hashlib.sha256(repr((self.shape, self.classes, self.num_images)).encode())
        digest.update(self.labels.numpy().tobytes())
        with track("digest of the images", self.num_images, after_s=PROGRESS_AFTER_S) as bar:
            for pixels in self._pixel_batches(torch.arange(self.num_images).split(PASS_BATCH)):
                digest.update(pixels.cpu().numpy().tobytes())
                bar.advance(num=len(pixels))
        return digest.hexdigest()

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Return the images at the indices (integers [M], in that order); held pixels are shared, not copied.

        Raises:
            ValueError: There are none, or one is outside 0..N-1.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64, device="cpu").flatten()
        if not len(chosen):
            raise ValueError("subset: at least one index is needed, got none")
        if chosen.min() < 0 or chosen.max() >= self.num_images:
            wrong = chosen[(chosen < 0) | (chosen >= self.num_images)][0].item()
            raise ValueError(f"subset: indices must be 0..{self.num_images - 1}, got {wrong}")
        part = self._like(self.labels[chosen])
        if self._pixels is None:
            part._images = self._images.select(chosen)
        else:
            part._index = chosen.to(self.device) if self._index is None else self._index[chosen.to(self.device)]
        return part

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with its batches, and its held pixels, on the device; itself when they are there."""
        target = torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if target == self.device:
            return self
        moved = self._like(self.labels)
        moved.device = target
        if self._pixels is not None:
            pixels = self._pixels if self._index is None else self._pixels[self._index]
            moved._pixels, moved._index = pixels.to(target), None
        return moved

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        augment: AugmentConfig | None = None,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images once.

        The order, and what augmentation does to the image at a place in it, depend on (seed, epoch) and that place
        only: not on the device, the batch size, the workers, or whether the pixels are held.

        Args:
            batch_size: Images a batch; the last one may be smaller.
            seed: Shuffles and augments. None keeps the order and does not augment.
            epoch: Which pass this is.
            augment: What to do to the images; None for nothing.
            drop_last: Leave a smaller last batch out.
            share: (index, number): of every ``number`` batches only the one at ``index``, as one of as many ranks
                needs; batches that do not go round are left out.

        Returns:
            An iterator over (images, labels): float32 [B, C, H, W], (pixel / 255 - mean) / std, and int64 [B], on the
            set's device.

        Raises:
            ValueError: The batch size is below 1, or above N with ``drop_last``; the augmentation leaves nothing of
                an image; a file cannot be decoded.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: must be 1 or more, got {batch_size}")
        if drop_last and batch_size > self.num_images:
            raise ValueError(f"batch_size: at most {self.num_images}, the number of images, got {batch_size}")
        augment = augment or AugmentConfig()
        augment.check(*self.shape[1:])
        order, draws = torch.arange(self.num_images), None
        if seed is not None:
            stream = rng.generator(seed, "batches", epoch)
            order = torch.randperm(self.num_images, generator=stream)
            if augment.active:
                # In doubles: 24 bits would make some crops likelier than others by a measurable amount.
                draws = torch.rand(self.num_images, NUM_DRAWS, generator=stream, dtype=torch.float64)
        places = torch.arange(self.num_images).split(batch_size)
        if drop_last and len(places[-1]) < batch_size:
            places = places[:-1]
        index, number = share
        places = places[: len(places) // number * number][index::number]
        return self._batches(order, places, draws, augment)

    def _batches(
        self, order: Tensor, places: Sequence[Tensor], draws: Tensor | None, augment: AugmentConfig
    ) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        scale = (1 / (255 * std)).float().to(self.device)
        shift = (-mean / std).float().to(self.device)
        # all at once: to copy the part of a batch would wait for what a GPU still has to do
        labels = self.labels[order].to(self.device)
        draws = None if draws is None else draws.to(self.device)
        for place, pixels in zip(places, self._pixel_batches([order[place] for place in places]), strict=True):
            part = slice(int(place[0]), int(place[-1]) + 1)
            if draws is None:
                yield pixels.float().mul_(scale).add_(shift), labels[part]
                continue
            drawn = draws[part]
            images = crop_and_flip(pixels, drawn, augment).float().mul_(scale).add_(shift)
            yield cutout_(images, drawn, augment), labels[part]

    def _pixel_batches(self, index_lists: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 [B, C, H, W], on the device, for each list of indices."""
        if self._pixels is not None:
            chosen = torch.cat([torch.empty(0, dtype=torch.int64), *index_lists]).to(self.device)
            for indices in chosen.split([len(indices) for indices in index_lists]):
                yield self._pixels[indices if self._index is None else self._index[indices]]
            return
        loader: Iterable[Tensor | str] = DataLoader(
            self._images,  # type: ignore[arg-type]
            batch_size=None,
            sampler=[indices.tolist() for indices in index_lists],
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            # Not fork: the threads of this process, torch's own among them, may hold locks.
            multiprocessing_context="forkserver" if self._workers else None,
            # The loader draws a seed for its workers from this, not from the global generator.
            generator=torch.Generator(),
        )
        for pixels in loader:
            if isinstance(pixels, str):
                raise ValueError(pixels)
            yield pixels.to(self.device, non_blocking=True)

    def _statistics(self) -> Statistics:
        """Take mean and std, exactly, from a histogram; of images that are not held, from evenly spaced ones."""
        indices = torch.arange(self.num_images)
        if not self.held and self.num_images > STATISTICS_SAMPLE:
            indices = torch.arange(STATISTICS_SAMPLE) * self.num_images // STATISTICS_SAMPLE
        counts = torch.zeros(self.shape[0], 256, dtype=torch.int64)
        with track("mean and standard deviation", len(indices), after_s=PROGRESS_AFTER_S) as bar:
            for pixels in self._pixel_batches(indices.split(PASS_BATCH)):
                for channel in range(self.shape[0]):
                    counts[channel] += torch.bincount(pixels[:, channel].flatten(), minlength=256)
                bar.advance(num=len(pixels))
        values = torch.arange(256, dtype=torch.float64) / 255
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        variance = (share * (values - mean[:, None]).square()).sum(1)
        std = torch.where((counts > 0).sum(1) > 1, variance.sqrt(), 1.0)
        return tuple(mean.tolist()), tuple(std.tolist())

    def _like(self, labels: Tensor) -> ImageSet:
        other = ImageSet(
            self._images,
            self._pixels,
            labels=labels,
            classes=self.classes,
            statistics=(self.mean, self.std),
            workers=self._workers,
        )
        other.device, other._index = self.device, self._index
        return other


def load(config: DataConfig, split: Split) -> ImageSet:
    """Load a split of the configured data set, on the CPU.

    Mean and standard deviation are those of the training set (of the configured subset of it), which is therefore
    read for the test split too.

    Raises:
        ValueError: No such split or data set; files are missing, unreadable, of different sizes or kinds; the
            classes of the two splits differ.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: 'train' or 'test', got {split!r}")
    train = read_source(config, "train")
    stored = first_shape(train.stored)
    shape = (config.channels or stored[0], *_size(config, stored))
    if split == "train":
        return _build(config, train, shape, "Training images")
    test = read_source(config, "test")
    if test.classes != train.classes:
        raise ValueError(f"data.name: {config.name}: the classes of its training and test images differ")
    key = _fingerprint(config, train)
    if key not in _STATISTICS:
        _build(config, train, shape, "Training images, for their mean")
    return _build(config, test, shape, "Test images", statistics=_STATISTICS[key])


_STATISTICS: dict[str, Statistics] = {}
"""Mean and std by the fingerprint of a training set: a process that loads both splits decodes the files once."""


def _size(config: DataConfig, stored: Shape) -> tuple[int, int]:
    size = config.image_size
    return stored[1:] if size is None else (size, size) if isinstance(size, int) else size


def _build(
    config: DataConfig, source: Source, shape: Shape, what: str, *, statistics: Statistics | None = None
) -> ImageSet:
    """Decode a split, or check it when it is too large to hold; without statistics, take and remember its own."""
    images = Images(source.stored, shape, config.image_size is not None, config.channels is not None)
    skip = config.unreadable == "skip"
    key = _fingerprint(config, source)
    pixels: Tensor | None = None
    if len(images) * math.prod(shape) <= config.memory_limit_mb * 2**20:
        pixels, problems, readable = load_pixels(images, skip=skip, what=what)
    else:
        problems, readable = check_files(images, skip=skip, what=f"Checking: {what}")
    if problems:
        _report_skipped(problems, source, readable)
        images, source = images.select(readable), source.select(readable)
    if pixels is not None:
        images = Images((), shape)  # what the pixels were made from can go
    workers = min(usable_cores(), MAX_DEFAULT_WORKERS) if config.workers is None else config.workers
    result = ImageSet(
        images, pixels, labels=source.labels, classes=source.classes, statistics=statistics, workers=workers
    )
    if statistics is None:
        _STATISTICS[key] = result.mean, result.std
    return result


def _report_skipped(problems: list[str], source: Source, readable: Tensor) -> None:
    """Warn of the files left out; a class that has none left is a ValueError."""
    left = torch.bincount(source.labels[readable], minlength=len(source.classes))
    if (left == 0).any():
        name = source.classes[int(left.argmin())]
        raise ValueError(f"data.unreadable: no readable image is left in class {name!r}; the first: {problems[0]}")
    shown = "; ".join(problem.split(": cannot be read")[0] for problem in problems[:SKIPPED_SHOWN])
    more = ", ..." if len(problems) > SKIPPED_SHOWN else ""
    warnings.warn(f"{len(problems)} unreadable images were skipped: {shown}{more}", stacklevel=4)


def _fingerprint(config: DataConfig, source: Source) -> str:
    """Return what the statistics of a training set follow from: its files' state or pixels, and the conversion."""
    kept = config.model_dump_json(exclude={"workers", "download"})
    digest = hashlib.sha256(kept.encode())
    if isinstance(source.stored, Tensor):
        digest.update(source.stored.numpy().tobytes())
        return digest.hexdigest()
    for path in source.stored:
        try:
            state = os.stat(path)
        except OSError:  # a dangling link; reading it reports it by name
            continue
        digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
