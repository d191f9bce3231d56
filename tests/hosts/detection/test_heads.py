"""A new head comes in as one object in its family's list: a toy keypoint head on a toy detector."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import parse_terms
from kd_det.hosts.detection.distillation import DistillationBranch, DistillationPlan
from kd_det.hosts.detection.family import Family
from kd_det.hosts.detection.heads import Call, Head, HeadTap, TapTable, recorded_calls

KEYPOINTS, SIDE = 5, 4


class ToyDetector(nn.Module):
    """A backbone of one level, a class score per image, and heat maps of boxes."""

    def __init__(self, width: int, keypoints: int = KEYPOINTS) -> None:
        super().__init__()
        self.backbone = ToyBackbone(width)
        self.score = nn.Linear(width, 3)
        self.pool = ToyPool()
        self.keypoint_head = nn.Conv2d(width, keypoints, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        features = self.backbone(batch["images"])
        # As a real detector does, the student chooses its own boxes.
        boxes = [b + torch.rand(len(b), 2).round() for b in batch["boxes"]]
        maps = self.keypoint_head(self.pool(features, boxes))
        scores = self.score(features["p2"].mean(dim=(2, 3)))
        task = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        return {"loss_score": task, "loss_keypoint": maps.square().mean()}


class ToyBackbone(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"p2": self.conv(images)}


class ToyPool(nn.Module):
    """Cuts out cells of the map that begin at the box's corner."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        crops = [
            feature[:, y : y + SIDE, x : x + SIDE]
            for feature, own in zip(features["p2"], boxes, strict=True)
            for x, y in own.long().tolist()
        ]
        return torch.stack(crops)


class ToyFamily(Family):
    task_losses = ("loss_score",)

    def features(self, model, wanted):
        width = model.backbone.conv.out_channels
        return TapTable(
            model, {"p2": Tap("backbone", select="p2")}, {"p2": TapSpec(width, 4)}, ["p2"]
        )

    def context_taps(self, model, needs):
        return {}

    def anchors(self, step):
        raise NotImplementedError

    def gt_boxes(self, step):
        return step.batch["boxes"]


class KeypointHead(Head):
    """Heat maps of the sampled boxes: one distribution over pixels for each keypoint."""

    taps: ClassVar = {"keypoint_maps": HeadTap("keypoints", "softmax")}

    def specs(self, model):
        return {"keypoint_maps": TapSpec(SIDE * SIDE)} if model.keypoint_head else {}

    def places(self, model, wanted):
        return {"boxes": Tap("pool", at="input", select=1), "keypoint_maps": Tap("keypoint_head")}

    def student_values(self, step, wanted):
        return {"keypoint_maps": step.recorded["keypoint_maps"].flatten(0, 1).flatten(1)}

    def teacher_values(self, step, wanted):
        pooled = step.teacher.pool(step.features, step.recorded["boxes"])
        return {"keypoint_maps": step.teacher.keypoint_head(pooled).flatten(0, 1).flatten(1)}


class Distilled(DistillationBranch):
    family = ToyFamily()

    def __init__(self, student: nn.Module, plan: DistillationPlan) -> None:
        super().__init__()
        self.student = student
        self.attach(plan)

    @property
    def stock(self):
        return self.student

    def forward(self, batch):
        return self.distilled_losses(lambda: self.student(batch), batch)

    def teacher_pixels(self, teacher, batch, recorded):
        return F.pad(recorded["images"], (0, 8, 0, 8))  # it pads more than the student


@pytest.fixture
def family(monkeypatch):
    """The toy family with the new head in its list; nothing else is changed."""
    found = ToyFamily(KeypointHead())
    monkeypatch.setattr(Distilled, "family", found)
    return found


def distilled(terms, **arguments):
    torch.manual_seed(1)
    student, teacher = ToyDetector(6), ToyDetector(9)
    return Distilled(
        student, DistillationPlan(FrozenTeacher(teacher), parse_terms(terms), **arguments)
    )


def batch():
    generator = torch.Generator().manual_seed(2)
    corners = [torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[3.0, 0.0]])]
    return {"images": torch.rand(2, 3, 32, 32, generator=generator), "boxes": corners}


KD = {"maps": {"LOSS": "KD", "TAPS": ["keypoint_maps"]}}


def test_without_the_head_its_tap_is_unknown(refuses):
    with refuses("'keypoint_maps'", "known: p2"):
        distilled(KD)


def test_the_new_head_teaches_on_the_boxes_the_student_chose(family):
    model = distilled(KD)
    sampled, seen = [], {}
    listening = model.student.pool.register_forward_pre_hook(
        lambda _, args: sampled.extend(args[1])
    )
    model.distiller.register_forward_pre_hook(
        lambda _, args: seen.update(zip("st", args, strict=False))
    )
    losses = model(batch())
    listening.remove()
    for side, detector in (("s", model.student), ("t", model.teacher_taps.model)):
        features = detector.backbone(batch()["images"])
        expected = detector.keypoint_head(detector.pool(features, sampled))
        found = seen[side]["keypoint_maps"]
        torch.testing.assert_close(found, expected.reshape(3 * KEYPOINTS, SIDE * SIDE))
        assert found.requires_grad == (side == "s")
    expected = F.kl_div(
        seen["s"]["keypoint_maps"].log_softmax(-1),
        seen["t"]["keypoint_maps"].softmax(-1),
        reduction="batchmean",
    )
    torch.testing.assert_close(losses["maps"], expected)
    losses["maps"].backward()
    assert model.student.keypoint_head.weight.grad.any()
    assert model.student.score.weight.grad is None


def test_weight_zero_leaves_the_students_own_losses_bit_identical(family):
    model = distilled({"maps": {**KD["maps"], "WEIGHT": 0.0}})
    torch.manual_seed(3)
    losses = model(batch())
    torch.manual_seed(3)
    stock = model.student(batch())
    assert {k: v for k, v in losses.items() if k != "maps"} == stock
    assert losses["maps"] == 0


@pytest.mark.parametrize(
    ("terms", "parts"),
    [
        ({"x": {"LOSS": "AT", "TAPS": [["keypoint_maps", "p2"]]}}, ["keypoints", "images"]),
        ({"loss_score": KD["maps"]}, ["task loss", "loss_score"]),
        ({}, ["at least one loss"]),
    ],
)
def test_the_checks_know_the_new_head(terms, parts, family, refuses):
    with refuses(*parts):
        distilled(terms)


def test_a_term_named_like_a_loss_that_only_training_shows_is_refused(family, refuses):
    model = distilled({"loss_keypoint": KD["maps"]})
    with refuses("loss_keypoint", "rename"):
        model(batch())


def test_a_sigmoid_head_refuses_a_softmax(family, monkeypatch, refuses):
    monkeypatch.setattr(KeypointHead, "taps", {"keypoint_maps": HeadTap("keypoints", "sigmoid")})
    with refuses("ACTIVATION sigmoid", "keypoint_maps"):
        distilled(KD)


def test_no_head_measures_uncertainty(family, refuses):
    with refuses("KD.KCD", "keypoint_maps"):
        distilled(KD, values=True)


@pytest.mark.parametrize("own", [False, True])
def test_a_recorded_call_leaves_the_method_as_it_was(own):
    model = ToyDetector(2)
    if own:
        model.backbone.forward = stock = model.backbone.forward
    calls = {
        "result": Call("backbone", "forward"),
        "images": Call("backbone", "forward", argument=0),
    }
    images = torch.rand(1, 3, 8, 8)
    with recorded_calls(model, calls) as seen:
        result = model.backbone(images)
    assert seen["images"] is images
    assert seen["result"] is result
    assert ("forward" in vars(model.backbone)) is own
    if own:
        assert model.backbone.forward is stock
