"""A training step as one CUDA graph: issued kernel by kernel from Python once, and replayed by one call from then on.

A step of a fixed network asks the same of the device every time; what changes are images, labels and the seeds of the
faults. A graph reads all three from where they lay when it was captured, so that a replay gives what the step itself
would have given, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ftnas.faults import Injection

WARM_UP = 3
"""Steps before capture: they find the feature points, and make what is made once (plans, workspaces, kernels)."""

T = TypeVar("T")


class Graph(Protocol):
    """What notes the work of a function and does it again."""

    def warm(self, function: Callable[[], T]) -> T:
        """Run the function in a way after which it can be captured."""

    def capture(self, function: Callable[[], T], streams: Sequence[torch.Generator]) -> T:
        """Note what the function asks of the device, which is not done; its draws come from these generators."""

    def replay(self) -> None:
        """Do what was noted, on the same memory."""


class CudaGraph:
    """A graph of CUDA."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._side = torch.cuda.Stream()

    def warm(self, function: Callable[[], T]) -> T:
        """Run the function on a stream of its own, as capture will."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            result = function()
        torch.cuda.current_stream().wait_stream(self._side)
        return result

    def capture(self, function: Callable[[], T], streams: Sequence[torch.Generator]) -> T:
        """Note what the function asks of the device; see `Graph`."""
        for stream in streams:
            self._graph.register_generator_state(stream)
        with torch.cuda.graph(self._graph, stream=self._side):
            return function()

    def replay(self) -> None:
        """Do what was noted, on the current stream."""
        self._graph.replay()


class GraphedStep(Generic[T]):
    """The forwards and backward of a training step under faults, captured after a few calls and replayed from then on.

    What a call returns, and the gradients, lie in memory that the next call writes to. The injection may be left and
    entered again between calls; the weights must stay the same tensors.

    Args:
        step: From images and labels to the result, in tensors; sets the gradients anew from None.
        injection: The faults that the step meets: soft ones, drawn on the device.
        graph: What captures and replays.
        parameters: Get the gradients.

    Raises:
        ValueError: Faults that a graph cannot draw anew.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], T],
        injection: Injection,
        graph: Graph,
        parameters: Sequence[torch.nn.Parameter],
    ) -> None:
        check_faults(injection)
        self._step, self._injection, self._graph = step, injection, graph
        self._parameters = list(parameters)
        self._gradients: list[Tensor | None] = []
        self._calls = 0
        self._images = self._labels = torch.empty(0)
        self._result: T | None = None
        self._counts: tuple[Any, Any] = (None, None)

    def __call__(self, images: Tensor, labels: Tensor, draw: int) -> T:
        """Do the step of one draw on a batch, every time of the same shape."""
        self._calls += 1
        if self._calls <= WARM_UP:
            self._injection.draw = draw
            return self._graph.warm(partial(self._step, images, labels))
        if self._result is None:
            self._capture(images, labels, draw)
        else:
            self._images.copy_(images)
            self._labels.copy_(labels)
            self._injection.tally.again(*self._counts)
        self._seed(draw)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        assert self._result is not None
        return self._result

    def _capture(self, images: Tensor, labels: Tensor, draw: int) -> None:
        drawings, tally = self._injection.drawings, self._injection.tally
        self._images, self._labels = images.clone(), labels.clone()
        self._injection.draw = draw
        before = tally.at_risk()
        streams = [stream for drawing in drawings for stream in drawing.streams()]
        with drawings.weights.seeded(), drawings.features.seeded(), drawings.buffers.seeded():
            step = partial(self._step, self._images, self._labels)
            try:
                self._result = self._graph.capture(step, streams)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the step cannot be captured ({str(error).splitlines()[0]}); set compute.cuda_graph to false"
                ) from error
        self._counts = before, tally.at_risk()
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _seed(self, draw: int) -> None:
        for drawing in self._injection.drawings:
            drawing.seed(draw)


def check_faults(injection: Injection) -> None:
    """Refuse faults that a graph cannot draw anew.

    Raises:
        ValueError: Whole nodes that are down, or a part of a layer that is targeted or protected.
    """
    placed = [entry for drawing in injection.drawings for entry in drawing.placed]
    outside = ["node_down"] if injection.outages else []
    outside += [
        f"{p.fault.name} for parts of layers" for p in placed if p.fault.where is not None or any(p.never.values())
    ]
    if outside:
        raise ValueError(
            f"compute.cuda_graph cannot draw {outside[0]}, as that is looked up outside of it; set it to false"
        )
