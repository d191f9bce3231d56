"""VGG with batch norm for small images: five blocks, one linear layer.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, in the form of the public distillation collections (RepDistiller, mdistiller): three poolings
on 32x32 images, a global mean instead of the large linear layers.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_det.core.errors import check_known
from kd_det.core.taps import Tap
from kd_det.hosts.classification.models.base import CifarNet, he_init, head, head_taps

#: Channels of the convolutions, block by block, by the number of weight layers of the original.
VGG_WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}

_LARGE_MAP = 8


class PoolLargeMaps(nn.MaxPool2d):
    """Halves maps of at least 8x8 cells.

    Before the last block these come from images of at least 64 pixels (Tiny-ImageNet); on CIFAR the
    last two blocks work at the same size.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if min(x.shape[-2:]) >= _LARGE_MAP else x


class CifarVGG(CifarNet):
    """VGG-8, 11, 13, 16 or 19, the keys of :data:`VGG_WIDTHS`; any other depth is refused."""

    public_names = ((r"^classifier\.", "fc."),)

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3) -> None:
        check_known("VGG", f"vgg{depth}", [f"vgg{d}" for d in VGG_WIDTHS])
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = in_channels
        for k, widths in enumerate(VGG_WIDTHS[depth]):
            layers[f"block{k}"] = _block(before, widths)
            layers[f"relu{k}"] = nn.ReLU()
            if k < 3:
                layers[f"pool{k}"] = nn.MaxPool2d(2)
            elif k == 3:
                layers["pool3"] = PoolLargeMaps()
            before = widths[-1]
        super().__init__(OrderedDict(layers | head(before, num_classes)))
        he_init(self, linear_std=0.01)

    def taps(self) -> dict[str, Tap]:
        """``stem`` (block 0), ``stage1..4`` with ``_first`` and ``_pre``, ``pooled``, ``logits``.

        ``_first`` follows the first convolution, norm and ReLU of a block.
        """
        taps = {"stem": Tap("relu0")}
        for k in range(1, 5):
            single = len(list(self.get_submodule(f"block{k}").children())) == 2
            taps[f"stage{k}_first"] = Tap(f"relu{k}" if single else f"block{k}.2")
            taps[f"stage{k}_pre"] = Tap(f"block{k}")
            taps[f"stage{k}"] = Tap(f"relu{k}")
        return taps | head_taps()


def _block(in_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions with norms, ReLU between them but not at the end."""
    layers: list[nn.Module] = []
    for width in widths:
        if layers:
            layers.append(nn.ReLU())
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width)]
        in_channels = width
    return nn.Sequential(*layers)
