"""The stages of a run, each reading what the one before left in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from ftnas.campaign import Subject, run_campaign
from ftnas.config import SEARCHES, GivenModel, RunConfig, TrainStage
from ftnas.data import DataConfig, ImageSet, load, stratified_split
from ftnas.derive import WINNER
from ftnas.devices import pick_device
from ftnas.foresight import check_network, check_recipe, say_of_search, say_unmet, say_without_effect
from ftnas.models import ModelConfig, about, build_spec, check_logits, count, describe, load_factory, load_model
from ftnas.parallel import SearchJob, check_ranks, search_on_ranks
from ftnas.pool import num_threads
from ftnas.progress import say
from ftnas.protection import run_protection
from ftnas.ranks import Ranks
from ftnas.rng import seed_for
from ftnas.rundir import Folder, RunDir, quoted
from ftnas.sameness import check_data, check_file, note_factory
from ftnas.search_settings import SearchConfig
from ftnas.single import run_single_faults
from ftnas.space import Genotype
from ftnas.tolerance import ToleranceConfig, run_tolerance
from ftnas.trainings import MODEL, STOPPED, Failure, Training, check_failures, is_done, train_in_turn
from ftnas.tuning import train_on_workers
from ftnas.workers import open_pool


class Pipeline:
    """One run: its config, its folder, its images.

    Args:
        config: The resolved config.
        run: The open run folder.

    Raises:
        ValueError: The device is not there or has no room for the ranks of a search, or the dataset is missing or
            unreadable.
    """

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self.config = config
        self.run = run
        self.device = pick_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        for which in SEARCHES:
            search: SearchConfig | None = getattr(config, which)
            if search is not None:
                local = config.pool.address is None
                check_ranks(search, which=which, device=self.device, threads=config.threads or 1, local=local)
        self._train_images: ImageSet | None = None
        self._tried: set[str] = set()
        run.events("started", device=str(self.device), threads=torch.get_num_threads(), torch=torch.__version__)

    @property
    def train_images(self) -> ImageSet:
        """The training images, on the device; loaded on first use."""
        if self._train_images is None:
            images = load(self.config.data, "train").to(self.device)
            check_data(self.run, images.digest, "dataset_digest", "training images")
            self.run.describe(num_classes=len(images.classes))
            self._train_images = images
        return self._train_images

    def _test_images(self) -> ImageSet:
        """Load the test images, on the device."""
        images = load(self.config.data, "test").to(self.device)
        check_data(self.run, images.digest, "test_digest", "test images")
        return images

    def _check_ahead(self, now: str = "train") -> None:
        """Find mistakes in what follows, in one line, before hours are spent: the config cannot be changed then.

        The recipe, every search to come but that of ``now``, and all that will be done to the models known already.
        """
        stage, shape = self.config.train, self.train_images.shape
        for name, given in self.config.models.items():
            path = given.file or given.checkpoint
            if path is None or self._makes(path):
                continue
            if not Path(path).is_file():
                raise ValueError(f"models.{name}: no file {path}, which is needed once the trainings are done")
            subject = self._given(name, given)
            seed = subject.train_seed
            if stage is not None and name in stage.models and seed in stage.seeds:
                raise ValueError(f"models.{name}: train.models has one of that name and seed {seed}; rename one")
            if name not in self._tried:
                check_network(subject.load(), shape, config=self.config, name=name, trains=False)
                self._tried.add(name)
        for which in SEARCHES:
            search: SearchConfig | None = getattr(self.config, which)
            if search is not None and which != now and not self.run.stage(which).file(WINNER).exists():
                job = self._job(which, search)
                job.make(self.train_images, Folder(job.folder), Ranks(0, search.ranks))
        if stage is not None:
            self._check_trainings(stage)
        if (self.config.evaluates or self.config.bounds is not None) and "test_digest" not in self.run.info:
            self._test_images()  # that all can be read; a file that is changed later is told

    def _check_trainings(self, stage: TrainStage) -> None:
        """Find mistakes in the recipe and in the networks that are known already."""
        shape = self.train_images.shape
        check_recipe(stage.recipe, self.train_images, config=self.config)
        for name, model in stage.models.items():
            paths = [path for path in (model.start, model.genotype) if path is not None and path not in SEARCHES]
            if f"train.{name}" in self._tried or any(self._makes(path) for path in paths):
                continue
            if model.start is not None and not Path(model.start).is_file():
                raise ValueError(f"train.models.{name}.start: no file {model.start}")
            if model.genotype in SEARCHES and not self.run.stage(model.genotype).file(WINNER).exists():
                continue
            self._check_space(model)
            training = self._training(name, stage.seeds[0])
            network = build_spec(training.spec, seed=0, allow_factory=True, start=model.start).to(self.device).eval()
            check_network(network, shape, config=self.config, name=name, trains=True)
            self._tried.add(f"train.{name}")

    def _check_space(self, model: ModelConfig) -> None:
        """Refuse to build what a search found in another space than that of the search."""
        if model.genotype in SEARCHES and model.space is None:
            search: SearchConfig = getattr(self.config, model.genotype)
            check_file(self.run, f"{model.genotype}.space", search.space)

    def _makes(self, path: str) -> bool:
        """Whether a file is one that this run has still to make."""
        return not Path(path).exists() and Path(path).resolve().is_relative_to(self.run.path.resolve())

    def search(self, which: str = "search") -> Genotype:
        """Run one of the config's searches, or go on with it; a finished one is read."""
        config: SearchConfig | None = getattr(self.config, which)
        if config is None:
            raise ValueError(f"the config {self.config.name!r} has no {which} section")
        folder = self.run.stage(which)
        if folder.file(WINNER).exists():
            return Genotype.load(folder.file(WINNER))
        check_file(self.run, "hardware.defects", self.config.hardware.defects)
        check_file(self.run, f"{which}.space", config.space)
        self._check_ahead(which)
        say_of_search(config, which)
        job = self._job(which, config)
        if config.ranks > 1:
            return search_on_ranks(job, self.train_images)
        return job.make(self.train_images, folder).run()

    def searches(self) -> dict[str, Genotype]:
        """Run every search that the config has, so that all that is trained is there; return what they found."""
        return {which: self.search(which) for which in SEARCHES if getattr(self.config, which) is not None}

    def _job(self, which: str, search: SearchConfig) -> SearchJob:
        return SearchJob(
            search,
            data=self.config.data,
            hardware=self.config.hardware,
            pool=self.config.pool,
            seed=seed_for(self.config.seed, which),
            split_seed=seed_for(self.config.seed, "split"),
            folder=self.run.stage(which).path.resolve(),
            title=which,
            device=self.device.type,
            threads=self.config.threads,
        )

    def train(self) -> None:
        """Train every model of the train section for every seed; finished ones are kept.

        Raises:
            RuntimeError: Some trainings failed; all the others are done.
        """
        stage = self.config.train
        if stage is None:
            raise ValueError(f"the config {self.config.name!r} has no train section")
        wanted = [(name, seed) for name in stage.models for seed in stage.seeds]
        finished = all(is_done(self._model_folder(*which).path) for which in wanted)
        if not finished:
            check_file(self.run, "hardware.defects", self.config.hardware.defects)
            for name, model in stage.models.items():
                for key in ("genotype", "space", "start"):
                    check_file(self.run, f"train.models.{name}.{key}", getattr(model, key))
                note_factory(self.run, f"train.models.{name}.factory", model.factory)
                self._check_space(model)
        trainings = [self._training(*which) for which in wanted]
        failures: list[Failure] = []
        if not finished:
            self._check_ahead()
            say_without_effect(self.config, self.device)
            if self.config.pool.workers:
                failures = train_on_workers(
                    trainings, self.train_images, pool=self.config.pool, asha=stage.asha, folder=self.run.stage("train")
                )
            else:
                with num_threads(self.config.pool.threads or torch.get_num_threads()):
                    failures = train_in_turn(trainings, self.train_images)
        first = trainings[0].folder / MODEL
        if first.exists():
            _copy(first, self.run.stage("train").file(MODEL))
        check_failures(failures, len(trainings), folder=self.run.path)

    def campaign(self) -> None:
        """Measure every trained model on the test set, which only this stage and `bounds` read."""
        config = self.config
        if not config.evaluates:
            raise ValueError(f"the config {config.name!r} has no campaign, single_faults or protections section")
        say_unmet(config)
        subjects = list(self._subjects())
        images = self._test_images()
        seed, hardware = seed_for(config.seed, "campaign"), config.hardware
        if config.campaign is not None:
            for number, path in enumerate(config.campaign.defects):
                check_file(self.run, f"campaign.defects.{number}", path)
            chosen = _some(images, config.campaign.images)
            with open_pool(config.pool, events=self.run.events) as pool:
                if not pool.shares_memory and self.device.type != "cpu":
                    raise ValueError(f"pool.workers measure on the CPU, and the run is on {self.device}; use workers=0")
                run_campaign(
                    subjects, chosen, config=config.campaign, hardware=hardware, seed=seed, folder=self.run, pool=pool
                )
        for single in config.single_faults:
            chosen = _some(images, single.images)
            run_single_faults(subjects, chosen, config=single, hardware=hardware, seed=seed, folder=self.run)
        for protection in config.protections:
            choosing = _some(self.train_images, protection.images)
            run_protection(subjects, choosing, images, config=protection, hardware=hardware, seed=seed, folder=self.run)

    def bounds(self) -> str:
        """Bound what failures can do to every trained model at worst; those that have their numbers keep them."""
        config = self.config.bounds
        if config is None:
            raise ValueError(f"the config {self.config.name!r} has no bounds section")
        images = _some(self._test_images(), config.images)
        seed = seed_for(self.config.seed, "bounds")
        return run_tolerance(list(self._subjects()), images, config=config, seed=seed, folder=self.run)

    def stages(self) -> list[tuple[str, Callable[[], object]]]:
        """Return the stages that the config asks for, in order."""
        stages: list[tuple[str, Callable[[], object]]] = [
            (which, partial(self.search, which)) for which in SEARCHES if getattr(self.config, which)
        ]
        if self.config.train is not None:
            stages.append(("train", self.train))
        if self.config.evaluates:
            stages.append(("campaign", self.campaign))
        if self.config.bounds is not None:
            stages.append(("bounds", self.bounds))
        return stages

    def _first(self, command: str) -> str:
        """Advise to do what comes before, in this run or, where the mistake leaves nothing of it, in one like it."""
        if self.run.passing:
            return f"a new run begins with `ftnas {command}`, or does all by `ftnas run`, with the same arguments"
        return f"run `ftnas {command} --resume {quoted(self.run.path)}` first"

    def _model_folder(self, name: str, train_seed: int) -> Folder:
        return self.run.stage("train").stage(f"{name}/seed-{train_seed}")

    def _resolved(self, name: str, model: ModelConfig) -> ModelConfig:
        """Replace ``genotype: search`` by the file that the search wrote, in that search's space."""
        if model.genotype not in SEARCHES:
            return model
        path = self.run.stage(model.genotype).file(WINNER)
        if not path.exists():
            raise ValueError(f"train.models.{name} needs {path}; {self._first('search')}")
        search: SearchConfig | None = getattr(self.config, model.genotype)
        assert search is not None
        return model.model_copy(update={"genotype": str(path), "space": model.space or search.space})

    def _training(self, name: str, train_seed: int) -> Training:
        config, stage, images = self.config, self.config.train, self.train_images
        assert stage is not None
        return Training(
            name=name,
            spec=describe(
                self._resolved(name, stage.models[name]),
                num_classes=len(images.classes),
                in_channels=images.shape[0],
                image_size=min(images.shape[1:]),
            ),
            recipe=stage.recipe,
            start=stage.models[name].start,
            hardware=config.hardware,
            data=config.data,
            train_seed=train_seed,
            seed=seed_for(config.seed, "train", train_seed),
            holdout_seed=seed_for(config.seed, "holdout"),
            folder=self._model_folder(name, train_seed).path.resolve(),
            title=f"train {name}" if len(stage.seeds) == 1 else f"train {name}, seed {train_seed}",
        )

    def _subjects(self) -> Iterable[Subject]:
        stage = self.config.train
        for name, model in stage.models.items() if stage is not None else ():
            note_factory(self.run, f"train.models.{name}.factory", model.factory)
            for train_seed in stage.seeds if stage is not None else ():
                folder = self._model_folder(name, train_seed)
                path = folder.file(MODEL)
                if folder.file(STOPPED).exists():
                    say(f"note: {name}, seed {train_seed}, was stopped early in its training and is left out")
                    continue
                if not path.exists():
                    raise ValueError(f"{path} is missing; {self._first('train')}")
                yield self._subject(name, path, allow_factory=True, train_seed=train_seed)
        for name, given in self.config.models.items():
            check_file(self.run, f"models.{name}", given.file or given.checkpoint)
            note_factory(self.run, f"models.{name}.factory", given.factory)
            yield self._given(name, given)

    def _given(self, name: str, given: GivenModel) -> Subject:
        """Read a model of the ``models`` section."""
        if given.file is not None:
            return self._subject(name, Path(given.file), allow_factory=False)
        assert given.factory is not None and given.checkpoint is not None
        images = self.train_images
        classes, channels = len(images.classes), images.shape[0]
        network = load_factory(given.factory, given.checkpoint, num_classes=classes, in_channels=channels)
        with about(name):
            check_logits(network, images.shape, classes)
        size = count(network, images.shape)
        return Subject(name, 0, "given", size, network.to(self.device).eval)

    def _subject(self, name: str, path: Path, *, allow_factory: bool, train_seed: int | None = None) -> Subject:
        network, metadata = load_model(path, allow_factory=allow_factory)
        images = self.train_images
        if list(metadata.get("classes", images.classes)) != list(images.classes):
            theirs, ours = metadata["classes"], list(images.classes)
            raise ValueError(
                f"{path}: trained for {_listed(theirs)}, and {self.config.data.name} has {_listed(ours)}; give the "
                "images that it was trained for, or a model of these"
            )
        shape = list(metadata.get("shape", images.shape))
        if shape != list(images.shape):
            raise ValueError(
                f"{path}: trained on images of {_size(shape)}, and {self.config.data.name} has {_size(images.shape)}; "
                f"set data.image_size={shape[-1]}"
            )
        here, there = (*images.mean, *images.std), (*metadata.get("mean", ()), *metadata.get("std", ()))
        if f"note.{name}" not in self._tried and any(abs(a - b) > 1e-3 for a, b in zip(here, there, strict=False)):
            self._tried.add(f"note.{name}")
            say(
                f"note: {name} was trained on images of another mean and deviation than those of this run's training "
                "images, by which all are normalised here; its accuracy can be another one than in its own run"
            )
        return Subject(
            name=name,
            train_seed=metadata.get("train_seed", 0) if train_seed is None else train_seed,
            training=metadata.get("training", "given"),
            complexity=count(network, images.shape),
            load=lambda: load_model(path, allow_factory=allow_factory)[0].to(self.device).eval(),
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(number) for number in shape)


def bounded_images(data: DataConfig, bounds: ToleranceConfig) -> ImageSet:
    """Return the test images that the bounds of a config are about, on the CPU.

    Raises:
        ValueError: The dataset is missing or unreadable.
    """
    return _some(load(data, "test"), bounds.images)


def _listed(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(map(str, classes[:3]))}{', ...' if len(classes) > 3 else ''})"


def _some(images: ImageSet, number: int | None) -> ImageSet:
    """Return that many of the images, stratified, always the same ones; all of them for None."""
    if number is None or number >= images.num_images:
        if number is not None and number > images.num_images:
            say(f"note: {number} images are asked for, and there are {images.num_images}; all are taken")
        return images
    chosen, _ = stratified_split(images.labels, number / images.num_images, seed=0)
    return images.subset(chosen)


def _copy(source: Path, target: Path) -> None:
    """Copy a file in one step."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)
