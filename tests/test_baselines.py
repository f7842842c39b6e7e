import pytest
import torch
from torch import nn

from ftnas import baselines, rng


def create(name, **arguments):
    with rng.isolated(0, "baseline"):
        return baselines.create(name, **arguments)


def naive_complexity(model, shape):
    """Millions of parameters and of 2 x MAC, by hooks."""
    flops = 0

    def add(module, _inputs, output):
        nonlocal flops
        flops += 2 * output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return sum(p.numel() for p in model.parameters()) / 1e6, flops / 1e6


# Published: Table 4 of FTT-NAS for the first two, He et al. 2016 (0.27M) for ResNet-20, the common CIFAR version for
# MobileNet-V1. MobileNet-V2 is torchvision's, to the digit; 2.30M and 182M in Table 4 are another variant's.
@pytest.mark.parametrize(
    ("name", "params", "mflops"),
    [
        ("resnet18", (11.17, 11.18), (1110, 1111)),
        ("vgg16", (14.70, 14.75), (626, 627)),
        ("mobilenet_v2", (2.236682, 2.236682), (175.952896, 175.952896)),
        ("resnet20", (0.27, 0.28), (81, 82)),
        ("resnet8", (0.078, 0.079), (24, 26)),
        ("mobilenet_v1", (3.2, 3.3), (92, 94)),
    ],
)
def test_published_sizes(name, params, mflops):
    counted = naive_complexity(create(name), (3, 32, 32))
    assert params[0] <= counted[0] <= params[1]
    assert mflops[0] <= counted[1] <= mflops[1]


def test_all_names_are_tested_here():
    assert sorted(baselines.names()) == ["mobilenet_v1", "mobilenet_v2", "resnet18", "resnet20", "resnet8", "vgg16"]


# Map size before global pooling, as the module promises: every halving that leaves 2x2 (VGG-16: 1x1).
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", {4: 2, 8: 2, 9: 2, 28: 4}),
        ("resnet20", {4: 2, 8: 2, 9: 3, 28: 7}),
        ("resnet8", {4: 2, 8: 2, 9: 3, 28: 7}),
        ("vgg16", {4: 1, 8: 1, 9: 1, 28: 1}),
        ("mobilenet_v2", {4: 2, 8: 2, 9: 2, 28: 4}),
        ("mobilenet_v1", {4: 2, 8: 2, 9: 2, 28: 2}),
    ],
)
def test_maps_never_vanish(name, sizes):
    for image_size, expected in sizes.items():
        model = create(name, num_classes=7, in_channels=1, width=0.125, image_size=image_size)
        seen = []
        pool = next((m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)), None)
        watched = pool if pool is not None else model.features[-1]
        watched.register_forward_hook(lambda _m, inputs, out, seen=seen: seen.append((inputs[0], out)))
        logits = model(torch.zeros(2, 1, image_size, image_size))
        assert logits.shape == (2, 7)
        before, after = seen[0]
        assert (before if pool is not None else after).shape[-2:] == (expected, expected)


def test_small_images_lose_the_first_halvings():
    model = create("resnet18", image_size=8, width=0.125)
    strides = [stage[0].conv1.stride[0] for stage in model.stages]
    assert strides == [1, 1, 2, 2]


@pytest.mark.parametrize("name", baselines.names())
def test_channels_follow_the_width(name):
    for width in (0.1, 0.3, 1.0):
        with torch.device("meta"):
            models = create(name, width=width), create(name)
        convolutions = zip(*([m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in models), strict=True)
        for narrow, full in convolutions:
            if name == "mobilenet_v2" and narrow.out_channels == 6 * narrow.in_channels:
                continue  # an expansion: six times what is checked before it
            if narrow.groups > 1:
                continue  # depthwise: as wide as its input
            wanted = full.out_channels * width
            assert narrow.out_channels % 4 == 0
            assert narrow.out_channels == 4 or 0.9 * wanted <= narrow.out_channels <= wanted + 4


@pytest.mark.parametrize("name", baselines.names())
def test_all_parameters_learn_and_the_seed_decides(name):
    model = create(name, image_size=8, width=0.125, in_channels=1)
    twin = create(name, image_size=8, width=0.125, in_channels=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    x = torch.randn(4, 1, 8, 8, generator=rng.generator(0, "x"))
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"name": "resnet19"}, "did you mean 'resnet18'"),
        ({"name": "os:getcwd"}, "accepted from a config only"),
        ({"width": 0.0}, "positive factor on the channels, got 0.0"),
        ({"width": float("inf")}, "got inf"),
        ({"width": float("nan")}, "got nan"),
        ({"image_size": 3}, "image_size: at least 4, got 3"),
        ({"num_classes": 0}, "num_classes: at least 1, got 0"),
        ({"in_channels": 0}, "in_channels: at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, rule):
    with pytest.raises(ValueError, match=rule) as error:
        baselines.create(**{"name": "resnet20", **arguments})
    assert "\n" not in str(error.value)
