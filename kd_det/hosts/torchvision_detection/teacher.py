"""The teacher of a run: a complete config of this host and its own weights."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode

from kd_det.core.checkpoint import read_weights
from kd_det.core.teacher import (
    FrozenTeacher,
    check_teacher_config,
    check_teacher_weights,
    load_strict,
)
from kd_det.hosts.base import Teacher
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.run.yaml_files import config_path


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The complete config that ``cfg.KD.TEACHER.CONFIG_FILE`` names.

    Raises:
        KDError: there is none, or this host cannot read it.
    """
    config_file = config_path(cfg.KD.TEACHER.CONFIG_FILE)
    check_teacher_config(config_file, "configs/digits_torchvision/teacher_frcnn.yaml")
    return load_config(config_file)


def build_teacher(cfg: CfgNode) -> Teacher:
    """The frozen teacher that ``cfg.KD.TEACHER`` describes, on the CPU.

    Random number streams are left as they were.

    Raises:
        KDError: no config, no weights without ``ALLOW_RANDOM``, or weights that do not fill
            every key of the teacher exactly.
    """
    node = cfg.KD.TEACHER
    teacher_cfg = teacher_config(cfg)
    check_teacher_weights(node.WEIGHTS, node.CONFIG_FILE, node.ALLOW_RANDOM)
    # Its own weights follow; those of its backbone alone would be downloaded for nothing.
    whole = teacher_cfg.clone()
    whole.defrost()
    whole.MODEL.BACKBONE.WEIGHTS = ""
    with torch.random.fork_rng(devices=[]):
        model = build_model(whole)
    if node.WEIGHTS:
        load_strict(model, read_weights(node.WEIGHTS), source=node.WEIGHTS)
    return Teacher(FrozenTeacher(model), teacher_cfg)
