"""The end of a search: from a trained controller and shared weights to one genotype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ftnas.candidates import Candidates, Terms, num_scored, scored
from ftnas.controllers import Controller
from ftnas.data import ImageSet
from ftnas.evaluate import Score, score
from ftnas.faults.bounds import Limits
from ftnas.faults.hardware import Hardware
from ftnas.progress import say, track
from ftnas.recipe import SgdConfig
from ftnas.rng import isolated, seed_for
from ftnas.rundir import Folder
from ftnas.search_settings import DeriveConfig
from ftnas.space import Genotype, Space, Supernet, build_network
from ftnas.train import fit

MOST_BYTES = 2**29
"""Of decoded images that are held at once for all candidates."""
_FLOAT_BYTES = 4
VERSION = 2
"""Of what a search chooses: raised where the same config and seed choose another net than before.

1: candidates ranked on images in the order in which they are stored. 2: in random order.
"""
WINNER = "genotype.json"
RANKING = "ranking.json"


def derive(
    controller: Controller,
    supernet: Supernet,
    *,
    candidates: Candidates,
    config: DeriveConfig,
    limits: Limits,
    weights: SgdConfig,
    hardware: Hardware,
    weights_images: ImageSet,
    controller_images: ImageSet,
    alpha_r: float,
    batch_size: int,
    seed: int,
    folder: Folder,
    title: str,
) -> Genotype:
    """Choose a genotype, and write it as ``genotype.json`` and the ranked candidates as ``ranking.json``.

    All candidates meet the same images (the whole controller split) and the same fault draws.

    Args:
        controller: Is asked for the candidates.
        supernet: Trained shared weights.
        candidates: Scores paths of that supernet.
        config: How many candidates, and how they are scored.
        limits: What keeps finalists that are trained within bounds; the supernet has its own.
        weights: Training settings of the finalists, when they are trained.
        hardware: Faults and number formats.
        weights_images: What finalists are trained on.
        controller_images: What everything is scored on.
        alpha_r: Weight of the faulty accuracy.
        batch_size: Images per forward.
        seed: Of fault draws and of the finalists' trainings.
        folder: Where the files go.
        title: Name on the progress bar.

    Raises:
        RuntimeError: Every finalist failed, or is wrong on every image.
    """
    sampled = _distinct(controller, config.samples)
    rank = _Scorer(candidates, hardware, controller_images, alpha_r, batch_size, seed)
    with track(f"{title}: derive", rank.parts * len(sampled)) as progress:
        found = rank.shared(sampled, config.draws, "derive", done=progress.advance)
    ranked = list(zip(sampled, found, strict=True))
    ranked.sort(key=lambda pair: -pair[1].reward)
    best = [genotype for genotype, _ in ranked[: config.finalists]]
    recipe = config.recipe(weights)
    if recipe is not None:
        again = []
        for place, genotype in enumerate(best):
            stage = folder.stage(f"finalists/{place}")
            model = _untrained(genotype, supernet, limits, weights_images, seed)
            name = f"{title}: {place + 1}"
            try:
                fit(model, weights_images, config=recipe, hardware=hardware, seed=seed, folder=stage, title=name)
                again.append(rank.trained(model, config.final_draws))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # one that diverges is no reason to lose the others
                say(f"warning: finalist {place + 1} failed and scores 0: {error}")
                folder.events("finalist_failed", reason=str(error), genotype=genotype.to_dict())
                again.append(Score(clean=0.0, faulty=0.0, reward=0.0))
    else:
        again = rank.shared(best, config.final_draws, "final")
    finals = [(genotype, first, final) for (genotype, first), final in zip(ranked, again, strict=False)]
    finals.sort(key=lambda entry: -entry[2].reward)
    winner = finals[0][0]
    if finals[0][2].reward == 0.0:
        raise RuntimeError(f"{title}: no candidate could be scored, or all are wrong on every image; see events.jsonl")
    _tell_degenerate(winner, supernet.space, folder)
    rest = [(genotype, first, None) for genotype, first in ranked[config.finalists :]]
    folder.write_json(RANKING, [_entry(*entry) for entry in [*finals, *rest]])
    winner.save(folder.file(WINNER))
    return winner


def _distinct(controller: Controller, num: int) -> list[Genotype]:
    """Ask for genotypes that differ as architectures; fewer than ``num`` when the controller repeats itself."""
    found: dict[str, Genotype] = {}
    for _ in range(20):
        for genotype in controller.ask(num):
            if len(found) < num:
                found.setdefault(genotype.canonical_key(), genotype)
        if len(found) == num:
            break
    return list(found.values())


class _Scorer:
    """Scores candidates on all images of the controller split, on common draws.

    The images come in one random order for all candidates: a supernet normalises by the statistics of the batch, which
    are those that it was trained with where the classes are mixed, and files lie class by class.
    """

    def __init__(
        self, candidates: Candidates, hardware: Hardware, images: ImageSet, alpha_r: float, batch_size: int, seed: int
    ) -> None:
        self._candidates, self._hardware, self._images, self._alpha_r = candidates, hardware, images, alpha_r
        self._batch_size, self._seed = batch_size, seed
        of_a_batch = _FLOAT_BYTES * batch_size * math.prod(images.shape)
        self._at_once = max(1, MOST_BYTES // of_a_batch)

    @property
    def parts(self) -> int:
        """How often `shared` goes through the genotypes, each time with other images."""
        return max(1, math.ceil(num_scored(self._images.num_images, self._batch_size) / self._at_once))

    def shared(
        self, genotypes: Sequence[Genotype], draws: int, purpose: str, *, done: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """Score paths of the supernet, in order; its weights are quantized once for all of them."""
        batches = scored(self._batches(), self._batch_size)
        found: list[Score] = []
        first, images_before = 0, 0
        with self._candidates.weights(seed_for(self._seed, purpose)):
            while part := list(itertools.islice(batches, self._at_once)):
                terms = Terms(self._alpha_r, draws, first_draw=first * draws)
                new = self._candidates.score(genotypes, part, terms, done=done)
                images = sum(len(labels) for _, labels in part)
                found = [self._joined(a, images_before, b, images) for a, b in zip(found or new, new, strict=True)]
                first, images_before = first + len(part), images_before + images
        return found

    def trained(self, model: Any, draws: int) -> Score:
        """Score a discrete network with its running statistics."""
        model.eval()
        with self._hardware.inject(model, seed=seed_for(self._seed, "final"), errors="soft") as injection:
            return score(model, injection, self._batches(), alpha_r=self._alpha_r, draws=draws)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._images.batches(self._batch_size, seed=seed_for(self._seed, "derive-order"))

    def _joined(self, one: Score, images: int, other: Score, others: int) -> Score:
        """Return the score over the images of both, 0 where one part failed; ``other`` where there are none before."""
        if not images:
            return other
        if 0.0 in (one.clean, other.clean):
            return Score(clean=0.0, faulty=0.0, reward=0.0)
        share = images / (images + others)
        clean = share * one.clean + (1.0 - share) * other.clean
        faulty = None
        if one.faulty is not None and other.faulty is not None:
            faulty = share * one.faulty + (1.0 - share) * other.faulty
        return Score(clean, faulty, (1.0 - self._alpha_r) * clean + self._alpha_r * (faulty or 0.0))


def _untrained(genotype: Genotype, supernet: Supernet, limits: Limits, images: ImageSet, seed: int) -> Any:
    with isolated(seed, "finalist"):
        model = build_network(
            genotype, supernet.space, num_classes=len(images.classes), in_channels=images.shape[0]
        ).to(images.device)
    limits.apply(model)
    return model


def _tell_degenerate(winner: Genotype, space: Space, folder: Folder) -> None:
    cells = winner.only_skips_and_nones()
    if cells:
        say(f"warning: the {' and the '.join(cells)} cell of the winner holds only skips and nones")
        folder.events("degenerate_winner", cells=list(cells))
    unread = winner.unread_cells(space)
    if unread:
        numbers = ", ".join(map(str, unread))
        say(f"note: nothing reads cell {numbers} of the winner: built and counted, without effect on the answer")
        folder.events("unread_cells", cells=unread)


def _entry(genotype: Genotype, first: Score, final: Score | None) -> dict[str, Any]:
    return {
        "genotype": genotype.to_dict(),
        "sampled": {"clean": first.clean, "faulty": first.faulty, "reward": first.reward},
        "final": None if final is None else {"clean": final.clean, "faulty": final.faulty, "reward": final.reward},
    }
