"""The teacher of a run: a complete config of this host and its own weights."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_det.checkpoint import SUFFIXES
from kd_det.checks import fail
from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.data import SOURCES, single
from kd_det.hosts.classification.model import Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.teacher import FrozenTeacher


def num_classes(cfg: CfgNode) -> int:
    """``MODEL.NUM_CLASSES``, or the classes of the training data where it is 0."""
    if cfg.MODEL.NUM_CLASSES:
        return int(cfg.MODEL.NUM_CLASSES)
    name = single(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    return SOURCES[name].num_classes if name in SOURCES else 0


def build_teacher(cfg: CfgNode) -> tuple[FrozenTeacher, Statistics]:
    """The frozen teacher that ``cfg.KD.TEACHER`` describes, on the CPU, and its pixel statistics.

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
            remedy="give a path such as configs/classification/digits/teacher_resnet20_x0.5.yaml, "
            "or set KD.ENABLED False",
        )
    teacher_cfg = load_config(node.CONFIG_FILE)
    # A torchvision teacher may name its published weights in its own config.
    named = teacher_cfg.MODEL.WEIGHTS
    published = named if named and not named.endswith(SUFFIXES) else ""
    weights = node.WEIGHTS or published
    if not weights and not node.ALLOW_RANDOM:
        fail(
            expected="KD.TEACHER.WEIGHTS to name the teacher's weights",
            received="''",
            remedy=f"train {node.CONFIG_FILE} and give its model_final.pth, or set "
            "KD.TEACHER.ALLOW_RANDOM True to distil from an untrained teacher on purpose",
        )
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(teacher_cfg.MODEL.NAME, num_classes(teacher_cfg), weights)
    statistics = Statistics(teacher_cfg.MODEL.PIXEL_MEAN, teacher_cfg.MODEL.PIXEL_STD)
    return FrozenTeacher(model), statistics
