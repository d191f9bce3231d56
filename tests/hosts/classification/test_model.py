"""The distilled classifier: a stock forward, recorded; each model sees pixels its own way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.classification.build import build_training_model, flops_ratio
from kd_det.hosts.classification.model import Distillation, DistilledClassifier, Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.losses import kd_loss
from kd_det.procedures.unix import MixedBatch

SOFT = {"soft": {"LOSS": "KD", "WEIGHT": 0.9, "TAPS": ["logits"], "TEMPERATURE": 4.0}}


@pytest.fixture
def batch(generator):
    return torch.rand(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])


def test_each_model_sees_pixels_as_it_was_trained(batch):
    student, teacher = build_classifier("resnet8_x0.25", 10), build_classifier("resnet8_x0.5", 10)
    twin = copy.deepcopy(student)
    plan = Distillation(SOFT, FrozenTeacher(teacher), Statistics([0.5] * 3, [2.0] * 3), None, 0.1)
    model = DistilledClassifier(student, Statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), 16, plan)
    losses = model.train()(*batch)
    images, targets = batch
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    logits = twin.train()((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    with torch.no_grad():
        soft = teacher.eval()((images - 0.5) / 2)
    torch.testing.assert_close(losses["loss_cls"], 0.1 * F.cross_entropy(logits, targets))
    torch.testing.assert_close(losses["soft"], 0.9 * kd_loss(logits, soft, 4.0))
    assert torch.equal(model.logits, logits)


def test_building_changes_no_statistics_and_no_random_stream(config):
    cfg = config(KD={"TERMS": SOFT})
    torch.manual_seed(0)
    plain = build_classifier("resnet8_x0.25", 10)
    after = torch.rand(1)
    torch.manual_seed(0)
    model = build_training_model(cfg)
    assert torch.equal(torch.rand(1), after)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.student.state_dict()[key], value), key
    assert model.training
    assert not any(module.training for module in model.teacher.model.modules())


def test_a_mixed_batch_is_taught_both_targets(config, batch):
    model = build_training_model(config(KD={"TERMS": SOFT})).train()
    images, targets = batch
    other, mu = targets.flip(0), torch.tensor([0.0, 0.1, 0.2, 0.5])
    losses = model(images, MixedBatch(images, targets, other, mu))
    logits = model.logits
    each = [
        (1 - m) * F.cross_entropy(z[None], a[None]) + m * F.cross_entropy(z[None], b[None])
        for z, a, b, m in zip(logits, targets, other, mu, strict=True)
    ]
    torch.testing.assert_close(losses["loss_cls"].detach(), torch.stack(each).mean())


def test_the_ratio_of_operations_is_that_of_the_layers(config):
    model = build_training_model(config(KD={"TERMS": SOFT}))

    def operations(widths, blocks=1):
        size, total, before = 16, 2 * 3 * widths[0] * 9 * 16**2, widths[0]
        for k, width in enumerate(widths[1:]):
            size = 16 // 2**k
            total += 2 * 9 * size**2 * (before * width + width**2)
            total += 2 * before * width * size**2 if before != width or k else 0
            before = width
        return total + 2 * before * 10

    expected = operations([8, 8, 16, 32]) / operations([4, 4, 8, 16])
    assert flops_ratio(model, 16) == pytest.approx(expected)


BAD = {
    "unknown tap": ({"x": {"LOSS": "KD", "TAPS": ["logit"]}}, "'logit'", "logits"),
    "other shapes": ({"x": {"LOSS": "KD", "TAPS": [["logits", "stage3"]]}}, "10 logits"),
    "boxes": ({"x": {"LOSS": "FGFI", "TAPS": ["stage3"]}}, "'anchors' from its host"),
    "name of a task loss": ({"loss_cls": SOFT["soft"]}, "'loss_cls', the name of a task loss"),
}


@pytest.mark.parametrize(("terms", "parts"), [(v[0], v[1:]) for v in BAD.values()], ids=BAD)
def test_terms_that_cannot_work_are_refused(config, refuses, terms, parts):
    with refuses(*parts):
        build_training_model(config(KD={"TERMS": terms}))


def test_a_teacher_of_other_classes_is_refused(config, refuses, tmp_path):
    cfg = config(KD={"TERMS": SOFT})
    (tmp_path / "teacher.yaml").write_text(
        "HOST: classification\nMODEL: {NAME: resnet8_x0.5, NUM_CLASSES: 7}\n"
    )
    cfg.KD.TEACHER.WEIGHTS, cfg.KD.TEACHER.ALLOW_RANDOM = "", True
    with refuses("student 10 classes, teacher 7 classes", "KD.TEACHER.CLASS_NAMES"):
        build_training_model(cfg)


def test_a_teacher_without_weights_is_refused(config, refuses):
    cfg = config(KD={"TERMS": SOFT})
    cfg.KD.TEACHER.WEIGHTS = ""
    with refuses("KD.TEACHER.WEIGHTS"):
        build_training_model(cfg)


def test_no_terms_are_refused(config, refuses):
    with refuses("KD.TERMS to name at least one loss"):
        build_training_model(config(KD={"TERMS": {}}))
