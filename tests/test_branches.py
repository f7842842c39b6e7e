"""Clean and faulty part side by side: what waits for what, on streams that only take notes, and on two threads."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import pytest
import torch
from faulty import CASES, gen
from torch import nn

from ftnas import bound, branches, devices
from ftnas.branches import InTurn, Overlapped, parts_of_a_step
from ftnas.faults.bounds import FeatureBound
from ftnas.faults.hardware import Hardware
from ftnas.regularizers import CrashVariance, Regularization
from ftnas.rng import isolated
from ftnas.train import FaultTolerantLoss


class Stream:
    """A stream that notes in a common list what is asked of it; everything runs at once anyway."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def record_event(self):
        self.notes.append((self.name, "record"))
        return len(self.notes) - 1

    def wait_event(self, event):
        self.notes.append((self.name, "wait", event))

    def wait_stream(self, other):
        self.notes.append((self.name, "join", other.name))


@pytest.fixture
def notes(monkeypatch):
    """What is asked of streams that only take notes, in place of those of a GPU."""
    found = []
    main, side = Stream("main", found), Stream("side", found)
    current = [main]

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(branches, "_has_streams", lambda _device: True)
    return found


@pytest.fixture
def waiting(monkeypatch):
    """A CPU on which, as on a GPU, no value is read and weights are read together."""
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)


def net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
        )  # fmt: skip


def step(model, *, graphed=True, alpha_l=0.5, steps=1, fault="adsaf"):
    """Do steps of training as a graph does them; return the losses and the state that they leave."""
    images, labels = torch.randn(4, 3, 9, 9, generator=gen(1)), torch.arange(4)
    losses, gradients = [], []
    with Hardware(fault=CASES[fault]).inject(model.train(), seed=0, errors="soft", draw_on="device") as injection:
        sides = parts_of_a_step(model, graphed=graphed)
        loss, parameters = FaultTolerantLoss(model, alpha_l=alpha_l), list(model.parameters())
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            found = loss(model, injection, images, labels, sides)
            sides.backward(found.total, found.parts, parameters)
            losses.append(found.total.item())
            gradients.append([p.grad if p.grad is None else p.grad.clone() for p in parameters])
            assert all(p.grad is None or p.grad.stride() == p.stride() for p in parameters)
    return losses, gradients, {name: value.clone() for name, value in model.state_dict().items()}


def test_the_second_part_waits_layer_by_layer_for_the_first(notes):
    step(net(), steps=3)
    # the first step looks for the feature points too, within its first forward
    starts = [number + 1 for number, note in enumerate(notes) if note[1:] == ("join", "side")][1::2]
    assert len(starts) == 3
    # what the first part of the first step made is there before the second part
    asked = [note[1] for note in notes if note[0] == "side"]
    assert asked[:3] == ["wait", "join", "wait"] and asked.count("join") == 1
    for start, end in itertools.pairwise(starts):
        assert notes[start:end] == [
            *[("main", "record")] * 6,  # as the model begins, and after two norms and three layers with weights
            *[("side", "wait", start + number) for number in range(6)],
            ("main", "join", "side"),  # before the sum of the losses
            ("main", "join", "side"),  # before the sum of the gradients
        ]


@pytest.mark.parametrize("alpha_l", [0.0, 1.0])
def test_one_part_alone_stays_on_its_stream(alpha_l, notes):
    step(net(), alpha_l=alpha_l)
    assert {note[:2] for note in notes} <= {("main", "record")}


@pytest.mark.parametrize("fault", ["adsaf", "mibb", "log normal"])
@pytest.mark.parametrize("alpha_l", [0.0, 0.3, 1.0])
def test_parts_side_by_side_leave_what_parts_in_turn_leave(fault, alpha_l, notes, waiting):
    model = net()
    losses, gradients, state = step(model, steps=3, fault=fault, alpha_l=alpha_l)
    assert notes or alpha_l == 1.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    notes.clear()
    other_losses, other_gradients, other = step(net(), steps=3, fault=fault, alpha_l=alpha_l, graphed=False)
    assert not notes and losses == other_losses
    torch.testing.assert_close(gradients, other_gradients, rtol=0, atol=0)
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def spectral(model):
    nn.utils.parametrizations.spectral_norm(model[0])


def counting_nan(model):
    bound(model, features=FeatureBound(value=4.0, learned=True, nan="zero"))


@pytest.mark.parametrize("change", [spectral, counting_nan])
def test_forwards_that_write_what_others_write_run_in_turn(change, notes):
    model = net()
    change(model)
    step(model)
    assert not notes


def test_a_cpu_has_no_streams():
    assert type(parts_of_a_step(net(), graphed=True)) is type(parts_of_a_step(net(), graphed=False)) is InTurn


def overlapped_step(model, sides, *, alpha_l=0.3, fault="adsaf", regularization=None, steps=3):
    """Return losses, gradients and state after some steps."""
    images, labels = torch.randn(4, 3, 9, 9, generator=gen(1)), torch.arange(4)
    parameters, losses = list(model.parameters()), []
    loss = FaultTolerantLoss(model, alpha_l=alpha_l, regularization=regularization)
    with Hardware(fault=CASES[fault]).inject(model.train(), seed=0, errors="soft", draw_on="device") as injection:
        for _ in range(steps):
            losses.append(loss.gradients(model, injection, images, labels, parameters, sides).total)
    return losses, [p.grad for p in parameters], model.state_dict()


@pytest.mark.parametrize("reading", ["together", "one by one"])
@pytest.mark.parametrize("fault", ["adsaf", "mibb", "log normal"])
@pytest.mark.parametrize("alpha_l", [0.0, 0.3, 1.0])
def test_an_overlapped_backward_pass_leaves_what_one_for_both_leaves(fault, alpha_l, reading, request):
    if reading == "together":
        request.getfixturevalue("waiting")
    found = overlapped_step(net(), Overlapped(torch.device("cpu")), alpha_l=alpha_l, fault=fault)
    torch.testing.assert_close(found, overlapped_step(net(), InTurn(), alpha_l=alpha_l, fault=fault), rtol=0, atol=0)


def test_penalties_take_one_backward_pass_for_all():
    def penalised(sides):
        model = net()
        extras = Regularization([CrashVariance(layers=("relu",), rate=0.1)], model)
        extras.step(gen(2))
        with extras.attached():
            return overlapped_step(model, sides, regularization=extras, steps=1)

    found = penalised(Overlapped(torch.device("cpu")))
    torch.testing.assert_close(found, penalised(InTurn()), rtol=0, atol=0)
    assert not torch.equal(found[1][0], overlapped_step(net(), InTurn(), steps=1)[1][0])


class Second(nn.Module):
    """Passes a batch on, after calling a function if the forward is the second of a step."""

    def __init__(self, act):
        super().__init__()
        self._act, self._calls = act, 0

    def forward(self, x):
        self._calls += torch.is_grad_enabled()  # not where feature points are looked for
        if self._calls == 2:
            self._act()
        return x


def test_the_first_backward_pass_runs_while_the_second_forward_does():
    begun, seen = threading.Event(), []
    model = nn.Sequential(Second(lambda: seen.append(begun.wait(20))), net())
    model[1][-1].register_full_backward_hook(lambda *_: begun.set())
    overlapped_step(model, Overlapped(torch.device("cpu")), steps=1)
    assert seen == [True]


def test_a_forward_that_fails_leaves_no_backward_pass_behind():
    ended = []

    def fail():
        raise KeyError("second")

    def slow(*_):
        time.sleep(0.2)
        ended.append(True)

    model = nn.Sequential(net(), Second(fail))
    model[0][-1].register_full_backward_hook(slow)
    with pytest.raises(KeyError, match="second"):
        overlapped_step(model, Overlapped(torch.device("cpu")), steps=1)
    assert ended


def test_a_backward_pass_that_fails_is_told():
    def fail(*_):
        raise KeyError("backward")

    model = net()
    model[-1].register_full_backward_hook(fail)
    with pytest.raises(KeyError, match="backward"):
        overlapped_step(model, Overlapped(torch.device("cpu")), steps=1)


def test_a_gpu_overlaps_steps_without_a_graph_on_the_stream_of_the_step(notes):
    model, streams = net(), set()
    model[-1].register_full_backward_hook(lambda *_: streams.add(torch.cuda.current_stream().name))
    sides = parts_of_a_step(model, graphed=False)
    assert type(sides) is Overlapped
    with torch.cuda.stream(Stream("own", notes)):
        overlapped_step(model, sides, steps=1)
    assert streams == {"own"}
