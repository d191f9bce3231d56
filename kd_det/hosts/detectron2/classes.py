"""Names of the classes of student and teacher, and the map between them."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.core.class_map import ClassMap
from kd_det.data.catalogue import detection_class_names
from kd_det.data.coco_json import category_names
from kd_det.data.digits import DIGITS
from kd_det.hosts.detectron2.family import FAMILY
from kd_det.hosts.detectron2.teacher import teacher_config
from kd_det.run.class_names import run_class_map


def num_classes(cfg: CfgNode) -> int:
    """Foreground classes of the meta-architecture in use."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name.endswith("FCOS"):
        return int(cfg.MODEL.FCOS.NUM_CLASSES)
    node = cfg.MODEL.RETINANET if name.endswith("RetinaNet") else cfg.MODEL.ROI_HEADS
    return int(node.NUM_CLASSES)


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes a config trains on, in the order of the outputs.

    Nothing is registered or written. The names are unknown where the data is not on this machine,
    except of data sets such as COCO whose names Detectron2 lists itself.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    if name in cfg.DATASETS.COCO_JSON or name in DIGITS:
        return detection_class_names(name, cfg.DATASETS.COCO_JSON)
    if name not in DatasetCatalog:
        return None
    meta = MetadataCatalog.get(name)
    if known := meta.get("thing_classes"):
        return list(known)
    json_file = meta.get("json_file")
    return category_names(name, json_file) if json_file else None


def build_class_map(cfg: CfgNode) -> ClassMap | None:
    """The class map of a run; see :func:`kd_det.run.class_names.run_class_map`."""
    return run_class_map(cfg, teacher_config(cfg), FAMILY.class_taps, num_classes, class_names)
