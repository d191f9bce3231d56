"""Stock torchvision detectors, built from a config.

Every class and head is torchvision's own. torchvision builds a feature pyramid for two families
of backbones only; here the children that it stands on are determined for any backbone by a dry run.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from kd_det.bench.looks import evaluating
from kd_det.core.errors import fail, nearest
from kd_det.hosts.detection.family import PROBE_SIZE

_FCOS_GROUPS = 32  # of the GroupNorm in torchvision's FCOS head


def build_model(cfg: CfgNode) -> nn.Module:
    """The stock detector a config describes, with random weights (or those of its backbone).

    Raises:
        KDError: an unknown backbone, or levels it cannot deliver.
    """
    name, backbone = cfg.MODEL.META_ARCHITECTURE, build_backbone(cfg)
    if name == "FasterRCNN":
        return FasterRCNN(backbone, **_rcnn_arguments(cfg, backbone.out_channels))
    if name == "MaskRCNN":
        arguments = _rcnn_arguments(cfg, backbone.out_channels)
        return MaskRCNN(backbone, **arguments, **_mask_arguments(cfg, backbone.out_channels))
    if name == "RetinaNet":
        below, above = cfg.MODEL.RETINANET.IOU_THRESHOLDS
        arguments = _dense_arguments(cfg)
        return RetinaNet(backbone, **arguments, bg_iou_thresh=below, fg_iou_thresh=above)
    if backbone.out_channels % _FCOS_GROUPS:
        fail(
            expected=f"MODEL.FPN.OUT_CHANNELS to be a multiple of {_FCOS_GROUPS} for FCOS",
            received=str(backbone.out_channels),
            remedy="use 32, 64, ...: its head normalises in groups",
        )
    return FCOS(backbone, **_dense_arguments(cfg))


def num_classes(cfg: CfgNode) -> int:
    """Foreground classes of the meta-architecture in use."""
    dense = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS")
    return (cfg.MODEL.RETINANET if dense else cfg.MODEL.ROI_HEADS).NUM_CLASSES


def build_backbone(cfg: CfgNode) -> BackboneWithFPN:
    """A feature pyramid over a classification backbone, with levels ``"0"``, ``"1"``, ..."""
    node, levels = cfg.MODEL.BACKBONE, list(cfg.MODEL.FPN.LEVELS)
    if node.NAME == "basic_resnet":
        body: nn.Module = basic_resnet(node.WIDTH, node.BLOCKS)
    else:
        body = _classification_body(node.NAME, node.WEIGHTS)
    if node.NORM == "FrozenBN":
        _freeze_batch_norm(body)
    last = last_children(body)
    deepest = max(last, default=0)
    present = [level for level in levels if level in last]
    extra = [level for level in levels if level > deepest]
    if sorted(present + extra) != levels or not present or len(extra) > 2:
        fail(
            expected=f"backbone {node.NAME} to deliver MODEL.FPN.LEVELS {levels}, of which at "
            "most the last two may lie above it",
            received=f"levels {sorted(last)}",
            remedy="choose levels from these, and one or two more on top",
        )
    width = cfg.MODEL.FPN.OUT_CHANNELS
    names, channels = zip(*(last[level] for level in present), strict=True)
    outputs = {name: str(i) for i, name in enumerate(names)}
    top = LastLevelP6P7(channels[-1], width) if len(extra) == 2 else LastLevelMaxPool()
    backbone = BackboneWithFPN(body, outputs, list(channels), width, top)
    if not extra:
        # BackboneWithFPN always adds a level; the pyramid itself does not need one.
        backbone.fpn.extra_blocks = None
    _freeze_up_to(backbone.body, node.FREEZE_AT)
    return backbone


def basic_resnet(width: int, blocks: Sequence[int]) -> nn.Sequential:
    """A CPU-sized ResNet of torchvision's ``BasicBlock``: strides 4, 8, 16, (32).

    The stem and the first stage have ``width`` channels; every further stage has twice as many.
    """
    if width < 1 or not 1 <= len(blocks) <= 4 or min(blocks) < 1:
        fail(
            expected="MODEL.BACKBONE.WIDTH >= 1 and one to four BLOCKS of at least 1",
            received=f"WIDTH {width}, BLOCKS {list(blocks)}",
            remedy="write for example WIDTH 16, BLOCKS [1, 1, 1]",
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    in_channels = width
    for stage, count in enumerate(blocks):
        out_channels = width * 2**stage
        stride = 1 if stage == 0 else 2
        shortcut = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        rest = [BasicBlock(out_channels, out_channels) for _ in range(count - 1)]
        layers[f"layer{stage + 1}"] = nn.Sequential(first, *rest)
        in_channels = out_channels
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def last_children(body: nn.Module) -> dict[int, tuple[str, int]]:
    """``{log2 stride: (child name, channels)}`` of the last child of each stride.

    From one run of the children in order, as far as they give square maps.
    """
    last: dict[int, tuple[str, int]] = {}
    for name, shape in _run_children(list(body.named_children())):
        level = math.log2(PROBE_SIZE / shape[2])
        if level.is_integer():
            last[int(level)] = (name, shape[1])
    return last


def _run_children(children: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, torch.Size]]:
    """Names and output shapes up to the first child that does not turn a map into a map."""
    shapes = []
    x = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE)
    with evaluating(nn.ModuleList(child for _, child in children)):
        for name, child in children:
            try:
                y = child(x)
            except (RuntimeError, TypeError, ValueError, AssertionError):
                break
            # Maps have channels first and are square here, as the input was.
            if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[2] != y.shape[3]:
                break
            if y.shape[2] == 1:
                break
            shapes.append((name, y.shape))
            x = y
    return shapes


def _classification_body(name: str, weights: str) -> nn.Module:
    """The part of a torchvision classifier whose children run in sequence and give maps."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        fail(
            expected="MODEL.BACKBONE.NAME to be basic_resnet or a torchvision classifier",
            received=f"'{name}'",
            remedy=nearest(name, [*known, "basic_resnet"]),
        )
    with_aux = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=weights or None, **with_aux)
    children = list(model.named_children())
    # `features` of MobileNet and its kind hold the whole trunk in one child, RegNet's
    # `trunk_output` most of it: go down to where strides change one by one.
    first = children[0][1]
    if isinstance(first, nn.Sequential) and max(last_children(first), default=0) >= 4:
        return first
    reached = _run_children(children)
    flat: OrderedDict[str, nn.Module] = OrderedDict()
    size, split = PROBE_SIZE, False
    for (child_name, shape), (_, child) in zip(reached, children, strict=False):
        if isinstance(child, nn.Sequential) and size / shape[2] > 2:
            flat.update((f"{child_name}_{n}", c) for n, c in child.named_children())
            split = True
        else:
            flat[child_name] = child
        size = shape[2]
    return nn.Sequential(flat) if split else model


def _freeze_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)


def _freeze_up_to(body: nn.Module, level: int) -> None:
    if level > 0:
        names = [name for name, _ in body.named_children()]
        last = last_children(body).get(level, (names[0], 0))[0]
        for name in names[: names.index(last) + 1]:
            getattr(body, name).requires_grad_(False)


def _anchor_generator(cfg: CfgNode) -> AnchorGenerator:
    levels = cfg.MODEL.FPN.LEVELS

    def per_level(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(v) for v in (values if len(values) > 1 else [values[0]] * len(levels)))

    if cfg.MODEL.META_ARCHITECTURE == "FCOS":
        # One anchor as large as a cell: torchvision's way to say "point".
        return AnchorGenerator(tuple((2**k,) for k in levels), ((1.0,),) * len(levels))
    node = cfg.MODEL.ANCHOR_GENERATOR
    return AnchorGenerator(per_level(node.SIZES), per_level(node.ASPECT_RATIOS))


def _input_arguments(cfg: CfgNode) -> dict[str, Any]:
    return {
        "min_size": tuple(cfg.INPUT.MIN_SIZE_TRAIN),
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "image_mean": list(cfg.MODEL.PIXEL_MEAN),
        "image_std": list(cfg.MODEL.PIXEL_STD),
        "size_divisible": cfg.MODEL.FPN.SIZE_DIVISIBILITY,
    }


def _pool(cfg: CfgNode, node: CfgNode) -> MultiScaleRoIAlign:
    # RoIs are pooled from levels of the backbone, never from the subsampled one on top.
    levels = [str(i) for i, level in enumerate(cfg.MODEL.FPN.LEVELS) if level <= 5]
    return MultiScaleRoIAlign(levels, node.POOLER_RESOLUTION, node.POOLER_SAMPLING_RATIO)


def _rcnn_arguments(cfg: CfgNode, width: int) -> dict[str, Any]:
    rpn, roi, box = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    size = box.POOLER_RESOLUTION
    head: nn.Module
    if box.NUM_CONV == 0 and box.NUM_FC == 2:
        head = TwoMLPHead(width * size**2, box.FC_DIM)
    else:
        layers = [box.CONV_DIM] * box.NUM_CONV, [box.FC_DIM] * box.NUM_FC
        head = FastRCNNConvFCHead((width, size, size), *layers)
    return {
        **_input_arguments(cfg),
        "rpn_anchor_generator": _anchor_generator(cfg),
        "rpn_pre_nms_top_n_train": rpn.PRE_NMS_TOPK_TRAIN,
        "rpn_pre_nms_top_n_test": rpn.PRE_NMS_TOPK_TEST,
        "rpn_post_nms_top_n_train": rpn.POST_NMS_TOPK_TRAIN,
        "rpn_post_nms_top_n_test": rpn.POST_NMS_TOPK_TEST,
        "rpn_nms_thresh": rpn.NMS_THRESH,
        "rpn_bg_iou_thresh": rpn.IOU_THRESHOLDS[0],
        "rpn_fg_iou_thresh": rpn.IOU_THRESHOLDS[1],
        "rpn_batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
        "rpn_positive_fraction": rpn.POSITIVE_FRACTION,
        "box_roi_pool": _pool(cfg, box),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(box.FC_DIM, roi.NUM_CLASSES + 1),
        "box_score_thresh": roi.SCORE_THRESH_TEST,
        "box_nms_thresh": roi.NMS_THRESH_TEST,
        "box_detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        "box_fg_iou_thresh": roi.IOU_THRESHOLDS[0],
        "box_bg_iou_thresh": roi.IOU_THRESHOLDS[0],
        "box_batch_size_per_image": roi.BATCH_SIZE_PER_IMAGE,
        "box_positive_fraction": roi.POSITIVE_FRACTION,
    }


def _mask_arguments(cfg: CfgNode, width: int) -> dict[str, Any]:
    node = cfg.MODEL.ROI_MASK_HEAD
    last = node.CONV_DIM if node.NUM_CONV else width
    return {
        "mask_roi_pool": _pool(cfg, node),
        "mask_head": MaskRCNNHeads(width, [node.CONV_DIM] * node.NUM_CONV, 1),
        "mask_predictor": MaskRCNNPredictor(last, node.CONV_DIM, num_classes(cfg) + 1),
    }


def _dense_arguments(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.RETINANET
    return {
        **_input_arguments(cfg),
        # torchvision's builders count a background here too, although no anchor is trained to
        # it: labels then mean the same in all four detectors.
        "num_classes": node.NUM_CLASSES + 1,
        "anchor_generator": _anchor_generator(cfg),
        "score_thresh": node.SCORE_THRESH_TEST,
        "nms_thresh": node.NMS_THRESH_TEST,
        "detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        "topk_candidates": node.TOPK_CANDIDATES_TEST,
    }
