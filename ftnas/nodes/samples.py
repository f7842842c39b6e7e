"""What a study of split networks is trained and measured on: images, or rows of sensor readings."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ftnas import rng
from ftnas.augment import AugmentConfig
from ftnas.data import load
from ftnas.datasets import DataConfig, Split, stratified_split
from ftnas.progress import track
from ftnas.settings import Count, Settings, parse

NUM_SENSORS = 23
ACTIVITIES = (
    *("standing still", "sitting and relaxing", "lying down", "walking", "climbing stairs", "waist bends forward"),
    *("frontal elevation of arms", "knees bending", "cycling", "jogging", "running", "jump front and back"),
)
SUFFIXES = (".log", ".csv")


class Samples(Protocol):
    """Labelled samples of one shape; `ftnas.data.ImageSet` is one."""

    labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of values and labels in order."""

    def __len__(self) -> int: ...

    def subset(self, indices: Any) -> Samples:
        """Return the samples at the indices."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        augment: AugmentConfig | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float [B, *shape] and int64 [B]; without a seed in order."""


class HealthConfig(Settings):
    """The UCI MHEALTH recordings (Banos et al. 2015), which ResiliNet calls Health; the user brings the files.

    Attributes:
        name: ``health``.
        root: Folder of ``*.log`` (numbers apart by spaces or tabs, as UCI has them) or ``*.csv`` files (by commas), or
            one file; environment variables are filled in. A row: 23 sensors, then the activity, 1 to 12, or 0 for none,
            which is left out. A first line of names is skipped.
        test_share: Of the rows, stratified by activity, always the same ones: the test set (10% in the paper).
        subset: Take this many training rows, stratified, always the same ones. None: all.
    """

    name: Literal["health"]
    root: str
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    subset: Count | None = None


class Readings:
    """Rows of sensor readings, standardised by the mean and deviation of the training rows.

    Args:
        values: float32 [N, 23].
        labels: int64 [N], each an index into ``classes``.
    """

    classes = ACTIVITIES

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        self.values, self.labels = values, labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(23,)."""
        return tuple(self.values.shape[1:])

    @property
    def num_classes(self) -> int:
        """12."""
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of shape, values and labels in order."""
        digest = hashlib.sha256(repr(tuple(self.values.shape)).encode())
        for part in (self.values, self.labels):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Any) -> Readings:
        """Return the rows at the indices (integers [M], in that order)."""
        chosen = torch.as_tensor(indices)
        return Readings(self.values[chosen], self.labels[chosen])

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        augment: AugmentConfig | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Samples.batches`; the order depends on (seed, epoch) alone. ValueError for augmentation."""
        if augment is not None and augment.active:
            raise ValueError("augment is for images, and has no effect on sensor readings; leave it out")
        if drop_last and batch_size > len(self):
            raise ValueError(f"batch_size: at most {len(self)}, the number of rows, got {batch_size}")
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=rng.generator(seed, "batches", epoch))
        for chosen in order.split(batch_size):
            if not drop_last or len(chosen) == batch_size:
                yield self.values[chosen], self.labels[chosen]


def _to_config(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.get("name") == "health":
        return parse(HealthConfig, value)
    return parse(DataConfig, value)


SamplesConfig = Annotated[DataConfig | HealthConfig, BeforeValidator(_to_config)]


def load_samples(config: DataConfig | HealthConfig, which: Split) -> Samples:
    """Load the training or the test part; ValueError in one line for what is wrong with its files."""
    if isinstance(config, DataConfig):
        return load(config, which)
    values, labels = _read(config)
    test, train = stratified_split(labels, config.test_share, seed=0)
    if config.subset is not None and config.subset != len(train):
        if config.subset > len(train):
            raise ValueError(f"data.subset: there are {len(train)} training rows, got {config.subset}")
        train = train[stratified_split(labels[train], config.subset / len(train), seed=0)[0]]
    mean, std = values[train].mean(0), values[train].std(0, correction=0)
    chosen = train if which == "train" else test
    scaled = (values[chosen] - mean) / torch.where(std > 0, std, 1.0)
    return Readings(scaled.float(), labels[chosen])


def _read(config: HealthConfig) -> tuple[Tensor, Tensor]:
    """Read all rows with an activity: float64 [N, 23], labels int64 [N] from 0."""
    root = Path(os.path.expandvars(config.root)).expanduser()
    if "$" in str(root):
        raise ValueError(
            f"data.root: an environment variable in it is not set, got {config.root!r}; give data.root=PATH"
        )
    files = [root] if root.is_file() else sorted(path for path in root.glob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"data.root: no *.log or *.csv files in {str(root)!r}; give the folder of the MHEALTH files")
    tables = []
    with track("files of readings", len(files), after_s=1.0) as bar:
        for path in files:
            tables.append(_read_file(path))
            bar.advance(path.name)
    rows = np.concatenate(tables)
    rows = rows[rows[:, -1] != 0]
    labels = torch.from_numpy(rows[:, -1].astype(np.int64)) - 1
    counts = torch.bincount(labels, minlength=len(ACTIVITIES))
    if counts.min() < 2:
        place = int(counts.argmin())
        raise ValueError(
            f"{root}: activity {place + 1} ({ACTIVITIES[place]}) has {int(counts[place])} rows; training and test need "
            "one each"
        )
    return torch.from_numpy(rows[:, :-1]), labels


def _read_file(path: Path) -> np.ndarray:
    """Read one file, float64 [rows, 24]; ValueError in one line with the place of what is wrong."""
    try:
        separator = "," if path.suffix.lower() == ".csv" else None
        with path.open(encoding="utf-8") as file:
            first_line = file.readline().split(separator)
        names = bool(first_line) and not any(map(_is_number, first_line))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which has too few columns below
            rows = np.loadtxt(path, delimiter=separator, skiprows=int(names), ndmin=2)
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: not a table of numbers: {' '.join(str(error).split())}") from None
    first = int(names) + 1
    if rows.shape[1] != NUM_SENSORS + 1:
        raise ValueError(f"{path}: a row has {NUM_SENSORS} sensors and the activity, 24 columns; got {rows.shape[1]}")
    wrong = ~np.isfinite(rows).all(1)
    if wrong.any():
        raise ValueError(f"{path}: row {int(wrong.argmax()) + first}: a value is not finite; take the row out")
    label = rows[:, -1]
    wrong = (label != np.round(label)) | (label < 0) | (label > len(ACTIVITIES))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{path}: row {row + first}: the last column is the activity, 0 to 12; got {label[row]:g}")
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
