"""Configs of small models of every family, and of the runs that are made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import yaml

Config = dict[str, Any]

# In the keys that both detection hosts share.
_DETECTOR = """
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {STEPS: [], IMS_PER_BATCH: 2, BASE_LR: 0.005}
MODEL:
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64]], ASPECT_RATIOS: [[1.0]]}
  ROI_HEADS: {NUM_CLASSES: 10, BATCH_SIZE_PER_IMAGE: 16}
  ROI_BOX_HEAD: {NUM_FC: 1, FC_DIM: 32, POOLER_SAMPLING_RATIO: 1}
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 8, POOLER_SAMPLING_RATIO: 1}
  RETINANET: {NUM_CLASSES: 10}
"""
_HOSTS: dict[str, str] = {
    "torchvision_detection": """
MODEL:
  BACKBONE: {NAME: basic_resnet, BLOCKS: [1, 1, 1]}
  FPN: {LEVELS: [2, 3, 4]}
""",
    "detectron2": """
VERSION: 2
MODEL:
  WEIGHTS: ""
  BACKBONE: {NAME: build_basic_resnet_fpn_backbone, FREEZE_AT: 0}
  BASIC_RESNET: {TOP_BLOCK: none}
  FPN: {IN_FEATURES: [res2, res3, res4]}
  RPN: {IN_FEATURES: &levels [p2, p3, p4]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: *levels}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead}
  RETINANET: {IN_FEATURES: *levels}
  FCOS: {IN_FEATURES: *levels, NUM_CLASSES: 10, NORM: ""}
""",
    "classification": """
MODEL: {NAME: resnet8_x0.25}
INPUT: {SIZE: 16, CROP: {PADDING: 2}, RANDOM_FLIP: none}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 16, EPOCH_STEPS: []}
TEST: {EVAL_PERIOD: 2}
""",
}
_TERMS = yaml.safe_load("""
review: {LOSS: ReviewKD, TAPS: [p2, p3, p4], WEIGHT: 0.1}
hint: {LOSS: FitNet, TAPS: [c3], WEIGHT: 0.1}
box: {LOSS: KD, TAPS: [box_logits]}
mask: {LOSS: KD, TAPS: [mask_logits], ACTIVATION: sigmoid, REDUCTION: mean}
dense: {LOSS: KD, TAPS: [cls_logits], ACTIVATION: sigmoid, REDUCTION: foreground}
logits: {LOSS: KD, TAPS: [logits], TEMPERATURE: 4.0}
stage: {LOSS: FitNet, TAPS: [stage2]}
""")
_RCNN, _DENSE = ("box", "hint", "review"), ("dense", "hint", "review")
#: host -> family -> (what it adds to the host's config, names of its terms)
FAMILIES: dict[str, dict[str, tuple[Config, tuple[str, ...]]]] = {
    "torchvision_detection": {
        "FasterRCNN": ({"META_ARCHITECTURE": "FasterRCNN"}, _RCNN),
        "MaskRCNN": ({"META_ARCHITECTURE": "MaskRCNN"}, (*_RCNN, "mask")),
        "RetinaNet": ({"META_ARCHITECTURE": "RetinaNet"}, _DENSE),
        # Its head normalises groups of 32 channels.
        "FCOS": ({"META_ARCHITECTURE": "FCOS", "FPN": {"OUT_CHANNELS": 32}}, _DENSE),
    },
    "detectron2": {
        "FasterRCNN": ({"META_ARCHITECTURE": "DistilledRCNN"}, _RCNN),
        "MaskRCNN": ({"META_ARCHITECTURE": "DistilledRCNN", "MASK_ON": True}, (*_RCNN, "mask")),
        "CascadeRCNN": (
            {
                "META_ARCHITECTURE": "DistilledRCNN",
                "ROI_HEADS": {"NAME": "CascadeROIHeads"},
                "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True},
            },
            _RCNN,
        ),
        "RetinaNet": ({"META_ARCHITECTURE": "DistilledRetinaNet"}, _DENSE),
        "FCOS": ({"META_ARCHITECTURE": "DistilledFCOS"}, _DENSE),
    },
    "classification": {"ResNet": ({}, ("logits", "stage"))},
}
# Detectron2's FCOS is in none of its registries: the distilled class without distillation is it.
_STOCK = {"DistilledRCNN": "GeneralizedRCNN", "DistilledRetinaNet": "RetinaNet"}

KCD: Config = {"KCD": {"ENABLED": True, "PERIOD": 2}}
BALANCE: Config = {"BALANCE": {"NAME": "gradient_share", "PERIOD": 2}}
UNIX: Config = {"UNIX": {"ENABLED": True}}
BOOSTER: Config = {
    "JOINT": {"ENABLED": True, "NAME": "resnet14_x0.25"},
    "TERMS": {"hint": {"LOSS": "Rocket", "TAPS": ["logits"]}},
}


def student(host: str, family: str, tiny: bool) -> Config:
    """A stock model that trains without a teacher; data and device are missing."""
    config = yaml.safe_load(_HOSTS[host])
    if host == "classification":
        config["DATASETS"] = {"TRAIN_PER_CLASS": 4}
    else:
        config = merged(yaml.safe_load(_DETECTOR), config)
        side, width = (96, 4) if tiny else (640, 16)
        wide = "BASIC_RESNET" if host == "detectron2" else "BACKBONE"
        config["INPUT"] = {"MIN_SIZE_TRAIN": [side], "MAX_SIZE_TRAIN": side}
        config["MODEL"]["FPN"]["OUT_CHANNELS"] = 2 * width
        config["MODEL"] = merged(config["MODEL"], {wide: {"WIDTH": width}})
    config["MODEL"] = merged(config["MODEL"], FAMILIES[host][family][0])
    architecture = config["MODEL"].get("META_ARCHITECTURE")
    if architecture in _STOCK:
        config["MODEL"]["META_ARCHITECTURE"] = _STOCK[architecture]
    return config | {"HOST": host, "SEED": 5, "KD": {"ENABLED": False}}


def distilled(config: Config, family: str, teacher: Config, weight: float | None = None) -> Config:
    """The same student with all terms of its family, with a weight of their own or this one."""
    architecture, names = FAMILIES[config["HOST"]][family]
    terms = {name: dict(_TERMS[name]) for name in names}
    for term in terms.values() if weight is not None else ():
        term["WEIGHT"] = weight
    config = merged(config, {"KD": {"ENABLED": True, "TEACHER": teacher, "TERMS": terms}})
    return merged(config, {"MODEL": architecture})


def graph_term(host: str) -> Config:
    """``KD`` with MHGD alone, whose networks learn in a pre-stage."""
    taps = ["stage1", "stage2"] if host == "classification" else ["box_pooled", "box_features"]
    graph = {"LOSS": "MHGD", "TAPS": taps, "HEADS": 2, "REDUCTION": "mean"}
    return {"TERMS": {"graph": graph}, "PRE_STAGE": {"MAX_ITER": 2}}


def balanced(config: Config) -> Config:
    """``KD.BALANCE`` over the terms of a config."""
    shares = dict.fromkeys(config["KD"]["TERMS"], 0.2)
    return merged(BALANCE, {"BALANCE": {"SHARES": shares}})


def schedule(host: str, length: int, amp: bool = False) -> Config:
    """Iterations of a detector, epochs of a classifier."""
    if host == "classification":
        return {"SOLVER": {"MAX_EPOCH": length, "AMP": {"ENABLED": amp}}}
    return {"SOLVER": {"MAX_ITER": length, "CHECKPOINT_PERIOD": 2, "AMP": {"ENABLED": amp}}}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """A copy with nested changes."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else copy.deepcopy(value)
    return result
