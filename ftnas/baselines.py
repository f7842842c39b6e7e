"""Hand-made networks to compare with, for small images: ResNet, VGG-16, MobileNet.

Every network starts with a 3x3 convolution at stride 1 and ends in global average pooling and one Linear. Of the
halvings that its definition for ImageNet names, those are kept that leave at least a 2x2 map (1x1 in VGG-16, whose last
pooling is its global one): as many as the image allows, and the first ones are dropped, since small images lack the
resolution that these would take away. At 32x32 these are the networks usually called by these names for CIFAR-10.

Channels are multiplied by ``width`` and rounded to a multiple of 4 (at least 4, never more than 10% down).

Layers draw their first weights from torch's global generator; wrap a call in ``ftnas.rng.isolated``.

torchvision's blocks are imported where they are used: they take as long as torch itself, and a mistake in a config
should not have to wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ftnas.registry import Registry

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
_MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# Expansion, channels, blocks, stride of the first block. ImageNet's stem halves too, and so would stage 2.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a baseline is built for."""

    num_classes: int
    in_channels: int
    width: float
    image_size: int

    def channels(self, base: int) -> int:
        """Return the channels of a layer that has ``base`` at width 1."""
        wanted = base * self.width
        rounded = max(4, int(wanted + 2) // 4 * 4)
        return rounded if rounded >= 0.9 * wanted else rounded + 4

    def strides(self, wanted: Sequence[int], *, smallest: int = 2) -> list[int]:
        """Return the strides with the first halvings dropped that the image is too small for."""
        size, allowed = self.image_size, 0
        while size > smallest:
            size, allowed = -(-size // 2), allowed + 1
        surplus = max(0, sum(stride == 2 for stride in wanted) - allowed)
        kept = []
        for stride in wanted:
            drop = stride == 2 and surplus > 0
            surplus -= drop
            kept.append(1 if drop else stride)
        return kept


BASELINES: Registry[Callable[[Shape], nn.Module]] = Registry("baseline")


def names() -> list[str]:
    """Return the names of all baselines."""
    return BASELINES.names()


def create(
    name: str, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32
) -> nn.Module:
    """Build a baseline that maps float images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        name: One of ``names()``.
        num_classes: Number of classes.
        in_channels: Of the images.
        width: Factor on all channels.
        image_size: Shorter side of the images in pixels, at least 4.

    Raises:
        ValueError: No baseline has the name (the nearest is told), or an argument is out of range.
    """
    builder = BASELINES.get(name)
    for argument, value, least in (
        ("num_classes", num_classes, 1),
        ("in_channels", in_channels, 1),
        ("image_size", image_size, 4),
    ):
        if value < least:
            raise ValueError(f"{argument}: at least {least}, got {value!r}")
    if not 0.0 < width < float("inf"):
        raise ValueError(f"width: a positive factor on the channels, got {width!r}")
    model = builder(Shape(num_classes=num_classes, in_channels=in_channels, width=width, image_size=image_size))
    _initialise(model)
    return model


class ResNet(nn.Module):
    """Residual network of torchvision's basic blocks, with a 3x3 stem.

    Args:
        shape: What it is built for.
        stages: Channels of each stage at width 1; each stage but the first halves the map.
        blocks: Blocks in each stage.
    """

    def __init__(self, shape: Shape, *, stages: Sequence[int], blocks: int) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        previous = shape.channels(stages[0])
        self.conv1 = nn.Conv2d(shape.in_channels, previous, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(previous)
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.Sequential()
        strides = shape.strides([1] + [2] * (len(stages) - 1))
        for base, first_stride in zip(stages, strides, strict=True):
            channels = shape.channels(base)
            stage = nn.Sequential()
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                stage.append(BasicBlock(previous, channels, stride, _shortcut(previous, channels, stride)))
                previous = channels
            self.stages.append(stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, in_channels, H, W] to logits [B, num_classes]."""
        x = self.stages(self.relu(self.bn1(self.conv1(images))))
        return self.fc(self.avgpool(x).flatten(1))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


@BASELINES.register("resnet18")
def _resnet18(shape: Shape) -> nn.Module:
    return ResNet(shape, stages=(64, 128, 256, 512), blocks=2)


def imagenet_resnet18(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-18 for images of 224x224, with its names of weights: a factory for model configs.

    Args:
        num_classes: Number of classes.
        in_channels: Of the images.
    """
    from torchvision.models.resnet import resnet18

    model = resnet18(num_classes=num_classes)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def chain_of_convolutions(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build three 3x3 convolutions with ReLU and max pooling, without BatchNorm: a factory for model configs.

    A chain, in which every statement of ``ftnas.bounds`` holds and `ftnas.regularizers.Fep` is defined.

    Args:
        num_classes: Number of classes.
        in_channels: Of the images, of at least 8x8 pixels.
    """
    features, previous = nn.Sequential(), in_channels
    for channels in (16, 32, 64):
        features.extend([nn.Conv2d(previous, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)])
        previous = channels
    model = _with_head(features, channels=previous, num_classes=num_classes)
    _initialise(model)
    return model


@BASELINES.register("resnet8")
def _resnet8(shape: Shape) -> nn.Module:
    return ResNet(shape, stages=(16, 32, 64), blocks=1)


def perceptron(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Build a fully connected net of two hidden layers of 64 ReLU on 8x8 pixels: a factory for model configs.

    Small and shallow, for bounds of failures that say something (docs/certificates.md).

    Args:
        num_classes: Number of classes.
        in_channels: Of the images, which are averaged to 8x8.
    """
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64 * in_channels, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


@BASELINES.register("resnet20")
def _resnet20(shape: Shape) -> nn.Module:
    return ResNet(shape, stages=(16, 32, 64), blocks=3)


def _with_head(features: nn.Sequential, *, channels: int, num_classes: int) -> nn.Sequential:
    network = nn.Sequential()
    network.add_module("features", features)
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(channels, num_classes))
    return network


@BASELINES.register("vgg16")
def _vgg16(shape: Shape) -> nn.Module:
    from torchvision.models.vgg import make_layers

    pools = iter(shape.strides([2] * _VGG16.count("M"), smallest=1))
    layers: list[int | str] = []
    for entry in _VGG16:
        if isinstance(entry, int):
            layers.append(shape.channels(entry))
        elif next(pools) == 2:
            layers.append(entry)
    features = make_layers(layers, batch_norm=True)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True  # so that odd maps halve as those of strided convolutions do
    first = features[0]
    features[0] = nn.Conv2d(shape.in_channels, first.out_channels, 3, padding=1)
    return _with_head(features, channels=shape.channels(512), num_classes=shape.num_classes)


@BASELINES.register("mobilenet_v2")
def _mobilenet_v2(shape: Shape) -> nn.Module:
    from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
    from torchvision.ops.misc import Conv2dNormActivation

    strides = shape.strides([stage[3] for stage in _MOBILENET_V2])
    stages = [
        [expansion, channels, blocks, stride]
        for (expansion, channels, blocks, _), stride in zip(_MOBILENET_V2, strides, strict=True)
    ]
    model = MobileNetV2(
        num_classes=shape.num_classes,
        width_mult=shape.width,
        inverted_residual_setting=stages,
        round_nearest=4,
        dropout=0.0,
    )
    stem = Conv2dNormActivation(shape.in_channels, shape.channels(32), activation_layer=nn.ReLU6)
    model.features[0] = stem
    last = model.features[-2]
    assert isinstance(last, InvertedResidual)
    # torchvision never makes the last layer narrower than 1280, which would be most of a narrow network.
    model.last_channel = shape.channels(1280)
    model.features[-1] = Conv2dNormActivation(
        last.out_channels, model.last_channel, kernel_size=1, activation_layer=nn.ReLU6
    )
    model.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(model.last_channel, shape.num_classes))
    return model


@BASELINES.register("mobilenet_v1")
def _mobilenet_v1(shape: Shape) -> nn.Module:
    from torchvision.ops.misc import Conv2dNormActivation

    previous = shape.channels(32)
    features = nn.Sequential(Conv2dNormActivation(shape.in_channels, previous))
    strides = shape.strides([stride for _, stride in _MOBILENET_V1])
    for (base, _), stride in zip(_MOBILENET_V1, strides, strict=True):
        channels = shape.channels(base)
        features.append(
            nn.Sequential(
                Conv2dNormActivation(previous, previous, stride=stride, groups=previous),
                Conv2dNormActivation(previous, channels, kernel_size=1),
            )
        )
        previous = channels
    return _with_head(features, channels=previous, num_classes=shape.num_classes)


def _initialise(model: nn.Module) -> None:
    """Draw weights of convolutions by He et al. (fan out) and of Linear from N(0, 0.01^2); biases are 0.

    torchvision draws those of its VGG and MobileNet-V2 in this way, and leaves the Linear of its ResNet at torch's
    default, which all layers have in the networks that ``ftnas.space`` builds.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
