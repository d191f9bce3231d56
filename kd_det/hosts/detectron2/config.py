"""Config keys of this host, beside Detectron2's own."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_stock_cfg

import kd_det.run.config
from kd_det.hosts.detectron2.backbones import add_backbone_config
from kd_det.hosts.detectron2.datasets import register_datasets
from kd_det.run.config import merge_config
from kd_det.run.yaml_files import ConfigFile


def get_cfg() -> CfgNode:
    """Detectron2's defaults plus the keys of kd_det."""
    cfg = get_stock_cfg()
    add_kd_config(cfg)
    return cfg


def load_config(config: str | ConfigFile, opts: Sequence[str] = ()) -> CfgNode:
    """The defaults with a file and overrides merged in, checked and frozen.

    The data sets of ``DATASETS.COCO_JSON`` are registered.

    Raises:
        KDError: a file, key or data set that does not exist.
    """
    cfg = merge_config(get_cfg(), config, opts)
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def add_kd_config(cfg: CfgNode) -> None:
    """Add ``KD``, ``HOST``, ``DATASETS.COCO_JSON`` and the keys of our backbones, in place."""
    kd_det.run.config.add_kd_config(cfg)
    add_backbone_config(cfg)
    # Detectron2 describes its FCOS in Python only; these are that class's own defaults.
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80  # foreground classes
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]  # levels of the pyramid
    cfg.MODEL.FCOS.NUM_CONVS = 4  # of each branch of the head
    cfg.MODEL.FCOS.NORM = "GN"  # of these convolutions; empty for none
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01  # of a foreground class, before training
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5  # of the positive centre of a box, in cells
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25  # weight of foreground in the focal loss
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0  # exponent of the focal loss
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2  # lowest score of a detection
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000  # locations of each level before NMS
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6  # IoU above which NMS drops a detection
