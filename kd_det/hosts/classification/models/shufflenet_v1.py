"""ShuffleNet V1 for small images, three groups.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, in the form of the public distillation collections (RepDistiller, mdistiller): a 1x1
stem that keeps the size of the image, and a quarter of each block's own output channels inside it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kd_det.hosts.classification.models.base import (
    ResidualNet,
    channel_shuffle,
    conv,
    head,
    scaled,
    stem,
)

_GROUPS = 3
_STEM = 24
_WIDTHS = (240, 480, 960)
_BLOCKS = (4, 8, 4)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; joined with the input, then ReLU.

    With stride 2 the mean-pooled input is appended to the branch, with stride 1 it is added.
    ``groups`` are those of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.appends = stride == 2
        own = channels - in_channels if self.appends else channels
        hidden = own // 4
        self.groups = groups
        self.conv1 = conv(in_channels, hidden, groups=groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(hidden, own, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if self.appends else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = channel_shuffle(self.relu1(self.bn1(self.conv1(x))), self.groups)
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        kept = self.pool(x)
        return self.relu(torch.cat([branch, kept], 1) if self.appends else branch + kept)


class CifarShuffleNetV1(ResidualNet):
    """ShuffleNet V1 with three groups; weights start as PyTorch's defaults.

    Args:
        num_classes: number of logits.
        factor: of the stages' widths 240, 480, 960.
        in_channels: of the images.
    """

    public_names = ((r"^linear\.", "fc."),)

    def __init__(self, num_classes: int, factor: float = 1.0, in_channels: int = 3) -> None:
        widths = scaled(factor, _WIDTHS)
        layers = stem(in_channels, _STEM, 1)
        before = _STEM
        for k, (width, count) in enumerate(zip(widths, _BLOCKS, strict=True), 1):
            # The few channels of the stem are not worth grouping.
            first = ShuffleBlock(before, width, 2, groups=1 if k == 1 else _GROUPS)
            rest = [ShuffleBlock(width, width, 1, _GROUPS) for _ in range(count - 1)]
            layers[f"layer{k}"] = nn.Sequential(first, *rest)
            before = width
        super().__init__(OrderedDict(layers | head(before, num_classes)))
