"""Stripping a distilled checkpoint to the stock student, with its config beside it."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det import checkpoint
from kd_det.hosts.torchvision_detection.models import build_model


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """:func:`kd_det.checkpoint.export_student` for a run of this host.

    Args:
        cfg: the config of the distillation run.
        weights: its checkpoint.
        output: a folder; its two files must not exist yet.

    Returns:
        Paths of the weights, a plain state dict, and the config.

    Raises:
        KDError: the checkpoint does not hold this student, or the files exist.
    """
    stock = stock_config(cfg)
    return checkpoint.export_student(build_model(stock), weights, stock.dump(), output)


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone; its backbone's own weights are not fetched again."""
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.BACKBONE.WEIGHTS = ""
    stock.KD = type(cfg)({"ENABLED": False})
    return stock
