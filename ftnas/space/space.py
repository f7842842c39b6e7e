"""The search space as a YAML file fixes it, and the layout of cells that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ftnas.settings import Count, Positive, Settings, did_you_mean, parse
from ftnas.shipped import find_file, shipped_names
from ftnas.space.ops import NONE, PRIMITIVES, SKIP, check_primitive, module_label
from ftnas.yaml_text import read_yaml

FOLDER = "search_spaces"
VERSION = 1
NUM_INPUTS = 2
CellType = Literal["normal", "reduce"]


class Stem(Settings):
    """The first layers: convolution 3x3 to ``multiplier * channels``, BN."""

    multiplier: Count = 3


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """One cell's place in the network.

    Attributes:
        cell_type: ``normal`` or ``reduce``.
        channels: Of every node of the cell.
        in_channels: Of the older and the newer input.
        in_strides: Of the preprocess blocks; the older input's is 2 right after a reduction, where its map is larger.
        stride: Of the edges that leave the two input nodes.
    """

    cell_type: CellType
    channels: int
    in_channels: tuple[int, int]
    in_strides: tuple[int, int]
    stride: int


class CellSaturation(Settings):
    """The bounded function that the weights of a cell pass through, as one more decision for each type of cell.

    Attributes:
        functions: What there is to choose from: ``none``, ``tanh``, ``arctan``, ``softsign``.
        scale: s of s * f(w / s), see `ftnas.saturate`.
    """

    functions: tuple[Literal["none", "tanh", "arctan", "softsign"], ...] = Field(min_length=2)
    scale: Positive = 1.0

    @field_validator("functions")
    @classmethod
    def _once(cls, functions: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(functions):
            if name in functions[:index]:
                raise ValueError(f"each function once, {name!r} is there twice")
        return functions


class Space(Settings):
    """A cell-based search space (FTT-NAS section 4.2).

    Attributes:
        version: Schema version of the file, 1.
        name: What runs and genotypes call it.
        nodes: Nodes of a cell, the two inputs included (B in the paper).
        primitives: What an edge may be: registered names or the user's ``package.module:Name``.
        cells: Number of cells.
        reductions: Indices of the cells that halve the map, increasing.
        channels: Channels of the first cell's nodes.
        channel_growth: Factor on the channels at each reduction.
        stem: The first layers.
        preprocess: The block that maps each input of a cell to the cell's channels.
        saturation: Functions of the convolutions' weights among which a genotype decides for each type of cell; None:
            weights are used as they are stored.
    """

    version: int
    name: str = Field(min_length=1)
    # Canonical keys try the relabellings of inner nodes: 8! of them at most with 10 nodes.
    nodes: int = Field(ge=3, le=10)
    primitives: tuple[str, ...]
    cells: Count
    reductions: tuple[int, ...]
    # A factorised reduction gives half of the channels to each of its two convolutions.
    channels: int = Field(ge=2)
    channel_growth: Count = 2
    stem: Stem = Stem()
    preprocess: Literal["relu_conv_bn_1x1", "relu_conv_bn_3x3"]
    saturation: CellSaturation | None = None

    @field_validator("version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(f"this release reads version {VERSION}")
        return version

    @field_validator("primitives")
    @classmethod
    def _known_primitives(cls, primitives: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(primitives):
            if name in primitives[:index]:
                raise ValueError(f"each primitive once, {name!r} is there twice")
            if ":" not in name and name not in PRIMITIVES:
                raise ValueError(f"unknown primitive {name!r}; {did_you_mean(name, PRIMITIVES)}")
        if len({module_label(name) for name in primitives}) < len(primitives):
            raise ValueError("two primitives differ in punctuation only; rename one")
        if all(name in (NONE, SKIP) for name in primitives):
            raise ValueError(f"no cell would compute anything; add a primitive besides {NONE!r} and {SKIP!r}")
        return primitives

    @model_validator(mode="after")
    def _reductions_in_range(self) -> Space:
        if any(not 0 <= index < self.cells for index in self.reductions):
            raise ValueError(f"reductions: indices lie in 0..{self.cells - 1}, got {list(self.reductions)}")
        if any(b <= a for a, b in zip(self.reductions, self.reductions[1:], strict=False)):
            raise ValueError(f"reductions: each index once, in increasing order, got {list(self.reductions)}")
        return self

    @property
    def cell_types(self) -> tuple[CellType, ...]:
        """The types of cell that occur, ``normal`` before ``reduce``; a genotype has one cell of each."""
        normal: tuple[CellType, ...] = ("normal",) if len(self.reductions) < self.cells else ()
        return (*normal, "reduce") if self.reductions else normal

    @property
    def functions(self) -> tuple[str, ...]:
        """What the function of a cell's weights may be; empty where a genotype does not decide on it."""
        return () if self.saturation is None else self.saturation.functions

    @property
    def imported_primitives(self) -> tuple[str, ...]:
        """The primitives that come from the user's own modules."""
        return tuple(name for name in self.primitives if ":" in name)

    @property
    def out_channels(self) -> int:
        """Channels of the last cell's output, what the classifier sees."""
        return self.layout()[-1].channels * (self.nodes - NUM_INPUTS)

    def resized(self, *, channels: int | None = None, cells: int | None = None) -> Space:
        """Return the space at another size; as many reductions, at even parts of the new depth.

        Raises:
            ValueError: Too few cells for the reductions, or channels under 2.
        """
        changes: dict[str, object] = {} if channels is None else {"channels": channels}
        if cells is not None and cells != self.cells:
            parts = len(self.reductions) + 1
            changes["cells"] = cells
            changes["reductions"] = [part * cells // parts for part in range(1, parts)]
        return parse(Space, {**self.model_dump(), **changes}, where="space")

    def layout(self) -> tuple[CellPlan, ...]:
        """Return the plan of every cell, in order."""
        channels = self.channels
        stem = self.stem.multiplier * channels
        inputs, strides, plans = (stem, stem), (1, 1), []
        for index in range(self.cells):
            reduces = index in self.reductions
            channels *= self.channel_growth if reduces else 1
            plans.append(
                CellPlan(
                    cell_type="reduce" if reduces else "normal",
                    channels=channels,
                    in_channels=inputs,
                    in_strides=strides,
                    stride=2 if reduces else 1,
                )
            )
            inputs = (inputs[1], channels * (self.nodes - NUM_INPUTS))
            strides = (2 if reduces else 1, 1)
        return tuple(plans)


def space_names() -> list[str]:
    """Return the names of the shipped spaces."""
    return shipped_names(FOLDER, ".yaml")


def load_space(name_or_path: str | Path) -> Space:
    """Load a shipped space by name, or a user's by the path of its YAML file.

    Every rule is checked here; primitives of the user's own are imported and tried.

    Raises:
        ValueError: One line: what is wrong with the file.
    """
    path = find_file(name_or_path, FOLDER, ".yaml", kind="search space")
    try:
        data = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"search space {str(path)!r}: {error}") from None
    space = parse(Space, data, where=f"search space {str(name_or_path)!r}")
    for name in space.imported_primitives:
        check_primitive(name)
    return space
