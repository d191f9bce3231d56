"""Detectron2's FCOS, which it describes in Python only, from a config."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead


class ConfigurableFCOS(FCOS):
    """The stock FCOS, described by ``cfg.MODEL.FCOS``: Detectron2 describes it in Python only."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of ``FCOS`` from a config."""
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
        head = FCOSHead(
            input_shape=shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }
