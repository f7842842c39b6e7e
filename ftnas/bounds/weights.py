"""Crashes from gradients of weights: b3 without a gradient of the data (*Fatal Brain Damage*, Propositions 7 and 8).

The output depends on the product of a layer's weights and inputs alone, so that for each input j
sum_i dy/dW_ij W_ij = dy/dx_j x_j. A convolution does so for each input channel, with the sum over output channels and
positions of the kernel on one side and over positions of the channel on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ftnas.bounds.crashes import Moments
from ftnas.settings import did_you_mean

CHUNK = 16
"""Samples whose gradients are held at once."""


@dataclass(frozen=True)
class WeightForm:
    """What the weights of one layer say about crashes of its inputs.

    Attributes:
        moments: Those of b3 for crashes of the layer's inputs (or input channels), from weights alone (Corollary 2).
        norm_bound: p |W|_F |dy/dW|_F, which is at least the 2-norm of the mean over the outputs (Corollary 3):
            float64 [B].
    """

    moments: Moments
    norm_bound: Tensor


def from_weights(model: nn.Module, layer: str, inputs: Tensor, *, p: float) -> WeightForm:
    """Return the moments of b3 from the gradients of a layer's weights, one sample at a time.

    Args:
        model: In evaluation mode from here on; from [B, ...] to [B, M].
        layer: Name of a Linear or Conv2d that runs once per forward. Its *inputs* crash.
        inputs: float [B, ...].
        p: Crash probability, in [0, 1].

    Raises:
        ValueError: One line: no such layer, another kind of layer, one that runs not once, or p is no probability.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
    module = _weighted(model.eval(), layer, inputs)
    name, weight = f"{layer}.weight", module.weight.detach()

    def outputs(own: Tensor, sample: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {name: own}, (sample[None].clone(),))
        return found[0]

    gradients = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=CHUNK)(weight, inputs)  # [B, M, *weight]
    products = gradients.double() * weight.double()
    effect = _by_input(products, module)
    size = gradients.double().flatten(1).norm(dim=1) * weight.double().norm()
    return WeightForm(Moments(-p * effect.sum(dim=2), p * effect.square().sum(dim=2)), p * size)


def loss_shift_from_weights(model: nn.Module, layer: str, inputs: Tensor, labels: Tensor, *, p: float) -> Tensor:
    """Return R = E_x (dL/dy, E Delta) to first order from one gradient: -p (E_x dL/dW, W) (Proposition 8).

    L is the cross-entropy. At a critical point of the loss it is 0 (Corollary 4).

    Args:
        model: In evaluation mode from here on.
        layer: Name of a Linear or Conv2d that runs once per forward. Its *inputs* crash.
        inputs: float [B, ...].
        labels: int64 [B].
        p: Crash probability, in [0, 1].

    Returns:
        float64 scalar.

    Raises:
        ValueError: One line, as `from_weights`.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a crash probability is in [0, 1], got {p!r}")
    weight = _weighted(model.eval(), layer, inputs).weight
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs.clone()), labels), weight)
    return -p * (gradient.double() * weight.detach().double()).sum()


def _by_input(products: Tensor, module: nn.Linear | nn.Conv2d) -> Tensor:
    """Sum products [B, M, *weight] over all but the layer's inputs: [B, M, inputs]."""
    if isinstance(module, nn.Linear):
        return products.sum(dim=2)
    grouped = products.unflatten(2, (module.groups, -1))  # [B, M, groups, out / groups, in / groups, h, w]
    return grouped.sum(dim=(3, 5, 6)).flatten(2)


@torch.no_grad()
def _weighted(model: nn.Module, layer: str, inputs: Tensor) -> nn.Linear | nn.Conv2d:
    modules = {name: module for name, module in model.named_modules() if name}
    if layer not in modules:
        raise ValueError(f"no layer {layer!r}; {did_you_mean(layer, modules)}")
    module = modules[layer]
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"layer {layer!r} is a {type(module).__name__}; name a Linear or a Conv2d, whose inputs crash")
    runs: list[None] = []
    handle = module.register_forward_hook(lambda *_: runs.append(None))
    try:
        model(inputs[:1].clone())
    finally:
        handle.remove()
    if len(runs) != 1:
        raise ValueError(f"layer {layer!r} runs {len(runs)} times; name one that runs once")
    return module
