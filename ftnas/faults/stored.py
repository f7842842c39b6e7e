"""The seam for weights: a parametrization that reads what the faulty hardware holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ftnas.faults.base import Plan
from ftnas.quantize import Grid, Rounded
from ftnas.saturated import after_memory, inner_name, plain_name, put_on


@dataclass
class SharedWeights:
    """What forwards on the same weights share, by layer.

    Attributes:
        clean: What is read without faults.
        rounded: The same as it was rounded, which a faulty copy starts from.
        row: Layers whose weights were rounded together, and whether in inference mode; these weights end to end.
        hit: The last draw of faults, the same weights after it, and its plan.
        counted: Layers of the row for which that plan was counted.
        met: Features of the last forward without faults, see `Ahead`.
    """

    clean: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Rounded] = field(default_factory=dict)
    row: tuple[tuple[tuple[str, ...], bool], Rounded] | None = None
    hit: tuple[int, Tensor, Plan] | None = None
    counted: set[str] = field(default_factory=set)
    met: list[Any] = field(default_factory=list)


class Ready(Protocol):
    """What is read for some weights in the forward that runs, by layer, where it is known already."""

    ready: dict[str, Tensor]


class Reader(Protocol):
    """What knows how the hardware holds weights: the injection."""

    finding: bool
    shared: SharedWeights | None

    @property
    def together(self) -> Ready:
        """What is read in the forward that runs without being asked for."""

    def weight_bound(self, layer: str) -> Tensor | None:
        """Return the bound of a layer's weight as it is stored, a buffer or a parameter; None without."""

    def weight(self, layer: str, weight: Tensor) -> Tensor:
        """Return what is read for a weight that learns; same shape and dtype, gradients pass."""

    def stored(self, layer: str, weight: Tensor) -> tuple[Tensor, Grid | None]:
        """Return what the hardware holds without faults, and its grid."""

    def faulty(self, layer: str, stored: Tensor, grid: Grid | None) -> Tensor:
        """Return a faulty copy of what the hardware holds."""

    def check_reading(self, layer: str) -> None:
        """Raise a ValueError where a weight is read in a way in which one tensor cannot say what the hardware holds."""

    def weight_state(self, layer: str) -> Any:
        """Return what, beside its values, decides what is read for a weight now; None without faults."""


class StoredWeight(nn.Module):
    """The parametrization of one weight; without gradients it keeps what it computed until the weight changes."""

    def __init__(self, reader: Reader, layer: str) -> None:
        super().__init__()
        self._reader = reader
        self._layer = layer
        self._stored: tuple[Any, Tensor, Grid | None, Tensor] | None = None
        self._faulty: tuple[Any, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized and faulty weight; same shape and dtype."""
        if self._reader.finding:
            return weight
        self._reader.check_reading(self._layer)
        ready = self._reader.together.ready.get(self._layer)
        if ready is not None:
            return ready
        with torch._C.DisableTorchFunction():  # our own arithmetic is no business of any function mode
            return self._read(weight)

    def right_inverse(self, _value: Tensor) -> Tensor:
        """Refuse an assignment to the weight, also by ``torch.func.functional_call``."""
        raise NotImplementedError(
            f"the weight of layer {self._layer!r} cannot be assigned inside inject(...), nor by functional_call; load "
            "the weights before the block, or by load_state_dict in it"
        )

    def _read(self, weight: Tensor) -> Tensor:
        """Return what is read; what was kept, if nothing has changed."""
        bound = self._reader.weight_bound(self._layer)
        learns = torch.is_grad_enabled() and (weight.requires_grad or (bound is not None and bound.requires_grad))
        if learns or not isinstance(weight, nn.Parameter) or weight.is_inference():
            self._stored = self._faulty = None  # what a model's own parametrization made tells nothing by its address
            return self._learning(weight)
        # what is made in inference mode is of no use to a forward with gradients
        inference = torch.is_inference_mode_enabled()
        key = (inference, *((x.data_ptr(), x._version) for x in (weight, bound) if x is not None))
        if self._stored is None or self._stored[0] != key:
            values, grid = self._reader.stored(self._layer, weight.detach())
            self._stored, self._faulty = (key, values, grid, values.to(weight.dtype)), None
        _, values, grid, clean = self._stored
        state = self._reader.weight_state(self._layer)
        if state is None:
            return clean
        if self._faulty is None or self._faulty[0] != state:
            self._faulty = (state, self._reader.faulty(self._layer, values, grid).to(weight.dtype))
        return self._faulty[1]

    def _learning(self, weight: Tensor) -> Tensor:
        """Return what is read for a weight that learns; the same tensor for forwards with gradients that share it."""
        shared = self._reader.shared if torch.is_grad_enabled() else None
        if shared is None or self._reader.weight_state(self._layer) is not None:
            return self._reader.weight(self._layer, weight)
        if self._layer not in shared.clean:
            shared.clean[self._layer] = self._reader.weight(self._layer, weight)
        return shared.clean[self._layer]


def check_not_cached(layers: Iterable[nn.Module]) -> None:
    """Raise a RuntimeError where torch would keep weights that we read from one forward to the next."""
    if parametrize._cache_enabled and any(map(is_stored, layers)):
        raise RuntimeError(
            "the model runs within torch.nn.utils.parametrize.cached(), where weights are read once for all forwards, "
            "so that faults of later ones would not be met; call it outside of that"
        )


def is_stored(module: nn.Module) -> bool:
    """Tell whether an injection reads this layer's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return any(isinstance(p, StoredWeight) for p in module.parametrizations.weight)  # type: ignore[union-attr]


def store_weight(module: nn.Module, reader: Reader, layer: str) -> Callable[[], None]:
    """Put the parametrization on a layer's weight; return what takes it off again, bit for bit.

    While it is on, ``state_dict`` and ``load_state_dict`` of the model speak of the stored weight by its plain name.
    """
    own = "weight" in module._parameters or "weight" in module._buffers
    if not own and not parametrize.is_parametrized(module, "weight"):
        raise ValueError(
            f"layer {layer!r} gets its weight from a hook, as pruning and the older weight_norm and spectral_norm do, "
            "and faults cannot go there; make it permanent (torch.nn.utils.prune.remove, remove_weight_norm, ...), or "
            "use torch.nn.utils.parametrizations"
        )
    order, buffers = list(module._parameters), list(module._buffers)
    fleeting = "weight" in module._non_persistent_buffers_set
    alone = not parametrize.is_parametrized(module, "weight")
    kind = type(module)
    if alone and parametrize.is_parametrized(module):  # by another tensor: copies of the module share its class
        module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
    stored = StoredWeight(reader, layer)
    put_on(module, stored)
    chain = cast(parametrize.ParametrizationList, module.parametrizations.weight)  # type: ignore[union-attr]
    later = after_memory(module)
    if later is not None:  # the memory comes before what is applied to what is read from it
        del chain[-1]
        chain.insert(list(chain).index(later), stored)
    handles = [] if not alone else [
        module.register_state_dict_post_hook(plain_name),
        module.register_load_state_dict_pre_hook(inner_name),
    ]  # fmt: skip

    def undo() -> None:
        for handle in handles:
            handle.remove()
        if len(chain) > 1:  # the model's own stay
            del chain[list(chain).index(stored)]
            return
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for key in order:  # the weight came back as the last one
            module._parameters[key] = module._parameters.pop(key)
        for key in buffers:
            module._buffers[key] = module._buffers.pop(key)
        if parametrize.is_parametrized(module):
            module.__class__ = kind
        if fleeting:
            module._non_persistent_buffers_set.add("weight")

    return undo
