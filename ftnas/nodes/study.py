"""The settings of a study of split networks, and its run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftnas.augment import AugmentConfig
from ftnas.controllers import ControllerChoice, EvolutionConfig
from ftnas.nodes.matching import Matching
from ftnas.nodes.models import SplitModel
from ftnas.nodes.network import Failout, Mode, Weighting
from ftnas.nodes.partition import Partition, Skip
from ftnas.nodes.samples import HealthConfig, SamplesConfig
from ftnas.overrides import read_data
from ftnas.rundir import RunDir
from ftnas.settings import Count, Positive, Rate, Settings, did_you_mean, parse

FOLDER = "configs/nodes"
NO_FAILURE = "no_failure"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]  # of files, too
Index = Annotated[int, Field(ge=0)]


class Variant(Settings):
    """One way to train and run the network.

    Attributes:
        mode: `resilinet` and `on_failure` need ``failout``, `dfg` may have it, `vanilla` not.
        failout: Of the training.
        weights: Of the hyperconnections.
        weights_setting: The failure setting that the weights follow, where they follow one.
        skips: Those that this variant has; None for all of the map.
        models: Another variant, whose trained models are run in this one's ``mode``, with these ``skips``; nothing is
            trained then.
        survival: In use, multiply each hyperconnection by the probability that failout left its source alive.
    """

    mode: Mode
    failout: Failout | None = None
    weights: Weighting = Weighting()
    weights_setting: str = "normal"
    skips: tuple[Skip, ...] | None = None
    models: str | None = None
    survival: bool = False

    @model_validator(mode="after")
    def _effective(self) -> Variant:
        if self.models is not None:
            if self.failout is not None or self.weights != Weighting():
                raise ValueError("failout and weights are those of the variant under models; leave them out here")
            if self.mode == "vanilla":
                raise ValueError("mode vanilla has no effect with models; give skips: [] to run them without any")
            return self
        if self.mode == "vanilla" and (self.failout is not None or self.skips is not None):
            raise ValueError(
                "failout and skips have no effect on mode vanilla, nothing bypasses its nodes; leave them out"
            )
        if self.mode in ("resilinet", "on_failure") and self.failout is None:
            raise ValueError(f"mode {self.mode} needs failout; give its rate, e.g. failout: {{rate: 0.05}}")
        if self.skips == ():
            raise ValueError("skips: [] is mode vanilla; take that")
        if self.survival and self.failout is None:
            raise ValueError("survival has no effect without failout; leave it out")
        return self


class Selection(Settings):
    """Which epoch of a training is kept: the best on validation images, the earliest of equals.

    The paper keeps the epoch of the highest validation accuracy without failures (section 3.1).

    Attributes:
        share: Of the training images, stratified, that are kept for it.
        setting: Failure setting whose exact average accuracy decides, or ``no_failure``.
    """

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    setting: str = NO_FAILURE


class SkipSearch(Settings):
    """Which skips of the map to keep (``ftnas nodes search``).

    Attributes:
        mode: How the kept ones are run.
        failout: Of the training; needed as for a variant. Rates of single nodes hold while a skip bypasses the node.
        setting: Failure setting whose exact average accuracy, on the samples of ``selection``, is the score.
        budget: The most that the kept skips may take together, in bytes per image.
        counted: ``reserved`` counts what a skip carries while it is active, whether it is or not; ``expected`` what it
            carries on average in the failure setting.
        controller: What proposes subsets: random or evolution.
        trials: Subsets that are asked for.
        exhaustive: Score every subset too, to compare.
    """

    mode: Mode = "on_failure"
    failout: Failout | None = None
    setting: str
    budget: Positive
    counted: Literal["reserved", "expected"] = "reserved"
    controller: ControllerChoice = EvolutionConfig(population_size=8, sample_size=3)
    trials: Count = 30
    exhaustive: bool = False

    @model_validator(mode="after")
    def _effective(self) -> SkipSearch:
        Variant(mode=self.mode, failout=self.failout)
        if self.mode == "vanilla":
            raise ValueError("mode vanilla has no skips to search; take another")
        if self.controller.name == "reinforce":
            raise ValueError("controller reinforce decides on cells only; take random or evolution")
        return self


class LiveConfig(Settings):
    """How ``ftnas nodes run`` runs a trained network, each node a process.

    Attributes:
        variant: Which; None for the first with skips.
        time_limit_s: The answer is there so soon after the loss of one node.
        images: From the start of the test set; None for all.
        batch_size: Images that are sent together.
        kill: Node -> number of the image before which its process is killed, for trying it.
        hang: Node -> number of the image before which its process is stopped, so that it hangs.
    """

    variant: str | None = None
    time_limit_s: Positive = 3.0
    images: Count | None = 200
    batch_size: Count = 1
    kill: dict[str, Index] = Field(default_factory=dict)
    hang: dict[str, Index] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_effect(self) -> LiveConfig:
        for name, image in [*self.kill.items(), *self.hang.items()]:
            if self.images is not None and image >= self.images:
                raise ValueError(f"{name}: image {image} is never sent, there are images 0 to {self.images - 1}")
        both = sorted(set(self.kill) & set(self.hang))
        if both:
            raise ValueError(f"nodes both in kill and in hang: {both}; leave one out")
        return self


class NodesConfig(Settings):
    """A study of split networks.

    Attributes:
        name: Of the study, and of its folder under ``runs/``.
        seed: Of the first training.
        data: Images or sensor readings.
        augment: Crop, flip and cutout of images.
        model: The network whose blocks are split.
        partition: Nodes and skips.
        matching: How a skip fits another shape: ``projection`` or ``zero_padding``.
        epochs: Of each training.
        batch_size: Samples per step.
        settings: Failure settings: name -> node -> probability of failure; every node is named.
        variants: Name -> how to train and run.
        seeds: Trainings of each variant, with seeds ``seed`` to ``seed + seeds - 1``.
        lr: Of Adam.
        test_images: Evaluate on this many test images, stratified, always the same ones. None: all.
        selection: Which epoch is kept; None for the last.
        compare: The variant that a table holds the others against, seed by seed; None for no such table.
        live: Of ``ftnas nodes run``.
        search: Of ``ftnas nodes search``.
    """

    name: Name
    seed: int = 0
    seeds: Count = 5
    data: SamplesConfig
    augment: AugmentConfig = AugmentConfig()
    model: SplitModel
    partition: Partition
    matching: Matching = "projection"
    settings: dict[str, dict[str, Rate]]
    variants: dict[Name, Variant] = Field(min_length=1)
    epochs: Count
    batch_size: Count
    lr: Positive = 0.001
    selection: Selection | None = None
    test_images: Count | None = None
    compare: str | None = None
    live: LiveConfig = LiveConfig()
    search: SkipSearch | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> NodesConfig:
        names = set(self.partition.parents)
        if isinstance(self.data, HealthConfig) and self.augment.active:
            raise ValueError("augment is for images, and has no effect on sensor readings; leave it out")
        self.partition.check_covers(self.model.num_blocks)
        if NO_FAILURE in self.settings:
            raise ValueError(f"settings.{NO_FAILURE}: is there always; take another name")
        for name, rates in self.settings.items():
            self.partition.check_names(rates, where=f"settings.{name}")
            if set(rates) != names:
                raise ValueError(f"settings.{name}: no rate for {sorted(names - set(rates))}; give each node one")
        if self.selection is not None and self.selection.setting not in (NO_FAILURE, *self.settings):
            known = did_you_mean(self.selection.setting, [NO_FAILURE, *self.settings])
            raise ValueError(f"selection.setting: no failure setting {self.selection.setting!r}; {known}")
        if self.search is not None:
            if self.search.setting not in (NO_FAILURE, *self.settings):
                known = did_you_mean(self.search.setting, [NO_FAILURE, *self.settings])
                raise ValueError(f"search.setting: no failure setting {self.search.setting!r}; {known}")
            if self.selection is None or not self.partition.skips:
                raise ValueError("search needs skips to choose from, and selection: validation samples to score on")
            if self.search.failout is not None:
                self.search.failout.rates_of(self.partition)
        for name, variant in self.variants.items():
            self._check_variant(name, variant)
        for where in ("kill", "hang"):
            self.partition.check_names(getattr(self.live, where), where=f"live.{where}")
        if self.compare is not None and self.compare not in self.variants:
            known = did_you_mean(self.compare, self.variants)
            raise ValueError(f"compare: no variant {self.compare!r}; {known}")
        if self.compare is not None and self.seeds < 2:
            raise ValueError(f"compare takes two seeds or more, got seeds={self.seeds}; give more, or compare=null")
        if self.live.variant is not None and self.live.variant not in self.variants:
            raise ValueError(
                f"live.variant: no variant {self.live.variant!r}; {did_you_mean(self.live.variant, self.variants)}"
            )
        return self

    def _check_variant(self, name: str, variant: Variant) -> None:
        source = self.trained(name)
        if variant.models is not None and (source is None or source.models is not None):
            trained = [other for other, value in self.variants.items() if value.models is None]
            hint = did_you_mean(variant.models or "", trained)
            raise ValueError(f"variants.{name}.models: no trained variant {variant.models!r}; {hint}")
        assert source is not None
        if variant.survival and source.failout is None:
            raise ValueError(f"variants.{name}.survival has no effect, {variant.models} has no failout; leave it out")
        has = self.partition if source.skips is None else self.partition.with_skips(source.skips)
        if variant.skips is not None:
            has.with_skips(variant.skips)
        if source.failout is not None and not source.failout.rates_of(has):
            raise ValueError(f"variants.{name}: failout has no effect, the map has no skips; add some, or take vanilla")
        follows = variant.weights.scheme in ("reliability", "relative")
        if follows and variant.weights_setting not in self.settings:
            known = did_you_mean(variant.weights_setting, self.settings)
            raise ValueError(f"variants.{name}.weights_setting: no setting {variant.weights_setting!r}; {known}")
        if not follows and variant.weights_setting != type(variant).model_fields["weights_setting"].default:
            raise ValueError(f"variants.{name}.weights_setting has no effect on the weights here; leave it out")

    def trained(self, name: str) -> Variant | None:
        """Return the variant whose training gives the models of a variant: itself, or that under ``models``."""
        variant = self.variants[name]
        return variant if variant.models is None else self.variants.get(variant.models)

    @property
    def all_seeds(self) -> range:
        """The seed of each training of a variant."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Every failure setting, ``no_failure`` first."""
        return {NO_FAILURE: dict.fromkeys(self.partition.parents, 0.0), **self.settings}


def read_nodes_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> NodesConfig:
    """Read the YAML file of a study, a path or the name of a shipped one; ValueError in one line for what is wrong."""
    return parse(NodesConfig, read_data(name_or_path, overrides, folder=FOLDER))


def open_study(
    name_or_path: str | Path, out: Path | None = None, *, overrides: Sequence[str] = ()
) -> tuple[NodesConfig, RunDir]:
    """Read a config and open its run folder, made when missing; ``live`` and ``compare`` may differ from the folder's.

    A study of another config that has made nothing yet is replaced.

    Raises:
        ValueError: The folder holds another run, or files and no run.
    """
    config = read_nodes_config(name_or_path, overrides)
    plain = config.model_dump(mode="json")
    folder = (out if out is not None else Path("runs") / config.name).expanduser()
    if not any(folder.glob("*")):
        return config, RunDir.create(folder, plain)
    run = RunDir.open(folder)
    of_nodes = "partition" in run.config
    for key in {**plain, **run.config}:
        if key not in ("live", "compare") and run.config.get(key) != plain.get(key):
            run.close()
            if of_nodes and not run.made_anything():
                return config, RunDir.create(folder, plain, overwrite=True)
            what = f"a run of another config, {key} differs" if of_nodes else "a run that is no study of nodes"
            raise ValueError(f"{folder} holds {what}; give another --out or remove it")
    return config, run


def model_file(name: str, seed: int) -> str:
    """Return the name of the file of one trained model."""
    return f"{name}-{seed}.pt"
