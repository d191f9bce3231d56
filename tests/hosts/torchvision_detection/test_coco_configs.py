"""The COCO configs of this host: both models build, a step trains, the student exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.train import build_training_model
from kd_det.procedures.pre_stage import pre_stage_losses
from kd_det.run.plan import read_plan

FOLDER = Path("configs/coco_torchvision")
# Nothing is downloaded, and images are small.
SMALL = [
    *("MODEL.BACKBONE.WEIGHTS", "", "KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"),
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MAX_SIZE_TRAIN", "160"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_r18_r50.yaml")), ids=lambda p: p.stem)
def test_a_config_trains_a_step_under_a_teacher(path):
    stages = read_plan(str(path)).stages
    cfg = load_config(str(path), [*(stages[0].options(None) if stages else []), *SMALL])
    assert cfg.OUTPUT_DIR.endswith(path.stem)
    model = build_training_model(cfg).train()
    for loss, _ in pre_stage_losses(model.distiller).values():
        loss.finish_pre_stage()
    images = [torch.rand(3, 128, 160) for _ in range(2)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 90.0, 100.0]]), "labels": torch.tensor([3])}
    losses = model(images, [target, target])
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    student = {k: v for k, v in model.state_dict().items() if not k.startswith("distiller.")}
    build_model(cfg).load_state_dict(student)


@pytest.mark.parametrize("name", ["teacher_frcnn_r50", "baseline_frcnn_r18"])
def test_a_plain_config_is_that_of_its_model(name):
    cfg = load_config(str(FOLDER / f"{name}.yaml"), SMALL)
    assert not cfg.KD.ENABLED
    build_model(cfg)
