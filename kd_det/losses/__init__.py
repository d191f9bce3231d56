"""Distillation losses: one paper, one file. Each sees tensors only."""

from kd_det.losses.base import DistillLoss, TapSpec
from kd_det.losses.fgfi import FGFILoss, fgfi_mask, imitation_loss
from kd_det.losses.fitnet import FitNetLoss, hint_loss
from kd_det.losses.kd import KDLoss, kd_loss
from kd_det.losses.reviewkd import ReviewKDLoss, hcl_loss

__all__ = [
    "DistillLoss",
    "FGFILoss",
    "FitNetLoss",
    "KDLoss",
    "ReviewKDLoss",
    "TapSpec",
    "fgfi_mask",
    "hcl_loss",
    "hint_loss",
    "imitation_loss",
    "kd_loss",
]
