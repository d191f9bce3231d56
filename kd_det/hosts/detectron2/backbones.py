"""Backbones that the papers use, or that small data needs, and Detectron2 lacks.

A level named ``m3``, ``res3`` or ``p3`` has stride ``2 ** 3``. The residual network of free width
and depth exists because the stock builder requires 64 channels for basic blocks, which is too wide
to train on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from kd_det.core.errors import check_choice, fail, nearest

#: Which of torchvision's ``features`` make up which stage, as half-open ranges. As in a ResNet, a
#: stage is all the layers of one stride, except that ``stem`` ends at stride 2. The last entry of
#: ``features``, the 1x1 expansion before the classifier, belongs to no stage.
MOBILENETV2_STAGES: dict[str, tuple[int, int]] = {
    "stem": (0, 2),
    "m2": (2, 4),
    "m3": (4, 7),
    "m4": (7, 14),
    "m5": (14, 18),
}


def add_backbone_config(cfg: CfgNode) -> None:
    """Add the keys of this module's backbones to ``cfg``, in place."""
    cfg.MODEL.MOBILENETV2 = CfgNode()
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = ["m2", "m3", "m4", "m5"]  # the last block of each stride
    cfg.MODEL.MOBILENETV2.WIDTH_MULT = 1.0  # of all channel counts
    # The published detection recipe trains every layer (FREEZE_AT 0) but keeps the ImageNet
    # statistics. "BN" and "SyncBN" train them.
    cfg.MODEL.MOBILENETV2.NORM = "FrozenBN"

    cfg.MODEL.BASIC_RESNET = CfgNode()
    # Backbone stage k (res2 is k = 0) has WIDTH * 2^k channels.
    cfg.MODEL.BASIC_RESNET.WIDTH = 16
    cfg.MODEL.BASIC_RESNET.BLOCKS = [1, 1, 1]  # basic blocks of each backbone stage
    cfg.MODEL.BASIC_RESNET.NORM = "BN"  # a name of Detectron2's norms
    # Coarser levels on top of the pyramid: "maxpool" adds one (R-CNN), "p6p7" adds two by
    # convolutions on the last bottom-up map (RetinaNet, FCOS), "none" adds nothing.
    cfg.MODEL.BASIC_RESNET.TOP_BLOCK = "maxpool"


class MobileNetV2(Backbone):
    """MobileNetV2 as a Detectron2 backbone, built from torchvision's blocks.

    The outputs ``m2..m5`` are the last linear bottlenecks of each stride: signed maps without a
    final ReLU. At width 1.0 they have 24, 32, 96 and 320 channels.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

    Args:
        out_features: names among ``stem, m2, m3, m4, m5``. Stages after the last one named are
            not built, so that no parameter stays without a gradient.
        width_mult: multiplies every width, as in torchvision.
        norm: a name that Detectron2's ``get_norm`` knows: ``FrozenBN``, ``BN``, ``SyncBN``...
        freeze_at: how many stages to freeze from the input on; 1 is the stem, 2 adds ``m2``.
    """

    def __init__(
        self,
        out_features: Sequence[str] = ("m2", "m3", "m4", "m5"),
        width_mult: float = 1.0,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        known = list(MOBILENETV2_STAGES)
        _check_names("MODEL.MOBILENETV2.OUT_FEATURES", out_features, known)
        if not norm:
            fail(
                expected="MODEL.MOBILENETV2.NORM to name a norm",
                received="''",
                remedy="use FrozenBN, BN or SyncBN",
            )
        norm_layer = partial(get_norm, norm)
        features = mobilenet_v2(width_mult=width_mult, norm_layer=norm_layer).features
        self.stage_names = known[: max(map(known.index, out_features)) + 1]
        self._out_feature_strides: dict[str, int] = {}
        self._out_feature_channels: dict[str, int] = {}
        for exponent, name in enumerate(self.stage_names, start=1):
            start, stop = MOBILENETV2_STAGES[name]
            self.add_module(name, nn.Sequential(*features[start:stop]))
            self._out_feature_strides[name] = 2**exponent
            self._out_feature_channels[name] = features[stop - 1].out_channels
        self._out_features = [name for name in self.stage_names if name in out_features]
        self.freeze(freeze_at)

    def freeze(self, freeze_at: int) -> None:
        """Stop the first ``freeze_at`` stages from training, their norms included."""
        for name in self.stage_names[:freeze_at]:
            stage = getattr(self, name)
            stage.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(stage)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images ``[N, 3, H, W]`` to ``{"m2": [N, C2, H/4, W/4], ...}``."""
        outputs = {}
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build MobileNetV2 under the stock FPN with a max-pooled ``p6``, as R-CNN uses it."""
    return _build_fpn(cfg, _build_mobilenetv2(cfg, input_shape), "maxpool")


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build MobileNetV2 under the stock FPN with convolved ``p6`` and ``p7``, for dense heads."""
    return _build_fpn(cfg, _build_mobilenetv2(cfg, input_shape), "p6p7")


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a residual network of basic blocks, of any width and depth, under the stock FPN.

    It has Detectron2's own stem, blocks and names (``res2``...), so ``MODEL.BACKBONE.FREEZE_AT``
    and every module path mean what they mean for the stock ResNet.
    """
    node = cfg.MODEL.BASIC_RESNET
    known = [f"res{k + 2}" for k in range(len(node.BLOCKS))]
    if not 1 <= len(node.BLOCKS) <= 4 or min(node.BLOCKS) < 1:
        fail(
            expected="MODEL.BASIC_RESNET.BLOCKS to give one to four stages at least one block each",
            received=str(list(node.BLOCKS)),
            remedy="write one positive number per stage from res2 on, for example [1, 1, 1]",
        )
    _check_names("MODEL.FPN.IN_FEATURES", cfg.MODEL.FPN.IN_FEATURES, known)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=node.WIDTH, norm=node.NORM)
    stages, in_channels = [], node.WIDTH
    for k, num_blocks in enumerate(node.BLOCKS):
        out_channels = node.WIDTH * 2**k
        # The stem already has stride 4, hence so has res2.
        strides = [1 if k == 0 else 2] + [1] * (num_blocks - 1)
        shape = {"in_channels": in_channels, "out_channels": out_channels, "norm": node.NORM}
        stages.append(ResNet.make_stage(BasicBlock, num_blocks, stride_per_block=strides, **shape))
        in_channels = out_channels
    names, frozen = list(cfg.MODEL.FPN.IN_FEATURES), cfg.MODEL.BACKBONE.FREEZE_AT
    bottom_up = ResNet(stem, stages, out_features=names, freeze_at=frozen)
    return _build_fpn(cfg, bottom_up, node.TOP_BLOCK)


def _build_mobilenetv2(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    if input_shape.channels != 3:
        fail(
            expected="3 input channels for MobileNetV2",
            received=str(input_shape.channels),
            remedy="give MODEL.PIXEL_MEAN and PIXEL_STD three values",
        )
    node, frozen = cfg.MODEL.MOBILENETV2, cfg.MODEL.BACKBONE.FREEZE_AT
    _check_names("MODEL.FPN.IN_FEATURES", cfg.MODEL.FPN.IN_FEATURES, node.OUT_FEATURES)
    return MobileNetV2(node.OUT_FEATURES, node.WIDTH_MULT, node.NORM, frozen)


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: str) -> FPN:
    """Put the stock FPN of ``cfg.MODEL.FPN`` on ``bottom_up``.

    The stock builders put the top block on level 5 by name. Here it follows the last level, so that
    a pyramid may end at stride 16.
    """
    check_choice("MODEL.BASIC_RESNET.TOP_BLOCK", top_block, ("maxpool", "p6p7", "none"))
    pyramid = cfg.MODEL.FPN
    last = pyramid.IN_FEATURES[-1]
    shape = bottom_up.output_shape()[last]
    block: nn.Module | None = None
    if top_block == "maxpool":
        block = LastLevelMaxPool()
        block.in_feature = f"p{int(math.log2(shape.stride))}"
    elif top_block == "p6p7":
        block = LastLevelP6P7(shape.channels, pyramid.OUT_CHANNELS, in_feature=last)
    names, width = pyramid.IN_FEATURES, pyramid.OUT_CHANNELS
    return FPN(bottom_up, names, width, pyramid.NORM, block, pyramid.FUSE_TYPE)


def _check_names(key: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        fail(
            expected=f"{key} to name levels of the backbone",
            received=str(list(names)),
            remedy=nearest(unknown[0] if unknown else "", known),
        )
