"""Forward error propagation as the paper states it (El Mhamdi and Guerraoui, *When Neurons Fail*), from a few numbers.

A layer is known by its number of neurons, its largest weight and its Lipschitz constant. The bounds of
`ftnas.bounds.worst` know every weight and are nowhere larger for one failing neuron; these are shown beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ftnas.bounds.ops import Activation, Add, Affine, Average, Concat, Constant, MaxPool, Scale
from ftnas.bounds.summary import Summary
from ftnas.bounds.worst import lipschitz


@dataclass(frozen=True)
class Chain:
    """A fully connected network of L layers and one layer of outputs.

    Attributes:
        widths: N_1 to N_L.
        weights: w_m of the synapses into layers 1 to L + 1.
        lipschitz: K_1 to K_L.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]
    lipschitz: tuple[float, ...]

    @classmethod
    def of(cls, summary: Summary) -> Chain:
        """Read the numbers of a summary.

        Raises:
            ValueError: It is no chain of Linear layers with at most one activation function between two of them.
        """
        ops = [node.op for node in summary.nodes[1:]]
        affine = [op for op in ops if isinstance(op, Affine)]
        straight = all(node.inputs == (number - 1,) for number, node in enumerate(summary.nodes) if number)
        plain = all(isinstance(op, (Affine, Activation)) for op in ops) and isinstance(ops[-1], Affine)
        plain = plain and not any(isinstance(a, Activation) and isinstance(b, Activation) for a, b in pairwise(ops))
        if (
            not (straight and plain and all(op.window is None for op in affine))
            or len(affine) != len(summary.layers) + 1
        ):
            raise ValueError(
                "the printed formulas are for chains of Linear layers alone, with at most one activation function "
                "between two of them and none after the last"
            )
        return cls(
            tuple(layer.shape[0] for layer in summary.layers),
            tuple(op.largest for op in affine),
            tuple(lipschitz(summary, layer) for layer in summary.layers),
        )

    def onward(self, layer: int, failed: Sequence[int]) -> float:
        """Return what an error of 1 at one neuron of a layer (from 1) becomes at the output."""
        factor = self.weights[-1]
        for later in range(layer + 1, len(self.widths) + 1):
            factor *= self.lipschitz[later - 1] * (self.widths[later - 1] - failed[later - 1]) * self.weights[later - 1]
        return factor


def fep(chain: Chain, counts: Sequence[int], capacity: float | Sequence[float]) -> float:
    """Return Fep as printed before Theorem 2: sum of f_l C K^(L-l) w_m^(L+1) prod (N_l' - f_l') w_m^(l').

    It bounds the error for exactly f_l neurons whose values deviate by at most C.

    Args:
        chain: The network.
        counts: f_1 to f_L.
        capacity: C, or one for each layer.
    """
    limits = [capacity] * len(counts) if isinstance(capacity, (int, float)) else capacity
    parts = zip(counts, limits, strict=True)
    return sum(f * c * chain.onward(number, counts) for number, (f, c) in enumerate(parts, start=1))


def single_layer_tolerance(weights: Tensor, budget: float, *, largest: float = 1.0) -> int:
    """Return how many neurons of a single layer may crash (Theorem 1): the largest integer up to budget / w_m.

    Args:
        weights: From the layer to one output, [N].
        budget: epsilon - epsilon'.
        largest: sup of the activation function, 1 for a sigmoid.
    """
    worst = float(weights.abs().amax()) * largest
    return len(weights) if worst == 0 else min(len(weights), math.floor(budget / worst))


def synapses(chain: Chain, counts: Sequence[int], capacity: float) -> float:
    """Return the sound form of Theorem 4: C sum over l of f_l K^(L+1-l) prod over l' > l of w_m^(l'), prod of N_l'.

    A failing synapse into layer l changes the sum of one neuron by at most C, its value by K C (Lemma 2); from there it
    goes on as from a failing neuron. No neuron fails, so that all N_l' pass errors on.

    Args:
        chain: The network.
        counts: f_1 to f_{L+1}, synapses into each layer and into the output.
        capacity: C, a deviation of what arrives.
    """
    none = [0] * len(chain.widths)
    *inner, last = counts
    parts = (
        f * k * chain.onward(n, none) for n, (f, k) in enumerate(zip(inner, chain.lipschitz, strict=True), start=1)
    )
    return capacity * (sum(parts) + last)


def synapses_printed(chain: Chain, counts: Sequence[int], capacity: float) -> float:
    """Return the left side of Theorem 4 as printed: C sum of f_l K^(L+1-l) w_m^(l) prod (N_l' - f_l') w_m^(l').

    It is no bound: the factor w_m^(l) contradicts Lemma 2, and N_l' - f_l' takes synapses from neurons.

    Args:
        chain: The network.
        counts: f_1 to f_{L+1}.
        capacity: C.
    """
    layers = len(chain.widths)
    found = 0.0
    for number, failed in enumerate(counts, start=1):
        factor = chain.weights[number - 1]
        for later in range(number + 1, layers + 2):
            left = chain.widths[later - 1] - counts[later - 1] if later <= layers else 1
            factor *= left * chain.weights[later - 1]
        factor *= math.prod(chain.lipschitz[number - 1 :])
        found += failed * factor
    return capacity * found


def precision(chain: Chain, errors: Sequence[float]) -> float:
    """Return Theorem 5: sum of K^(L-l) lambda_l prod over l' from l to L of N_l' w_m^(l'+1).

    Args:
        chain: The network.
        errors: lambda_1 to lambda_L, of every value that a layer sends.
    """
    none = [0] * len(chain.widths)
    parts = zip(chain.widths, errors, strict=True)
    return sum(n * error * chain.onward(number, none) for number, (n, error) in enumerate(parts, start=1))


@dataclass(frozen=True)
class _Error:
    """An error of at most ``rest`` at every value, and of at most C at up to n of them, for each (n, C)."""

    rest: float
    failed: tuple[tuple[int, float], ...] = ()


def receptive(summary: Summary, counts: Mapping[str, int], deviations: Mapping[str, float]) -> float:
    """Return Fep over any summary: the number of inputs of a neuron instead of N, joins as in `ftnas.bounds.ops`.

    Each layer is known by its largest weight and by how many values one neuron reads (the paper's refinement for
    convolutions: weights repeat, and neurons outside the receptive field have weight 0). In a chain of Linear layers it
    is Fep as printed, as long as C is at least the error of a neuron that works; else it counts the larger one,
    so that it holds for at most f_l failures too.

    Args:
        summary: The network.
        counts: Failing neurons, by layer; none where left out.
        deviations: C by layer: how far the value of a failing neuron is off at most.
    """
    by_node = {layer.node: layer.name for layer in summary.layers}
    found: list[_Error] = []
    for number, node in enumerate(summary.nodes):
        error = _Error(0.0) if node.op is None else _forward(node.op, [found[i] for i in node.inputs])
        name = by_node.get(number)
        if name is not None and counts.get(name, 0):
            error = _Error(error.rest, (*error.failed, (counts[name], deviations[name])))
        found.append(error)
    last = found[-1]
    return last.rest + sum(max(0.0, c - last.rest) for _, c in last.failed)


def _forward(op: object, errors: Sequence[_Error]) -> _Error:
    if isinstance(op, Add):
        rest = sum(error.rest for error in errors)
        return _Error(rest, tuple((n, c + rest - error.rest) for error in errors for n, c in error.failed))
    if isinstance(op, Concat):
        return _Error(max(error.rest for error in errors), tuple(hit for error in errors for hit in error.failed))
    if isinstance(op, Constant):
        return _Error(0.0)
    (error,) = errors
    if isinstance(op, Affine):
        extra = sum(min(n, op.fan_in) * max(0.0, c - error.rest) for n, c in error.failed)
        return _Error(op.largest * (op.fan_in * error.rest + extra))
    if isinstance(op, (MaxPool, Average)):
        return _Error(error.rest, tuple((n * op.overlap, c) for n, c in error.failed))
    factor = (
        op.lipschitz if isinstance(op, Activation) else float(op.factor.abs().amax()) if isinstance(op, Scale) else 1.0
    )
    return _Error(factor * error.rest, tuple((n, factor * c) for n, c in error.failed))


@torch.no_grad()
def replicate(model: nn.Sequential, copies: int) -> nn.Sequential:
    """Return a network of the same function with every neuron ``copies`` times, and the outgoing weights shared out.

    Fep of given failure counts falls by the factor ``copies``: w_m of every layer but the first is divided by it and
    every N multiplied by it (the over-provisioning of Corollary 1, made).

    Args:
        model: A chain of Linear layers and activation functions without weights.
        copies: At least 1.

    Raises:
        ValueError: It is another network, or copies are below 1.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    linear = [module for module in model if isinstance(module, nn.Linear)]
    if not linear or any(not isinstance(m, nn.Linear) and list(m.parameters()) for m in model):
        raise ValueError("only chains of Linear layers and activation functions without weights are replicated")
    made: list[nn.Module] = []
    for module in model:
        if not isinstance(module, nn.Linear):
            made.append(module)
            continue
        into = 1 if module is linear[0] else copies
        out = 1 if module is linear[-1] else copies
        wide = nn.Linear(
            module.in_features * into,
            module.out_features * out,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        wide.weight.copy_(module.weight.repeat(out, into) / into)
        if module.bias is not None:
            wide.bias.copy_(module.bias.repeat(out))
        made.append(wide)
    return nn.Sequential(*made)
