"""Rocket: a shared trunk, two task losses and the hint between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.losses import RocketLoss
from tests.golden.reader import Golden


def check_rocket(g: Golden) -> dict[str, Tensor]:
    trunk = F.relu(F.linear(g["in_x"], g["param_shared"]))
    light = F.linear(trunk, g["param_light"], g["param_light_b"])
    hidden = F.relu(F.linear(trunk, g["param_boost1"], g["param_boost1_b"]))
    booster = F.linear(hidden, g["param_boost2"], g["param_boost2_b"])
    ce_light = F.cross_entropy(light, g["in_target"])
    ce_booster = F.cross_entropy(booster, g["in_target"])
    results = {
        "out_logits_light": light,
        "out_logits_booster": booster,
        "out_ce_light": ce_light,
        "out_ce_booster": ce_booster,
    }
    # "gradnb": without the gradient block.
    for prefix, block in (("grad", True), ("gradnb", False)):
        hint = RocketLoss(block)([light], [booster])
        total = ce_light + ce_booster + g.meta["hyper"]["gamma"] * hint
        results |= {"out_hint": hint, "out_loss_total": total}
        for name, logits in (("light", light), ("booster", booster)):
            (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
            results[f"{prefix}_logits_{name}"] = gradient
        parameters = [k for k in g.arrays if k.startswith("param_")]
        results |= g.gradients(total, {f"{prefix}_{k}": k for k in parameters})
    return results


CHECKS = {"Rocket": check_rocket}
