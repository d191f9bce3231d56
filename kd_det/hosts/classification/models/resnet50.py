"""ResNet-50 for CIFAR: four stages of bottlenecks behind a 3x3 stem that keeps the image's size.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1, in the form of the
public distillation collections (RepDistiller, mdistiller).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_det.hosts.classification.models.base import (
    CifarNet,
    conv,
    he_init,
    head,
    head_taps,
    last_sum_taps,
    shortcut,
    stage_taps,
)
from kd_det.taps import Tap

_STEM = 64
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and expanding 1x1 convolution and a shortcut; ReLU after the sum.

    Args:
        in_channels: of the input map.
        width: channels inside; the output has four times as many.
        stride: of the 3x3 convolution and the shortcut.
    """

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


class CifarResNet50(CifarNet):
    """ResNet-50 whose stages work at full, half, quarter and eighth size.

    Args:
        num_classes: number of logits.
        in_channels: of the images.
    """

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

    def taps(self) -> dict[str, Tap]:
        """``stem``, ``stage1..4`` with ``_first`` and ``_pre``, ``pooled``, ``logits``."""
        return {"stem": Tap("relu"), **stage_taps(self), **last_sum_taps(self), **head_taps()}
