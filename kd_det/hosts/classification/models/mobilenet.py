"""MobileNetV2 for small images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, in the form of
the public distillation collections (RepDistiller, mdistiller): ReLU instead of ReLU6, a first
block that expands by 1 with its own 1x1 convolution, and strides that leave 2x2 cells of a 32x32
image.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_det.core.taps import Tap
from kd_det.hosts.classification.models.base import CifarNet, conv, he_init, head, head_taps, scaled

_STEM = 32
_LAST = 1280
#: Expansion, channels, blocks and first stride of the seven groups.
_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: First and last group of each backbone stage: the groups that work at one size.
_STAGES = ((0, 1), (2, 2), (3, 4), (5, 6))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution; a sum where shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.adds = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *_conv_norm_relu(in_channels, hidden),
            *_conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class CifarMobileNetV2(CifarNet):
    """MobileNetV2 with expansion 6.

    ``factor`` multiplies all widths; the last, 1280, only grows. The papers' student has 0.5.
    """

    public_names = ((r"^classifier\.0\.", "fc."),)

    def __init__(self, num_classes: int, factor: float = 0.5, in_channels: int = 3) -> None:
        stem, last = scaled(factor, (_STEM, _LAST))
        last = max(last, _LAST)
        groups, before = [], stem
        for expansion, width, count, stride in _GROUPS:
            (channels,) = scaled(factor, (width,))
            blocks = [InvertedResidual(before, channels, stride, expansion)]
            blocks += [InvertedResidual(channels, channels, 1, expansion) for _ in range(count - 1)]
            groups.append(nn.Sequential(*blocks))
            before = channels
        layers = {
            "conv1": nn.Sequential(*_conv_norm_relu(in_channels, stem, 3, stride=2)),
            "blocks": nn.Sequential(*groups),
            "conv2": nn.Sequential(*_conv_norm_relu(before, last)),
        }
        super().__init__(OrderedDict(layers | head(last, num_classes)))
        he_init(self, linear_std=0.01)

    def taps(self) -> dict[str, Tap]:
        """``stem``, ``stage1..4`` with ``_first``, ``pooled``, ``logits``.

        Blocks end in a linear convolution, so that no tap is before or after an activation.
        """
        taps = {"stem": Tap("conv1")}
        for k, (first, last) in enumerate(_STAGES, 1):
            taps[f"stage{k}_first"] = Tap(f"blocks.{first}.0")
            taps[f"stage{k}"] = Tap(f"blocks.{last}")
        return taps | head_taps()


def _conv_norm_relu(
    in_channels: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = conv(in_channels, channels, kernel, stride, groups)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
