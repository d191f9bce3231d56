"""Tap names of classifiers, and what each delivers.

==================  ============================================================================
name                tensor
==================  ============================================================================
``stem``            ``[N, C, H, W]`` end of what comes before the first stage
``stage1..``        ``[N, C, H, W]`` end of a stage, after its activation where it has one
``stage1_first..``  ``[N, C, H, W]`` end of the first block of a stage
``stage1_pre..``    ``[N, C, H, W]`` end of a stage before its activation
``stage1_post..``   ``[N, C, H, W]`` wide ResNet: end of a stage after the norm and ReLU behind it
``pooled``          ``[N, C]`` the vector that enters the last linear layer
``logits``          ``[N, K]``
any module path     what the module returns
==================  ============================================================================

Not every family has every name. ``docs/classification_models.md`` lists them by network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torchvision.models import VGG, MobileNetV2, MobileNetV3, ResNet, ShuffleNetV2

from kd_det.core.errors import fail, nearest
from kd_det.core.taps import Tap
from kd_det.hosts.classification.models.base import CifarNet, stage_taps

LOGITS = "logits"

# Classifiers of torchvision and timm share no base class that would name their parts.
Classifier = Any


def tap_table(model: nn.Module) -> dict[str, Tap]:
    """The named taps of a classifier.

    Stages are known for CIFAR networks; torchvision's ResNet, VGG, MobileNet and ShuffleNet; and
    timm classifiers that describe theirs (``feature_info``). Others have ``pooled`` and ``logits``.
    """
    if isinstance(model, CifarNet):
        return model.taps()
    stages = next((table for kind, table in _STAGES.items() if isinstance(model, kind)), _described)
    return {**stages(model), **_pooled(model), LOGITS: Tap("")}


def resolve_taps(model: nn.Module, names: Iterable[str]) -> dict[str, Tap]:
    """The taps of a config's names: of :func:`tap_table`, or paths of modules (their output).

    Raises:
        KDError: a name that is neither; the message lists the named taps.
    """
    table = tap_table(model)
    paths = dict(model.named_modules())
    taps = {}
    for name in names:
        if name not in table and (name not in paths or not name):
            fail(
                expected=f"a tap of {type(model).__name__}, or the path of one of its modules",
                received=f"'{name}'",
                remedy=nearest(name, table),
            )
        taps[name] = table.get(name, Tap(name))
    return taps


def _resnet(model: Classifier) -> dict[str, Tap]:
    # The block's only ReLU module runs two or three times and in place, so that the sum before
    # the last of them cannot be told apart: no `_pre` here.
    return {"stem": Tap("maxpool"), **stage_taps(model)}


def _vgg(model: Classifier) -> dict[str, Tap]:
    taps = {}
    units: list[int] = []  # the ReLUs since the last pooling
    block = 0
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.ReLU):
            units.append(i)
        elif isinstance(layer, nn.MaxPool2d):
            last = Tap(f"features.{units[-1]}")
            if block == 0:
                taps["stem"] = last
            else:
                taps[f"stage{block}_first"] = Tap(f"features.{units[0]}")
                # The ReLU overwrites its input.
                taps[f"stage{block}_pre"] = Tap(last.path, at="input", clone=True)
                taps[f"stage{block}"] = last
            block, units = block + 1, []
    return taps


def _mobile(model: Classifier) -> dict[str, Tap]:
    """A chain ``features``: stem, blocks, last convolution; a stage begins at a stride of 2."""
    last = len(model.features) - 2
    begins = [i for i in range(1, last + 1) if _halves(model.features[i])]
    ends = [i - 1 for i in begins[1:]] + [last]
    taps = {"stem": Tap("features.0")}
    for k, (begin, end) in enumerate(zip(begins, ends, strict=True), 1):
        taps |= {f"stage{k}_first": Tap(f"features.{begin}"), f"stage{k}": Tap(f"features.{end}")}
    return taps


def _halves(block: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride[0] == 2 for m in block.modules())


def _shufflenet(model: Classifier) -> dict[str, Tap]:
    taps = {"stem": Tap("maxpool")}
    for k in (1, 2, 3):
        taps |= {f"stage{k}_first": Tap(f"stage{k + 1}.0"), f"stage{k}": Tap(f"stage{k + 1}")}
    return taps


def _described(model: Classifier) -> dict[str, Tap]:
    """Stages of a timm classifier; the first is the stem where its stride is below 4."""
    entries = [(e["module"], e["reduction"]) for e in getattr(model, "feature_info", ())]
    has_stem = bool(entries) and entries[0][1] < 4
    names = [f"stage{k}" if k else "stem" for k in range(not has_stem, len(entries) + 1)]
    return {name: Tap(path) for name, (path, _) in zip(names, entries, strict=False)}


def _pooled(model: nn.Module) -> dict[str, Tap]:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {"pooled": Tap(linear[-1], at="input")} if linear else {}


_STAGES: dict[type[nn.Module], Callable[[Classifier], dict[str, Tap]]] = {
    ResNet: _resnet,
    VGG: _vgg,
    MobileNetV2: _mobile,
    MobileNetV3: _mobile,
    ShuffleNetV2: _shufflenet,
}
