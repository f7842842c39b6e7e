"""What crashes do to the loss: R of *Fatal Brain Damage* (Corollary 4, Proposition 9), and its true change.

A loss is one more layer, so that everything that holds for outputs holds for it: cut `WithLoss` instead of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WithLoss(nn.Module):
    """A classifier followed by the cross-entropy of each sample.

    ``exact(Cut(WithLoss(model, labels), "model.1"), inputs, p=p).mean`` is the expected change of each sample's loss;
    ``linear`` of it is the summand of R to first order.

    Args:
        model: From inputs [B, ...] to logits [B, M].
        labels: int64 [B], of the inputs that the cut is used with.
    """

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, inputs: Tensor) -> Tensor:
        """Return losses [K, 1] of inputs [K, ...], K = k B in blocks of B."""
        labels = self.labels.repeat(len(inputs) // len(self.labels))
        return F.cross_entropy(self.model(inputs.clone()), labels, reduction="none")[:, None]


def loss_shift(model: nn.Module, inputs: Tensor, labels: Tensor, mean: Tensor) -> Tensor:
    """Return (dL/dy, E Delta) of each sample, whose mean is R of Corollary 4 and Proposition 9.

    Args:
        model: In evaluation mode from here on.
        inputs: float [B, ...].
        labels: int64 [B].
        mean: float [B, M], of the error under crashes.

    Returns:
        float64 [B].
    """
    with torch.no_grad():
        slope = model.eval()(inputs).double().softmax(dim=1) - F.one_hot(labels, mean.shape[1])
    return (slope * mean.double()).sum(dim=1)
