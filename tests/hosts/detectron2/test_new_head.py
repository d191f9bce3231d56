"""Detectron2's own keypoint head, which the package does not know, as one object in the list."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, Keypoints
from detectron2.utils.events import EventStorage

from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.hosts.detection.heads import Head, HeadTap
from kd_det.hosts.detectron2.family import FAMILY
from tests.hosts.detectron2.models import batch, build, distilled_cfg, tiny_cfg, write_teacher

pytestmark = pytest.mark.detectron2

OPTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4]
OPTS += ["MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 5]
OPTS += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8, 8]]
TERMS = {"maps": {"LOSS": "KD", "TAPS": ["keypoint_maps"]}}


class KeypointHead(Head):
    """Heat maps of the sampled boxes with visible keypoints, before they are enlarged."""

    taps: ClassVar = {"keypoint_maps": HeadTap("keypoints", "softmax")}

    def specs(self, model):
        roi_heads = getattr(model, "roi_heads", None)
        if not getattr(roi_heads, "keypoint_on", False):
            return {}
        side = 2 * roi_heads.keypoint_pooler.output_size[0]
        return {"keypoint_maps": TapSpec(side * side)}

    def places(self, model, wanted):
        return {
            "keypoint_boxes": Tap("roi_heads.keypoint_pooler", at="input", select=1),
            "keypoint_maps": Tap("roi_heads.keypoint_head.score_lowres"),
        }

    def student_values(self, step, wanted):
        return {"keypoint_maps": step.recorded["keypoint_maps"].flatten(0, 1).flatten(1)}

    def teacher_values(self, step, wanted):
        roi_heads = step.teacher.roi_heads
        levels = [step.features[name] for name in roi_heads.keypoint_in_features]
        x = roi_heads.keypoint_pooler(levels, list(step.recorded["keypoint_boxes"]))
        for layer in roi_heads.keypoint_head:
            x = layer(x)
        return {"keypoint_maps": x.flatten(0, 1).flatten(1)}


@pytest.fixture
def known(monkeypatch):
    """The new head in the family's list; nothing else is changed."""
    monkeypatch.setattr(FAMILY, "heads", [*FAMILY.heads, KeypointHead()])


def people():
    """The batch of this host with four visible keypoints in each box."""
    examples = batch()
    for example in examples:
        corners = example["instances"].gt_boxes.tensor
        x1, y1, x2, y2 = corners.unbind(1)
        points = torch.stack([torch.stack([(x1 + x2) / 2, (y1 + y2) / 2])] * 4)
        visible = torch.full((len(corners), 4, 1), 2.0)
        points = torch.cat([points.permute(2, 0, 1), visible], dim=2)
        example["instances"].gt_keypoints = Keypoints(points)
    return examples


def config(tmp_path):
    return distilled_cfg("faster", write_teacher(tmp_path, "faster", OPTS), TERMS, OPTS)


def test_without_the_object_the_tap_is_unknown(tmp_path, refuses):
    with refuses("'keypoint_maps'", "box_features"):
        build(config(tmp_path))


def test_the_keypoint_head_teaches_on_the_students_boxes(tmp_path, known):
    model = build(config(tmp_path))
    boxes, maps, seen = [], [], {}
    heads = model.roi_heads
    heads.keypoint_pooler.register_forward_pre_hook(
        lambda _, args: boxes.extend(Boxes(b.tensor.clone()) for b in args[1])
    )
    heads.keypoint_head.score_lowres.register_forward_hook(lambda m, args, out: maps.append(out))
    model.distiller.register_forward_pre_hook(
        lambda _, args: seen.update(zip("st", args, strict=False))
    )
    torch.manual_seed(4)
    with EventStorage():
        losses = model(people())
    stock = build(tiny_cfg("faster", OPTS))
    torch.manual_seed(4)
    with EventStorage():
        own = stock(people())
    assert {k: v for k, v in losses.items() if k != "maps"} == own
    assert losses["maps"] > 0
    assert len(maps[0]) == sum(map(len, boxes)) > 0
    own_rows, rows = seen["s"]["keypoint_maps"], seen["t"]["keypoint_maps"]
    assert torch.equal(own_rows, maps[0].reshape(-1, 100))
    assert own_rows.requires_grad
    teacher = model.teacher.frozen.model
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(people()).tensor)
        levels = [features[name] for name in teacher.roi_heads.keypoint_in_features]
        expected = teacher.roi_heads.keypoint_pooler(levels, boxes)
        for layer in teacher.roi_heads.keypoint_head:
            expected = layer(expected)
    torch.testing.assert_close(rows, expected.reshape(-1, 100))
    losses["maps"].backward()
    assert heads.keypoint_head.score_lowres.weight.grad.any()


def test_a_model_without_keypoints_does_not_have_the_tap(tmp_path, known, refuses):
    cfg = distilled_cfg("faster", write_teacher(tmp_path, "faster"), TERMS)
    with refuses("'keypoint_maps'", "box_features"):
        build(cfg)
