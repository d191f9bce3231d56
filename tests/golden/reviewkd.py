"""ReviewKD: the chain of ABF modules and HCL."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.losses import ReviewKDLoss, hcl_loss
from tests.golden.reader import Golden


def check_reviewkd(g: Golden) -> dict[str, Tensor]:
    student, teacher = g.series("in_s"), g.series("in_t")
    out: dict[str, Tensor] = {}
    if any(key.startswith("param_abfs") for key in g.arrays):
        hyper = g.meta["hyper"]
        module = ReviewKDLoss(hyper["in_channels"], hyper["out_channels"], hyper["mid_channels"])
        g.load(module, lambda key: key)
        fused = module.fuse(student, [t.shape[-2:] for t in teacher])
        out |= {f"out_f{i}": f for i, f in enumerate(fused)}
        loss = module(student, teacher)
    else:
        fused = student
        loss = hcl_loss(student, teacher)
    out["out_loss_hcl"] = loss
    out["out_loss_level"] = torch.stack(
        [hcl_loss(f, t) for f, t in zip(fused, teacher, strict=True)]
    )
    keys = {f"grad_s{i}": f"in_s{i}" for i in range(len(student))}
    return out | g.gradients(loss, keys | g.parameters())


CHECKS = {"ReviewKD": check_reviewkd}
