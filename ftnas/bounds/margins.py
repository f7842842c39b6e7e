"""When failures cannot change the answer: differences of logits, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ftnas.bounds.ranges import Ranges, of_samples
from ftnas.bounds.summary import Summary
from ftnas.bounds.worst import Cost, Failures, check_shape, gains, sums_of_largest

SLACK = 1e-6
"""Share of a margin that is kept for what float32 rounds in the network itself."""


@dataclass(frozen=True, eq=False)
class Margins:
    """What it costs to change the answers of B samples.

    Attributes:
        costs: Of neurons of each layer; rows are (sample, other class) in blocks of M - 1.
        budgets: float64 [B (M - 1)]: how far the answer is ahead of each other class, less the slack.
        answers: int64 [B].
    """

    costs: list[Cost]
    budgets: Tensor
    answers: Tensor

    def of(self, samples: Tensor) -> Margins:
        """Return the margins of some samples, int64 [K]."""
        rows = torch.arange(len(self.budgets), device=samples.device).view(len(self.answers), -1)[samples].flatten()
        costs = [replace(cost, sums=cost.sums[rows]) for cost in self.costs]
        return Margins(costs, self.budgets[rows], self.answers[samples])

    def tolerated(self) -> list[Tensor]:
        """Return for each layer how many failures in it alone leave each sample's answer, int64 [B]."""
        samples = len(self.answers)
        return [cost.tolerated(self.budgets).view(samples, -1).amin(dim=1) for cost in self.costs]


@torch.no_grad()
def margins(summary: Summary, inputs: Tensor, failures: Failures) -> Margins:
    """Follow the differences of logits, each as one output, so that what moves both alike costs nothing.

    Args:
        summary: Of a classifier, M logits, M >= 2.
        inputs: The samples, float [B, ...]; the values that their neurons send are their own.
        failures: Of neurons.

    Raises:
        ValueError: The failures are of synapses, or there is one output.
    """
    classes = summary.num_outputs
    if failures.component != "neuron" or classes < 2:
        raise ValueError("margins are between two logits at least, under failures of neurons")
    ranges = of_samples(summary, inputs)
    logits = ranges.boxes[-1].low
    answers = logits.argmax(dim=1)
    others = torch.arange(classes, device=answers.device).repeat(len(answers), 1)
    others = others[others != answers[:, None]].view(len(answers), classes - 1)
    ahead = logits.gather(1, answers[:, None]) - logits.gather(1, others)
    pairs = torch.triu_indices(classes, classes, offset=1, device=answers.device).T  # [P, 2]
    number = torch.zeros(classes, classes, dtype=torch.int64, device=answers.device)
    number[pairs[:, 0], pairs[:, 1]] = number[pairs[:, 1], pairs[:, 0]] = torch.arange(
        len(pairs), device=answers.device
    )
    eye = torch.eye(classes, dtype=torch.float64, device=answers.device)
    head = summary.with_head(eye[pairs[:, 0]] - eye[pairs[:, 1]])
    costs = _costs(summary, head, ranges, failures, number[answers[:, None], others])
    return Margins(costs, (ahead * (1.0 - SLACK)).flatten(), answers)


def _costs(summary: Summary, head: Summary, ranges: Ranges, failures: Failures, pair: Tensor) -> list[Cost]:
    """Return costs of the pairs [B, M - 1] of each sample."""
    found = gains(head, [layer.node for layer in summary.layers])
    costs = []
    for layer, gain in zip(summary.layers, found, strict=True):
        deviation = failures.deviation(ranges.boxes[layer.node])
        check_shape(gain.shape[1:], deviation, layer.name)
        whole = failures.unit == "channel" and len(layer.shape) == 3
        rows = []
        for own, pairs in zip(deviation, pair, strict=True):
            product = gain[pairs] * own
            product = torch.where(gain[pairs] == 0, 0.0, product)
            rows.append(product.flatten(2).sum(2) if whole else product.flatten(1))
        costs.append(Cost(layer.name, sums_of_largest(torch.cat(rows))))
    return costs
