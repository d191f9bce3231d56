"""Tiny students, teachers and batches for the tests of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.pytorch import Callback
from torch import nn

from kd_det.hosts.torchvision_detection.config import get_cfg
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model

BASE = Path("configs/digits_torchvision/base_frcnn.yaml")
ARCHITECTURES = ("FasterRCNN", "MaskRCNN", "RetinaNet", "FCOS")
LEVELS = ["p2", "p3", "p4"]


class Stop(Callback):
    """Fail like a machine that is switched off, after some iterations."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.after:
            raise ConnectionError("switched off")


def tiny_cfg(name: str, opts: list[Any] | None = None) -> CfgNode:
    """The plain student's config of an architecture."""
    cfg = get_cfg()
    cfg.merge_from_file(str(BASE))
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", name, "MODEL.RETINANET.NUM_CLASSES", 10])
    width = 32 if name == "FCOS" else 8
    cfg.merge_from_list(["MODEL.BACKBONE.WIDTH", 4, "MODEL.FPN.OUT_CHANNELS", width])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (80, 82), "INPUT.MAX_SIZE_TRAIN", 96])
    cfg.merge_from_list(opts or [])
    cfg.KD.ENABLED = False
    return cfg


def teacher_cfg(name: str, opts: list[Any] | None = None) -> CfgNode:
    """A teacher twice as wide, with pixel statistics and padding of its own."""
    width = 64 if name == "FCOS" else 16
    own = ["MODEL.BACKBONE.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", width]
    own += ["MODEL.PIXEL_MEAN", [0.4, 0.5, 0.6], "MODEL.FPN.SIZE_DIVISIBILITY", 64]
    return tiny_cfg(name, [*own, *(opts or [])])


def teacher_model(name: str, opts: list[Any] | None = None) -> nn.Module:
    torch.manual_seed(77)
    model = build_model(teacher_cfg(name, opts))
    for key, parameter in model.named_parameters():
        if "classification_head" in key and parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.1)  # untrained, its KL would be rounding noise
    return model


def write_teacher(folder: Path, name: str, opts: list[Any] | None = None) -> tuple[Path, Path]:
    """A teacher's config and weights as files."""
    config, weights = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(teacher_cfg(name, opts).dump())
    torch.save({"model": teacher_model(name, opts).state_dict()}, weights)
    return config, weights


def all_terms(name: str, weight: float = 1.0) -> dict[str, Any]:
    """Every loss this architecture can have."""
    terms: dict[str, Any] = {
        "hint": {"LOSS": "FitNet", "TAPS": ["c3"]},
        "review": {"LOSS": "ReviewKD", "TAPS": LEVELS, "MID_CHANNELS": 8},
        "imitation": {"LOSS": "FGFI", "TAPS": LEVELS, "ASSIGN": "anchor"},
        "module": {"LOSS": "FitNet", "TAPS": ["backbone.body.layer2"]},
        "attention": {"LOSS": "AT", "TAPS": LEVELS},
        "flow": {"LOSS": "FSP", "TAPS": LEVELS, "PAIRS": "chain", "ADAPT": True},
    }
    if "RCNN" in name:
        terms["logits"] = {"LOSS": "KD", "TAPS": ["box_logits"]}
        terms["pooled"] = {"LOSS": "FitNet", "TAPS": ["box_pooled"]}
        terms["relations"] = {"LOSS": "IRG", "TAPS": ["box_logits", "box_features"]}
    else:
        terms["logits"] = {
            "LOSS": "KD",
            "TAPS": ["cls_logits"],
            "ACTIVATION": "sigmoid",
            "REDUCTION": "foreground",
        }
    if name == "MaskRCNN":
        terms["masks"] = {
            "LOSS": "KD",
            "TAPS": ["mask_logits"],
            "ACTIVATION": "sigmoid",
            "REDUCTION": "mean",
        }
    return {key: {**term, "WEIGHT": weight} for key, term in terms.items()}


def student_model(name: str, opts: list[Any] | None = None) -> nn.Module:
    torch.manual_seed(5)
    return build_model(tiny_cfg(name, opts))


def distilled(
    name: str, weight: float = 1.0, terms: Any = None, **arguments: Any
) -> DistilledDetector:
    """A student under its teacher, built from the same seed as :func:`student_model`."""
    terms = terms or all_terms(name, weight)
    return DistilledDetector(student_model(name), teacher_model(name), terms, **arguments)


def batch(seed: int = 0, empty: bool = False) -> tuple[list[Any], list[dict[str, Any]]]:
    """Two images of different sizes with three boxes each."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for height, width in ((64, 90), (80, 70)):
        corner = torch.rand(3, 2, generator=generator) * 30
        side = 12 + torch.rand(3, 2, generator=generator) * 20
        boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(3, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        labels = torch.randint(1, 11, (3,), generator=generator)
        keep = slice(0, 0) if empty else slice(None)
        images.append(torch.rand(3, height, width, generator=generator))
        targets.append({"boxes": boxes[keep], "labels": labels[keep], "masks": masks[keep]})
    return images, targets
