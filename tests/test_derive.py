"""How the end of a search scores its candidates: on mixed batches, in bounded memory."""

import json

import pytest
import torch
from test_search import SPACE, make_search, space

from ftnas import derive as derive_module
from ftnas.candidates import Candidates
from ftnas.data import DataConfig, load
from ftnas.rundir import RunDir

__all__ = ["SPACE", "space"]


@pytest.fixture(scope="module")
def by_class():
    """Digits that lie class by class, as the files of an image folder do."""
    images = load(DataConfig(name="digits"), "train").subset(torch.arange(400))
    return images.subset(torch.argsort(images.labels, stable=True))


def run(space, path, images, **changes):
    """Search; return the ranking, and the labels of each call that scored more than one batch."""
    seen = []
    real = Candidates.score

    def watching(self, genotypes, batches, terms, **others):
        seen.append([labels for _, labels in batches])
        return real(self, genotypes, batches, terms, **others)

    with pytest.MonkeyPatch.context() as patch, RunDir.create(path, {}) as folder:
        patch.setattr(Candidates, "score", watching)
        search = make_search(space, folder.stage("search"), images=images, epochs=2, **changes)
        search.run()
    return json.loads((path / "search" / "ranking.json").read_text()), seen


def test_candidates_are_ranked_on_batches_of_mixed_classes(space, by_class, tmp_path):
    _, seen = run(space, tmp_path / "run", by_class)
    derived = [labels for labels in seen if len(labels) > 1]
    assert len(derived) == 2  # all samples, then the finalists
    assert torch.equal(derived[0][0], derived[1][0])  # one order for both
    for labels in derived:
        assert sum(map(len, labels)) == 80
        assert all(len(batch.unique()) >= 6 for batch in labels), labels


def test_finalists_that_are_trained_are_scored_on_mixed_batches_too(space, by_class, tmp_path, monkeypatch):
    seen = []
    real = derive_module.score

    def watching(model, injection, batches, **others):
        batches = list(batches)
        seen.extend(labels for _, labels in batches)
        return real(model, injection, batches, **others)

    monkeypatch.setattr(derive_module, "score", watching)
    run(space, tmp_path / "run", by_class, derive={"samples": 2, "finalists": 1, "final_draws": 1, "train_epochs": 1})
    assert len(seen) == 4 and all(len(batch.unique()) >= 6 for batch in seen)


def test_what_is_held_at_once_is_bounded_and_changes_no_score(space, by_class, tmp_path, monkeypatch):
    derive = {"samples": 4, "finalists": 2, "draws": 2, "final_draws": 2}
    whole, _ = run(space, tmp_path / "whole", by_class, derive=derive)
    monkeypatch.setattr(derive_module, "MOST_BYTES", 4 * 64 * 20 * 3)  # three batches of 20 images of 1x8x8
    parts, seen = run(space, tmp_path / "parts", by_class, derive=derive)
    assert [len(labels) for labels in seen[-4:]] == [3, 1, 3, 1]
    assert [entry["genotype"] for entry in parts] == [entry["genotype"] for entry in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one["sampled"] == pytest.approx(other["sampled"])
        assert one["final"] == pytest.approx(other["final"]) if one["final"] else other["final"] is None


def test_a_candidate_that_fails_on_a_part_of_the_images_scores_0(space, by_class, tmp_path, monkeypatch):
    monkeypatch.setattr(derive_module, "MOST_BYTES", 4 * 64 * 20 * 3)
    scorer = derive_module._Scorer(None, None, by_class, 0.5, 20, 0)
    good = derive_module.Score(clean=0.5, faulty=0.25, reward=0.375)
    failed = derive_module.Score(clean=0.0, faulty=0.0, reward=0.0)
    assert scorer._joined(good, 60, failed, 20).reward == scorer._joined(failed, 60, good, 20).reward == 0.0
    assert scorer._joined(good, 60, good, 20) == good
