"""torchvision's detectors as a family: names of taps, backbone maps, anchors, and the heads.

================  ================================================================================
name              tensor
================  ================================================================================
``c2..c5``        ``[N, C, H, W]`` map of the backbone's body at stride 4..32
``p2..``          ``[N, C, H, W]`` level of the feature pyramid at stride 4..
any path          ``[N, C, H, W]`` output of a module inside ``backbone``
``box_pooled``    ``[R, C, h, w]`` input of the box head: the R sampled RoIs (Faster, Mask R-CNN)
``box_features``  ``[R, D]`` output of the box head, one vector per RoI
``box_logits``    ``[R, K + 1]`` classification of the RoIs, background first
``mask_logits``   ``[R', M, M]`` of the R' positive RoIs, for their true class (Mask R-CNN)
``cls_logits``    ``[N * HWA, K + 1]`` of all anchors (RetinaNet, FCOS), trained with a sigmoid
================  ================================================================================

torchvision counts a background in every head. RoIs are those the student sampled, on both sides:
the teacher's box branch runs on them too.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd_det.core.adaptors import crop_to
from kd_det.core.class_map import map_labels
from kd_det.core.errors import fail
from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.hosts.detection.family import Family, map_spec, probe_backbone
from kd_det.hosts.detection.heads import (
    Call,
    Detector,
    Head,
    HeadTap,
    Specs,
    Step,
    TapTable,
    check_anchors,
    own_channel,
)
from kd_det.hosts.detection.uncertainty import anchor_values, roi_values

#: What several heads and the family record about a student's forward.
TRANSFORMED = "transformed"
FEATURES = "features"
BOXES = "boxes"

_BODY = "backbone.body"
_BACKGROUND = -1  # what torchvision's matchers say of an anchor below every threshold


class BoxHead(Head):
    """The box branch of Faster and Mask R-CNN."""

    taps: ClassVar = {
        "box_pooled": HeadTap("RoIs"),
        "box_features": HeadTap("RoIs"),
        "box_logits": HeadTap("RoIs", "softmax", "first", classes=True),
    }
    uncertain = "box_logits"
    _places: ClassVar = {
        "box_pooled": Tap("roi_heads.box_roi_pool"),
        "box_features": Tap("roi_heads.box_head"),
        "box_logits": Tap("roi_heads.box_predictor", select=0),
    }

    def specs(self, model: Detector) -> Specs:
        if not hasattr(model, "roi_heads"):
            return {}
        score = _score_layer(model)
        size = tuple(model.roi_heads.box_roi_pool.output_size)
        return {
            "box_pooled": TapSpec(model.backbone.out_channels, size=size),
            "box_features": TapSpec(score.in_features),
            "box_logits": TapSpec(score.out_features),
        }

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        boxes = Tap("roi_heads.box_roi_pool", at="input", select=1)
        return {BOXES: boxes, **{name: self._places[name] for name in wanted}}

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        """From one pass through the teacher's box branch, only as far as it is needed."""
        heads = step.teacher.roi_heads
        pooled = heads.box_roi_pool(step.features, step.recorded[BOXES], sizes(step))
        values = {"box_pooled": pooled}
        if "box_features" in wanted or "box_logits" in wanted:
            values["box_features"] = heads.box_head(pooled)
        if "box_logits" in wanted:
            logits = heads.box_predictor(values["box_features"])[0]
            values["box_logits"] = self.taps["box_logits"].mapped(logits, step.class_map)
        return {name: value for name, value in values.items() if name in wanted}

    def image_values(self, step: Step) -> Tensor:
        counts = [len(boxes) for boxes in step.recorded[BOXES]]
        return roi_values([step.recorded["box_logits"]], [counts], mean_first=True)


class MaskHead(Head):
    """The mask head of Mask R-CNN, on the positive RoIs."""

    taps: ClassVar = {"mask_logits": HeadTap("positive RoIs", "sigmoid", "first", True)}

    def specs(self, model: Detector) -> Specs:
        if not (hasattr(model, "roi_heads") and model.roi_heads.has_mask()):
            return {}
        # Its classes, so that a class count that differs shows; the tensor has one channel.
        return {"mask_logits": TapSpec(_score_layer(model).out_features)}

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        return {
            "mask_boxes": Tap("roi_heads.mask_roi_pool", at="input", select=1),
            "mask_logits": Tap("roi_heads.mask_predictor"),
        }

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        return {"mask_logits": own_channel(step.recorded["mask_logits"], self._classes(step))}

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        heads = step.teacher.roi_heads
        pooled = heads.mask_roi_pool(step.features, step.recorded["mask_boxes"], sizes(step))
        masks = heads.mask_predictor(heads.mask_head(pooled))
        labels = map_labels(self._classes(step), step.class_map, first=1)
        return {"mask_logits": own_channel(masks, labels)}

    @torch.no_grad()
    def _classes(self, step: Step) -> Tensor:
        """Labels ``[R']`` of the ground truth that the positive RoIs were matched to.

        By torchvision's own rule, once in a step.
        """
        if "mask_classes" not in step.recorded:
            boxes, (_, targets) = step.recorded["mask_boxes"], step.recorded[TRANSFORMED]
            _, labels = step.student.roi_heads.assign_targets_to_proposals(
                boxes,
                [t["boxes"].to(b.dtype) for t, b in zip(targets, boxes, strict=True)],
                [t["labels"] for t in targets],
            )
            step.recorded["mask_classes"] = torch.cat(labels)
        return step.recorded["mask_classes"]


class DenseHead(Head):
    """The classification of RetinaNet and FCOS."""

    # Independent classes, of which the first is never any anchor's.
    taps: ClassVar = {"cls_logits": HeadTap("anchors", "sigmoid", "first", classes=True)}
    uncertain = "cls_logits"

    def specs(self, model: Detector) -> Specs:
        if hasattr(model, "roi_heads"):
            return {}
        return {"cls_logits": TapSpec(model.head.classification_head.num_classes)}

    def teacher_specs(self, student: TapTable, teacher: TapTable, wanted: Collection[str]) -> Specs:
        """Refuse heads whose predictions do not correspond one to one."""
        check_anchors(student, teacher, lambda m: m.anchor_generator.num_anchors_per_location())
        return self.specs(teacher.model)

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        return {FEATURES: Tap("backbone"), "cls_logits": Tap("head.classification_head")}

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        return {"cls_logits": step.recorded["cls_logits"].flatten(0, 1)}

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        own = step.recorded[FEATURES]
        levels = [crop_to(step.features[key], value) for key, value in own.items()]
        rows = step.teacher.head.classification_head(levels).flatten(0, 1)
        return {"cls_logits": self.taps["cls_logits"].mapped(rows, step.class_map)}

    def uncertainty_places(self, model: Detector) -> dict[str, Tap | Call]:
        # The matches of anchors to ground truth.
        matches = Call("head", "compute_loss", argument=3)
        return {**super().uncertainty_places(model), "matches": matches}

    def image_values(self, step: Step) -> Tensor:
        matched = torch.stack(list(step.recorded["matches"]))
        return anchor_values(
            # No anchor is trained to the background.
            step.recorded["cls_logits"][..., 1:],
            matched >= 0,
            matched == _BACKGROUND,
            # As many negatives as an image may have detections.
            step.student.detections_per_img,
            mean_first=True,
        )


class TorchvisionFamily(Family):
    """``FasterRCNN``, ``MaskRCNN``, ``RetinaNet``, ``FCOS`` and their subclasses."""

    task_losses = (
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_mask",
        "classification",
        "bbox_regression",
        "bbox_ctrness",
    )

    def features(self, model: Detector, wanted: Collection[str]) -> TapTable:
        """Maps are measured by one dry run of the backbone, which leaves the model as it was."""
        taps = {path: Tap(path) for path in wanted if path.startswith("backbone.")}
        probes = {FEATURES: Tap("backbone"), **taps}
        if hasattr(model.backbone, "body"):
            probes[_BODY] = Tap(_BODY)
        captures = probe_backbone(model, probes)
        specs = Specs({path: map_spec(path, captures[path]) for path in taps})
        levels = []
        for prefix, path, outputs in (
            ("c", _BODY, captures.get(_BODY, {})),
            ("p", "backbone", captures[FEATURES]),
        ):
            for key, value in outputs.items():
                spec = map_spec("a level", value)
                name = f"{prefix}{round(math.log2(spec.stride or 1))}"
                taps[name], specs[name] = Tap(path, select=key), spec
                if prefix == "p":
                    levels.append(name)
        return TapTable(model, taps, specs, levels)

    def context_taps(self, model: Detector, needs: Collection[str]) -> dict[str, Tap]:
        taps = {TRANSFORMED: Tap("transform")}
        if "anchors" in needs:
            owner = "" if hasattr(model, "anchor_generator") else "rpn."
            taps |= {"anchors": Tap(f"{owner}anchor_generator"), FEATURES: Tap("backbone")}
        return taps

    def anchors(self, step: Step) -> dict[str, Tensor]:
        """Anchors of the first image, which torchvision's generator gives as one tensor."""
        model = step.student
        generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
        per_cell = generator.num_anchors_per_location()
        maps = step.recorded[FEATURES].values()
        counts = [m.shape[-2] * m.shape[-1] * a for m, a in zip(maps, per_cell, strict=True)]
        anchors = step.recorded["anchors"][0].split(counts)
        return dict(zip(step.levels, anchors, strict=True))

    def gt_boxes(self, step: Step) -> list[Tensor]:
        return [target["boxes"] for target in step.recorded[TRANSFORMED][1]]


def sizes(step: Step) -> list[tuple[int, int]]:
    """Image sizes for a pooler of the teacher, which takes the scale of its levels from them.

    Those of the padded batch are exact where the teacher pads more than the student.
    """
    count, _, height, width = step.pixels.shape
    return [(height, width)] * count


def _score_layer(model: Detector) -> nn.Linear:
    predictor = model.roi_heads.box_predictor
    score = getattr(predictor, "cls_score", None)
    if not isinstance(score, nn.Linear):
        fail(
            expected="torchvision's FastRCNNPredictor as the box predictor",
            received=type(predictor).__name__,
            remedy="give its classification layer the name cls_score",
        )
    return score


FAMILY = TorchvisionFamily(BoxHead(), MaskHead(), DenseHead())
