"""ResNets for CIFAR: three stages of basic blocks, at full, half and quarter size.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with the
projection shortcuts (1x1 convolution and norm) of the public distillation collections
(RepDistiller, mdistiller), whose parameter names these are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from kd_det.core.errors import fail
from kd_det.hosts.classification.models.base import ResidualNet, conv, he_init, head, shortcut

WIDTHS = (16, 16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU after the sum.

    Args:
        in_channels: of the input map.
        channels: of the output map.
        stride: of the first convolution and the shortcut.
    """

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


class CifarResNet(ResidualNet):
    """A ResNet of depth ``6n + 2``.

    Args:
        depth: 8, 14, 20, 26, ...
        num_classes: number of logits.
        widths: channels of the stem and of the three stages; the paper's are 16, 16, 32, 64.
        in_channels: of the images.

    Raises:
        KDError: a depth that is not ``6n + 2``.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
        in_channels: int = 3,
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            fail(
                expected="the depth of a CIFAR ResNet to be 6n + 2",
                received=str(depth),
                remedy="use 8, 14, 20, 32, 44, 56 or 110",
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, widths[0], 3), bn1=nn.BatchNorm2d(widths[0]), relu=nn.ReLU()
        )
        for k in (1, 2, 3):
            width, before = widths[k], widths[k - 1]
            first = BasicBlock(before, width, stride=1 if k == 1 else 2)
            rest = [BasicBlock(width, width) for _ in range((depth - 2) // 6 - 1)]
            layers[f"layer{k}"] = nn.Sequential(first, *rest)
        super().__init__(OrderedDict(layers | head(widths[-1], num_classes)))
        he_init(self)
