"""Certificates: which failures are tolerated within a budget, as a file that can be checked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ftnas.bounds.margins import margins
from ftnas.bounds.ranges import intervals
from ftnas.bounds.search import Found, asked, even, largest, within
from ftnas.bounds.summary import Summary, summarize
from ftnas.bounds.worst import Cost, Failures, neuron_costs, synapse_costs, total
from ftnas.settings import Count, Settings, parse
from ftnas.storage import atomic_write

SCHEMA = 1
AGREE = 1e-6
"""Relative difference of numbers that are computed again, on another machine too."""


class BoxOfInputs(Settings):
    """Every input between two values of each channel (of each feature, for vectors), as the network receives them."""

    kind: Literal["box"] = "box"
    low: tuple[float, ...] = Field(min_length=1)
    high: tuple[float, ...] = Field(min_length=1)

    def describe(self) -> str:
        """Return it in words: the interval of each channel, or the widest where there are many."""
        if len(set(zip(self.low, self.high, strict=False))) == 1:
            return f"from {self.low[0]:.6g} to {self.high[0]:.6g}"
        if len(self.low) > 4:
            return f"from {min(self.low):.6g} to {max(self.high):.6g}, each channel in an interval of its own"
        return "with channels from " + ", ".join(
            f"{low:.6g} to {high:.6g}" for low, high in zip(self.low, self.high, strict=False)
        )

    def ends(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the ends for samples of a shape; ValueError when there is not one for each channel."""
        if not len(self.low) == len(self.high) == shape[0]:
            raise ValueError(f"a box has one low and one high for each of {shape[0]} channels, got {len(self.low)}")
        view = (-1, *[1] * (len(shape) - 1))
        low, high = (torch.tensor(end, dtype=torch.float64).view(view) for end in (self.low, self.high))
        return low, high


class Samples(Settings):
    """Given samples, each with its own values.

    Attributes:
        digest: SHA-256 of all of them, float32.
        number: How many.
        certified: Positions of those whose answers stay, in order.
    """

    kind: Literal["samples"] = "samples"
    digest: str
    number: Count
    certified: tuple[int, ...]

    @model_validator(mode="after")
    def _positions(self) -> Samples:
        if list(self.certified) != sorted({n for n in self.certified if 0 <= n < self.number}):
            raise ValueError(f"certified are positions of {self.number} samples from 0, each once and in order")
        return self


class Tolerated(Settings):
    """What one layer tolerates.

    Attributes:
        name: Of the layer.
        components: Neurons (or synapses into it) that there are.
        failures: How many may fail, in all layers at once.
        needed: Signals of the layer that the next ones have to wait for, if failures are crashes (Corollary 2).
    """

    name: str
    components: Count
    failures: int = Field(ge=0)
    needed: int = Field(ge=0)


class Certificate(Settings):
    """A statement: for every input of the domain at most these failures in all layers at once are tolerated.

    Over a box, tolerated means that no output moves by more than the budget; over samples, that the answers of those
    certified do not change. It is about the network in exact arithmetic.

    Attributes:
        version: Of the schema.
        model: SHA-256 of structure and state.
        shape: Of a sample.
        failures: What fails, and how.
        domain: For which inputs.
        budget: In units of the outputs; None over samples, where each margin is the budget.
        layers: What is tolerated.
        bound: The largest error of an output (over samples: the largest share of a margin that is used up).
        method: How the bound is made.
        search: ``exact``, ``greedy`` or ``even``.
        gap: How many more failures another distribution may have at most (of the same method; 0 for even).
    """

    version: Literal[1] = 1
    model: str
    shape: tuple[Count, ...]
    failures: Failures
    domain: BoxOfInputs | Samples = Field(discriminator="kind")
    budget: float | None
    layers: tuple[Tolerated, ...]
    bound: float
    method: Literal["paths"] = "paths"
    search: Literal["exact", "greedy", "even"]
    gap: int = Field(ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> Certificate:
        if (self.budget is None) != (self.domain.kind == "samples"):
            raise ValueError("budget is of a box of inputs; over samples each margin is the budget, and it is null")
        return self

    @property
    def counts(self) -> list[int]:
        """Return the failures of each layer."""
        return [layer.failures for layer in self.layers]

    def summary(self) -> str:
        """Return the statement in a line: what fails, what that does, and for which inputs."""
        what = f"{sum(self.counts)} failures ({self.failures.describe()}) in {len(self.layers)} layers"
        if isinstance(self.domain, BoxOfInputs):
            error = f"error at most {self.bound:.6g} within a budget of {self.budget:.6g}"
            return f"{what}, {error}, for every input of shape {self.shape} {self.domain.describe()}"
        stay = f"the answers of {len(self.domain.certified)} of {self.domain.number} samples stay"
        return f"{what}, of inputs of shape {self.shape} {stay}"


def certify(
    model: nn.Module,
    box: BoxOfInputs,
    *,
    shape: Sequence[int],
    failures: Failures,
    budget: float,
    spread_evenly: bool = False,
) -> Certificate:
    """Find the largest failure distribution within a budget, for every input of a box.

    Args:
        model: That `summarize` takes.
        box: The inputs.
        shape: Of a sample.
        failures: What fails.
        budget: Largest error of an output, in its units.
        spread_evenly: The largest equal share of all layers, and not the most failures in all.

    Raises:
        ValueError: The budget is not above 0, or the model cannot be summarised.
    """
    if not 0.0 < budget < float("inf"):
        raise ValueError(f"a budget is a largest error above 0, in units of the outputs; got {budget!r}")
    summary = summarize(model, shape)
    costs = _box_costs(summary, box, failures)
    budgets = torch.full((len(costs[0].sums),), budget, dtype=torch.float64, device=summary.device)
    found = even(costs, budgets) if spread_evenly else largest(costs, budgets)
    return Certificate(
        model=model_digest(model, summary),
        shape=tuple(shape),
        failures=failures,
        domain=box,
        budget=budget,
        layers=_layers(costs, found),
        bound=float(total(costs, found.counts).amax()),
        search="even" if spread_evenly else "exact" if found.exact else "greedy",
        gap=found.gap,
    )


def certify_samples(
    model: nn.Module, inputs: Tensor, *, failures: Failures, share: float, spread_evenly: bool = False
) -> Certificate:
    """Find the most failing neurons under which a share of given samples keep their answers.

    The samples are those that bear most failures of single layers, added up; for them the search is as for a box.

    Args:
        model: A classifier that `summarize` takes.
        inputs: float [B, ...].
        failures: Of neurons.
        share: Of the samples, in (0, 1].
        spread_evenly: The largest equal share of all layers, and not the most failures in all; of any samples.

    Raises:
        ValueError: The share is out of range, or as for `margins`.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a share of the samples is in (0, 1], got {share!r}")
    summary = summarize(model, inputs.shape[1:])
    found = margins(summary, inputs, failures)
    if spread_evenly:
        chosen = even(found.costs, found.budgets, samples=len(inputs), share=share)
    else:
        bearing = torch.stack(found.tolerated()).sum(dim=0).sort(descending=True, stable=True).indices
        some = found.of(bearing[: asked(share, len(inputs))])
        chosen = largest(some.costs, some.budgets)
    kept = within(found.costs, chosen.counts, found.budgets, samples=len(inputs))
    return Certificate(
        model=model_digest(model, summary),
        shape=tuple(inputs.shape[1:]),
        failures=failures,
        domain=Samples(digest=_digest_of(inputs), number=len(inputs), certified=tuple(kept.nonzero()[:, 0].tolist())),
        budget=None,
        layers=_layers(found.costs, chosen),
        bound=_used(found.costs, chosen.counts, found.budgets, kept),
        search="even" if spread_evenly else "exact" if chosen.exact else "greedy",
        gap=chosen.gap,
    )


def verify(certificate: Certificate, model: nn.Module, inputs: Tensor | None = None) -> None:
    """Compute what a certificate's failures can do again, and compare.

    ``search`` and ``gap`` say how the numbers of failures were found, and are not looked at.

    Args:
        certificate: What is claimed.
        model: What it is claimed of.
        inputs: The samples, of a certificate over samples; None for one over a box.

    Raises:
        ValueError: One line: what does not hold.
    """
    summary = summarize(model, certificate.shape)
    if model_digest(model, summary) != certificate.model:
        raise ValueError("the certificate is of another model: the digests of structure and weights differ")
    if isinstance(certificate.domain, Samples):
        if inputs is None:
            raise ValueError("the certificate is about samples, and none are given; give them as inputs")
        if _digest_of(inputs) != certificate.domain.digest:
            raise ValueError("the certificate is about other samples than those given; their digests differ")
        if len(inputs) != certificate.domain.number:
            raise ValueError(f"the certificate says {certificate.domain.number} samples, and there are {len(inputs)}")
        if tuple(inputs.shape[1:]) != certificate.shape:
            raise ValueError(
                f"the certificate is about samples of shape {certificate.shape}, got {tuple(inputs.shape[1:])}"
            )
        found = margins(summary, inputs, certificate.failures)
        costs, budgets = found.costs, found.budgets
        _check_layers(certificate, costs)
        kept = within(costs, certificate.counts, budgets, samples=len(inputs))
        lost = [n for n in certificate.domain.certified if not kept[n]]
        if lost:
            raise ValueError(f"sample {lost[0]} is not certified under these failures: its margin can be used up")
        bound, limit = _used(costs, certificate.counts, budgets, kept), 1.0
    else:
        if inputs is not None:
            raise ValueError("the certificate is about every input of a box, and samples are given; leave them out")
        costs = _box_costs(summary, certificate.domain, certificate.failures)
        _check_layers(certificate, costs)
        bound, limit = float(total(costs, certificate.counts).amax()), certificate.budget or 0.0
    if not bound <= limit * (1 + AGREE):
        raise ValueError(f"the failures can do more than the certificate allows: {bound:.6g}, and at most {limit:.6g}")
    if abs(bound - certificate.bound) > AGREE * max(abs(bound), 1e-12):
        raise ValueError(f"the certificate says that the bound is {certificate.bound:.6g}, and it is {bound:.6g}")


def write_certificate(path: str | Path, certificate: Certificate) -> None:
    """Write a certificate as JSON with its own SHA-256, in one step."""
    plain = certificate.model_dump(mode="json")
    text = json.dumps({**plain, "sha256": _hash(plain)}, indent=1, allow_nan=False)
    atomic_write(Path(path), text.encode() + b"\n")


def read_certificate(path: str | Path) -> Certificate:
    """Read a certificate.

    Raises:
        ValueError: One line: no such file, no certificate of this schema, or changed after it was written.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no certificate {path}; `ftnas bounds` writes them as certificate.json")
    try:
        plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except _GivenTwiceError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, RecursionError):  # a number of too many digits is a ValueError of its own
        raise ValueError(f"{path}: not JSON, so no certificate") from None
    if not isinstance(plain, dict) or plain.get("version") != SCHEMA:
        raise ValueError(f"{path}: no certificate of version {SCHEMA}")
    claimed = plain.pop("sha256", None)
    try:
        own = _hash(plain)
    except ValueError:
        raise ValueError(f"{path}: holds NaN or a number that is not finite, so no certificate; make it anew") from None
    if claimed != own:
        raise ValueError(f"{path}: changed after it was written: its SHA-256 does not fit; make it anew")
    return parse(Certificate, plain, where=str(path))


class _GivenTwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is given twice: its last value would count, and a reader may look at the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _GivenTwiceError(f"key {key!r} is given twice, so no certificate; make it anew")
        found[key] = value
    return found


@torch.no_grad()
def model_digest(model: nn.Module, summary: Summary) -> str:
    """Return a SHA-256 of the structure of a summary and of the model's state."""
    found = hashlib.sha256(summary.structure().encode())
    for key, value in sorted(model.state_dict().items()):
        found.update(key.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
            found.update(str(value.dtype).encode() + plain.numpy().tobytes())
    return found.hexdigest()


def _box_costs(summary: Summary, box: BoxOfInputs, failures: Failures) -> list[Cost]:
    ranges = intervals(summary, *box.ends(summary.nodes[0].shape))
    costs = neuron_costs if failures.component == "neuron" else synapse_costs
    return costs(summary, ranges, failures)


def _layers(costs: Sequence[Cost], found: Found) -> tuple[Tolerated, ...]:
    return tuple(
        Tolerated(name=cost.name, components=cost.components, failures=count, needed=cost.components - count)
        for cost, count in zip(costs, found.counts, strict=True)
    )


def _check_layers(certificate: Certificate, costs: Sequence[Cost]) -> None:
    for layer in certificate.layers:
        if layer.needed != layer.components - layer.failures:
            raise ValueError(f"layer {layer.name!r}: needed is not components less failures in the certificate")
    claimed = [(layer.name, layer.components) for layer in certificate.layers]
    if claimed != [(cost.name, cost.components) for cost in costs]:
        raise ValueError("the certificate names other layers, or other numbers of components, than the model has")


def _used(costs: Sequence[Cost], counts: Sequence[int], budgets: Tensor, kept: Tensor) -> float:
    """Return the largest share of a margin that failures use up, over the samples that are certified; 0 for none."""
    shares = (total(costs, counts) / budgets.clamp_min(1e-300)).view(len(kept), -1)[kept]
    return float(shares.amax()) if shares.numel() else 0.0


def _digest_of(inputs: Tensor) -> str:
    plain = inputs.detach().float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(inputs.shape)).encode() + plain).hexdigest()


def _hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()
