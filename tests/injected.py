"""Models of many kinds, and what the tests of `inject` share."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ftnas import FixedPoint, inject
from ftnas.faults import AdSAF, MiBB, Plan, Site
from ftnas.rng import generator

FIXED = FixedPoint(bits=8)
MIBB = MiBB(mac_error_rate=0.002)
ADSAF = AdSAF(sa0_rate=0.1, sa1_rate=0.1)


class Residual(nn.Module):
    """A skip connection around in-place activations."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Twice(nn.Module):
    """One convolution run two times, defined after the layer that runs last."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.head(self.conv(F.relu(self.conv(x), inplace=True)).mean((2, 3)))


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)
    )


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 3),
    )  # fmt: skip


MODELS = {
    "plain": plain,
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(), Residual()),
    "separable": separable,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)),
    "twice": Twice,
    "root": lambda: nn.Conv2d(3, 4, 3),
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def create(name, seed=0):
    """Build a model whose parameters and BatchNorm statistics are random, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]() if isinstance(name, str) else name()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.running_mean, module.bias, module.weight):
                    tensor.data.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(batch=4, seed=1):
    return torch.randn(batch, 3, 8, 8, generator=gen(seed))


def run(model, x, *faults, **options):
    options.setdefault("quantization", FIXED)
    with torch.no_grad(), inject(model, *faults, **options):
        return model(x)


def rounded(x, encoding="twos_complement"):
    """Round to 8-bit dynamic fixed point, the slow way."""
    largest, s = float(x.abs().max()), -20
    while 2.0**s < largest:
        s += 1
    low = -128 if encoding == "twos_complement" else -127
    return (x * 2.0 ** (7 - s)).round().clamp(low, 127) * 2.0 ** (s - 7)


def drawn(fault, values, layer, macs, *, seed=0, when=0, call=0, number=0, form=FIXED):
    """Apply the faults that the documented stream gives, and count them."""
    stream = generator(seed, fault.name, number, when, layer, call)
    plan = fault.sample(Site(layer, tuple(values.shape), macs, 8), generator=stream)
    return fault.apply(values, plan, grid=form.grid(values)), plan


class Spying(MiBB):
    """Keeps the plans that it draws."""

    seen: ClassVar[dict[str, list[Plan]]] = {}

    def sample(self, site, *, generator):
        plan = super().sample(site, generator=generator)
        self.seen.setdefault(site.layer, []).append(plan)
        return plan


def snapshot(model):
    """Everything that an injection may disturb, comparable."""
    hooks = [
        {key: list(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
        for module in model.modules()
    ]
    return {
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        "values": [(name, value.tolist()) for name, value in model.state_dict().items()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "classes": [type(module) for module in model.modules()],
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": hooks,
    }
