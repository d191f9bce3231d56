"""Names of the classes of student and teacher, and the map between them."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from kd_det.core.class_map import ClassMap
from kd_det.data.catalogue import data_root
from kd_det.hosts.classification.data import SOURCES
from kd_det.hosts.classification.taps import LOGITS
from kd_det.hosts.classification.teacher import num_classes, teacher_config
from kd_det.run.class_names import run_class_map


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes a config trains on, in the order of the outputs.

    Folders of images have the names of the folders; unknown where the data is not on this machine.
    """
    if len(cfg.DATASETS.TRAIN) != 1 or cfg.DATASETS.TRAIN[0] not in SOURCES:
        return None
    return SOURCES[cfg.DATASETS.TRAIN[0]].names(data_root())


def build_class_map(cfg: CfgNode) -> ClassMap | None:
    """The class map of a run; see :func:`kd_det.run.class_names.run_class_map`."""
    return run_class_map(cfg, teacher_config(cfg), (LOGITS,), num_classes, class_names)
