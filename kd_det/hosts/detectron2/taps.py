"""What a Detectron2 model offers to tap: names, module paths, widths and strides.

Names are the same for student and teacher whatever the backbone calls its stages:

* ``p2, p3, ...``: outputs of the backbone (FPN levels), by Detectron2's own names;
* ``c2, c3, ...``: bottom-up stages by stride; ``c3`` is the stage of stride 8 (``res3``, ``m3``);
* ``box_logits``: classification logits of the student's sampled boxes, ``[R, K + 1]``; for a
  cascade one per stage;
* ``box_pooled``: what enters the box head for these boxes, ``[R, C, h, w]``, and ``box_features``:
  what leaves it, ``[R, D]``. For a cascade those of the first stage, whose boxes are the sampled
  proposals as in any other R-CNN, so that all relations are between the same boxes;
* ``mask_logits``: mask logits of the sampled foreground boxes, for their own class, ``[R, M, M]``;
* ``cls_logits``: logits of a dense head, one row per anchor of the batch, ``[N * sum(HWA), K]``;
* any module path inside ``backbone``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from kd_det.core.taps import Tap, TapRecorder
from kd_det.hosts.detection.terms import BOX_TAPS
from kd_det.losses import TapSpec

Specs = dict[str, TapSpec | list[TapSpec]]

# A stock meta-architecture. As nn.Module its attributes would all be "Tensor | Module".
StockModel = Any


_PROBE_SIZE = 256  # pixels; enough for one cell at stride 128 after padding


def num_box_stages(model: StockModel) -> int:
    """1, or the number of stages of a cascade."""
    return getattr(model.roi_heads, "num_cascade_stages", 1)


def box_branches(model: StockModel) -> list[tuple[Any, Any]]:
    """``(box_head, box_predictor)`` of each stage."""
    heads, predictors = model.roi_heads.box_head, model.roi_heads.box_predictor
    if isinstance(predictors, nn.ModuleList):
        return list(zip(heads, predictors, strict=True))
    return [(heads, predictors)]


def feature_taps(model: StockModel, wanted: Collection[str]) -> tuple[dict[str, Tap], Specs]:
    """Taps and specs of the wanted backbone features; names it does not know are left out."""
    backbone = model.backbone
    bottom_up = getattr(backbone, "bottom_up", None)
    taps, specs = {}, Specs()
    for name, shape in backbone.output_shape().items():
        taps[name] = Tap("backbone", select=name)
        specs[name] = TapSpec(shape.channels, shape.stride)
    owner, path = (backbone, "backbone") if bottom_up is None else (bottom_up, "backbone.bottom_up")
    for name, shape in owner.output_shape().items():
        alias = f"c{int(math.log2(shape.stride))}"
        taps[alias] = Tap(path, select=name)
        specs[alias] = TapSpec(shape.channels, shape.stride)
    for path in wanted:
        if path not in taps and path.startswith("backbone."):
            taps[path] = Tap(path)
            specs[path] = _probe(model, path)
    return taps, specs


def head_specs(model: StockModel) -> Specs:
    """Specs of what the model's heads produce. Channels are what classes are compared by."""
    specs = Specs()
    if isinstance(model, DenseDetector):
        specs["cls_logits"] = TapSpec(model.num_classes)
        return specs
    roi_heads = getattr(model, "roi_heads", None)
    if hasattr(roi_heads, "box_head"):
        branches = box_branches(model)
        # Heads with independent classes have a column for the background, but do not train it.
        stages = [TapSpec(p.num_classes + (not p.use_sigmoid_ce)) for _, p in branches]
        specs["box_logits"] = stages if len(stages) > 1 else stages[0]
        level = model.backbone.output_shape()[roi_heads.box_in_features[0]]
        specs["box_pooled"] = TapSpec(level.channels, size=roi_heads.box_pooler.output_size)
        out = branches[0][0].output_shape
        # A head without fully connected layers delivers maps.
        size = (out.height, out.width) if out.height else None
        specs["box_features"] = TapSpec(out.channels, size=size)
    if getattr(roi_heads, "mask_on", False) and roi_heads.mask_pooler is not None:
        side = roi_heads.mask_pooler.output_size[0]
        specs["mask_logits"] = TapSpec(roi_heads.num_classes, size=(side, side))
    return specs


def sigmoid_heads(model: StockModel) -> set[str]:
    """Names of heads trained with sigmoid cross-entropy, for which softmax has no meaning."""
    names = {"cls_logits", "mask_logits"}
    if hasattr(getattr(model, "roi_heads", None), "box_head") and any(
        p.use_sigmoid_ce for _, p in box_branches(model)
    ):
        names.add("box_logits")
    return names


def head_taps(model: StockModel, wanted: Collection[str]) -> dict[str, Tap]:
    """Taps that the wanted outputs of heads (and ``anchors``) of a student need."""
    taps: dict[str, Tap] = {}
    dense = isinstance(model, DenseDetector)
    if "cls_logits" in wanted:
        taps["cls_logits"] = Tap("head", select=0)
    if not set(BOX_TAPS).isdisjoint(wanted):
        stages = num_box_stages(model)
        # The pooler's input is the only place that stays right under TRAIN_ON_PRED_BOXES.
        taps["boxes"] = Tap("roi_heads.box_pooler", at="input", select=1, calls=stages)
        paths = [f".{stage}" if stages > 1 else "" for stage in range(stages)]
        if "box_pooled" in wanted:
            taps["box_pooled"] = Tap(f"roi_heads.box_head{paths[0]}", at="input")
        if "box_features" in wanted:
            taps["box_features"] = Tap(f"roi_heads.box_head{paths[0]}")
        if "box_logits" in wanted:
            for stage, path in enumerate(paths):
                taps[f"box_logits.{stage}"] = Tap(f"roi_heads.box_predictor{path}", select=0)
    if "mask_logits" in wanted:
        taps["mask_boxes"] = Tap("roi_heads.mask_pooler", at="input", select=1)
        taps["mask_instances"] = Tap("roi_heads.mask_head", at="input", select=1)
        taps["mask_logits"] = Tap("roi_heads.mask_head.predictor")
    if "anchors" in wanted:
        taps["anchors"] = Tap(
            "anchor_generator" if dense else "proposal_generator.anchor_generator"
        )
    return taps


def anchor_levels(model: StockModel) -> list[str]:
    """Feature names in the order in which the anchor generator sees them."""
    if isinstance(model, DenseDetector):
        return list(model.head_in_features)
    return list(model.proposal_generator.in_features)


def _probe(model: StockModel, path: str) -> TapSpec:
    """Width and stride of any map inside the backbone, from one forward of a blank image."""
    recorder = TapRecorder(model, {"probe": path})
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        blank = next(model.parameters()).new_zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE)
        with torch.no_grad(), recorder.recording():
            model.backbone(blank)
        tensor = recorder.read()["probe"]
    finally:
        for module, mode in training.items():
            module.training = mode
    return TapSpec(tensor.shape[1], _PROBE_SIZE // tensor.shape[2])
