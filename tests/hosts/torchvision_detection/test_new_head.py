"""torchvision's Keypoint R-CNN, which the package does not know, by one object in the list."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.hosts.detection.heads import Head, HeadTap
from kd_det.hosts.torchvision_detection.family import FAMILY, sizes
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import _rcnn_arguments, build_backbone
from tests.hosts.torchvision_detection.models import batch, teacher_cfg, tiny_cfg

TERMS = {"maps": {"LOSS": "KD", "TAPS": ["keypoint_maps"]}}
KEYPOINTS, SIDE = 4, 20


class KeypointHead(Head):
    """Heat maps of the positive RoIs: one distribution over pixels for each keypoint."""

    taps: ClassVar = {"keypoint_maps": HeadTap("keypoints", "softmax")}

    def specs(self, model):
        if not (hasattr(model, "roi_heads") and model.roi_heads.has_keypoint()):
            return {}
        return {"keypoint_maps": TapSpec(SIDE * SIDE)}

    def places(self, model, wanted):
        return {
            "keypoint_boxes": Tap("roi_heads.keypoint_roi_pool", at="input", select=1),
            "keypoint_maps": Tap("roi_heads.keypoint_predictor"),
        }

    def student_values(self, step, wanted):
        return {"keypoint_maps": step.recorded["keypoint_maps"].flatten(0, 1).flatten(1)}

    def teacher_values(self, step, wanted):
        heads = step.teacher.roi_heads
        x = heads.keypoint_roi_pool(step.features, step.recorded["keypoint_boxes"], sizes(step))
        x = heads.keypoint_predictor(heads.keypoint_head(x))
        return {"keypoint_maps": x.flatten(0, 1).flatten(1)}


@pytest.fixture
def known(monkeypatch):
    """The new head in the family's list; nothing else is changed."""
    monkeypatch.setattr(FAMILY, "heads", [*FAMILY.heads, KeypointHead()])


def keypoint_rcnn(cfg) -> nn.Module:
    torch.manual_seed(5)
    backbone = build_backbone(cfg)
    width = backbone.out_channels
    return KeypointRCNN(
        backbone,
        **_rcnn_arguments(cfg, width),
        keypoint_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2),
        keypoint_head=KeypointRCNNHeads(width, [8]),
        keypoint_predictor=KeypointRCNNPredictor(8, KEYPOINTS),
    )


def distilled():
    cfg = tiny_cfg("FasterRCNN", ["INPUT.MIN_SIZE_TRAIN", (80,)])
    return DistilledDetector(
        keypoint_rcnn(cfg), keypoint_rcnn(teacher_cfg("FasterRCNN")), TERMS
    ).train()


def people():
    """The batch of this host with four visible keypoints in each box."""
    images, targets = batch()
    for target in targets:
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        centre = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, torch.ones(len(x1))], dim=1)
        target["keypoints"] = centre[:, None].repeat(1, KEYPOINTS, 1)
    return images, targets


def test_without_the_object_the_tap_is_unknown(refuses):
    with refuses("KeypointRCNN", "'keypoint_maps'", "box_features"):
        distilled()


def test_the_keypoint_head_teaches_on_the_students_boxes(known):
    model = distilled()
    boxes, maps, seen = [], [], {}
    heads = model.student.roi_heads
    heads.keypoint_roi_pool.register_forward_pre_hook(lambda _, args: boxes.extend(args[1]))
    heads.keypoint_predictor.register_forward_hook(lambda m, args, out: maps.append(out))
    model.distiller.register_forward_pre_hook(
        lambda _, args: seen.update(zip("st", args, strict=False))
    )
    images, targets = people()
    torch.manual_seed(4)
    losses = model(images, targets)
    stock = keypoint_rcnn(tiny_cfg("FasterRCNN", ["INPUT.MIN_SIZE_TRAIN", (80,)])).train()
    torch.manual_seed(4)
    own = stock(*people())
    assert {k: v for k, v in losses.items() if k != "maps"} == own
    assert losses["maps"] > 0
    assert len(maps[0]) == sum(map(len, boxes)) > 0
    own_rows, rows = seen["s"]["keypoint_maps"], seen["t"]["keypoint_maps"]
    assert torch.equal(own_rows, maps[0].reshape(-1, SIDE * SIDE))
    assert own_rows.requires_grad
    teacher = model.teacher.model
    captures = {"images": model.student.transform(images)[0]}
    padded = captures["images"].tensors
    recorded = {"images": padded, "transformed": (captures["images"], None)}
    with torch.no_grad():
        pixels = model.teacher_pixels(teacher, (images, targets), recorded)
        shape = [tuple(pixels.shape[-2:])] * 2
        pooled = teacher.roi_heads.keypoint_roi_pool(teacher.backbone(pixels), boxes, shape)
        expected = teacher.roi_heads.keypoint_predictor(teacher.roi_heads.keypoint_head(pooled))
    torch.testing.assert_close(rows, expected.reshape(-1, SIDE * SIDE))
    losses["maps"].backward()
    assert heads.keypoint_predictor.kps_score_lowres.weight.grad.any()
