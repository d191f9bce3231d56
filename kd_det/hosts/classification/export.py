"""Stripping a distilled checkpoint to the stock classifier, with its config beside it."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det.core import checkpoint
from kd_det.hosts.classification.build import build_student
from kd_det.run.config import without_distillation


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write the stock classifier of a run with ``cfg``; see :mod:`kd_det.core.checkpoint`."""
    stock = without_distillation(cfg)
    # The student starts from nothing.
    stock.MODEL.WEIGHTS = ""
    model = build_student(stock, "", complete=False)
    return checkpoint.export_student(model, weights, stock.dump(), output)
