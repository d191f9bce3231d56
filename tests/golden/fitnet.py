"""FitNet: adaptor and hint loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.losses import FitNetLoss, hint_loss
from tests.golden.reader import Golden


def check_fitnet(g: Golden) -> dict[str, Tensor]:
    s, t = g["in_feat_s"], g["in_feat_t"]
    relu = "ReLU" in g.meta["hyper"]["adaptor"]
    module = FitNetLoss(
        [s.shape[1]], [t.shape[1]], [tuple(s.shape[2:])], [tuple(t.shape[2:])], relu
    )
    g.load(module, lambda key: f"adaptors.0.{key}")
    adapted = module.adaptors[0](s)
    loss = module([s], [t])
    assert torch.equal(loss, hint_loss(adapted, t))
    keys = {"grad_feat_s": "in_feat_s"} | g.parameters()
    return {"out_adapted": adapted, "out_loss_hint": loss} | g.gradients(loss, keys)


CHECKS = {"FitNet": check_fitnet}
