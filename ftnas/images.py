"""Stored images, files or arrays, brought to uint8 pixels of one shape, by many threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ftnas.progress import track

Shape = tuple[int, int, int]

CHUNK = 256  # images a thread takes at a time
PROGRESS_AFTER_S = 2.0

_GREY_MODES = frozenset({"1", "L", "LA", "La"})
_COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, values from 5 on swap height and width


class UnreadableImageError(ValueError):
    """A file that is no image, or is damaged, or holds more than 8 bits a channel."""


@dataclass(frozen=True)
class Images:
    """N images that are decoded when asked for; picklable, so that the workers of a DataLoader can have it.

    Attributes:
        stored: Paths of image files, or a uint8 tensor [N, C0, H0, W0] with C0 of 1 or 3.
        shape: (C, H, W) that every image comes out with.
        resize: Whether an image of another height or width is resized to ``shape`` (stretched to it, Pillow's
            bilinear filter, which averages when it shrinks); else such an image is an error that names it.
        convert: Whether grey and colour images are converted into each other (ITU-R 601 luma); else likewise.
    """

    stored: tuple[str, ...] | Tensor
    shape: Shape
    resize: bool = False
    convert: bool = False

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Tensor | str:
        """Return the images at the indices as uint8 [B, C, H, W], or the one-line reason why there are none.

        The reason is returned, not raised: a DataLoader would wrap an exception of its worker in a traceback.
        """
        pixels = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        rows = pixels.numpy()
        try:
            for row, index in enumerate(indices):
                rows[row] = self.decode(int(index))
        except ValueError as error:
            return str(error)
        return pixels

    @property
    def ready(self) -> Tensor | None:
        """The stored tensor itself when it has the shape already."""
        ready = isinstance(self.stored, Tensor) and tuple(self.stored.shape[1:]) == self.shape
        return self.stored if ready else None  # type: ignore[return-value]

    def select(self, indices: Tensor) -> Images:
        """Return the images at the indices (int64 [M])."""
        return Images(select(self.stored, indices), self.shape, self.resize, self.convert)

    def decode(self, index: int) -> np.ndarray:
        """Return one image, uint8 [C, H, W].

        Raises:
            UnreadableImageError: The file is missing, damaged, or no image of 8 bits a channel.
            ValueError: Its size or its kind is not that of ``shape``, and conversion was not asked for.
        """
        if isinstance(self.stored, Tensor):
            return self._fit(self.stored[index].numpy(), f"image {index}")
        path = self.stored[index]
        return self._fit(_read(path), path)

    def check_header(self, index: int) -> None:
        """Raise as `decode` does, for what the head of the file shows, without decoding it."""
        if not isinstance(self.stored, Tensor):
            self._check_shape(_header(self.stored[index]), self.stored[index])

    def _check_shape(self, shape: Shape, name: str) -> None:
        if shape[1:] != self.shape[1:] and not self.resize:
            raise ValueError(
                f"{name}: {shape[1]}x{shape[2]} pixels (height x width), where the first training image has "
                f"{self.shape[1]}x{self.shape[2]}; set data.image_size to resize all of them"
            )
        if shape[0] != self.shape[0] and not self.convert:
            kinds = {1: "grey", 3: "in colour"}
            raise ValueError(
                f"{name}: is {kinds[shape[0]]}, where the first training image is {kinds[self.shape[0]]}; "
                "set data.channels to 1 or 3 to convert all of them"
            )

    def _fit(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Bring uint8 [C0, H0, W0] to ``shape``: first the channels, then the size."""
        self._check_shape(pixels.shape, name)
        channels, height, width = self.shape
        if pixels.shape == self.shape:
            return pixels
        if pixels.shape[0] == 3 and channels == 1:
            pixels = _from_pillow(_to_pillow(pixels).convert("L"))
        if pixels.shape[1:] != (height, width):
            pixels = _from_pillow(_to_pillow(pixels).resize((width, height), Image.Resampling.BILINEAR))
        return np.repeat(pixels, 3, axis=0) if pixels.shape[0] < channels else pixels


def select(stored: tuple[str, ...] | Tensor, indices: Tensor) -> tuple[str, ...] | Tensor:
    """Return the stored images at the indices (int64 [M])."""
    if isinstance(stored, Tensor):
        return stored[indices]
    return tuple(stored[index] for index in indices.tolist())


def first_shape(stored: tuple[str, ...] | Tensor) -> Shape:
    """Return (C, H, W) of the first image that has a readable head; the first one's problem when none has."""
    if isinstance(stored, Tensor):
        return tuple(stored.shape[1:])  # type: ignore[return-value]
    problem: UnreadableImageError | None = None
    for path in stored:
        try:
            return _header(path)
        except UnreadableImageError as error:
            problem = problem or error
    raise problem or ValueError("there are no images")


def load_pixels(images: Images, *, skip: bool, what: str) -> tuple[Tensor, list[str], Tensor]:
    """Decode all images into memory.

    Args:
        images: What to decode.
        skip: Leave unreadable files out instead of raising.
        what: Title of the progress bar.

    Returns:
        Pixels uint8 [M, C, H, W] of the readable images, one line for every unreadable one, and the indices of the
        readable ones, int64 [M].

    Raises:
        ValueError: An image is unreadable (without ``skip``), or of another size or kind; the first one in order.
    """
    if images.ready is not None:
        return images.ready, [], torch.arange(len(images))
    pixels = torch.empty((len(images), *images.shape), dtype=torch.uint8)
    rows = pixels.numpy()

    def decode(index: int) -> None:
        rows[index] = images.decode(index)

    problems = for_each(decode, len(images), skip=skip, what=what)
    if not problems:
        return pixels, [], torch.arange(len(images))
    readable = _without(len(images), problems)
    return pixels[readable], list(problems.values()), readable


def check_files(images: Images, *, skip: bool, what: str) -> tuple[list[str], Tensor]:
    """Check images that will be decoded later, and return the unreadable ones' lines and the readable indices.

    With ``skip`` every file is decoded once (only that shows which ones are damaged); else the heads of the files
    are read, and not even those when nothing in them could be wrong for ``images``.
    """
    if isinstance(images.stored, Tensor) or (images.resize and images.convert and not skip):
        return [], torch.arange(len(images))
    problems = for_each(images.decode if skip else images.check_header, len(images), skip=skip, what=what)
    return list(problems.values()), _without(len(images), problems)


def _without(num: int, problems: dict[int, str]) -> Tensor:
    keep = torch.ones(num, dtype=torch.bool)
    keep[list(problems)] = False
    return keep.nonzero().squeeze(1)


def for_each(work: Callable[[int], object], num: int, *, skip: bool, what: str) -> dict[int, str]:
    """Call ``work(index)`` for 0..num-1 from one thread per core, and return the problems by index, in order.

    Raises:
        ValueError: From ``work``, that of the smallest index; UnreadableImageError only without ``skip``.
    """

    def run(indices: range) -> dict[int, str]:
        problems: dict[int, str] = {}
        for index in indices:
            try:
                work(index)
            except UnreadableImageError as error:
                if not skip:
                    raise
                problems[index] = str(error)
        return problems

    chunks = [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]
    found: dict[int, str] = {}
    with track(what, num, after_s=PROGRESS_AFTER_S) as bar, ThreadPoolExecutor(usable_cores()) as pool:
        try:
            for chunk, problems in zip(chunks, pool.map(run, chunks), strict=True):
                found.update(problems)
                bar.advance(num=len(chunk))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unreadable(path: str, reason: str) -> UnreadableImageError:
    return UnreadableImageError(
        f"{path}: cannot be read as an image ({reason}); repair or remove it, or set data.unreadable=skip"
    )


def _header(path: str) -> Shape:
    """Return (C, H, W) as the head of the file tells it, upright."""
    try:
        with Image.open(path) as image:
            channels = _channels(image, path)
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            # Of a TIFF some versions of Pillow give the size as turned, some as stored: only turning it tells.
            width, height = ImageOps.exif_transpose(image).size if turned else image.size
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files raise almost anything from Pillow's decoders
        raise _unreadable(path, _reason(error)) from None
    return channels, height, width


def _read(path: str) -> np.ndarray:
    """Return the pixels of a file, uint8 [C, H, W] with C of 1 (grey) or 3, upright by its EXIF orientation.

    Transparency is dropped, palettes and CMYK become RGB, of an animation the first frame counts.
    """
    try:
        with Image.open(path) as image:
            mode = "L" if _channels(image, path) == 1 else "RGB"
            # Each of the calls below would copy an image that needs no change, which small images feel.
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            upright = ImageOps.exif_transpose(image) if turned else image
            if upright.mode in ("P", "PA"):  # a palette's transparency must be resolved first
                upright = upright.convert("RGBA")
            return _from_pillow(upright if upright.mode == mode else upright.convert(mode))
    except UnreadableImageError:
        raise
    except Exception as error:  # as in _header
        raise _unreadable(path, _reason(error)) from None


def _channels(image: Image.Image, path: str) -> int:
    if image.mode in _GREY_MODES:
        return 1
    if image.mode in _COLOUR_MODES:
        return 3
    raise _unreadable(path, f"Pillow mode {image.mode}, more than 8 bits a channel; convert it to 8 bits")


def _to_pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
