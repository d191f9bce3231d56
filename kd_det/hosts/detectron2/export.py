"""Stripping a distilled checkpoint to the stock student, with its stock config beside it."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_det.core import checkpoint

STOCK_NAMES = {"DistilledRCNN": "GeneralizedRCNN", "DistilledRetinaNet": "RetinaNet"}


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write the stock model of a run with ``cfg``; see :mod:`kd_det.core.checkpoint`."""
    stock = stock_config(cfg)
    text = stock.dump()
    stock.defrost()
    stock.MODEL.DEVICE = "cpu"
    model, optional = build_model(stock), ("pixel_mean", "pixel_std")
    return checkpoint.export_student(model, weights, text, output, True, optional)


def stock_config(cfg: CfgNode) -> CfgNode:
    """The student's config as Detectron2 alone understands it.

    Keys of backbones that only kd_det has (``MODEL.MOBILENETV2``) stay where the student uses
    them; such a config needs ``import kd_det.hosts.detectron2`` to be built, and
    ``add_backbone_config`` to be read. FCOS has no yacs config in Detectron2: it stays
    ``DistilledFCOS`` with ``KD.ENABLED False``, which is the stock model.
    """
    stock = cfg.clone()
    stock.defrost()
    name = stock.MODEL.META_ARCHITECTURE
    if name == "DistilledFCOS":
        stock.KD = type(cfg)({"ENABLED": False})
    else:
        stock.MODEL.META_ARCHITECTURE = STOCK_NAMES.get(name, name)
        del stock["KD"]
        del stock.MODEL["FCOS"]
        for backbone in ("MOBILENETV2", "BASIC_RESNET"):
            if backbone.lower() not in stock.MODEL.BACKBONE.NAME:
                del stock.MODEL[backbone]
    for key in ("HOST", "STAGES", "SEEDS", "PREFLIGHT", "LOGGERS"):
        del stock[key]
    del stock.DATASETS["COCO_JSON"]
    stock.freeze()
    return stock
