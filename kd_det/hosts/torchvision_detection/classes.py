"""Names of the classes of student and teacher, and the map between them."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from kd_det.core.class_map import ClassMap
from kd_det.core.errors import KDError
from kd_det.data.coco_json import category_names
from kd_det.hosts.torchvision_detection.data import DIGITS, dataset_paths
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.models import num_classes
from kd_det.hosts.torchvision_detection.teacher import teacher_config
from kd_det.run.class_names import given_names, run_class_map


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes a config trains on, in the order of the outputs.

    Nothing is written: data that is not on this machine has no names.
    """
    if len(cfg.DATASETS.TRAIN) != 1:
        return None
    name = cfg.DATASETS.TRAIN[0]
    if name in DIGITS and name not in cfg.DATASETS.COCO_JSON:
        from kd_det.data.digits.detection import CLASS_NAMES

        return list(CLASS_NAMES)
    try:
        json_file, _ = dataset_paths(cfg, name)
    except KDError:  # a teacher's data need not be here
        return None
    return category_names(name, json_file)


def teacher_class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the teacher's classes: those ``cfg`` gives, or those of its training data."""
    return given_names(cfg) or class_names(teacher_config(cfg))


def build_class_map(cfg: CfgNode) -> ClassMap | None:
    """How the teacher's logits become those of the student's classes; None if they are already.

    Raises:
        KDError: see :func:`kd_det.run.class_names.run_class_map`.
    """
    return run_class_map(cfg, teacher_config(cfg), FAMILY.class_taps, num_classes, class_names)
