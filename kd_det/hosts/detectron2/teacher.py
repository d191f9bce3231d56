"""Building the teacher from its own complete config and its own weights."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from kd_det.core.checkpoint import read_weights
from kd_det.core.errors import fail, nearest
from kd_det.core.teacher import FrozenTeacher, check_teacher_weights, load_strict
from kd_det.hosts.base import Teacher
from kd_det.hosts.detectron2.config import get_cfg
from kd_det.run.yaml_files import config_path, merge_file

# Buffers that older Detectron2 files store and newer models do not, or the reverse.
_OPTIONAL_KEYS = ("anchor_generator.cell_anchors", "pixel_mean", "pixel_std", "num_batches_tracked")


def build_teacher(cfg: CfgNode) -> Teacher:
    """Build and load the teacher that ``cfg.KD.TEACHER`` names, on ``cfg.MODEL.DEVICE``.

    Raises:
        KDError: the config or the weights are missing, or do not belong together; the message
            lists the keys.
    """
    node = cfg.KD.TEACHER
    teacher_cfg = teacher_config(cfg)
    check_teacher_weights(node.WEIGHTS, node.CONFIG_FILE, node.ALLOW_RANDOM)
    # Weights are read before the model is built: a wrong path should cost no time.
    weights = read_weights(_local_path(node.WEIGHTS)) if node.WEIGHTS else None
    # The student's random stream must not depend on whether there is a teacher.
    with torch.random.fork_rng(devices=[]):
        model = build_model(teacher_cfg)
    if weights is not None:
        load_strict(model, weights, node.WEIGHTS, _OPTIONAL_KEYS)
    return Teacher(FrozenTeacher(model), teacher_cfg)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The complete config that ``cfg.KD.TEACHER.CONFIG_FILE`` names, for the student's device.

    Raises:
        KDError: there is none.
    """
    teacher_cfg = get_cfg()
    merge_file(teacher_cfg, str(find_config(cfg.KD.TEACHER.CONFIG_FILE)))
    teacher_cfg.defrost()
    teacher_cfg.KD.ENABLED = False  # a distilled student may teach in turn
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.freeze()
    return teacher_cfg


def find_config(name: str) -> Path:
    """The path of a teacher config: a file, or a name in Detectron2's model zoo.

    Raises:
        KDError: neither exists.
    """
    path = Path(config_path(name))
    if name and path.is_file():
        return path
    from detectron2.model_zoo import model_zoo

    if name:
        with suppress(RuntimeError):
            return Path(model_zoo.get_config_file(name))
    zoo = [f"{config}.yaml" for config in model_zoo._ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX]
    suggestion = nearest(name, zoo).partition("known:")[0]
    fail(
        expected="KD.TEACHER.CONFIG_FILE to be a config file or a model-zoo name",
        received=f"'{name}'",
        remedy=f"{suggestion}give a path, or a name such as "
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    )


def _local_path(weights: str) -> str:
    if "://" not in weights:
        return weights
    try:
        return PathManager.get_local_path(weights)
    except (OSError, RuntimeError, ValueError) as error:
        fail(
            expected=f"KD.TEACHER.WEIGHTS '{weights}' to be reachable",
            received=f"{type(error).__name__}: {error}",
            remedy=f"download it by hand into {os.getenv('FVCORE_CACHE', '~/.torch')} or give a "
            "local path",
        )
