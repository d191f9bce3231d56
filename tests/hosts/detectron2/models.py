"""Tiny students, teachers and batches for the tests of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from kd_det.hosts.detectron2 import get_cfg

BASE = Path("configs/digits/base_rcnn.yaml")

CASCADE = [
    "MODEL.ROI_HEADS.NAME",
    "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    True,
]
DENSE = ["MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4"], "MODEL.RETINANET.NUM_CLASSES", 10]
POINTS = [
    "MODEL.FCOS.NORM",
    "",
    "MODEL.FCOS.IN_FEATURES",
    ["p2", "p3", "p4"],
    "MODEL.FCOS.NUM_CLASSES",
    10,
]

#: name -> (stock meta-architecture, distilled one, options)
ARCHITECTURES: dict[str, tuple[str, str, list[Any]]] = {
    "faster": ("GeneralizedRCNN", "DistilledRCNN", []),
    "mask": ("GeneralizedRCNN", "DistilledRCNN", ["MODEL.MASK_ON", True]),
    "cascade": ("GeneralizedRCNN", "DistilledRCNN", CASCADE),
    "retinanet": ("RetinaNet", "DistilledRetinaNet", DENSE),
    "fcos": ("DistilledFCOS", "DistilledFCOS", POINTS),
}


def tiny_cfg(name: str, opts: list[Any] | None = None) -> CfgNode:
    """The plain student's config of an architecture."""
    stock, _, arch_opts = ARCHITECTURES[name]
    cfg = get_cfg()
    cfg.merge_from_file(str(BASE))
    cfg.merge_from_list(["MODEL.BASIC_RESNET.WIDTH", 4, "MODEL.FPN.OUT_CHANNELS", 8])
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", stock, *arch_opts, *(opts or [])])
    cfg.KD.ENABLED = False
    return cfg


def write_teacher(folder: Path, name: str, opts: list[Any] | None = None) -> tuple[Path, Path]:
    """A teacher twice as wide: its config and its weights."""
    cfg = tiny_cfg(
        name, ["MODEL.BASIC_RESNET.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 16, *(opts or [])]
    )
    torch.manual_seed(77)
    model = build_model(cfg)
    for key, parameter in model.named_parameters():
        if "cls_score.weight" in key:  # an untrained head is so flat that its KL is rounding noise
            torch.nn.init.normal_(parameter, std=0.3)
    config, weights = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return config, weights


def all_terms(name: str, weight: float = 0.0) -> dict[str, Any]:
    """Every loss this architecture can have."""
    logits = {"faster": "box_logits", "mask": "box_logits", "cascade": "box_logits"}.get(name)
    kd: dict[str, Any] = {"LOSS": "KD", "WEIGHT": weight, "TAPS": [logits or "cls_logits"]}
    if logits is None:
        kd |= {"ACTIVATION": "sigmoid", "REDUCTION": "foreground"}
    levels = ["p2", "p3", "p4"]
    terms = {
        "logits": kd,
        "attention": {"LOSS": "AT", "WEIGHT": weight, "TAPS": levels},
        "flow": {
            "LOSS": "FSP",
            "WEIGHT": weight,
            "TAPS": levels,
            "PAIRS": "chain",
            "ADAPT": True,
        },
        "hint": {"LOSS": "FitNet", "WEIGHT": weight, "TAPS": ["c3"]},
        "imitation": {"LOSS": "FGFI", "WEIGHT": weight, "TAPS": levels},
        "review": {"LOSS": "ReviewKD", "WEIGHT": weight, "TAPS": levels},
    }
    if logits:
        terms["relations"] = {
            "LOSS": "IRG",
            "WEIGHT": weight,
            "VERTICES": False,
            "TAPS": ["box_pooled", "box_features"],
        }
    if name == "mask":
        terms["masks"] = {
            "LOSS": "KD",
            "WEIGHT": weight,
            "TAPS": ["mask_logits"],
            "ACTIVATION": "sigmoid",
            "REDUCTION": "mean",
        }
    return terms


def distilled_cfg(
    name: str, teacher: tuple[Path, Path], terms: dict[str, Any], opts: list[Any] | None = None
) -> CfgNode:
    """The same student with a teacher beside it."""
    cfg = tiny_cfg(name, ["MODEL.META_ARCHITECTURE", ARCHITECTURES[name][1], *(opts or [])])
    cfg.KD.ENABLED = True
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = map(str, teacher)
    cfg.KD.TERMS = CfgNode(terms, new_allowed=True)
    return cfg


def build(cfg: CfgNode, seed: int = 0) -> nn.Module:
    """A model in training mode whose weights depend on the seed only."""
    torch.manual_seed(seed)
    return build_model(cfg).train()


def batch(seed: int = 0, empty: bool = False, sizes: Any = ((64, 96), (80, 70))) -> list[dict]:
    """Random pixels with two boxes (or none) per image."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for h, w in sizes:
        instances = Instances((h, w))
        boxes = [] if empty else [[8.0, 8.0, 40.0, 52.0], [24.0, 16.0, 60.0, 40.0]]
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.tensor([1, 3][: len(boxes)])
        instances.gt_masks = PolygonMasks(
            [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
        )
        pixels = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        inputs.append(
            {
                "image": pixels,
                "instances": instances,
                "height": h,
                "width": w,
                "image_id": len(inputs),
            }
        )
    return inputs
