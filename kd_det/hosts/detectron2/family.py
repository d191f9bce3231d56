"""Detectron2's detectors as a family: names of taps, backbone maps, anchors, and the heads.

Names are the same for student and teacher whatever the backbone calls its stages:

* ``p2, p3, ...``: outputs of the backbone (FPN levels), by Detectron2's own names;
* ``c2, c3, ...``: bottom-up stages by stride; ``c3`` is the stage of stride 8 (``res3``, ``m3``);
* any module path inside ``backbone``;
* ``box_logits``: classification logits of the student's sampled boxes, ``[R, K + 1]`` with the
  background last, or ``[R, K]`` of independent classes; for a cascade one tensor per cascade stage;
* ``box_pooled``: what enters the box head for these boxes, ``[R, C, h, w]``, and ``box_features``:
  what leaves it, ``[R, D]``. For a cascade those of the first stage, whose boxes are the sampled
  proposals as in any other R-CNN, so that all relations are between the same boxes;
* ``mask_logits``: mask logits of the sampled foreground boxes, for their own class, ``[R', M, M]``;
* ``cls_logits``: logits of a dense head, one row per anchor of the batch, ``[N * sum(HWA), K]``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes
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

BOXES = "boxes"


class BoxHead(Head):
    """The box branch of an R-CNN, cascades included.

    A cascade teacher of a one-stage student answers with the logits of its stages' mean
    probability, which is what it scores by at inference.
    """

    taps: ClassVar = {
        "box_pooled": HeadTap("RoIs"),
        "box_features": HeadTap("RoIs"),
        "box_logits": HeadTap("RoIs", "softmax", "last", classes=True),
    }
    uncertain = "box_logits"

    def describe(self, model: Detector) -> Mapping[str, HeadTap]:
        """A head with independent classes (``USE_SIGMOID_CE``) does not train its last column."""
        if not any(predictor.use_sigmoid_ce for _, predictor in box_branches(model)):
            return self.taps
        logits = replace(self.taps["box_logits"], activation="sigmoid", background=None)
        return {**self.taps, "box_logits": logits}

    def specs(self, model: Detector) -> Specs:
        roi_heads = getattr(model, "roi_heads", None)
        if not hasattr(roi_heads, "box_head"):
            return {}
        branches = box_branches(model)
        level = model.backbone.output_shape()[roi_heads.box_in_features[0]]
        out = branches[0][0].output_shape
        # A head without fully connected layers delivers maps.
        size = (out.height, out.width) if out.height else None
        stages = [TapSpec(p.num_classes + (not p.use_sigmoid_ce)) for _, p in branches]
        return {
            "box_pooled": TapSpec(level.channels, size=roi_heads.box_pooler.output_size),
            "box_features": TapSpec(out.channels, size=size),
            "box_logits": stages if len(stages) > 1 else stages[0],
        }

    def teacher_specs(self, student: TapTable, teacher: TapTable, wanted: Collection[str]) -> Specs:
        """One entry of logits per cascade stage of the student, as :meth:`teacher_values` answers.

        Raises:
            KDError: logits of cascades of different length.
        """
        specs = self.specs(teacher.model)
        if "box_logits" not in wanted or "box_logits" not in student.specs:
            return specs
        stages = [len(box_branches(side.model)) for side in (student, teacher)]
        if stages[0] == stages[1]:
            return specs
        if 1 not in stages:
            fail(
                expected="cascades of the same number of stages, or one side with a single stage",
                received=f"student {stages[0]}, teacher {stages[1]}",
                remedy="choose a teacher with as many stages",
            )
        logits = specs["box_logits"]
        first = logits[0] if isinstance(logits, list) else logits
        return {**specs, "box_logits": [first] * stages[0]}

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        stages = len(box_branches(model))
        paths = [f".{stage}" if stages > 1 else "" for stage in range(stages)]
        # The pooler's input is the only place that stays right under TRAIN_ON_PRED_BOXES.
        taps = {BOXES: Tap("roi_heads.box_pooler", at="input", select=1, calls=stages)}
        if "box_pooled" in wanted:
            taps["box_pooled"] = Tap(f"roi_heads.box_head{paths[0]}", at="input")
        if "box_features" in wanted:
            taps["box_features"] = Tap(f"roi_heads.box_head{paths[0]}")
        if "box_logits" in wanted:
            for stage, path in enumerate(paths):
                taps[f"box_logits.{stage}"] = Tap(f"roi_heads.box_predictor{path}", select=0)
        return taps

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        values = {name: step.recorded.get(name) for name in wanted}
        if "box_logits" in wanted:
            stages = range(len(box_branches(step.student)))
            logits = [step.recorded[f"box_logits.{stage}"] for stage in stages]
            values["box_logits"] = self._trained(step.student, logits)
        return values

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        """From one pass through the teacher's box branch."""
        teacher, roi_heads = step.teacher, step.teacher.roi_heads
        levels = [step.features[name] for name in roi_heads.box_in_features]
        branches, boxes = box_branches(teacher), staged_boxes(step)
        with_logits = "box_logits" in wanted
        averaged = with_logits and len(branches) != len(boxes)
        tap = self.describe(teacher)["box_logits"]
        values: dict[str, Any] = {"box_logits": []}
        for stage, own in enumerate(boxes if with_logits else boxes[:1]):
            pooled = roi_heads.box_pooler(levels, list(own))
            heads = branches if averaged else branches[stage : stage + 1]
            outputs = [head(pooled) for head, _ in heads]
            if stage == 0:
                values |= {"box_pooled": pooled, "box_features": outputs[0]}
            if with_logits:
                scores = [p(output)[0] for (_, p), output in zip(heads, outputs, strict=True)]
                scores = self._trained(teacher, scores)
                answer = _mean_score(scores, tap) if averaged else scores[0]
                values["box_logits"].append(tap.mapped(answer, step.class_map))
        return {name: values[name] for name in wanted}

    def image_values(self, step: Step) -> Tensor:
        logits = self.student_values(step, ["box_logits"])["box_logits"]
        counts = [[len(own) for own in boxes] for boxes in staged_boxes(step)]
        sigmoid = self.describe(step.student)["box_logits"].activation == "sigmoid"
        return roi_values(logits, counts, sigmoid)

    def _trained(self, model: Detector, stages: Sequence[Tensor]) -> list[Tensor]:
        """The columns that mean something."""
        if self.describe(model)["box_logits"].activation == "softmax":
            return list(stages)
        return [logits[:, :-1] for logits in stages]


class MaskHead(Head):
    """The mask head of a Mask R-CNN, on the sampled foreground boxes."""

    taps: ClassVar = {"mask_logits": HeadTap("positive RoIs", "sigmoid", classes=True)}

    def specs(self, model: Detector) -> Specs:
        roi_heads = getattr(model, "roi_heads", None)
        if not getattr(roi_heads, "mask_on", False) or roi_heads.mask_pooler is None:
            return {}
        side = roi_heads.mask_pooler.output_size[0]
        return {"mask_logits": TapSpec(roi_heads.num_classes, size=(side, side))}

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        return {
            "mask_boxes": Tap("roi_heads.mask_pooler", at="input", select=1),
            "mask_instances": Tap("roi_heads.mask_head", at="input", select=1),
            "mask_logits": Tap("roi_heads.mask_head.predictor"),
        }

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        return {"mask_logits": own_channel(step.recorded["mask_logits"], self._classes(step))}

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        roi_heads = step.teacher.roi_heads
        levels = [step.features[name] for name in roi_heads.mask_in_features]
        pooled = roi_heads.mask_pooler(levels, list(step.recorded["mask_boxes"]))
        logits = roi_heads.mask_head.layers(pooled)
        classes = map_labels(self._classes(step), step.class_map)
        return {"mask_logits": own_channel(logits, classes)}

    def _classes(self, step: Step) -> Tensor:
        return torch.cat([x.gt_classes for x in step.recorded["mask_instances"]])


class DenseHead(Head):
    """The classification of a dense detector: RetinaNet, FCOS."""

    taps: ClassVar = {"cls_logits": HeadTap("anchors", "sigmoid", classes=True)}
    uncertain = "cls_logits"

    def specs(self, model: Detector) -> Specs:
        dense = isinstance(model, DenseDetector)
        return {"cls_logits": TapSpec(model.num_classes)} if dense else {}

    def teacher_specs(self, student: TapTable, teacher: TapTable, wanted: Collection[str]) -> Specs:
        """Refuse heads whose predictions do not correspond one to one."""
        check_anchors(student, teacher, lambda model: model.anchor_generator.num_anchors)
        return self.specs(teacher.model)

    def places(self, model: Detector, wanted: Collection[str]) -> dict[str, Tap]:
        return {"cls_logits": Tap("head", select=0)}

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        levels = step.recorded["cls_logits"]
        return {"cls_logits": _dense_rows(levels, step.student.num_classes, levels)}

    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        teacher = step.teacher
        logits = teacher.head([step.features[name] for name in teacher.head_in_features])[0]
        rows = _dense_rows(logits, teacher.num_classes, step.recorded["cls_logits"])
        return {"cls_logits": self.taps["cls_logits"].mapped(rows, step.class_map)}

    def uncertainty_places(self, model: Detector) -> dict[str, Tap | Call]:
        labels = Call("", "label_anchors")
        return {**super().uncertainty_places(model), "anchor_labels": labels}

    def image_values(self, step: Step) -> Tensor:
        model = step.student
        levels = [permute_to_N_HWA_K(x, model.num_classes) for x in step.recorded["cls_logits"]]
        labels = torch.stack(step.recorded["anchor_labels"][0])
        background = labels == model.num_classes
        positive = (labels >= 0) & ~background
        # As many negatives as an image may have detections.
        negatives = model.max_detections_per_image
        return anchor_values(torch.cat(levels, dim=1), positive, background, negatives)


class Detectron2Family(Family):
    """The stock meta-architectures with a backbone of named levels."""

    def features(self, model: Detector, wanted: Collection[str]) -> TapTable:
        backbone = model.backbone
        bottom_up = getattr(backbone, "bottom_up", backbone)
        taps, specs = {}, Specs()
        for name, shape in backbone.output_shape().items():
            taps[name] = Tap("backbone", select=name)
            specs[name] = TapSpec(shape.channels, shape.stride)
        path = "backbone" if bottom_up is backbone else "backbone.bottom_up"
        for name, shape in bottom_up.output_shape().items():
            alias = f"c{int(math.log2(shape.stride))}"
            taps[alias] = Tap(path, select=name)
            specs[alias] = TapSpec(shape.channels, shape.stride)
        for path in wanted:
            if path not in taps and path.startswith("backbone."):
                taps[path] = Tap(path)
                specs[path] = map_spec(path, probe_backbone(model, {path: Tap(path)})[path])
        dense = hasattr(model, "head_in_features")
        generator = None if dense else model.proposal_generator
        levels = model.head_in_features if dense else getattr(generator, "in_features", [])
        return TapTable(model, taps, specs, list(levels))

    def context_taps(self, model: Detector, needs: Collection[str]) -> dict[str, Tap]:
        if "anchors" not in needs:
            return {}
        owner = "" if hasattr(model, "anchor_generator") else "proposal_generator."
        return {"anchors": Tap(f"{owner}anchor_generator")}

    def anchors(self, step: Step) -> dict[str, Tensor]:
        levels = zip(step.levels, step.recorded["anchors"], strict=True)
        return {name: boxes.tensor for name, boxes in levels}

    def gt_boxes(self, step: Step) -> list[Tensor]:
        device = step.student.device
        return [x["instances"].gt_boxes.tensor.to(device) for x in step.batch]


def box_branches(model: Detector) -> list[tuple[Any, Any]]:
    """``(box_head, box_predictor)`` of each cascade stage."""
    heads, predictors = model.roi_heads.box_head, model.roi_heads.box_predictor
    if isinstance(predictors, nn.ModuleList):
        return list(zip(heads, predictors, strict=True))
    return [(heads, predictors)]


def staged_boxes(step: Step) -> Sequence[Sequence[Boxes]]:
    """Per cascade stage, per image, the boxes that entered the student's pooler."""
    boxes = step.recorded[BOXES]
    return boxes if isinstance(boxes[0], (list, tuple)) else [boxes]


def _mean_score(stages: Sequence[Tensor], tap: HeadTap) -> Tensor:
    """The logits of the stages' mean probability."""
    scores = torch.stack(list(stages)).float()
    if tap.activation == "softmax":
        return scores.softmax(dim=-1).mean(dim=0).log()
    # Beyond eps float32 cannot tell a mean from 0 or 1.
    return scores.sigmoid().mean(dim=0).logit(eps=1e-6)


def _dense_rows(logits: Sequence[Tensor], num_classes: int, like: Sequence[Tensor]) -> Tensor:
    """Per-level logits ``[N, A * K, H, W]``, cropped, to rows ``[sum(N * H * W * A), K]``."""
    rows = []
    for level, reference in zip(logits, like, strict=True):
        level = crop_to(level, reference)
        n, _, h, w = level.shape
        rows.append(level.view(n, -1, num_classes, h, w).permute(0, 3, 4, 1, 2))
    return torch.cat([r.reshape(-1, num_classes) for r in rows])


FAMILY = Detectron2Family(BoxHead(), MaskHead(), DenseHead())
