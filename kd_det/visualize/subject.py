"""Finds in a run, of any host, what there is to look at."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import nn

from kd_det.bench.workbench import PixelInput
from kd_det.core.distiller import Distiller
from kd_det.core.taps import Tap
from kd_det.hosts.base import get_host
from kd_det.visualize.watch import Subject

#: Modules that pool a student's sampled boxes, of Detectron2 and of torchvision.
_BOX_POOLERS = ("roi_heads.box_pooler", "roi_heads.box_roi_pool")


def find_subject(cfg: CfgNode, student: nn.Module, distiller: Distiller) -> Subject:
    """What to look at in a run.

    Args:
        cfg: of any host.
        student: the stock model whose modules the taps name.
        distiller: its losses.
    """
    classifies = cfg.HOST == "classification"
    paths = {path for path, _ in student.named_modules()}
    poolers = [path for path in _BOX_POOLERS if path in paths]
    return Subject(
        student=student,
        distiller=distiller,
        entrance="" if classifies else "backbone",
        pixels=_pixel_input(cfg),
        box_tap=Tap(poolers[0], at="input", select=1) if poolers else None,
        class_names=get_host(cfg.HOST).class_names(cfg),
        background="first" if cfg.HOST == "torchvision_detection" else "last",
    )


def _pixel_input(cfg: CfgNode) -> PixelInput:
    own = cfg.HOST == "detectron2"
    return PixelInput(
        order=cfg.INPUT.FORMAT if own else "RGB",
        mean=tuple(cfg.MODEL.PIXEL_MEAN),
        std=tuple(cfg.MODEL.PIXEL_STD),
        scale=255 if own else 1,
        divisor=1,
    )
