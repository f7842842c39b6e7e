"""Memory and number formats of a training step: the same step, nearer or further in its last bits."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from faulty import never_waits
from injected import gen

from ftnas import rounding
from ftnas.branches import parts_of_a_step
from ftnas.compute import Compute
from ftnas.devices import pick_device
from ftnas.faults import AdSAF, MiBB, WeightBitFlip
from ftnas.faults.hardware import Hardware
from ftnas.quantize import FixedPoint, Quantization
from ftnas.recipe import SgdConfig
from ftnas.rng import isolated
from ftnas.space import Genotype, Supernet, load_space
from ftnas.train import FaultTolerantLoss, move

SPACE = load_space("small-8x8").resized(channels=4, cells=3)
PLAIN = Compute()
FAULTS = {"mibb": MiBB(mac_error_rate=1e-3), "adsaf": AdSAF(cells="differential", stuck_at="max")}
SGD = SgdConfig(batch_size=8, lr=0.05)


class Steps:
    """A supernet under training, step by step."""

    def __init__(self, fault, compute=PLAIN, device="cpu", bits=8):
        with isolated(0, "net"):
            self.supernet = Supernet(SPACE, num_classes=10).to(device).train()
        self.genotypes = [Genotype.random(SPACE, generator=gen(number)) for number in range(4)]
        self.images = torch.randn(8, 3, 16, 16, generator=gen(1)).to(device)
        self.labels = torch.arange(8, device=device)
        self.loss = FaultTolerantLoss(self.supernet, alpha_l=0.5, compute=compute)
        self.optimizer = SGD.optimizer(self.supernet)
        fixed = FixedPoint(bits=bits)
        hardware = Hardware(fault=FAULTS[fault], quantization=Quantization(weights=fixed, features=fixed))
        self.injection = hardware.inject(self.supernet, seed=0, errors="soft", draw_on="device")

    def __call__(self, number):
        genotype = self.genotypes[number % len(self.genotypes)]
        forward, parameters = partial(self.supernet, genotype=genotype), list(self.supernet.parameters())
        sides = parts_of_a_step(self.supernet, graphed=False)
        losses = self.loss.gradients(forward, self.injection, self.images, self.labels, parameters, sides)
        move(parameters, self.optimizer, SGD.grad_clip)
        return losses


def gradients(steps):
    with steps.injection:
        losses = steps(0)
    return torch.stack([losses.clean, losses.faulty]), torch.cat(
        [p.grad.reshape(-1) for p in steps.supernet.parameters() if p.grad is not None]
    )


def spy(monkeypatch):
    """Note the dtype in which tensors are rounded and faults applied."""
    seen = {"round": set(), "apply_": set()}
    monkeypatch.setattr(FixedPoint, "round", noted(FixedPoint.round, seen["round"], lambda result: result.values.dtype))
    for fault in (MiBB, AdSAF):
        monkeypatch.setattr(fault, "apply_", noted(fault.apply_, seen["apply_"], lambda result: result.dtype))
    return seen


def noted(function, seen, read):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        seen.add(read(result))
        return result

    return call


# With 8 bits, sums in another order let a value on the edge between two steps of the grid fall to the other side
@pytest.mark.parametrize(("bits", "tolerance", "cosine"), [(8, 0.02, 0.95), (20, 1e-4, 0.9999)])
@pytest.mark.parametrize("fault", FAULTS)
def test_channels_last_gives_the_same_step_within_rounding(fault, bits, tolerance, cosine):
    losses, gradient = gradients(Steps(fault, bits=bits))
    steps = Steps(fault, Compute(channels_last=True), bits=bits)
    kernels = [p for p in steps.supernet.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    other_losses, other = gradients(steps)
    similar = torch.nn.functional.cosine_similarity(gradient, other, dim=0)
    assert torch.allclose(losses, other_losses, rtol=tolerance) and similar > cosine


STRIDED = """
import torch
from torch import nn
from ftnas.compute import Compute
from ftnas.faults import MiBB
from ftnas.faults.hardware import Hardware
from ftnas.rng import isolated
from ftnas.train import FaultTolerantLoss
labels = torch.arange(4)
for stride, size in (((2, 2), 64), ((1, 2), 64), ((2, 1), 64), ((2, 2), 63)):
    results = []
    for compute in (Compute(), Compute(channels_last=True)):
        with isolated(0, "net"):
            first, strided = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, stride=stride)
            net = nn.Sequential(first, strided, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            images = torch.randn(4, 3, size, size)
        loss = FaultTolerantLoss(net, alpha_l=0.5, compute=compute)
        with Hardware(fault=MiBB(mac_error_rate=1e-3)).inject(net, seed=0, errors="soft") as injection:
            for _ in range(5):
                injection.draw = 0
                net.zero_grad()
                loss(net, injection, images, labels).total.backward()
        assert not strided._forward_pre_hooks
        results.append([first.weight.grad, strided.weight.grad])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*results)), (stride, size)
"""


def test_channels_last_keeps_within_memory_where_a_1x1_kernel_strides_over_few_channels():
    # in a process of its own: writing past the end of memory would end this one
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_bf16_computes_fixed_point_and_faults_in_float32(fault, monkeypatch):
    losses, gradient = gradients(Steps(fault))
    seen = spy(monkeypatch)
    steps = Steps(fault, Compute(autocast="bf16"))
    dtypes = set()
    for module in steps.supernet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    other_losses, other = gradients(steps)
    assert dtypes == {torch.bfloat16} and seen == {"round": {torch.float32}, "apply_": {torch.float32}}
    assert torch.allclose(losses, other_losses, rtol=0.02) and not torch.equal(losses, other_losses)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.95


@pytest.mark.parametrize("fault", FAULTS)
def test_fused_rounding_gives_the_same_step_bit_for_bit(fault, monkeypatch):
    losses, gradient = gradients(Steps(fault))
    calls = []
    monkeypatch.setattr(rounding, "_compiled", lambda function: lambda *args: calls.append(1) or function(*args))
    other_losses, other = gradients(Steps(fault, Compute(fused_rounding=True)))
    assert calls and torch.equal(losses, other_losses) and torch.equal(gradient, other)


def test_fused_rounding_lets_what_follows_work_in_place(monkeypatch):
    monkeypatch.setattr(rounding, "_compiled", lambda function: function)
    results = []
    for compute in (Compute(), Compute(fused_rounding=True)):
        with isolated(0, "net"):
            net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True))
        x = torch.randn(2, 1, 6, 6, generator=gen(0))
        with Hardware(fault=FAULTS["mibb"]).inject(net, seed=0, errors="soft"), compute.forward(x.device):
            net(x).square().sum().backward()
        results.append(net[0].weight.grad)
    assert torch.equal(*results)


def test_every_word_of_8_bits_is_exact_in_bfloat16():
    words = torch.arange(-128, 128).float() * 2.0**-9
    assert torch.equal(words.to(torch.bfloat16).float(), words)


def test_wider_words_than_bfloat16_holds_are_refused():
    hardware = Hardware(quantization=Quantization(weights=FixedPoint(bits=8), features=FixedPoint(bits=12)))
    with pytest.raises(ValueError, match=r"train\.compute\.autocast=bf16 holds words of up to 8 bits .* words of 12"):
        Compute(autocast="bf16").check(hardware.formats(), "train.compute")
    Compute().check(hardware.formats(), "train.compute")
    for dtype, bits in (("q4.15", 20), ("fp16", 16), ("fp32", 32)):
        own = Hardware(fault=WeightBitFlip(bit_error_rate=0.1, dtype=dtype)).formats()
        with pytest.raises(ValueError, match=f"words of {bits};"):
            Compute(autocast="bf16").check(own, "train.compute")
    Compute(autocast="bf16").check(Hardware(fault=WeightBitFlip(bit_error_rate=0.1, dtype="bf16")).formats(), "x")


@pytest.mark.parametrize(
    ("compute", "flag"), [(Compute(autocast="tf32"), "allow_tf32"), (Compute(cudnn_benchmark=True), "benchmark")]
)
def test_what_cudnn_may_do_is_for_steps_alone(compute, flag):
    flags = torch.backends.cudnn
    before = getattr(flags, flag)
    try:
        for held in (False, True):
            setattr(flags, flag, held)
            with pytest.raises(KeyError), compute.steps():
                assert getattr(flags, flag)
                raise KeyError
            assert getattr(flags, flag) is held
            with Compute(autocast="bf16").steps():
                assert getattr(flags, flag) is held
    finally:
        setattr(flags, flag, before)


def test_tf32_is_for_words_that_it_holds():
    compute = Compute(autocast="tf32")
    for bits in (11, 12):
        form = Hardware(quantization=Quantization(weights=FixedPoint(bits=bits))).formats()
        with pytest.raises(ValueError, match="tf32 holds words of up to 11") if bits > 11 else nullcontext():
            compute.check(form, "x")
    compute.check(Hardware(fault=WeightBitFlip(bit_error_rate=0.1, dtype="fp16")).formats(), "x")
    with pytest.raises(ValueError, match="words of 32"):
        compute.check(Hardware(fault=WeightBitFlip(bit_error_rate=0.1, dtype="fp32")).formats(), "x")
    compute.check_device(torch.device("cuda"), "x", obstacle="some")
    with pytest.raises(ValueError, match=r"x\.autocast=tf32 needs a CUDA device, and this runs on cpu; set it to null"):
        compute.check_device(torch.device("cpu"), "x", obstacle=None)


def test_cudnn_times_its_convolutions_on_a_gpu_alone():
    compute = Compute(cudnn_benchmark=True)
    compute.check_device(torch.device("cuda"), "x", obstacle=None)
    with pytest.raises(ValueError, match=r"x\.cudnn_benchmark needs a CUDA device, and this runs on cpu; set it to f"):
        compute.check_device(torch.device("cpu"), "x", obstacle=None)


def test_runs_compute_in_float32_and_the_same_every_time():
    flags = torch.backends.cudnn
    before = flags.allow_tf32, flags.deterministic
    try:
        flags.allow_tf32, flags.deterministic = True, False
        pick_device("auto")
        assert (flags.allow_tf32, flags.deterministic) == (False, True)
    finally:
        flags.allow_tf32, flags.deterministic = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "compute",
    [Compute(), Compute(fused_rounding=True), Compute(channels_last=True, autocast="bf16"), Compute(autocast="tf32")],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_of_the_shared_weights_on_a_gpu_never_waits(fault, compute):
    steps = Steps(fault, compute, device="cuda")
    with steps.injection as injection:
        steps(0)  # the first step finds the feature points, and makes the optimizer's buffers
        with never_waits():
            steps(0)
            steps(1)
    assert injection.record.hits > 0


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_no_tensor_outlives_its_step():
    steps = Steps("mibb")
    counts = []
    with steps.injection:
        for number in range(12):
            steps(number)
            if number % 4 == 3:  # every genotype has been trained as often
                counts.append(live_tensors())
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_over_2000_steps():
    steps = Steps("mibb")
    pages, counts = [], []
    with steps.injection:
        for number in range(2000):
            steps(number)
            if number in (499, 1999):
                counts.append(live_tensors())
                pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert counts[0] == counts[1]
    assert (pages[1] - pages[0]) * resource.getpagesize() < 8 * 2**20
