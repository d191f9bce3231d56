"""What the CIFAR networks share: a chain of named parts, their stem and head, and their taps.

Shape legend: ``N`` images, ``C`` channels, ``H, W`` height and width, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from kd_det.core.taps import Tap


class CifarNet(nn.Sequential):
    """A classifier for small images: its children run one after the other.

    The last three children are ``avgpool``, ``flatten`` and ``fc``. No ReLU works in place, so
    that every recorded tensor keeps its value. Input ``[N, C, H, W]`` with ``H, W >= 16``, output
    logits ``[N, K]``. Every network takes ``num_classes``, K, and ``in_channels``, C, 3 by default.

    Attributes:
        public_names: what to replace in the keys of the public distillation collections
            (RepDistiller, mdistiller) to get ours: regular expressions and replacements.
    """

    public_names: ClassVar[tuple[tuple[str, str], ...]] = ()

    def taps(self) -> dict[str, Tap]:
        """Taps by name; see :mod:`kd_det.hosts.classification.taps`."""
        raise NotImplementedError


class ResidualNet(CifarNet):
    """A :class:`CifarNet` whose stem ends in ``relu``, as do all blocks of its stages."""

    def taps(self) -> dict[str, Tap]:
        """``stem``, ``stage1``, ... with ``_first`` and ``_pre``, ``pooled``, ``logits``."""
        return {"stem": Tap("relu"), **stage_taps(self), **last_sum_taps(self), **head_taps()}


def stem(in_channels: int, channels: int, kernel: int) -> dict[str, nn.Module]:
    """The beginning of a residual network, which keeps the size of the image."""
    return {
        "conv1": conv(in_channels, channels, kernel),
        "bn1": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
    }


def residual_stages(
    block: Callable[[int, int, int], nn.Module],
    widths: Sequence[int],
    counts: Sequence[int],
    first_stride: int = 1,
) -> dict[str, nn.Module]:
    """Backbone stages ``layer1``, ``layer2``, ..., of which all but the first begin with stride 2.

    Args:
        block: ``(in_channels, channels, stride) -> block``.
        widths: channels of the stem and of each stage.
        counts: number of blocks of each stage.
        first_stride: that of the first stage.
    """
    layers: dict[str, nn.Module] = {}
    for k, count in enumerate(counts, 1):
        first = block(widths[k - 1], widths[k], first_stride if k == 1 else 2)
        rest = [block(widths[k], widths[k], 1) for _ in range(count - 1)]
        layers[f"layer{k}"] = nn.Sequential(first, *rest)
    return layers


def head(channels: int, num_classes: int) -> dict[str, nn.Module]:
    """The end of every network: mean over the positions, then one linear layer."""
    return {
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(channels, num_classes),
    }


def conv(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A padded convolution without bias, which the norm after it has."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """The identity where shapes agree, else a 1x1 convolution and a norm."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` equal groups of ``[N, C, H, W]``."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def head_taps() -> dict[str, Tap]:
    """``pooled`` ``[N, C]`` and ``logits`` ``[N, K]``."""
    return {"pooled": Tap("flatten"), "logits": Tap("fc")}


def stage_taps(model: nn.Module) -> dict[str, Tap]:
    """First block and end of the stages ``layer1``, ``layer2``, ..."""
    taps = {}
    for k, (name, _) in enumerate(stages(model), 1):
        taps[f"stage{k}_first"] = Tap(f"{name}.0")
        taps[f"stage{k}"] = Tap(name)
    return taps


def last_sum_taps(model: nn.Module) -> dict[str, Tap]:
    """What enters the ReLU that ends a stage, where blocks end in a module ``relu``."""
    return {
        f"stage{k}_pre": Tap(f"{name}.{len(stage) - 1}.relu", at="input")
        for k, (name, stage) in enumerate(stages(model), 1)
    }


def stages(model: nn.Module) -> list[tuple[str, nn.Sequential]]:
    """The children ``layer1``, ``layer2``, ... with their names, in order."""
    return [
        (name, child)
        for name, child in model.named_children()
        if name.startswith("layer") and isinstance(child, nn.Sequential)
    ]


def he_init(model: nn.Module, linear_std: float | None = None) -> None:
    """Normal weights of variance ``2 / (kernel area * output channels)`` for the convolutions.

    He et al., ICCV 2015, fan-out form. All biases start at zero; norms keep PyTorch's scale 1 and
    shift 0, and linear weights PyTorch's initial values unless ``linear_std`` is given.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if linear_std is not None:
                nn.init.normal_(module.weight, std=linear_std)


def scaled(factor: float, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Channel counts times ``factor``, rounded down as in the papers' code, at least 1."""
    return tuple(max(1, int(width * factor)) for width in widths)
