"""Names of the classes of student and teacher, and the map between them."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from kd_det.core.class_map import ClassMap
from kd_det.data.catalogue import detection_class_names
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.models import num_classes
from kd_det.hosts.torchvision_detection.teacher import teacher_config
from kd_det.run.class_names import run_class_map


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes a config trains on, in the order of the outputs.

    Nothing is written; the names are unknown where the data is not on this machine.
    """
    if len(cfg.DATASETS.TRAIN) != 1:
        return None
    return detection_class_names(cfg.DATASETS.TRAIN[0], cfg.DATASETS.COCO_JSON)


def build_class_map(cfg: CfgNode) -> ClassMap | None:
    """The class map of a run; see :func:`kd_det.run.class_names.run_class_map`."""
    return run_class_map(cfg, teacher_config(cfg), FAMILY.class_taps, num_classes, class_names)
