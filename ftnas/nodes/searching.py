"""Which skips to keep within a bandwidth budget: shared weights, a controller, and every subset beside it.

The paper leaves the question open (ResiliNet, section 3.4, which skips are critical).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftnas import rng
from ftnas.controllers import RandomConfig, create_controller
from ftnas.nodes.bandwidth import SkipSubsets, Subset, expected_bytes, link_bytes
from ftnas.nodes.exact import average, evaluate
from ftnas.nodes.fitting import (
    CHECKPOINT_EVERY_S,
    CHUNK,
    Fit,
    State,
    build,
    fit_into,
    samples_of,
    split,
    test_set,
    trained_state,
)
from ftnas.nodes.network import SplitNetwork
from ftnas.nodes.samples import Samples
from ftnas.nodes.study import NodesConfig, SkipSearch, Variant, model_file
from ftnas.progress import track
from ftnas.rundir import Folder, RunDir
from ftnas.stats import seed_interval

SHARED = "shared"
WINNER = "winner"


class SharedFit(Fit):
    """Trains the weights that all subsets share: each batch meets a random subset within the budget."""

    def __init__(self, network: SplitNetwork, config: NodesConfig, images: Samples, **options: Any) -> None:
        super().__init__(network, config, images, **options)
        assert config.search is not None
        self._subsets = subsets(config.search, network, config)
        self._present = rng.generator(self.seed, "nodes", "skips")

    def draw(self) -> frozenset[str]:
        """Draw the skips of one batch, then the nodes that are down; one that nothing bypasses now stays up."""
        present = self._subsets.random(generator=self._present)
        self.network.use(self.network.mode, skips=present)
        if self.failout is None:
            return frozenset()
        partition = self.network.partition.with_skips(present)
        return self.failout.within(partition).sample(partition, generator=self.masks)

    def choose(self, validation: Samples) -> None:
        """Judge the epoch with all skips."""
        self.network.use(self.network.mode, skips=self.network.partition.skips)
        super().choose(validation)

    def state(self) -> State:
        """Return what `Fit.state` does, and the stream of subsets."""
        return super().state() | {"present": self._present.get_state()}

    def load(self, state: State) -> None:
        """Go on from a state."""
        super().load(state)
        self._present.set_state(state["present"])


@dataclass(frozen=True)
class Trial:
    """One subset that was scored.

    Attributes:
        subset: The skips that stay.
        cost: Bytes per image that they take.
        score: Exact average accuracy on validation images, with the shared weights, in [0, 1].
    """

    subset: Subset
    cost: float
    score: float


def subsets(search: SkipSearch, network: SplitNetwork, config: NodesConfig) -> SkipSubsets:
    """Return the subsets of a network's skips within the budget."""
    reserved = link_bytes(network)

    def cost(subset: Subset) -> float:
        stay = {(skip.source, skip.to) for skip in subset}
        if search.counted == "reserved":
            return sum(reserved[link] for link in network.links if (link.source, link.to) in stay and link.bypassed)
        # what a skip carries depends on the others: by some of them its source is reached
        carried = expected_bytes(network, failure_rates=config.rates[search.setting], skips=subset)
        return sum(carried[link] for link in network.links if link.bypassed)

    return SkipSubsets(network.partition.skips, cost=cost, budget=search.budget)


class Scorer:
    """Scores subsets on validation images with the shared weights, each once."""

    def __init__(self, network: SplitNetwork, config: NodesConfig, validation: Samples, space: SkipSubsets) -> None:
        assert config.search is not None
        self._network, self._space, self._validation = network, space, validation
        self._mode, self._rates = config.search.mode, config.rates[config.search.setting]
        self.known: dict[Subset, Trial] = {}

    def __call__(self, subset: Subset) -> Trial:
        """Return the score of a subset."""
        if subset not in self.known:
            self._network.use(self._mode, skips=subset)
            results = evaluate(
                self._network,
                self._validation.batches(CHUNK),
                num_classes=self._validation.num_classes,
                never_down=[name for name, rate in self._rates.items() if rate == 0.0],
            )
            score = average(results, failure_rates=self._rates)
            self.known[subset] = Trial(subset, self._space.cost(subset), score)
        return self.known[subset]


def run_search(config: NodesConfig, folder: RunDir, *, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> str:
    """Train the shared weights, let the controller choose, train the winner by itself; return what came of it.

    ``search/trials.json`` has every trial, ``search/winner.json`` the skips, ``search/search.md`` the text.

    Raises:
        ValueError: The config has no search, or no validation images to score on.
    """
    search = config.search
    if search is None or config.selection is None:
        raise ValueError("a search of skips needs the section search; configs/nodes/digits-mlp-search.yaml has one")
    all_images, all_tests = samples_of(config, folder)
    test = test_set(config, all_tests)
    images, validation = split(config, all_images)
    assert validation is not None
    stage = folder.stage("search")
    variant = Variant(mode=search.mode, failout=search.failout)
    network = build(config, variant, images, seed=config.seed)
    if not stage.file(model_file(SHARED, config.seed)).exists():
        with track("epochs of the shared weights", config.epochs) as bar:
            fit = SharedFit(network, config, images, validation=validation, failout=search.failout, seed=config.seed)
            fit_into(fit, stage, SHARED, bar=bar, every_s=checkpoint_every_s)
    network = build(config, variant, images, seed=config.seed)
    network.load_state_dict(trained_state(stage, SHARED, config.seed))
    space = subsets(search, network, config)
    scorer = Scorer(network.eval(), config, validation, space)
    found = {"controller": choose(search, space, scorer, seed=config.seed)}
    found["random"] = choose(search.model_copy(update={"controller": RandomConfig()}), space, scorer, seed=config.seed)
    every = [scorer(subset) for subset in space.all()] if search.exhaustive else []
    winner = max(found["controller"], key=lambda trial: trial.score)
    stage.write_json("trials.json", {key: list(map(_plain, trials)) for key, trials in found.items()})
    stage.write_json("exhaustive.json", list(map(_plain, every)))
    stage.write_json("winner.json", _plain(winner))
    values = _final(config, stage, winner, samples=(images, validation, test), every_s=checkpoint_every_s)
    text = summary(search, found, every, space) + _final_text(search, values)
    stage.write_text("search.md", text)
    return text


def choose(search: SkipSearch, space: SkipSubsets, scorer: Scorer, *, seed: int) -> list[Trial]:
    """Ask a controller, score, tell; return all trials in order, repeated ones too."""
    controller: Any = create_controller(search.controller, space, seed=seed)
    trials = []
    with track(f"subsets asked of {search.controller.name}", search.trials, after_s=1.0) as bar:
        for _ in range(search.trials):
            trial = scorer(controller.ask(1)[0])
            controller.tell([trial.subset], [trial.score])
            trials.append(trial)
            bar.advance(f"score {trial.score:.3f}")
    return trials


def summary(search: SkipSearch, found: dict[str, list[Trial]], every: list[Trial], space: SkipSubsets) -> str:
    """Return Markdown: the best of each way to choose."""
    counted = "reserved for the skips" if search.counted == "reserved" else f"on the skips on average, {search.setting}"
    lines = [f"Bytes per image {counted}: at most {search.budget:g}. Score: average accuracy, {search.setting}, on", ""]
    lines[0] += " validation images with the shared weights."
    lines += ["| chosen by | subsets scored | best | bytes per image | score (%) | rank among all |", "|---" * 6 + "|"]
    ranked = sorted((trial.score for trial in every), reverse=True)
    names = {"controller": search.controller.name, "random": "random, as many"}
    rows = [(names[key], trials) for key, trials in found.items()] + ([("every subset", every)] if every else [])
    for name, trials in rows:
        best = max(trials, key=lambda trial: trial.score)
        skips = ", ".join(f"{skip.source} -> {skip.to}" for skip in best.subset) or "none"
        rank = f"{ranked.index(best.score) + 1} of {len(ranked)}" if ranked else "-"
        distinct = len({trial.subset for trial in trials})
        lines.append(f"| {name} | {distinct} | {skips} | {best.cost:g} | {100 * best.score:.2f} | {rank} |")
    if every and space.cost(space.skips) > search.budget:
        lines += ["", f"All {len(space.skips)} skips would take {space.cost(space.skips):g} bytes per image."]
    return "\n".join(lines) + "\n"


def _final(
    config: NodesConfig, stage: Folder, winner: Trial, *, samples: tuple[Samples, Samples, Samples], every_s: float
) -> list[float]:
    """Train the winner by itself from every seed; return its average accuracy on the test set, by seed.

    ``samples`` are those to train on, to choose the epoch by, and to measure on.
    """
    search, (images, validation, test) = config.search, samples
    assert search is not None
    variant = Variant(mode="vanilla")
    if winner.subset:
        failout = search.failout and search.failout.within(config.partition.with_skips(winner.subset))
        variant = Variant(mode=search.mode, failout=failout, skips=winner.subset)
    rates = config.rates[search.setting]
    values = []
    with track("epochs of the winner", config.epochs * config.seeds) as bar:
        for seed in config.all_seeds:
            network = build(config, variant, images, seed=seed)
            if not stage.file(model_file(WINNER, seed)).exists():
                fit = Fit(network, config, images, validation=validation, failout=variant.failout, seed=seed)
                fit_into(fit, stage, WINNER, bar=bar, every_s=every_s)
            network.load_state_dict(trained_state(stage, WINNER, seed))
            results = evaluate(network, test.batches(CHUNK), num_classes=test.num_classes)
            values.append(average(results, failure_rates=rates))
    return values


def _final_text(search: SkipSearch, values: list[float]) -> str:
    """Return one line: what the winner reaches, with its interval over seeds."""
    interval = seed_interval(values)
    half = f" ± {50 * (interval.high - interval.low):.2f}" if len(values) > 1 else ""
    return (
        f"\nThe winner of {search.controller.name}, trained by itself from {len(values)} seeds: "
        f"{100 * interval.mean:.2f}{half}% on the test set, {search.setting}.\n"
    )


def _plain(trial: Trial) -> dict[str, Any]:
    skips = [{"source": skip.source, "to": skip.to} for skip in trial.subset]
    return {"skips": skips, "bytes": trial.cost, "score": trial.score}
