"""Wide ResNets with pre-activation blocks.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_det.core.errors import fail
from kd_det.core.taps import Tap
from kd_det.hosts.classification.models.base import (
    CifarNet,
    conv,
    he_init,
    head,
    head_taps,
    residual_stages,
    stage_taps,
)


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, and a shortcut; nothing after the sum.

    Where widths differ, the shortcut is a 1x1 convolution of the first ReLU's output; otherwise it
    is the input itself.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(channels, channels, 3)
        self.projects = in_channels != channels
        if self.projects:
            self.shortcut = conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return branch + (self.shortcut(active) if self.projects else x)


class WideResNet(CifarNet):
    """A wide ResNet of depth ``6n + 4``; any other depth and a factor below 1 are refused.

    The stem has 16 channels, the stages have 16, 32 and 64 times ``factor``.
    """

    public_names = ((r"^block(\d)\.layer\.", r"layer\1."), (r"\.convShortcut\.", ".shortcut."))

    def __init__(self, depth: int, factor: int, num_classes: int, in_channels: int = 3) -> None:
        if depth < 10 or depth % 6 != 4 or factor < 1:
            fail(
                expected="the depth of a wide ResNet to be 6n + 4 and its factor at least 1",
                received=f"depth {depth}, factor {factor}",
                remedy="use a depth of 10, 16, 22, 28 or 40, as in wrn_16_2",
            )
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        layers: dict[str, nn.Module] = {"conv1": conv(in_channels, 16, 3)}
        layers |= residual_stages(PreActivationBlock, widths, [(depth - 4) // 6] * 3)
        layers |= {"bn1": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU()}
        super().__init__(OrderedDict(layers | head(widths[-1], num_classes)))
        he_init(self)

    def taps(self) -> dict[str, Tap]:
        """``stem``, ``stage1..3`` with ``_first``, ``_pre`` and ``_post``, ``pooled``, ``logits``.

        A stage ends in a sum without activation, which the public distillation codes tap. The norm
        that follows, at the start of the next stage, gives ``_pre``, its ReLU ``_post``.
        """
        taps = {"stem": Tap("conv1"), **stage_taps(self)}
        followers = (("layer2.0.bn1", "layer2.0.relu1"), ("layer3.0.bn1", "layer3.0.relu1"))
        for k, (norm, relu) in enumerate((*followers, ("bn1", "relu")), 1):
            taps |= {f"stage{k}_pre": Tap(norm), f"stage{k}_post": Tap(relu)}
        return taps | head_taps()
