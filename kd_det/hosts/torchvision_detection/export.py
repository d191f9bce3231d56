"""Stripping a distilled checkpoint to the stock student, with its config beside it."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det.core import checkpoint
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.run.config import without_distillation


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write the stock detector of a run with ``cfg``; see :mod:`kd_det.core.checkpoint`."""
    stock = without_distillation(cfg)
    stock.MODEL.BACKBONE.WEIGHTS = ""  # its weights are in the checkpoint
    return checkpoint.export_student(build_model(stock), weights, stock.dump(), output)
