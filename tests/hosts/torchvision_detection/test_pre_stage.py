"""Losses that learn from the teacher first: what it computes alone, and the runs around it."""

from __future__ import annotations

import pytest
import torch
import yaml

from kd_det.core.errors import KDError
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.pre_stage import TeacherCaptures
from kd_det.hosts.torchvision_detection.train import build_training_model, run
from kd_det.run.plan import Start
from tests.hosts.torchvision_detection.models import batch, distilled, teacher_model

BOX_TAPS = ["box_pooled", "box_features"]
MHGD = {"graph": {"LOSS": "MHGD", "TAPS": BOX_TAPS, "REDUCTION": "mean", "HEADS": 2}}
QUICK = ["KD.PRE_STAGE.MAX_ITER", "4", "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"]


def captures(name, taps):
    teacher = FrozenTeacher(teacher_model(name))
    return teacher, TeacherCaptures(teacher, FAMILY.tap_table(teacher.model), taps, (80,), 96)


@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN"])
def test_boxes_are_the_teachers_own_proposals_sampled_as_in_training(name):
    teacher, capture = captures(name, BOX_TAPS)
    heads = teacher.model.roi_heads
    boxes = []
    heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: boxes.append(inputs[1]))
    images, targets = batch()
    recorded = capture((images, targets))
    scaled = teacher.model.transform(images, targets)[1]  # its sizes were set: 80 at most 96
    for own, target in zip(boxes[0], scaled, strict=True):
        assert len(own) <= heads.fg_bg_sampler.batch_size_per_image
        # The ground truth is among them, as positives.
        for truth in target["boxes"]:
            assert (own - truth).abs().amax(dim=1).min() < 1e-3
    assert len(recorded["box_pooled"]) == sum(map(len, boxes[0])) > 6
    with torch.no_grad():
        vectors = heads.box_head(recorded["box_pooled"])
    assert torch.equal(recorded["box_features"], vectors)
    assert not recorded["box_features"].requires_grad
    assert not any(module.training for module in teacher.model.modules())


def test_maps_need_no_more_than_the_teachers_backbone():
    teacher, capture = captures("FasterRCNN", ["p3", "p4"])
    ran = []
    teacher.model.rpn.register_forward_hook(lambda *_: ran.append("rpn"))
    recorded = capture(batch())
    assert not ran
    assert [tuple(recorded[p].shape) for p in ("p3", "p4")] == [(2, 16, 16, 16), (2, 16, 8, 8)]


def test_the_transfer_needs_the_pre_stage_and_leaves_its_network_alone():
    model = distilled("FasterRCNN", terms=MHGD)
    with pytest.raises(KDError, match="pre-stage"):
        model(*batch())
    loss = model.distiller.terms["graph"]
    loss.finish_pre_stage()
    losses = model(*batch())
    assert losses["graph"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None for p in loss.network.parameters())
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]


def switched_off(kind, done, total):
    if (kind, done) == ("pre-stage", 3):
        raise ConnectionError("switched off")


def test_a_pre_stage_runs_first_and_is_reused(digits_config, tmp_path):
    steps = []
    run(digits_config("mhgd_frcnn", *QUICK), progress=lambda *step: steps.append(step))
    kinds = [kind for kind, *_ in steps]
    assert kinds == sorted(kinds, key=["pre-stage", "train"].index)
    assert ("pre-stage", 4, 4) in steps
    whole = torch.load(tmp_path / "run" / "pre_stage.pth")
    assert not (tmp_path / "run" / "pre_stage.ckpt").exists()
    final = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    assert final["distiller.terms.graph.ready"]
    for key, value in whole["entries"][0]["state"].items():
        assert torch.equal(final[f"distiller.terms.graph.network.{key}"], value), key

    # Switched off in the pre-stage: it continues there, to the same network and student.
    cfg = digits_config("mhgd_frcnn", *QUICK, output="again")
    with pytest.raises(ConnectionError):
        run(cfg, progress=switched_off)
    assert (tmp_path / "again" / "pre_stage.ckpt").exists()
    steps.clear()
    run(cfg, Start(resume=True), progress=lambda *step: steps.append(step))
    assert steps[0] == ("pre-stage", 2, 4)
    theirs = torch.load(tmp_path / "again" / "model_final.pth")["model"]
    assert theirs.keys() == final.keys()
    assert all(torch.equal(theirs[k], final[k]) for k in final)

    # Switched off after it: the file is used again.
    for name in ("last.ckpt", "model_final.pth", "metrics.json"):
        (tmp_path / "again" / name).unlink()
    steps.clear()
    with pytest.raises(KDError, match=r"pre_stage.*--resume"):
        run(cfg, progress=lambda *_: None)
    run(cfg, Start(resume=True), progress=lambda *step: steps.append(step))
    assert not any(kind == "pre-stage" for kind, *_ in steps)
    # So it does for another student, who starts from other weights.
    given = ["KD.PRE_STAGE.WEIGHTS", tmp_path / "run" / "pre_stage.pth"]
    other = digits_config("mhgd_frcnn", *QUICK, *given, output="other")
    run(other, progress=lambda *step: steps.append(step))
    assert not any(kind == "pre-stage" for kind, *_ in steps)


def test_a_pre_stage_of_another_teacher_is_refused(digits_config, tmp_path):
    run(digits_config("mhgd_frcnn", *QUICK), progress=lambda *_: None)
    given = ["KD.PRE_STAGE.WEIGHTS", tmp_path / "run" / "pre_stage.pth"]
    cfg = digits_config("mhgd_frcnn", *QUICK, *given, "SEED", "2", output="other")
    with pytest.raises(KDError, match=r"teacher .*; received teacher "):
        run(cfg, progress=lambda *_: None)
    assert not (tmp_path / "other").exists()
    with pytest.raises(KDError, match=r"pre-stage, such as MHGD"):
        build_training_model(digits_config("kd_frcnn", *QUICK, *given))
    zero = ["KD.PRE_STAGE.MAX_ITER", 0, "KD.PRE_STAGE.EPOCHS", 0]
    nothing = digits_config("mhgd_frcnn", *zero, output="nothing")
    with pytest.raises(KDError, match="at least one iteration"):
        run(nothing, progress=lambda *_: None)


def test_the_pre_stage_counts_epochs_of_the_training_set(digits_config, tmp_path):
    epochs = ["KD.PRE_STAGE.MAX_ITER", "0", "KD.PRE_STAGE.EPOCHS", "1", "SOLVER.MAX_ITER", "1"]
    steps = []
    cfg = digits_config("mhgd_frcnn", *epochs, "DATASETS.TEST", "()")
    run(cfg, progress=lambda *step: steps.append(step))
    assert steps[0] == ("pre-stage", 0, 3)  # six images, two at a time
    assert yaml.safe_load((tmp_path / "run" / "results.json").read_text()) == {}
