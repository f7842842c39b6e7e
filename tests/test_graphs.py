"""A graphed step gives what the step gives: held on a CPU by a graph of recorded operations, on a GPU by CUDA's own."""

from __future__ import annotations

import gc

import pytest
import torch
from faulty import CASES
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftnas import devices, train
from ftnas.compute import Compute
from ftnas.data import DataConfig, load
from ftnas.faults import AdSAF, MiBB, NodeDown, Where, inject
from ftnas.faults.hardware import Hardware
from ftnas.graphs import WARM_UP, CudaGraph, GraphedStep
from ftnas.quantize import FixedPoint
from ftnas.recipe import TrainConfig
from ftnas.rng import generator, isolated
from ftnas.rundir import RunDir
from ftnas.train import FaultTolerantLoss, fit, gradients_by, move

STEPS = WARM_UP + 4
SOFT = [case for case in CASES if "crash" not in case and "byzantine" not in case]


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    """A graph of the operations that a function asks for, which are done again on the same tensors.

    Recording does them as well, so that what they changed outside is put back.
    """

    def __init__(self):
        super().__init__()
        self.operations, self._own, self._before = [], set(), {}

    def warm(self, function):
        return function()

    def capture(self, function, streams):
        self.streams = list(streams)
        state = torch.get_rng_state()
        with self:
            result = function()
        torch.set_rng_state(state)
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)
        return result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in self._written(function, args, kwargs):
            if memory(tensor) not in self._own | self._before.keys():
                self._before[memory(tensor)] = (tensor.detach(), tensor.detach().clone())
        out = function(*args, **kwargs)
        given = {memory(tensor) for tensor in tensors((args, kwargs))}
        fresh = [memory(tensor) not in given for tensor in tensors(out)]
        self._own |= {memory(tensor) for tensor, is_fresh in zip(tensors(out), fresh, strict=True) if is_fresh}
        self.operations.append((function, args, kwargs, out, fresh))
        return out

    @staticmethod
    def _written(function, args, kwargs):
        if (
            function._schema.name == "aten::native_batch_norm"
        ):  # the running statistics, of which its schema says nothing
            return [tensor for tensor in args[3:5] if tensor is not None]
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return tensors([named[name] for name in written if name in named])

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out, fresh in self.operations:
                again = function(*args, **kwargs)
                for old, new, is_fresh in zip(tensors(out), tensors(again), fresh, strict=True):
                    if is_fresh:
                        old.copy_(new)


class Borrowed(RecordedGraph):
    """A graph that holds nothing, as CUDA's: it reads memory from outside for as long as it is replayed."""

    def __init__(self):
        super().__init__()
        self._memory = {}

    def capture(self, function, streams):
        result = super().capture(function, streams)
        made = set()
        for operation, args, kwargs, out, fresh in self.operations:
            for tensor in tensors((args, kwargs)):
                if memory(tensor) not in made and tensor.numel() > 0:
                    self._memory[memory(tensor)] = (StorageWeakRef(tensor.untyped_storage()), operation)
            made |= {memory(tensor) for tensor, is_fresh in zip(tensors(out), fresh, strict=True) if is_fresh}
        self.operations, self._before, self._own = [], {}, set()
        return result

    def replay(self):
        pass

    def check(self):
        gc.collect()
        assert self._memory
        assert not [operation for reference, operation in self._memory.values() if reference.expired()]


def net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 4, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
        )  # fmt: skip


def trained(fault, graph, device="cpu", compute=Compute(), size=8):  # noqa: B008 a frozen value
    """Return losses, state, and what was hit, after some steps of training with or without a graph."""
    model = net().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    injection = Hardware(fault=fault).inject(model, seed=3, errors="soft", draw_on="device")
    parameters, losses = list(model.parameters()), []
    with isolated(0, "training"), injection:
        loss = FaultTolerantLoss(model, alpha_l=0.5, compute=compute)
        gradients = gradients_by(model, loss, injection, parameters, graph=graph)
        for number in range(STEPS):
            images = torch.randn(4, 3, size, size, generator=generator(0, "images", number)).to(device)
            labels = torch.randint(0, 5, (4,), generator=generator(0, "labels", number)).to(device)
            found = gradients(images, labels, 10 + number)
            move(parameters, optimizer, 1.0)
            losses.append(torch.stack([found.total, found.clean, found.faulty]).clone())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return torch.stack(losses), state, injection.record


def same(one, other):
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0, equal_nan=True)  # float words become NaN
    assert one[2].hits == other[2].hits > 0
    assert one[2].sites == other[2].sites
    assert one[2].expected == pytest.approx(other[2].expected)
    assert one[2].layers == other[2].layers


@pytest.fixture
def no_reading(monkeypatch):
    """Let the CPU be a device whose values are not read on the way."""
    monkeypatch.setattr(devices, "is_readable", lambda device: False)


@pytest.mark.parametrize("case", SOFT)
def test_replayed_steps_are_the_steps(case, no_reading):
    graph = RecordedGraph()
    same(trained(CASES[case], graph), trained(CASES[case], None))
    assert graph.streams or isinstance(CASES[case], MiBB)  # which draws from a seed on the device


def test_other_seeds_give_other_steps(no_reading):
    class SeedsStay(RecordedGraph):
        def replay(self):
            for stream in self.streams:
                stream.manual_seed(0)
            super().replay()

    losses, _, _ = trained(CASES["adsaf"], None)
    stuck, _, _ = trained(CASES["adsaf"], SeedsStay())
    assert torch.equal(losses[:WARM_UP], stuck[:WARM_UP])
    assert not torch.equal(losses, stuck)


def test_a_step_that_reads_a_value_is_not_captured():
    with pytest.raises(
        RuntimeError, match=r"the step cannot be captured \(operation not permitted .*cuda_graph to false"
    ):
        trained(CASES["adsaf"], RecordedGraph())  # this CPU's values are read


def test_what_a_graph_cannot_draw_is_refused():
    model, fixed = net(), FixedPoint(bits=8)
    never = [
        (inject(model, NodeDown(rate=0.1, nodes={"a": ["0"]}), errors="soft"), "node_down"),
        (inject(model, MiBB(mac_error_rate=1e-3, where=Where(channels=(0,))), quantization=fixed), "mibb for parts"),
        (inject(model, AdSAF(), quantization=fixed, errors="soft", protect=[Where(channels=(1,))]), "adsaf for parts"),
    ]
    for injection, what in never:
        with pytest.raises(ValueError, match=rf"cuda_graph cannot draw {what}.*set it to false"):
            GraphedStep(lambda images, labels: images, injection, RecordedGraph(), [])


def test_graphs_are_refused_where_there_can_be_none():
    graph = Compute(cuda_graph=True)
    with pytest.raises(ValueError, match=r"train\.compute\.cuda_graph needs a CUDA device, and this runs on cpu"):
        graph.check_device(torch.device("cpu"), "train.compute", obstacle=None)
    with pytest.raises(ValueError, match=r"search\.weights\.compute\.cuda_graph replays steps, but each here trains"):
        graph.check_device(torch.device("cuda"), "search.weights.compute", obstacle="each here trains another path")
    graph.check_device(torch.device("cuda"), "train.compute", obstacle=None)
    Compute().check_device(torch.device("cpu"), "train.compute", obstacle=None)


def fitted(folder, graph, fault, device="cpu", dropout=0.2, **compute):
    def forget(_record):  # what a user may do between epochs
        model.zero_grad(set_to_none=True)

    images = load(DataConfig(name="digits"), "train").subset(torch.arange(160)).to(torch.device(device))
    with isolated(0, "net"):
        head = nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head).to(device)
    compute = Compute(cuda_graph=graph, **compute)
    config = TrainConfig(epochs=3, batch_size=20, lr=0.05, alpha_l=0.5, compute=compute)
    hardware = Hardware(fault=CASES[fault])
    with RunDir.create(folder, {}) as run:
        history = fit(model, images, config=config, hardware=hardware, seed=1, folder=run, epoch_done=forget)
    return history, model.state_dict()


@pytest.mark.parametrize("fault", ["mibb", "adsaf"])
def test_a_training_with_a_graph_is_the_same_training(fault, tmp_path, no_reading, monkeypatch):
    made = []

    def record():
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(train, "CudaGraph", record)
    monkeypatch.setattr(Compute, "check_device", lambda *args, **options: None)  # there is no CUDA device
    history, state = fitted(tmp_path / "graph", True, fault)
    plain_history, plain_state = fitted(tmp_path / "plain", False, fault)
    assert len(made) == 1 and made[0].operations  # for all epochs
    assert history == plain_history
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("case", "compute"),
    [
        *[(case, Compute()) for case in SOFT if case not in ("flip fp32", "flip bf16")],  # these make NaN
        *[(case, Compute(channels_last=True, autocast="bf16")) for case in ("adsaf", "mibb", "log normal")],
    ],
)
def test_what_a_graph_reads_is_there_for_all_epochs(case, compute, tmp_path, no_reading, monkeypatch):
    graph, epochs = Borrowed(), []

    def epoch_done(record):
        epochs.append(record)
        graph.check()

    monkeypatch.setattr(train, "CudaGraph", lambda: graph)
    monkeypatch.setattr(Compute, "check_device", lambda *args, **options: None)  # there is no CUDA device
    images = load(DataConfig(name="digits"), "train").subset(torch.arange(100))
    with isolated(0, "net"):
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        model = nn.Sequential(body, nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 10))
    compute = compute.model_copy(update={"cuda_graph": True})
    config = TrainConfig(epochs=3, batch_size=20, lr=0.05, alpha_l=0.5, compute=compute)
    with RunDir.create(tmp_path / "run", {}) as run:
        fit(model, images, config=config, hardware=Hardware(fault=CASES[case]), seed=1, folder=run,
            epoch_done=epoch_done)  # fmt: skip
    assert len(epochs) == 3


def test_trainings_too_short_for_a_graph_are_refused(tmp_path):
    model, images = nn.Linear(64, 10), load(DataConfig(name="digits"), "train").subset(torch.arange(64))
    config = TrainConfig(epochs=1, batch_size=20, lr=0.05, alpha_l=0.0, compute=Compute(cuda_graph=True))
    with (
        RunDir.create(tmp_path / "run", {}) as run,
        pytest.raises(ValueError, match="there are 3, of which the first 3 never are"),
    ):
        fit(model, images, config=config, hardware=Hardware(), seed=0, folder=run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute", [Compute(), Compute(fused_rounding=True), Compute(channels_last=True)])
@pytest.mark.parametrize("case", SOFT)
def test_a_cuda_graph_gives_the_same_steps(case, compute, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graphed = trained(CASES[case], CudaGraph(), "cuda", compute)
    same(graphed, trained(CASES[case], None, "cuda", compute))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("compute", [{}, {"channels_last": True, "autocast": "bf16", "fused_rounding": True}])
@pytest.mark.parametrize("fault", ["mibb", "adsaf"])
def test_a_cuda_graph_serves_all_epochs(fault, compute, dropout, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    history, state = fitted(tmp_path / "graph", True, fault, "cuda", dropout, **compute)
    plain_history, plain_state = fitted(tmp_path / "plain", False, fault, "cuda", dropout, **compute)
    assert history == plain_history
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_with_bfloat16():
    losses, _, record = trained(CASES["adsaf"], CudaGraph(), "cuda", Compute(autocast="bf16", channels_last=True))
    assert losses.isfinite().all()
    assert record.hits > 0
