"""A teacher of other classes: its logits are mapped by name, its features are not."""

from __future__ import annotations

import pytest
import torch

from kd_det.core.class_map import match_classes
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.classification.build import build_training_model
from kd_det.hosts.classification.classes import build_class_map, class_names
from kd_det.hosts.classification.model import Distillation, DistilledClassifier, Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.losses import kd_loss

TEACHER = [str(k) for k in (7, 2, 0, 9, 4, 1, 8, 3, 6, 5)]
STUDENT = ["3", "7", "1", "9"]
SOFT = {"soft": {"LOSS": "KD", "TAPS": ["logits"], "TEMPERATURE": 4.0}}
BOTH = {**SOFT, "hint": {"LOSS": "FitNet", "TAPS": ["stage2"]}}


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 16, 16, generator=generator)


def selected(logits, names):
    """Row by row, the teacher's logits of the names."""
    rows = [dict(zip(TEACHER, row.tolist(), strict=True)) for row in logits]
    return torch.tensor([[row[name] for name in names] for row in rows])


def test_a_student_of_four_classes_learns_from_a_teacher_of_ten(images):
    statistics = Statistics([0.5] * 3, [0.25] * 3)
    teacher = build_classifier("resnet8_x0.5", 10)
    plan = Distillation(
        BOTH, FrozenTeacher(teacher), statistics, class_map=match_classes(STUDENT, TEACHER)
    )
    model = DistilledClassifier(build_classifier("resnet8_x0.25", 4), statistics, 16, plan).train()
    losses = model(images, torch.tensor([0, 1, 2, 3]))
    with torch.no_grad():
        raw = teacher.eval()(statistics.normalize(images))
    expected = selected(raw, STUDENT)
    torch.testing.assert_close(model.teacher_captures(images)["logits"], expected)
    torch.testing.assert_close(losses["soft"].detach(), kd_loss(model.logits, expected, 4.0))
    assert losses["hint"] > 0


def test_a_run_takes_the_names_its_config_gives(config, images):
    cfg = config(KD={"TERMS": SOFT, "TEACHER": {"CLASS_NAMES": TEACHER}})
    assert class_names(cfg) == [str(k) for k in range(10)]
    model = build_training_model(cfg)
    raw = []
    model.teacher.model.register_forward_hook(lambda m, args, output: raw.append(output))
    seen = model.teacher_captures(images)["logits"]
    assert torch.equal(seen, selected(raw[0], class_names(cfg)))


def test_equal_names_and_a_booster_need_no_map(config):
    cfg = config(KD={"TERMS": SOFT})
    assert build_class_map(cfg) is None
    assert build_training_model(cfg).class_map is None
    joint = config(KD={"TERMS": SOFT, "JOINT": {"ENABLED": True, "NAME": "resnet8_x0.5"}})
    joint.KD.TEACHER.CONFIG_FILE = ""
    assert build_training_model(joint).class_map is None


def test_a_teacher_without_a_class_is_refused_where_logits_are_compared(config, refuses):
    names = ["three" if name == "3" else name for name in TEACHER]
    cfg = config(KD={"TERMS": SOFT, "TEACHER": {"CLASS_NAMES": names}})
    with refuses("1 of 10", "'3'", "KD.CLASS_MAP"):
        build_training_model(cfg)
    cfg.KD.CLASS_MAP["3"] = "three"
    assert build_training_model(cfg).class_map is not None
    cfg.KD.CLASS_MAP.clear()
    cfg.KD.TERMS.soft.LOSS, cfg.KD.TERMS.soft.TAPS = "FitNet", ["stage2"]
    del cfg.KD.TERMS.soft["TEMPERATURE"]
    assert build_training_model(cfg).class_map is None


def test_names_of_absent_data_are_unknown(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    for name in ("cifar10_train", "cifar100_coarse_train", "imagenet_train", "tiny_imagenet_train"):
        assert class_names(config(DATASETS={"TRAIN": [name]})) is None


def test_folders_of_images_have_the_names_of_the_folders(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for wnid in ("n02", "n01"):
        (tmp_path / "imagenet" / "train" / wnid).mkdir(parents=True)
    assert class_names(config(DATASETS={"TRAIN": ["imagenet_train"]})) == ["n01", "n02"]
