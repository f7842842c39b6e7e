"""How far shared weights agree on which genotypes are good: Kendall's tau between searches, group by group.

Each group is a set of run folders that differ by their seed alone, e.g. one rank and two ranks. The same random
genotypes are scored on the shared weights of every run, on its controller split under its hardware. Tau between runs of
one group is the noise floor: what another seed alone does to the ranking.

    for s in 0 1 2 3; do for r in 1 2; do ftnas search CONFIG seed=$s search.ranks=$r --out runs/ranks-$r-$s; done; done
    python scripts/compare_rankings.py "runs/ranks-1-*" "runs/ranks-2-*" --genotypes 40
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ftnas.candidates import Candidates, Terms
from ftnas.config import config_from
from ftnas.data import load, stratified_split
from ftnas.mistakes import told
from ftnas.pool import InProcess
from ftnas.progress import track
from ftnas.rng import generator, seed_for
from ftnas.rundir import RunDir
from ftnas.space import Genotype, Supernet, load_space
from ftnas.stats import rank_correlation
from ftnas.train import CHECKPOINT


def rewards(path: Path, num: int, draws: int) -> np.ndarray:
    """Return the rewards of the same random genotypes on the shared weights of a run, float64 [num]."""
    with RunDir.open(path) as run:
        config = config_from(run.config)
        if config.search is None:
            raise ValueError(f"{path} has no search")
        folder = run.stage("search")
        state = torch.load(folder.file(CHECKPOINT), weights_only=True)
    images = load(config.data, "train")
    _, second = stratified_split(images.labels, config.search.split, seed=seed_for(config.seed, "split"))
    space = load_space(config.search.space)
    supernet = Supernet(space, num_classes=len(images.classes), in_channels=images.shape[0])
    supernet.load_state_dict(state["supernet"])
    stream = generator(0, "compared genotypes")
    genotypes = [Genotype.random(space, generator=stream) for _ in range(num)]
    batches = list(images.subset(second).batches(config.search.controller_batch or 64))
    candidates = Candidates(InProcess(threads=1), supernet, config.hardware, events=lambda *_, **__: None)
    with candidates.weights(seed_for(0, "compared draws")), track(path.name, num) as progress:
        scores = candidates.score(genotypes, batches, Terms(config.search.alpha_r, draws), done=progress.advance)
    return np.array([score.reward for score in scores])


def taus(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Return tau of all pairs of different seeds, of one group or of two."""
    if second is None:
        return np.array([rank_correlation(a, b).tau for a, b in itertools.combinations(first, 2)])
    pairs = itertools.product(enumerate(first), enumerate(second))
    return np.array([rank_correlation(a, b).tau for (i, a), (j, b) in pairs if i != j])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="pattern of the run folders of one group; seeds in the same order")
    parser.add_argument("--genotypes", type=int, default=40, help="random genotypes (default: 40)")
    parser.add_argument("--draws", type=int, default=1, help="fault draws per image (default: 1)")
    parser.add_argument("--json", type=Path, help="file for all rewards and figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = {pattern: sorted(map(Path, glob.glob(pattern))) for pattern in options.groups}
    for pattern, paths in groups.items():
        if len(paths) < 2:
            raise ValueError(f"{pattern} names {len(paths)} run folders; a group needs at least two")
    found = {
        pattern: [rewards(path, options.genotypes, options.draws) for path in paths]
        for pattern, paths in groups.items()
    }
    result = {}
    for first, second in itertools.combinations_with_replacement(found, 2):
        values = taus(found[first]) if first == second else taus(found[first], found[second])
        result[f"{first} ~ {second}"] = values.tolist()
        spread = f"from {values.min():.3f} to {values.max():.3f}, {len(values)} pairs"
        print(f"{first} ~ {second}: tau {values.mean():.3f} ({spread})")
    for pattern, group in found.items():
        best = np.mean([values.max() for values in group])
        print(f"{pattern}: reward {np.mean(group):.3f}, best of each run {best:.3f}")
    if options.json:
        record = {"taus": result, "rewards": {pattern: [v.tolist() for v in group] for pattern, group in found.items()}}
        options.json.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with told():
        main()
