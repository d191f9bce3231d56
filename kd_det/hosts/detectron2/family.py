"""Detectron2's detectors as a family: names of taps, backbone maps, anchors, and the heads.

Names are the same for student and teacher whatever the backbone calls its stages:

* ``p2, p3, ...``: outputs of the backbone (FPN levels), by Detectron2's own names;
* ``c2, c3, ...``: bottom-up stages by stride; ``c3`` is the stage of stride 8 (``res3``, ``m3``);
* the taps of the heads, see :mod:`kd_det.hosts.detectron2.heads`;
* any module path inside ``backbone``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.hosts.detection.family import Family, map_spec, probe_backbone
from kd_det.hosts.detection.heads import Detector, Specs, Step, TapTable
from kd_det.hosts.detectron2.heads import BoxHead, DenseHead, MaskHead


class Detectron2Family(Family):
    """The stock meta-architectures with a backbone of named levels."""

    def features(self, model: Detector, wanted: Collection[str]) -> TapTable:
        backbone = model.backbone
        bottom_up = getattr(backbone, "bottom_up", None)
        taps, specs = {}, Specs()
        for name, shape in backbone.output_shape().items():
            taps[name] = Tap("backbone", select=name)
            specs[name] = TapSpec(shape.channels, shape.stride)
        owner, path = (
            (backbone, "backbone") if bottom_up is None else (bottom_up, "backbone.bottom_up")
        )
        for name, shape in owner.output_shape().items():
            alias = f"c{int(math.log2(shape.stride))}"
            taps[alias] = Tap(path, select=name)
            specs[alias] = TapSpec(shape.channels, shape.stride)
        for path in wanted:
            if path not in taps and path.startswith("backbone."):
                taps[path] = Tap(path)
                specs[path] = map_spec(path, probe_backbone(model, {path: Tap(path)})[path])
        return TapTable(model, taps, specs, _anchor_levels(model))

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


def _anchor_levels(model: Detector) -> list[str]:
    if hasattr(model, "head_in_features"):
        return list(model.head_in_features)
    return list(getattr(model.proposal_generator, "in_features", []))


FAMILY = Detectron2Family(BoxHead(), MaskHead(), DenseHead())
