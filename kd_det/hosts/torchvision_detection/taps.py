"""Tap names of the torchvision host, and what each delivers.

================  ================================================================================
name              tensor
================  ================================================================================
``c2..c5``        ``[N, C, H, W]`` map of the backbone's body at stride 4..32
``p2..``          ``[N, C, H, W]`` level of the feature pyramid at stride 4..
``box_pooled``    ``[R, C, h, w]`` input of the box head: the R sampled RoIs (Faster, Mask R-CNN)
``box_features``  ``[R, D]`` output of the box head, one vector per RoI
``box_logits``    ``[R, K + 1]`` classification of the RoIs, background first
``mask_logits``   ``[R', M, M]`` of the R' positive RoIs, for their true class (Mask R-CNN)
``cls_logits``    ``[N * HWA, K + 1]`` of all anchors (RetinaNet, FCOS), trained with a sigmoid
any path          ``[N, C, H, W]`` output of a module inside ``backbone``
================  ================================================================================

RoIs are those the student sampled, on both sides: the teacher's box branch runs on them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.core.errors import KDError, fail, nearest
from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap, TapRecorder
from kd_det.hosts.detection.terms import BOX_TAPS

_DRY_RUN_SIZE = 256

#: What the host itself needs to know about a student's forward.
TRANSFORMED = "transformed"
IMAGES = "images"
FEATURES = "features"
ANCHORS = "anchors"
BOXES = "boxes"
MASK_BOXES = "mask_boxes"
MASK_CLASSES = "mask_classes"  # computed from the recorded boxes, not recorded

# torchvision's four detectors share no base class that would name their parts.
Detector = Any

LOGITS = ("box_logits", "mask_logits", "cls_logits")
HEAD_TAPS = (*LOGITS, *BOX_TAPS)


@dataclass(frozen=True)
class TapTable:
    """What one detector offers.

    Attributes:
        taps: where to listen, by tap name.
        specs: channels and stride, by tap name.
        levels: FPN level names (``p2``) to the keys of the backbone's output (``"0"``), in order.
    """

    taps: dict[str, Tap]
    specs: dict[str, TapSpec]
    levels: dict[str, str]


def tap_table(model: Detector, wanted: Iterable[str] = ()) -> TapTable:
    """Names, places and shapes of a stock torchvision detector.

    Maps are measured by one dry run of the backbone, without gradients and with statistics and
    modes left as they were.

    Args:
        model: ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet`` or ``FCOS``.
        wanted: tap names of a config; module paths among them are added.

    Raises:
        KDError: a wanted name is neither a tap of this model nor a module inside its backbone.
    """
    taps: dict[str, Tap] = {}
    body = "backbone.body" if hasattr(model.backbone, "body") else ""
    heads = _head_taps(model)
    extra = [w for w in wanted if w.startswith("backbone.")]
    probes: dict[str, Tap | str] = {FEATURES: Tap("backbone"), **{w: Tap(w) for w in extra}}
    if body:
        probes["body"] = Tap(body)
    found = _dry_run(model, probes)

    specs: dict[str, TapSpec] = {}
    levels: dict[str, str] = {}
    for prefix, path, outputs in (
        ("c", body, found.get("body")),
        ("p", "backbone", found[FEATURES]),
    ):
        for key, value in (outputs or {}).items():
            spec = _map_spec(value)
            name = f"{prefix}{round(math.log2(spec.stride or 1))}"
            taps[name], specs[name] = Tap(str(path), select=key), spec
            if prefix == "p":
                levels[name] = key
    for name in extra:
        taps[name], specs[name] = Tap(name), _map_spec(found[name], name)
    for name, (tap, spec) in heads.items():
        taps[name], specs[name] = tap, spec
    for name in wanted:
        if name not in taps:
            fail(
                expected=f"a tap of {type(model).__name__}, or a module path in its backbone",
                received=f"'{name}'",
                remedy=nearest(name, taps),
            )
    return TapTable(taps, specs, levels)


def context_taps(model: Detector) -> dict[str, Tap]:
    """What the host listens to besides the taps of the terms."""
    taps = {
        TRANSFORMED: Tap("transform"),
        IMAGES: Tap("backbone", at="input"),
        FEATURES: Tap("backbone"),
    }
    if hasattr(model, "rpn"):
        taps[ANCHORS] = Tap("rpn.anchor_generator")
        taps[BOXES] = Tap("roi_heads.box_roi_pool", at="input", select=1)
        if model.roi_heads.has_mask():
            taps[MASK_BOXES] = Tap("roi_heads.mask_roi_pool", at="input", select=1)
    else:
        taps[ANCHORS] = Tap("anchor_generator")
    return taps


def anchors_per_level(
    model: Detector, anchors: Sequence[Tensor], maps: Sequence[Tensor]
) -> list[Tensor]:
    """Anchors of one padded image, level by level; all images of a batch share them.

    Args:
        model: the detector.
        anchors: per image ``[sum_l H_l * W_l * A_l, 4]``, as torchvision's generator gives them.
        maps: per level ``[N, C, H_l, W_l]``.

    Returns:
        Per level ``[H_l * W_l * A_l, 4]``.
    """
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    counts = [
        m.shape[-2] * m.shape[-1] * a
        for m, a in zip(maps, generator.num_anchors_per_location(), strict=True)
    ]
    return list(anchors[0].split(counts))


def _head_taps(model: Detector) -> dict[str, tuple[Tap, TapSpec]]:
    if not hasattr(model, "roi_heads"):
        head = model.head.classification_head
        return {"cls_logits": (Tap("head.classification_head"), TapSpec(head.num_classes))}
    heads = model.roi_heads
    score = _score_layer(heads.box_predictor)
    pooled = TapSpec(model.backbone.out_channels, size=tuple(heads.box_roi_pool.output_size))
    classes = TapSpec(score.out_features)
    taps = {
        "box_pooled": (Tap("roi_heads.box_roi_pool"), pooled),
        "box_features": (Tap("roi_heads.box_head"), TapSpec(score.in_features)),
        "box_logits": (Tap("roi_heads.box_predictor", select=0), classes),
    }
    if heads.has_mask():
        # Its classes, so that a class count that differs shows; the tensor has one channel.
        taps["mask_logits"] = (Tap("roi_heads.mask_predictor"), classes)
    return taps


def _score_layer(predictor: nn.Module) -> nn.Linear:
    score = getattr(predictor, "cls_score", None)
    if not isinstance(score, nn.Linear):
        fail(
            expected="torchvision's FastRCNNPredictor as the box predictor",
            received=type(predictor).__name__,
            remedy="give its classification layer the name cls_score",
        )
    return score


@torch.no_grad()
def _dry_run(model: Detector, probes: dict[str, Tap | str]) -> dict[str, Any]:
    modes = [(module, module.training) for module in model.modules()]
    recorder = TapRecorder(model, probes)
    weight = next(model.backbone.parameters())
    image = torch.zeros(
        1, 3, _DRY_RUN_SIZE, _DRY_RUN_SIZE, device=weight.device, dtype=weight.dtype
    )
    try:
        model.eval()
        with recorder.recording():
            model.backbone(image)
        return recorder.read()
    finally:
        recorder.release()
        for module, mode in modes:
            module.training = mode


def _map_spec(value: Any, name: str = "a level") -> TapSpec:
    if not isinstance(value, Tensor) or value.dim() != 4:
        raise KDError(
            f"expected {name} to be a map [N, C, H, W]; received "
            f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}; "
            "remedy: tap a convolutional layer"
        )
    return TapSpec(value.shape[1], stride=math.ceil(_DRY_RUN_SIZE / value.shape[-1]))
