"""ResNets for CIFAR: basic blocks in three backbone stages, and bottlenecks in four (ResNet-50).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and table 1, with
the projection shortcuts (1x1 convolution and norm) of the public distillation collections
(RepDistiller, mdistiller), whose parameter names these are. The 3x3 stem and the first stage keep
the size of the image; every further stage halves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from kd_det.core.errors import fail
from kd_det.hosts.classification.models.base import (
    ResidualNet,
    conv,
    he_init,
    head,
    residual_stages,
    shortcut,
    stem,
)

WIDTHS = (16, 16, 32, 64)
_EXPANSION = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, and a shortcut; ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu(branch + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution to ``channels``, a quarter as wide inside."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        width = channels // _EXPANSION
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


class CifarResNet(ResidualNet):
    """A ResNet of depth ``6n + 2``; any other depth is refused.

    ``widths`` are the channels of the stem and of the three stages. Default: the paper's.
    """

    def __init__(
        self, depth: int, num_classes: int, widths: Sequence[int] = WIDTHS, in_channels: int = 3
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            fail(
                expected="the depth of a CIFAR ResNet to be 6n + 2",
                received=str(depth),
                remedy="use 8, 14, 20, 32, 44, 56 or 110",
            )
        layers = stem(in_channels, widths[0], 3)
        layers |= residual_stages(BasicBlock, widths, [(depth - 2) // 6] * 3)
        super().__init__(OrderedDict(layers | head(widths[-1], num_classes)))
        he_init(self)


class CifarResNet50(ResidualNet):
    """ResNet-50."""

    public_names = ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample."))

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        layers = stem(in_channels, 64, 3)
        layers |= residual_stages(Bottleneck, (64, 256, 512, 1024, 2048), (3, 4, 6, 3))
        super().__init__(OrderedDict(layers | head(2048, num_classes)))
        he_init(self)
