"""The teacher of a run: a complete config of this host and its own weights."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode

from kd_det.core.checkpoint import SUFFIXES
from kd_det.core.teacher import FrozenTeacher, check_teacher_config, check_teacher_weights
from kd_det.hosts.base import Teacher
from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.data import SOURCES, single
from kd_det.hosts.classification.models import build_classifier
from kd_det.run.yaml_files import config_path

_EXAMPLE = "configs/classification/digits/teacher_resnet20.yaml"


def num_classes(cfg: CfgNode) -> int:
    """``MODEL.NUM_CLASSES``, or the classes of the training data where it is 0."""
    if cfg.MODEL.NUM_CLASSES:
        return int(cfg.MODEL.NUM_CLASSES)
    name = single(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    return SOURCES[name].num_classes if name in SOURCES else 0


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The complete config that ``cfg.KD.TEACHER.CONFIG_FILE`` names."""
    config_file = config_path(cfg.KD.TEACHER.CONFIG_FILE)
    check_teacher_config(config_file, _EXAMPLE)
    return load_config(config_file)


def build_teacher(cfg: CfgNode) -> Teacher:
    """The frozen teacher that ``cfg.KD.TEACHER`` describes, on the CPU.

    Its weights must fill every key exactly. Random number streams are left as they were.
    """
    node = cfg.KD.TEACHER
    teacher_cfg = teacher_config(cfg)
    # A torchvision teacher may name its published weights in its own config.
    named = teacher_cfg.MODEL.WEIGHTS
    published = named if named and not named.endswith(SUFFIXES) else ""
    weights = node.WEIGHTS or published
    check_teacher_weights(weights, node.CONFIG_FILE, node.ALLOW_RANDOM)
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(teacher_cfg.MODEL.NAME, num_classes(teacher_cfg), weights)
    return Teacher(FrozenTeacher(model), teacher_cfg)
