"""The reward against its formula, and predictions that are not numbers."""

import pytest
import torch
from torch import nn

from ftnas.evaluate import NONFINITE, answers, score
from ftnas.faults import MiBB
from ftnas.faults.hardware import Hardware

HARDWARE = Hardware(fault=MiBB(mac_error_rate=0.2), layers=None)


def net_and_batches():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 6, generator=generator))
        model.bias.zero_()
    batches = [
        (torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)) for _ in range(2)
    ]
    return model, batches


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_reward_is_the_weighted_sum_of_accuracies(alpha):
    model, batches = net_and_batches()
    with torch.no_grad(), HARDWARE.inject(model, seed=1) as injection:
        result = score(model, injection, batches, alpha_r=alpha, draws=3, first_draw=7)
        clean, faulty = [], []
        injection.draw = 7
        for x, y in batches:
            with injection.paused():
                clean.append((model(x).argmax(1) == y).double())
            for _ in range(3):
                faulty.append((model(x).argmax(1) == y).double())
    assert result.clean == pytest.approx(float(torch.cat(clean).mean()))
    if not alpha:
        assert result.faulty is None and result.reward == result.clean
        return
    assert result.faulty == pytest.approx(float(torch.cat(faulty).mean()))
    assert injection.record.hits > 0
    assert result.reward == pytest.approx((1 - alpha) * result.clean + alpha * result.faulty)


def test_candidates_with_the_same_first_draw_meet_the_same_faults():
    model, batches = net_and_batches()
    with HARDWARE.inject(model, seed=1) as injection:
        first = score(model, injection, batches, alpha_r=1.0, first_draw=4)
        other = score(model, injection, batches, alpha_r=1.0, first_draw=5)
        again = score(model, injection, batches, alpha_r=1.0, first_draw=4)
    assert first == again
    assert first != other


def test_outputs_that_are_not_finite_are_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x, torch.full_like(x, float("nan"))], dim=1)

    labels = torch.zeros(4, dtype=torch.int64)
    found = answers(Broken(), [(torch.ones(4), labels), (torch.ones(2), labels[:2])])
    assert found.top1.tolist() == [NONFINITE] * 6
    assert found.nonfinite.all() and not found.correct.any()


def test_a_candidate_without_a_number_for_an_answer_is_no_score():
    model, batches = net_and_batches()

    def forward(images):
        logits = model(images).clone()
        logits[3, 1] = float("nan") if images is batches[1][0] else 0.0
        return logits

    with HARDWARE.without_faults().inject(model, seed=1) as injection:
        with pytest.raises(RuntimeError, match="without faults, 1 of 40 answers are NaN or infinite"):
            score(forward, injection, batches, alpha_r=0.0)
