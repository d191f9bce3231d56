"""ShuffleNet V2 for small images.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
in the form of the public distillation collections (RepDistiller, mdistiller): a 1x1 stem that
keeps the size of the image.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kd_det.core.errors import check_known
from kd_det.hosts.classification.models.base import ResidualNet, channel_shuffle, conv, head, stem

_STEM = 24
_BLOCKS = (4, 8, 4)
#: Channels of the three stages and of the last 1x1 convolution, by width factor (paper, table 5).
SHUFFLENET_V2_WIDTHS: dict[float, tuple[int, int, int, int]] = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half run through 1x1, depthwise 3x3 and 1x1; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, branch = x.chunk(2, dim=1)
        branch = self.relu1(self.bn1(self.conv1(branch)))
        branch = self.bn3(self.conv3(self.bn2(self.conv2(branch))))
        # The kept half comes out of a ReLU, so a second one changes nothing; in this order the
        # whole map before the activation can be tapped.
        return channel_shuffle(self.relu(torch.cat([kept, branch], 1)), 2)


class DownUnit(nn.Module):
    """Two branches of stride 2, from all channels each, joined and shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, 2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        return channel_shuffle(self.relu(torch.cat([left, right], 1)), 2)


class CifarShuffleNetV2(ResidualNet):
    """ShuffleNet V2; weights start as PyTorch's defaults.

    Its ``_pre`` taps are maps before the last ReLU and the shuffle: passed half, then branch.

    Args:
        num_classes: number of logits.
        factor: a key of :data:`SHUFFLENET_V2_WIDTHS`.
        in_channels: of the images.

    Raises:
        KDError: a factor the paper does not define.
    """

    public_names = ((r"^linear\.", "fc."),)

    def __init__(self, num_classes: int, factor: float = 1.0, in_channels: int = 3) -> None:
        known = [f"x{f:g}" for f in SHUFFLENET_V2_WIDTHS]
        check_known("width of ShuffleNet V2", f"x{factor:g}", known)
        *widths, last = SHUFFLENET_V2_WIDTHS[factor]
        layers = stem(in_channels, _STEM, 1)
        before = _STEM
        for k, (width, count) in enumerate(zip(widths, _BLOCKS, strict=True), 1):
            rest = [ShuffleUnit(width) for _ in range(count - 1)]
            layers[f"layer{k}"] = nn.Sequential(DownUnit(before, width), *rest)
            before = width
        layers |= {"conv2": conv(before, last), "bn2": nn.BatchNorm2d(last), "relu2": nn.ReLU()}
        super().__init__(OrderedDict(layers | head(last, num_classes)))
