"""Stripping a distilled checkpoint to the stock student, with its config beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_det.checkpoint import read_weights
from kd_det.checks import fail
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.teacher import load_strict


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write ``model.pth`` and ``config.yaml`` of the plain student into ``output``.

    The student is built and loaded strictly before anything is written, so what is exported is
    known to load.

    Args:
        cfg: the config of the distillation run.
        weights: its checkpoint.
        output: a folder; its two files must not exist yet.

    Returns:
        Paths of the weights, a plain state dict, and the config.

    Raises:
        KDError: the checkpoint does not hold this student, or the files exist.
    """
    output = Path(output)
    model_path, config_path = output / "model.pth", output / "config.yaml"
    existing = [str(path) for path in (model_path, config_path) if path.exists()]
    if existing:
        fail(
            expected="an output folder without an earlier export",
            received=", ".join(existing),
            remedy="choose another --output",
        )
    stock = stock_config(cfg)
    model = build_model(stock)
    load_strict(model, read_weights(weights), str(weights))
    output.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), model_path)
    config_path.write_text(stock.dump())
    return model_path, config_path


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone; its backbone's own weights are not fetched again."""
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.BACKBONE.WEIGHTS = ""
    stock.KD = type(cfg)({"ENABLED": False})
    return stock
