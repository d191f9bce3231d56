"""Distillation losses of tensors: one paper, one file or folder."""

from kd_det.core.loss import DistillLoss, TapSpec
from kd_det.losses.at import ATLoss, at_loss, attention_map
from kd_det.losses.fgfi import FGFILoss, fgfi_mask, imitation_loss
from kd_det.losses.fitnet import FitNetLoss, hint_loss
from kd_det.losses.fsp import FSPLoss, fsp_loss, fsp_matrix
from kd_det.losses.irg.graph import edge_loss, edge_matrix, movement, movement_loss, vertex_loss
from kd_det.losses.irg.loss import IRGLoss, IRGMovementLoss, MTKLoss
from kd_det.losses.kd import KDLoss, kd_loss
from kd_det.losses.mhgd.loss import MHGDLoss, mhgd_loss
from kd_det.losses.mhgd.pre_training import PreStageLoss
from kd_det.losses.reviewkd import ReviewKDLoss, hcl_loss
from kd_det.losses.rocket import RocketLoss, rocket_hint

__all__ = [
    "ATLoss",
    "DistillLoss",
    "FGFILoss",
    "FSPLoss",
    "FitNetLoss",
    "IRGLoss",
    "IRGMovementLoss",
    "KDLoss",
    "MHGDLoss",
    "MTKLoss",
    "PreStageLoss",
    "ReviewKDLoss",
    "RocketLoss",
    "TapSpec",
    "at_loss",
    "attention_map",
    "edge_loss",
    "edge_matrix",
    "fgfi_mask",
    "fsp_loss",
    "fsp_matrix",
    "hcl_loss",
    "hint_loss",
    "imitation_loss",
    "kd_loss",
    "mhgd_loss",
    "movement",
    "movement_loss",
    "rocket_hint",
    "vertex_loss",
]
