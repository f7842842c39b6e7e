"""Where images come from: the bundled digits, torchvision's data sets, and the user's own class folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ftnas import rng
from ftnas.images import select
from ftnas.registry import Registry
from ftnas.settings import Count, Settings, Side

Split = Literal["train", "test"]

DIGITS_TEST_FRACTION = 0.2
DIGITS_TEST_SEED = 0  # fixed: every run, whatever its seed, has the same test set
SUBSET_SEED = 0  # likewise for data.subset
ROOT_VARIABLE = "FTNAS_DATA"
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .webp .tif .tiff .pgm .ppm".split())


class DataConfig(Settings):
    """Which images, and in what form.

    Attributes:
        name: A registered source: digits, cifar10, cifar100, mnist, fashion_mnist, svhn, image_folder.
        root: Folder of the files; environment variables in it are filled in. For image_folder it is required, and
            holds ``train/<class>/<file>`` and ``test/<class>/<file>`` (or ``val``). Else default: $FTNAS_DATA, or
            ~/.cache/ftnas.
        download: Whether files that are missing may be fetched from the network.
        image_size: Height and width, or one number for both; images of another size are resized (stretched).
            None: as stored, and all the same.
        channels: 1 (grey) or 3 (RGB); others are converted. None: as stored, and all the same.
        unreadable: What to do with a damaged file or one that is no image: stop, or skip it with a warning.
        memory_limit_mb: A split whose uint8 pixels take more MiB than this is decoded batch by batch instead of held.
        workers: Processes that decode for such a split; 0: in this one; None: one per core, at most 8.
        subset: Take this many training images, stratified, always the same ones. None: all.
    """

    name: str
    root: str | None = None
    download: bool = False
    image_size: Side | tuple[Side, Side] | None = None
    channels: Literal[1, 3] | None = None
    unreadable: Literal["error", "skip"] = "error"
    memory_limit_mb: Count = 4096
    workers: Annotated[int, Field(ge=0)] | None = None
    subset: Count | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        SOURCES.get(name)
        return name

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.name == "image_folder" and self.root is None:
            raise ValueError("data.root: required for image_folder; the folder that holds train/ and test/")
        if self.name in ("digits", "image_folder") and self.download:
            raise ValueError(f"data.download: has no effect on {self.name}; leave it out")
        if self.name == "digits" and self.root is not None:
            raise ValueError("data.root: has no effect on digits, which come with scikit-learn; leave it out")
        if self.name in TORCHVISION and self.unreadable != "error":
            raise ValueError("data.unreadable: concerns files of image_folder only; leave it out")
        return self

    @property
    def folder(self) -> Path:
        """The root, with the default and environment variables filled in.

        Raises:
            ValueError: The root names an environment variable that is not set.
        """
        root = os.path.expandvars(self.root or os.environ.get(ROOT_VARIABLE) or "~/.cache/ftnas")
        if "$" in root:
            raise ValueError(f"data.root: an environment variable in it is not set, got {root!r}; give data.root=PATH")
        return Path(root).expanduser()


@dataclass(frozen=True)
class Source:
    """One split as it is stored, nothing decoded yet.

    Attributes:
        stored: Paths of image files, or uint8 pixels [N, C, H, W] with C of 1 or 3.
        labels: int64 [N], each an index into ``classes``.
        classes: Names of the classes.
    """

    stored: tuple[str, ...] | Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def select(self, indices: Tensor) -> Source:
        """Return the images at the indices (int64 [M])."""
        return Source(select(self.stored, indices), self.labels[indices], self.classes)


SOURCES: Registry[Callable[[DataConfig, Split], Source]] = Registry("data set")


def read_source(config: DataConfig, split: Split) -> Source:
    """Return a split of the configured source, of the training split the configured subset.

    Raises:
        ValueError: Files are missing or malformed, or the subset is too large or too small; one line, with the fix.
    """
    source = SOURCES.get(config.name)(config, split)
    _check(source, f"data.name: {config.name}, {split}")
    num = len(source.labels)
    if split == "test" or config.subset is None or config.subset == num:
        return source
    if config.subset > num:
        raise ValueError(f"data.subset: there are {num} training images, got {config.subset}")
    chosen, _ = _draw(source.labels, config.subset, seed=SUBSET_SEED)
    empty = torch.bincount(source.labels[chosen], minlength=len(source.classes)) == 0
    if empty.any():
        name = source.classes[int(empty.nonzero()[0])]
        raise ValueError(f"data.subset: {config.subset} images leave class {name!r} without any; raise it")
    return source.select(chosen)


def _check(source: Source, where: str) -> None:
    """Refuse what is not as `Source` says, of a source of the user's own; ValueErrors begin with ``where``."""
    stored, labels, classes = source.stored, source.labels, len(source.classes)
    if not isinstance(labels, Tensor):
        raise ValueError(f"{where}: labels are a tensor, got {type(labels).__name__}; give torch.as_tensor(labels)")
    if not isinstance(stored, Tensor) and not all(isinstance(path, (str, os.PathLike)) for path in stored):
        raise ValueError(
            f"{where}: images are a tensor of pixels or a tuple of paths, got {type(stored).__name__}; give "
            "torch.as_tensor(pixels)"
        )
    if isinstance(stored, Tensor):
        if stored.dtype != torch.uint8:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ValueError(f"{where}: pixels are uint8 from 0 to 255, got {kind}; convert them")
        if stored.ndim != 4 or stored.shape[1] not in (1, 3):
            raise ValueError(
                f"{where}: pixels are [N, C, H, W] with C of 1 or 3, got {list(stored.shape)}; reshape or permute them"
            )
    if labels.dtype != torch.int64:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"{where}: labels are int64, got {kind}; give labels.long()")
    if list(labels.shape) != [len(stored)] or not len(stored):
        raise ValueError(
            f"{where}: there is one label for each image, [N], and one image or more; got labels {list(labels.shape)} "
            f"for {len(stored)} images"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"{where}: labels are 0 to {classes - 1}, for {classes} classes; got {wrong}")


def stratified_split(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into a share of every class and the rest.

    The first part has round(fraction * N) indices (halves to even). Each class of n gives floor(fraction * n), and the
    classes with the largest remainders one more, the first class first among equals.

    Args:
        labels: Integers [N], 0 or more.
        fraction: Share of the first part, in (0, 1).
        seed: Decides which images of a class go where.

    Returns:
        Two int64 tensors on the CPU, each ascending, together 0..N-1.

    Raises:
        ValueError: The fraction is outside (0, 1), or one part would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction of a split: must be between 0 and 1, got {fraction}")
    size = round(fraction * len(labels))
    if not 0 < size < len(labels):
        raise ValueError(f"fraction of a split: {fraction} of {len(labels)} images leaves one part empty; change it")
    return _draw(labels, size, seed=seed)


def _draw(labels: Tensor, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    labels = labels.cpu()
    counts = torch.bincount(labels)
    exact = [(int(count) * size) // len(labels) for count in counts]
    remainders = [(int(count) * size) % len(labels) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda label: -remainders[label])  # stable: ties by class
    for label in by_remainder[: size - sum(exact)]:
        exact[label] += 1
    order = torch.randperm(len(labels), generator=rng.generator(seed, "split"))
    grouped = order[torch.argsort(labels[order], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(grouped)
    rank[grouped] = torch.arange(len(labels)) - starts[labels[grouped]]
    first = rank < torch.tensor(exact)[labels]
    return first.nonzero().squeeze(1), (~first).nonzero().squeeze(1)


@SOURCES.register("digits")
def digits(config: DataConfig, split: Split) -> Source:
    """scikit-learn's 1,797 scans of 8x8 pixels; a stratified fifth (359) that never changes is the test set.

    A pixel v of 0..16 becomes round(v * 255 / 16), halves to even, so that v = round(u * 16 / 255) gives it back.
    """
    # Imported here: it costs most of a second, and only this source needs it.
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    test, train = stratified_split(labels, DIGITS_TEST_FRACTION, seed=DIGITS_TEST_SEED)
    chosen = train if split == "train" else test
    return Source(pixels[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))


TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}
"""Our name -> torchvision's class, and what it looks for under the root."""


def _torchvision(config: DataConfig, split: Split) -> Source:
    """Read one of torchvision's data sets."""
    # Imported here: it costs more than a second, and neither digits nor --help needs it.
    import torchvision.datasets

    kind, files = TORCHVISION[config.name]
    chosen: dict[str, Any] = {"split": split} if kind == "SVHN" else {"train": split == "train"}
    try:
        with warnings.catch_warnings():
            # CIFAR's own pickles were written by an old NumPy, and a new one complains about them to the user.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be", category=UserWarning)
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be", category=DeprecationWarning)
            data = getattr(torchvision.datasets, kind)(config.folder, download=config.download, **chosen)
    except Exception as error:  # whatever a missing, cut or wrong file makes of torchvision's readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        fix = "" if config.download else "set data.download=true to fetch them, or "
        raise ValueError(
            f"data.name: {config.name}: no intact files ({files}) under {config.folder}; "
            f"{fix}set data.root to the folder that holds them ({reason})"
        ) from None
    pixels = torch.as_tensor(data.data)
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif kind != "SVHN":
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(data.labels if kind == "SVHN" else data.targets, dtype=torch.int64)
    classes = tuple(map(str, range(10))) if kind == "SVHN" else tuple(data.classes)
    return Source(pixels.contiguous(), labels, classes)


for _name in TORCHVISION:
    SOURCES.register(_name)(_torchvision)


@SOURCES.register("image_folder")
def image_folder(config: DataConfig, split: Split) -> Source:
    """The user's own images: ``root/train/<class>/<file>`` and ``root/test/<class>/<file>``.

    ``val`` stands in for a missing ``test``. Classes and files are taken in sorted order; names that begin with a dot
    are left out. Every other file in a class folder must be an image.
    """
    root = config.folder
    if not root.is_dir():
        raise ValueError(f"data.root: no such folder, got {str(root)!r}; give the one that holds train/ and test/")
    if not (root / "train").is_dir():
        raise ValueError(f"data.root: {root} has no folder train/; put the training images in train/<class>/")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise ValueError(f"data.root: {root} has no folder test/ (or val/); put the test images in test/<class>/")
    train_classes, test_classes = _classes(root / "train"), _classes(test)
    for odd in sorted(set(train_classes) ^ set(test_classes)):
        there, missing = ("train", test.name) if odd in train_classes else (test.name, "train")
        raise ValueError(f"data.root: class folder {odd!r} is in {there}/ and not in {missing}/ of {root}; add it")
    paths: list[str] = []
    labels: list[int] = []
    wanted, other = (root / "train", test) if split == "train" else (test, root / "train")
    for label, name in enumerate(train_classes):
        _files(other / name)  # an empty class of the test images must not show after days of training only
        files = _files(wanted / name)
        paths += files
        labels += [label] * len(files)
    return Source(tuple(paths), torch.tensor(labels, dtype=torch.int64), tuple(train_classes))


def _classes(folder: Path) -> list[str]:
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                raise ValueError(f"{entry.path}: an image outside the class folders; move it into one of them")
    if len(names) < 2:
        raise ValueError(f"data.root: {folder} must hold two or more class folders, got {len(names)}")
    return sorted(names)


def _files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in found:
        if entry.is_dir():
            raise ValueError(f"{entry.path}: a folder inside a class folder; move its images one level up")
    if not found:
        raise ValueError(f"{folder}: the class folder is empty; add images or remove the class")
    return sorted(entry.path for entry in found)
