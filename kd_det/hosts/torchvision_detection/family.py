"""torchvision's detectors as a family: names of taps, backbone maps, anchors, and the heads.

================  ================================================================================
name              tensor
================  ================================================================================
``c2..c5``        ``[N, C, H, W]`` map of the backbone's body at stride 4..32
``p2..``          ``[N, C, H, W]`` level of the feature pyramid at stride 4..
any path          ``[N, C, H, W]`` output of a module inside ``backbone``
================  ================================================================================

The taps of the heads are those of :mod:`kd_det.hosts.torchvision_detection.heads`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from kd_det.core.taps import Tap
from kd_det.hosts.detection.family import Family, map_spec, probe_backbone
from kd_det.hosts.detection.heads import Detector, Specs, Step, TapTable
from kd_det.hosts.torchvision_detection.heads import (
    FEATURES,
    TRANSFORMED,
    BoxHead,
    DenseHead,
    MaskHead,
)

_BODY = "backbone.body"


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


FAMILY = TorchvisionFamily(BoxHead(), MaskHead(), DenseHead())
