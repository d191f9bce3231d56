"""The teacher of a run: a complete config of this host and its own weights."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_det.checkpoint import read_weights
from kd_det.checks import fail
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.teacher import FrozenTeacher, load_strict


def build_teacher(cfg: CfgNode) -> FrozenTeacher:
    """The frozen teacher that ``cfg.KD.TEACHER`` describes, on the CPU.

    Random number streams are left as they were.

    Raises:
        KDError: no config, no weights without ``ALLOW_RANDOM``, or weights that do not fill
            every key of the teacher exactly.
    """
    node = cfg.KD.TEACHER
    if not node.CONFIG_FILE or not Path(node.CONFIG_FILE).is_file():
        fail(
            expected="KD.TEACHER.CONFIG_FILE to name the teacher's complete config",
            received=f"'{node.CONFIG_FILE}'",
            remedy="give a path such as configs/digits_torchvision/teacher_frcnn.yaml, or set "
            "KD.ENABLED False",
        )
    if not node.WEIGHTS and not node.ALLOW_RANDOM:
        fail(
            expected="KD.TEACHER.WEIGHTS to name the teacher's weights",
            received="''",
            remedy=f"train {node.CONFIG_FILE} and give its model_final.pth, or set "
            "KD.TEACHER.ALLOW_RANDOM True to distil from an untrained teacher on purpose",
        )
    teacher_cfg = load_config(node.CONFIG_FILE)
    # Its own weights follow; those of its backbone alone would be downloaded for nothing.
    teacher_cfg.MODEL.BACKBONE.WEIGHTS = ""
    with torch.random.fork_rng(devices=[]):
        model = build_model(teacher_cfg)
    if node.WEIGHTS:
        load_strict(model, read_weights(node.WEIGHTS), source=node.WEIGHTS)
    return FrozenTeacher(model)
