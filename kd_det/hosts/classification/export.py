"""Stripping a distilled checkpoint to the stock classifier, with its config beside it."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det import checkpoint
from kd_det.hosts.classification.build import build_student


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
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.WEIGHTS = ""
    stock.KD = type(cfg)({"ENABLED": False})
    model = build_student(stock, "", complete=False)
    return checkpoint.export_student(model, weights, stock.dump(), output)
