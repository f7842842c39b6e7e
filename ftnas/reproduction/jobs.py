"""The runs behind a table, each in a folder named after the hash of what decides its result: tables share them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from ftnas.campaign import RECORDS, CampaignConfig, Subject, SweepConfig, run_campaign
from ftnas.config import SEARCHES, RunConfig
from ftnas.data import DataConfig, ImageSet, load, stratified_split
from ftnas.derive import VERSION, WINNER
from ftnas.devices import pick_device
from ftnas.foresight import check_recipe
from ftnas.models import count, describe, load_model
from ftnas.pipeline import Pipeline
from ftnas.rng import seed_for
from ftnas.rundir import RunDir
from ftnas.space import load_space, space_names
from ftnas.storage import read_journal
from ftnas.trainings import MODEL

DONE = "done.json"
TEST_DIGEST, TRAIN_DIGEST = "test_digest", "dataset_digest"
# What changes where or how fast a run goes, what it is called, or what follows it: not its result.
_ELSEWHERE = ("name", "description", "pool", "campaign", "single_faults", "protections", "models")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A sweep over one trained network.

    Attributes:
        sweep: Fault model and rates; rates are not part of the hash, so that more of them are measured later.
        devices: Per rate; not part of the hash either.
        images: Of the test set; None takes all.
        batch_size: Images per forward.
    """

    sweep: SweepConfig
    devices: int
    images: int | None
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training from one seed, with the search before it where the network is searched.

    Attributes:
        config: A run config with one model in its train section, and one seed.
        model: Its name.
        cache: Folder of all runs.
    """

    config: RunConfig
    model: str
    cache: Path

    @property
    def searches(self) -> bool:
        """Whether the architecture comes from a search of the config."""
        return self._model.genotype == "search"

    @cached_property
    def search_key(self) -> str:
        """Hash of what decides the search."""
        kept = {key: value for key, value in self._plain().items() if key != "train"}
        return _hash({**kept, "version": VERSION})

    @cached_property
    def key(self) -> str:
        """Hash of what decides the trained weights."""
        plain = self._plain()
        train = plain["train"]
        recipe = self.config.train.recipe if self.config.train else None
        assert recipe is not None
        if recipe.alpha_l == 0.0:  # nothing is faulted while it trains
            plain["hardware"] = self.config.hardware.without_faults().model_dump(mode="json")
        if self.searches:
            own = self._model.model_dump(mode="json", exclude_none=True, exclude={"start"})
            network: Any = {"search": self.search_key, **own}
            if self._model.space is not None:
                network["space"] = _space(self._model.space)
        else:
            network = describe(self._model, num_classes=0, in_channels=0, image_size=0)
        if self._model.start is not None:
            network["start"] = _sha256(self._model.start, f"train.models.{self.model}.start")
        kept = {key: value for key, value in plain.items() if key not in ("search", "control", "train")}
        return _hash({**kept, "recipe": train["recipe"], "seeds": train["seeds"], "network": network})

    @property
    def folder(self) -> Path:
        """Run folder of the training."""
        return self.cache / f"train-{self.key}"

    @property
    def search_folder(self) -> Path:
        """Run folder of the search."""
        return self.cache / f"search-{self.search_key}"

    @property
    def by_rate_protocol(self) -> bool:
        """Whether the training rate is found by the rate protocol."""
        return self.config.train is not None and self.config.train.recipe.rate_protocol is not None

    @property
    def seed(self) -> int:
        """The training seed."""
        assert self.config.train is not None
        return self.config.train.seeds[0]

    @property
    def _model(self) -> Any:
        assert self.config.train is not None
        return self.config.train.models[self.model]

    def _plain(self) -> dict[str, Any]:
        plain = self.config.model_dump(mode="json")
        where = ["root", "download", "workers"]
        if self.config.data.memory_limit_mb == DataConfig.model_fields["memory_limit_mb"].default:
            where.append("memory_limit_mb")  # of a set that is too large to hold, fewer images give mean and deviation
        plain["data"] = {key: value for key, value in plain["data"].items() if key not in where}
        recipes = [plain["train"]["recipe"]] if plain["train"] else []
        recipes += [plain[name]["weights"] for name in SEARCHES if plain[name]]
        for recipe in recipes:
            # the results are the same, but for last bits, which another machine changes as well
            for same_results in ("fused_rounding", "cuda_graph", "cudnn_benchmark"):
                del recipe["compute"][same_results]
        for search in (plain[name] for name in SEARCHES if plain[name]):
            search["space"] = _space(search["space"])
            del search["joint_forwards"]  # as those of a recipe
        if self.config.hardware.defects is not None:
            plain["hardware"]["defects"] = _sha256(self.config.hardware.defects, "hardware.defects")
        return {key: value for key, value in plain.items() if key not in _ELSEWHERE}

    def measure_key(self, measurement: Measurement) -> str:
        """Hash of what decides the records of a sweep, apart from its rates and devices."""
        plain = self._plain()
        sweep = measurement.sweep.model_dump(mode="json", exclude={"rates"})
        hardware = self.config.hardware.without_faults().model_dump(mode="json")
        sizes = {"images": measurement.images, "batch_size": measurement.batch_size}
        same = {key: plain[key] for key in ("version", "seed", "device", "threads", "data")}
        return _hash({**same, "training": self.key, "hardware": hardware, "sweep": sweep, **sizes})

    def measure_folder(self, measurement: Measurement) -> Path:
        """Run folder of a sweep."""
        return self.cache / f"measure-{self.measure_key(measurement)}"


def _hash(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _space(name_or_path: str) -> Any:
    """Return what stands for a space in a hash: the name of a shipped one, or what a file says."""
    return name_or_path if name_or_path in space_names() else load_space(name_or_path).model_dump(mode="json")


def _sha256(path: str, setting: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{setting}: not readable, got {path!r}: {error.strerror}") from None


def trained(job: Job) -> bool:
    """Tell whether the network is there."""
    return (job.folder / DONE).exists()


def train(job: Job) -> None:
    """Search where needed and train, or go on with either; what is done is left as it is.

    Raises:
        InUseError: Another process is at it.
        ValueError: A user's mistake.
        RuntimeError: The training failed.
    """
    if trained(job):
        return
    config = job.config
    if job.searches:
        path, search = _search(job), config.search
        assert config.train is not None and search is not None
        model = config.train.models[job.model]
        model = model.model_copy(update={"genotype": str(path), "space": model.space or search.space})
        stage = config.train.model_copy(update={"models": {job.model: model}})
        config = config.model_copy(update={"train": stage})
    config = config.model_copy(update={"search": None, "control": None, "campaign": None})
    with _opened(job.folder, config.model_dump(mode="json")) as run, _timed(run, config.pool.workers):
        Pipeline(config, run).train()
        run.write_json(DONE, {"model": job.model, "seed": job.seed})


def _search(job: Job) -> Path:
    path = job.search_folder / "search" / WINNER
    if not (job.search_folder / DONE).exists():
        config = job.config.model_copy(update={"train": None, "control": None, "campaign": None})
        with _opened(job.search_folder, config.model_dump(mode="json")) as run, _timed(run):
            stages = Pipeline(config, run)
            if job.config.train is not None:  # told before the search, which is the longer part
                check_recipe(job.config.train.recipe, stages.train_images, config=job.config)
            stages.search()
            run.write_json(DONE, {"genotype": f"search/{WINNER}"})
    return path


def measure(job: Job, measurement: Measurement) -> None:
    """Measure a sweep of a trained network; rates that were measured are left as they are.

    Raises:
        InUseError: Another process is at it.
    """
    if not missing(job, measurement):
        return
    config = job.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    plain = {
        "training": job.key,
        "seed": config.seed,
        "data": config.data.model_dump(mode="json"),
        "hardware": config.hardware.without_faults().model_dump(mode="json"),
        "sweep": measurement.sweep.model_dump(mode="json", exclude={"rates"}),
        "images": measurement.images,
        "batch_size": measurement.batch_size,
    }
    network, metadata = load_model(_model_file(job), allow_factory=True)
    images = test_images(config.data, measurement.images).to(device)
    subject = Subject(
        name=job.key,
        train_seed=job.seed,
        training=metadata["training"],
        complexity=count(network, images.shape),
        load=lambda: network.to(device).eval(),
    )
    campaign = CampaignConfig(
        sweeps=(measurement.sweep,), devices=measurement.devices, batch_size=measurement.batch_size
    )
    with _opened(job.measure_folder(measurement), plain) as run, _timed(run):
        run.describe(**{TEST_DIGEST: images.digest})
        run_campaign(
            [subject],
            images,
            config=campaign,
            hardware=config.hardware.without_faults(),
            seed=seed_for(config.seed, "campaign"),
            folder=run,
        )


def trained_for(job: Job) -> str:
    """Return what a trained network was trained for, e.g. ``mibb 0.0003``."""
    return str(load_model(_model_file(job), allow_factory=True)[1]["training"])


def _model_file(job: Job) -> Path:
    return job.folder / "train" / job.model / f"seed-{job.seed}" / MODEL


@lru_cache(maxsize=1)
def test_images(data: DataConfig, number: int | None) -> ImageSet:
    """Return that many test images, stratified, always the same ones; read once for all networks of a study."""
    images = load(data, "test")
    if number is None or number >= images.num_images:
        return images
    chosen, _ = stratified_split(images.labels, number / images.num_images, seed=0)
    return images.subset(chosen)


def records(job: Job, measurement: Measurement) -> list[dict[str, Any]]:
    """Return the records of a sweep that are there, of its devices, at its rates and at rate 0."""
    path = job.measure_folder(measurement) / RECORDS
    if not path.exists():
        return []
    wanted = {0.0, *measurement.sweep.rates}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in lines if line["rate"] in wanted and (line["device"] or 0) < measurement.devices]


def missing(job: Job, measurement: Measurement) -> int:
    """Return how many records of a sweep are not there."""
    rates = set(measurement.sweep.rates) - {0.0}
    found = {(line["rate"], line["device"]) for line in records(job, measurement)}
    return 1 + len(rates) * measurement.devices - len(found)


def finished(job: Job, measurements: Sequence[Measurement]) -> bool:
    """Tell whether a network is trained and all sweeps of it are measured."""
    return trained(job) and not any(missing(job, measurement) for measurement in measurements)


def cost(folder: Path) -> dict[str, Any]:
    """Return ``cpu_s`` and ``wall_s`` of all processes that worked at a run folder, its ``machines`` and ``commit``.

    Where there were workers of Ray, the time of the process that started them is all that is known (``is_all`` false).
    """
    path = folder / "events.jsonl"
    lines = read_journal(path)[0] if path.exists() else []  # without a last line that was cut
    spent = [line for line in lines if line["kind"] == "spent"]
    total = {name: round(sum(line[name] for line in spent), 1) for name in ("cpu_s", "wall_s")}
    info = json.loads((folder / "run.json").read_text(encoding="utf-8")) if spent else {}
    return {
        **total,
        "is_all": not any(line.get("workers") for line in spent),
        "machines": sorted({line["machine"] for line in spent}),
        "commit": info.get("commit"),
    }


def digest_in(folder: Path, name: str) -> str | None:
    """Return a digest of images that a run noted, or None."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None


@contextmanager
def _opened(path: Path, plain: dict[str, Any]) -> Iterator[RunDir]:
    with _open_or_create(path, plain) as run:
        yield run


def _open_or_create(path: Path, plain: dict[str, Any]) -> RunDir:
    if not (path / "run.json").exists():
        try:
            return RunDir.create(path, plain)
        except ValueError:
            if not (path / "run.json").exists():  # else another process made it between the two
                raise
    return RunDir.open(path)


@contextmanager
def _timed(run: RunDir, workers: int = 0) -> Iterator[None]:
    cpu, wall = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        spent = {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.monotonic() - wall, 2)}
        run.events("spent", **spent, machine=machine(), workers=workers)


def machine() -> str:
    """Return the processor and the number of cores, or the GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}"
