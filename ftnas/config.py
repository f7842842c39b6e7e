"""A run's config file: YAML, then ``key.path=value`` overrides, through one strict parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftnas.campaign import CampaignConfig
from ftnas.data import DataConfig
from ftnas.faults.hardware import Hardware, check_alpha
from ftnas.models import ModelConfig
from ftnas.overrides import read_data
from ftnas.pool import PoolConfig
from ftnas.protection import ProtectionConfig
from ftnas.recipe import TrainConfig
from ftnas.search_settings import SearchConfig
from ftnas.settings import Settings, parse
from ftnas.shipped import shipped_names
from ftnas.single import SingleFaultConfig
from ftnas.tolerance import TABLE, ToleranceConfig
from ftnas.trainings import MODEL
from ftnas.tuning import TUNE, AshaConfig

FOLDER = "configs"
VERSION = 1
SEARCHES = ("search", "control")

_TAKEN = (MODEL, TUNE, TABLE, "events.jsonl")
"""What lies beside the folders of models in ``train/`` and ``bounds/``."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class TrainStage(Settings):
    """Final training of one or more models with one recipe.

    Attributes:
        recipe: How each is trained.
        models: Models by name; the first is the one that ``train/model.pt`` holds. ``genotype: search`` and
            ``genotype: control`` mean what this run's searches found.
        seeds: Training seeds; every model is trained once for each.
        asha: With ``pool.workers``: stop trainings that lag behind. The stops are not reproducible.
    """

    recipe: TrainConfig
    models: dict[Name, ModelConfig] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    asha: AshaConfig | None = None

    @model_validator(mode="after")
    def _comparable(self) -> TrainStage:
        if self.asha is None:
            return self
        if self.recipe.rate_protocol is not None or len(self.seeds) > 1:
            raise ValueError(
                "asha stops models that lag behind, which rates and seeds must not decide: it takes one seed and no "
                "rate_protocol"
            )
        if len(self.models) < 2 or self.asha.grace_epochs >= self.recipe.epochs:
            raise ValueError("asha has no effect on one model, or with grace_epochs as long as the training; remove it")
        return self

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("training seeds are numbers from 0 on, each once")
        return seeds


class GivenModel(Settings):
    """A trained model from outside the run: a model file of ours, or the user's own factory with its weights.

    Attributes:
        file: A ``model.pt`` of ``ftnas train``.
        factory: ``package.module:Name``, called with ``num_classes=`` and ``in_channels=``.
        checkpoint: The factory's ``state_dict``, as ``torch.save`` wrote it.
    """

    file: str | None = None
    factory: str | None = None
    checkpoint: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> GivenModel:
        if (self.file is None) == (self.factory is None):
            raise ValueError("give either file (a model.pt) or factory (with checkpoint)")
        if (self.factory is None) != (self.checkpoint is None):
            raise ValueError("factory and checkpoint belong together: untrained weights are not worth a campaign")
        return self


class RunConfig(Settings):
    """Everything that a run does, stage by stage; a stage that is left out is not part of the run.

    Attributes:
        version: Schema version of the file, 1.
        name: Name of the run, and of its folder under ``runs/``.
        description: One line for ``ftnas configs``.
        seed: Seed of everything random.
        device: ``cpu``, ``cuda`` or ``auto`` (cuda where there is one).
        threads: CPU threads of torch; None leaves torch's own number. Float sums depend on it.
        pool: Who scores candidates, trains and measures: this process, or workers of Ray.
        data: The dataset.
        hardware: Faults and number formats of search and training.
        search: The architecture search.
        control: A second search to compare with, e.g. a random one of equal budget.
        train: Final trainings.
        campaign: Evaluation at fault rates, on the test set.
        single_faults: Evaluation of single faults, on the test set.
        protections: What to protect; chosen on training images, measured on the test set.
        bounds: Worst cases of failures, of trained models; images of the test set.
        models: Further trained models to evaluate.
    """

    version: Literal[1]
    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    pool: PoolConfig = PoolConfig()
    data: DataConfig
    hardware: Hardware = Hardware()
    search: SearchConfig | None = None
    control: SearchConfig | None = None
    train: TrainStage | None = None
    campaign: CampaignConfig | None = None
    single_faults: tuple[SingleFaultConfig, ...] = ()
    protections: tuple[ProtectionConfig, ...] = ()
    bounds: ToleranceConfig | None = None
    models: dict[Name, GivenModel] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _stages_fit(self) -> RunConfig:
        for name in SEARCHES:
            stage: SearchConfig | None = getattr(self, name)
            if stage is not None:
                check_alpha(stage.weights.alpha_l, self.hardware, f"{name}.weights.alpha_l")
                check_alpha(stage.alpha_r, self.hardware, f"{name}.alpha_r")
        if self.train is not None:
            if self.train.asha is not None and self.pool.workers == 0:
                raise ValueError("train.asha works with workers alone, and pool.workers=0; set workers or remove asha")
            if self.pool.workers and self.device.startswith("cuda:"):
                raise ValueError(f"with pool.workers Ray gives each training a GPU, and device={self.device} names one")
            check_alpha(self.train.recipe.alpha_l, self.hardware, "train.recipe.alpha_l")
            for name, model in self.train.models.items():
                if model.genotype in SEARCHES and getattr(self, model.genotype) is None:
                    raise ValueError(f"train.models.{name} takes the genotype of a {model.genotype} that is not there")
        learns = [self.train.recipe.alpha_l] if self.train is not None else []
        learns += [stage.weights.alpha_l for stage in (self.search, self.control) if stage is not None]
        if self.hardware.defects is not None and not any(learns):
            raise ValueError(
                "hardware.defects is a device to train for, and nothing here trains under faults, so that it has no "
                "effect; add a train section with alpha_l above 0, or remove it"
            )
        looks = self.evaluates or self.bounds is not None
        if self.models and not looks:
            raise ValueError("models are for a campaign or bounds, and there is none; add one or remove them")
        if looks and self.train is None and not self.models:
            raise ValueError("a campaign (or bounds) needs models: a train section, or trained ones under models")
        for section in ("single_faults", "protections"):
            labels = [entry.label for entry in getattr(self, section)]
            if len(set(labels)) < len(labels):
                raise ValueError(f"{section}: names must differ, got {', '.join(labels)}; give one a name of its own")
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there is anything for ``ftnas campaign`` to do."""
        return self.campaign is not None or bool(self.single_faults or self.protections)


def config_names() -> list[str]:
    """Return the names of the shipped configs."""
    return shipped_names(FOLDER, ".yaml")


def read_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides.

    Args:
        name_or_path: A shipped config's name, or a path.
        overrides: ``key.path=value``, each value in YAML.

    Raises:
        ValueError: One line: the file, key or value that is wrong, and the nearest right one.
    """
    config = config_from(read_data(name_or_path, overrides, folder=FOLDER))
    _check_new(config)
    return config


def _check_new(config: RunConfig) -> None:
    """Refuse what would go wrong or has no effect, in a config that can be mended: that of an older run may have it."""
    train, campaign, bounds = config.train, config.campaign, config.bounds
    for name in (*config.models, *(train.models if train is not None else ())):
        if name.lower() in _TAKEN:
            raise ValueError(
                f"models.{name}: a run has a file of that name beside the folders of models; choose another"
            )
    if train is not None and campaign is not None and campaign.interval == "bootstrap" and len(train.seeds) > 1:
        raise ValueError(
            "campaign.interval is for one training seed, and has no effect on several, whose reports give the interval "
            "over them; remove it"
        )
    if train is not None and train.recipe.alpha_l == 1.0 and train.recipe.bn_statistics == "clean":
        raise ValueError(
            "train.recipe.bn_statistics: alpha_l=1 has no clean forward, and running statistics would never move; take "
            "both or faulty, or set alpha_l below 1"
        )
    _check_devices(config)
    if config.data.unreadable != "error" and config.data.name != "image_folder":
        raise ValueError("data.unreadable: concerns files of image_folder only; leave it out")
    for single in config.single_faults:
        given = _changed(single, "margin", "level", "minimum")
        if single.exhaustive and given:
            raise ValueError(
                f"single_faults: {given} chooses a number of experiments, and exhaustive does all; remove it"
            )
        never = single.fault.with_rate(0.0)
        for key, field in type(single.fault).model_fields.items():
            if getattr(single.fault, key) not in (getattr(never, key), field.default):
                raise ValueError(f"single_faults: {single.label}: one fault at a time has no rate; remove {key}")
    given = None if bounds is None else _changed(bounds, "failing", "draws", "share")
    if bounds is not None and bounds.failures.component == "synapse" and given:
        raise ValueError(f"bounds: {given} has no effect on failing synapses, of which nothing is run; remove it")


def _check_devices(config: RunConfig) -> None:
    """Refuse settings that known devices, which say themselves what is hit, do not meet."""
    campaign = config.campaign
    if campaign is None or not campaign.defects:
        return
    if config.hardware.protect:
        raise ValueError(
            "hardware.protect keeps nothing from the devices of campaign.defects, which say themselves what is hit; "
            "remove one of them, or the hits from the devices"
        )
    if campaign.errors is not None and not campaign.sweeps:
        raise ValueError("campaign.errors is for sweeps, and has no effect on known devices (defects); remove it")


def _changed(settings: Settings, *keys: str) -> str | None:
    """Return the first of some settings that is not what it is when left out."""
    return next((key for key in keys if getattr(settings, key) != type(settings).model_fields[key].default), None)


def read_bounded(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[DataConfig, ToleranceConfig]:
    """Read of a config, which may be another one's, what its bounds are about; nothing that it names is imported.

    Raises:
        ValueError: One line, as `read_config`; or it has no bounds.
    """
    plain = read_data(name_or_path, overrides, folder=FOLDER)
    if plain.get("bounds") is None:
        raise ValueError(f"the config {plain.get('name')!r} has no bounds section")
    return (
        parse(DataConfig, plain.get("data") or {}, where="data"),
        parse(ToleranceConfig, plain["bounds"], where="bounds"),
    )


def config_from(data: Mapping[str, Any]) -> RunConfig:
    """Build a config from plain data, e.g. that of a run folder."""
    if "partition" in data and "version" not in data:
        raise ValueError("this is a study of nodes; the command of `ftnas nodes` that began it goes on with it")
    return parse(RunConfig, data)


def with_workers(config: RunConfig, workers: int | None, *, threads: int | None) -> RunConfig:
    """Return a recorded config with another number of workers, which changes the time of a run and not its result.

    Threads per task stay as they were: float sums depend on them.

    Args:
        config: As it was recorded.
        workers: How many; None leaves the config as it is.
        threads: That the run has used so far, where ``pool.threads`` does not say it; None for a fresh run.

    Raises:
        ValueError: A setting has no effect without workers.
    """
    if workers is None:
        return config
    address = config.pool.address if workers else None
    pool = {"workers": workers, "threads": config.pool.threads or threads, "address": address}
    return config_from({**config.model_dump(mode="json"), "pool": pool})
