"""Stripping a distilled checkpoint to the stock student, with its stock config beside it."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_det.core import checkpoint

STOCK_NAMES = {"DistilledRCNN": "GeneralizedRCNN", "DistilledRetinaNet": "RetinaNet"}


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """:func:`kd_det.core.checkpoint.export_student` for a run of this host.

    Args:
        cfg: the config of the distillation run.
        weights: its checkpoint.
        output: a folder; its two files must not exist yet.

    Returns:
        Paths of the weights and the config.

    Raises:
        KDError: the checkpoint does not hold this student, or the files exist.
    """
    stock = stock_config(cfg)
    return checkpoint.export_student(
        build_model(_on_cpu(stock)),
        weights,
        stock.dump(),
        output,
        wrap=True,
        optional_parts=("pixel_mean", "pixel_std"),
    )


def stock_config(cfg: CfgNode) -> CfgNode:
    """The student's config as Detectron2 alone understands it.

    Keys of backbones that only kd_det has (``MODEL.MOBILENETV2``) stay where the student uses
    them; such a config needs ``import kd_det.hosts.detectron2`` to be built, and
    ``add_backbone_config`` to be read. FCOS has no yacs config in Detectron2: it stays
    ``DistilledFCOS`` with ``KD.ENABLED False``, which is the stock model.
    """
    stock = cfg.clone()
    stock.defrost()
    if stock.MODEL.META_ARCHITECTURE == "DistilledFCOS":
        stock.KD = type(cfg)({"ENABLED": False})
    else:
        stock.MODEL.META_ARCHITECTURE = STOCK_NAMES.get(
            stock.MODEL.META_ARCHITECTURE, stock.MODEL.META_ARCHITECTURE
        )
        del stock["KD"]
        del stock.MODEL["FCOS"]
        if "mobilenetv2" not in stock.MODEL.BACKBONE.NAME:
            del stock.MODEL["MOBILENETV2"]
        if "basic_resnet" not in stock.MODEL.BACKBONE.NAME:
            del stock.MODEL["BASIC_RESNET"]
    for key in ("HOST", "STAGES", "SEEDS", "PREFLIGHT", "LOGGERS"):
        del stock[key]
    del stock.DATASETS["COCO_JSON"]
    stock.freeze()
    return stock


def _on_cpu(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg
