"""Training of the variants of a split network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from ftnas import rng
from ftnas.datasets import DataConfig, stratified_split
from ftnas.nodes.exact import average, evaluate
from ftnas.nodes.network import Failout, SplitNetwork
from ftnas.nodes.samples import Samples, load_samples
from ftnas.nodes.study import NodesConfig, Variant, model_file
from ftnas.progress import Tracker, say, track
from ftnas.rundir import Folder, RunDir
from ftnas.sameness import check_data

CHECKPOINT_EVERY_S = 20.0
CHUNK = 256

State = dict[str, Any]


@dataclass
class Progress:
    """Where a training is, beside network and optimizer.

    Attributes:
        epoch: Epochs done.
        left_out: Batches left out because no information reached the top.
        score: Validation accuracy of the epoch that is kept, in [0, 1].
        kept: Number of that epoch, from 1; 0 for none yet.
        best: Its weights.
    """

    epoch: int = 0
    left_out: int = 0
    score: float = -1.0
    kept: int = 0
    best: State = field(default_factory=dict)


def build(config: NodesConfig, variant: Variant, images: Samples, *, seed: int) -> SplitNetwork:
    """Build one variant as it is trained; the blocks start from the same weights in all variants of a seed."""
    partition = config.partition.without_skips() if variant.mode == "vanilla" else config.partition
    if variant.skips is not None:
        partition = partition.with_skips(variant.skips)
    rates = config.settings.get(variant.weights_setting, {})
    with rng.isolated(seed, "nodes", "blocks"):
        blocks = config.model.blocks(images.shape, num_classes=images.num_classes)
    with rng.isolated(seed, "nodes", "matches"):
        return SplitNetwork(
            blocks,
            partition=partition,
            shape=images.shape,
            mode=variant.mode,
            matching=config.matching,
            weights=variant.weights.weights(partition.links(), failure_rates=rates, seed=seed),
        )


def trained(config: NodesConfig, name: str, images: Samples, *, seed: int, folder: Folder) -> SplitNetwork:
    """Return a trained variant as it is run, in evaluation mode; ValueError if it is not trained yet."""
    variant, source = config.variants[name], config.trained(name)
    assert source is not None
    network = build(config, source, images, seed=seed)
    network.load_state_dict(trained_state(folder, variant.models or name, seed))
    survival: dict[str, float] = {}
    if variant.survival and source.failout is not None:
        survival = {node: 1.0 - rate for node, rate in source.failout.rates_of(network.partition).items()}
    network.use(variant.mode, skips=variant.skips, survival=survival)
    return network.eval()


def trained_state(folder: Folder, name: str, seed: int) -> State:
    """Return the weights of a trained variant; ValueError if it is not trained yet."""
    file = model_file(name, seed)
    if not folder.file(file).exists():
        raise ValueError(f"{name}, seed {seed} is not trained yet; run ftnas nodes train first")
    state: State = folder.load(file, keys=("state",))["state"]
    return state


class Fit:
    """One training by Adam on the cross-entropy, the nodes of a mask per batch shut down.

    Args:
        network: Is trained in place; at the end it holds the epoch that is kept.
        config: Of the study.
        images: To train on.
        validation: To choose the epoch by; None keeps the last.
        failout: Of the variant.
        seed: Of batches and masks.
    """

    def __init__(
        self,
        network: SplitNetwork,
        config: NodesConfig,
        images: Samples,
        *,
        validation: Samples | None = None,
        failout: Failout | None,
        seed: int,
    ) -> None:
        self.network, self.config, self.images, self.validation = network, config, images, validation
        self.failout, self.seed = failout, seed
        self.progress = Progress()
        self._optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
        self.masks = rng.generator(seed, "nodes", "failout")

    def run(self, after_epoch: Callable[[Fit, float], None] = lambda fit, loss: None) -> Progress:
        """Train to the end; ``after_epoch`` gets this training and the mean loss of the epoch."""
        while self.progress.epoch < self.config.epochs:
            loss = self._epoch()
            self.progress.epoch += 1
            if self.validation is not None:
                self.choose(self.validation)
            after_epoch(self, loss)
        if self.validation is not None:
            self.network.load_state_dict(self.progress.best)
        return self.progress

    def draw(self) -> frozenset[str]:
        """Draw the nodes that are down for one batch."""
        if self.failout is None:
            return frozenset()
        return self.failout.sample(self.network.partition, generator=self.masks)

    def _epoch(self) -> float:
        total, count = torch.zeros(()), 0
        self.network.train()
        for inputs, labels in self.images.batches(
            self.config.batch_size,
            seed=self.seed,
            epoch=self.progress.epoch,
            augment=self.config.augment,
            drop_last=True,
        ):
            down = self.draw()
            logits = self.network(inputs, down)
            if logits is None:
                self.progress.left_out += 1
                continue
            self._optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            self._optimizer.step()
            total, count = total + loss.detach(), count + 1
        return float(total) / max(1, count)

    def choose(self, validation: Samples) -> None:
        """Keep the epoch if it is the best so far on the validation samples."""
        assert self.config.selection is not None
        rates = self.config.rates[self.config.selection.setting]
        results = evaluate(
            self.network,
            validation.batches(CHUNK),
            num_classes=validation.num_classes,
            never_down=[name for name, rate in rates.items() if rate == 0.0],
        )
        score = average(results, failure_rates=rates)
        if score > self.progress.score:
            self.progress.score, self.progress.kept = score, self.progress.epoch
            self.progress.best = {key: value.clone() for key, value in self.network.state_dict().items()}

    def state(self) -> State:
        """Return all that a training needs to go on as if it had never stopped."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "masks": self.masks.get_state(),
            **vars(self.progress),
        }

    def load(self, state: State) -> None:
        """Go on from a state."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.masks.set_state(state["masks"])
        self.progress = Progress(**{key: state[key] for key in vars(self.progress)})


def samples_of(config: NodesConfig, run: RunDir) -> tuple[Samples, Samples]:
    """Load all samples of a study, to train and to test on: its variants are compared on the same ones.

    Raises:
        ValueError: A file is missing or wrong, or the study was begun with others.
    """
    images = load_samples(config.data, "train"), load_samples(config.data, "test")
    kind = "images" if isinstance(config.data, DataConfig) else "readings"
    check_data(run, images[0].digest, "dataset_digest", f"training {kind}")
    check_data(run, images[1].digest, "test_digest", f"test {kind}")
    return images


def split(config: NodesConfig, images: Samples) -> tuple[Samples, Samples | None]:
    """Return of the training samples those to train on and those to choose the epoch by, the same for every seed."""
    if config.selection is None:
        return images, None
    chosen, rest = stratified_split(images.labels, config.selection.share, seed=0)
    return images.subset(rest), images.subset(chosen)


def test_set(config: NodesConfig, images: Samples) -> Samples:
    """Return of the test samples those to evaluate on; ValueError when there are fewer than the config asks for."""
    num = config.test_images
    if num is None or num == len(images):
        return images
    if num > len(images):
        raise ValueError(f"test_images: there are {len(images)} test images, got {num}")
    return images.subset(stratified_split(images.labels, num / len(images), seed=0)[0])


def train_all(config: NodesConfig, folder: RunDir, *, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
    """Train every variant and seed that has no model file yet; one that was interrupted goes on."""
    own = [name for name, variant in config.variants.items() if variant.models is None]
    wanted = [(name, seed) for name in own for seed in config.all_seeds]
    missing = [task for task in wanted if not folder.file(model_file(*task)).exists()]
    if not missing:
        say("every variant is trained")
        return
    training, testing = samples_of(config, folder)
    test_set(config, testing)  # that there are as many as are asked for
    images, validation = split(config, training)
    done = (len(wanted) - len(missing)) * config.epochs
    with track("epochs", len(wanted) * config.epochs, done=done) as bar:
        for name, seed in missing:
            variant = config.variants[name]
            network = build(config, variant, images, seed=seed)
            fit = Fit(network, config, images, validation=validation, failout=variant.failout, seed=seed)
            fit_into(fit, folder, name, bar=bar, every_s=checkpoint_every_s)


def fit_into(fit: Fit, folder: Folder, name: str, *, bar: Tracker, every_s: float) -> None:
    """Train to the end, or go on with what was interrupted, and write the model file of that name."""
    part = f"{name}-{fit.seed}.part.pt"
    saved = time.monotonic()

    def after_epoch(fit: Fit, loss: float) -> None:
        nonlocal saved
        progress = fit.progress
        chosen = f"  validation {100 * progress.score:.1f}% (epoch {progress.kept})" if progress.kept else ""
        bar.advance(f"{name}, seed {fit.seed}: loss {loss:.3f}{chosen}")
        if progress.epoch < fit.config.epochs and time.monotonic() - saved >= every_s:
            folder.save(part, fit.state())
            saved = time.monotonic()

    if folder.file(part).exists():
        fit.load(folder.load(part, keys=tuple(fit.state())))
        bar.advance(f"{name}, seed {fit.seed}: goes on after epoch {fit.progress.epoch}", num=fit.progress.epoch)
    progress = fit.run(after_epoch)
    kept = progress.kept or fit.config.epochs
    facts = {"left_out": progress.left_out, "epoch": kept, "validation": progress.score if progress.kept else None}
    folder.save(model_file(name, fit.seed), {"state": fit.network.state_dict(), **facts})
    folder.file(part).unlink(missing_ok=True)
    folder.events("trained", variant=name, seed=fit.seed, **facts)
