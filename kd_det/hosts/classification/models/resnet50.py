"""ResNet-50 for CIFAR: four stages of bottlenecks behind a 3x3 stem that keeps the image's size.

Table 1 of the paper that :mod:`kd_det.hosts.classification.models.resnet` cites, in the form of the
same collections.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_det.hosts.classification.models.base import ResidualNet, conv, he_init, head, shortcut

_STEM = 64
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, which widens ``width`` channels to four times as many."""

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        channels = _EXPANSION * width
        self.conv1 = conv(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu(branch + self.downsample(x))


class CifarResNet50(ResidualNet):
    """ResNet-50 whose stages work at full, half, quarter and eighth size."""

    public_names = ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample."))

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, _STEM, 3), bn1=nn.BatchNorm2d(_STEM), relu=nn.ReLU()
        )
        before = _STEM
        for k, (width, count) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True), 1):
            first = Bottleneck(before, width, stride=1 if k == 1 else 2)
            before = _EXPANSION * width
            layers[f"layer{k}"] = nn.Sequential(
                first, *(Bottleneck(before, width) for _ in range(count - 1))
            )
        super().__init__(OrderedDict(layers | head(before, num_classes)))
        he_init(self)
