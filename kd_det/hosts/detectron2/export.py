"""Stripping a distilled checkpoint to the stock student, with its stock config beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_det.checkpoint import read_weights
from kd_det.checks import fail
from kd_det.teacher import load_strict

STOCK_NAMES = {"DistilledRCNN": "GeneralizedRCNN", "DistilledRetinaNet": "RetinaNet"}


def export_student(cfg: CfgNode, weights: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write ``model.pth`` and ``config.yaml`` of the plain student into ``output``.

    The student is rebuilt from the written config and loaded strictly before anything is
    written, so what is exported is known to load.

    Args:
        cfg: the config of the distillation run.
        weights: its checkpoint.
        output: a folder; its two files must not exist yet.

    Returns:
        Paths of the weights and the config.

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
    state = read_weights(weights)
    model = build_model(_on_cpu(stock))
    load_strict(model, state, str(weights), ("pixel_mean", "pixel_std"))
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, model_path)
    config_path.write_text(stock.dump())
    return model_path, config_path


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
    del stock["HOST"]
    del stock.DATASETS["COCO_JSON"]
    stock.freeze()
    return stock


def _on_cpu(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg
