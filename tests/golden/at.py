"""AT: attention maps, one loss per stage and their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.losses import ATLoss, at_loss
from tests.golden.reader import Golden


def check_at(g: Golden) -> dict[str, Tensor]:
    p = g.meta["hyper"].get("p", 2)
    students, teachers = g.series("in_s"), g.series("in_t")
    stages = [at_loss(s, t, p) for s, t in zip(students, teachers, strict=True)]
    loss = ATLoss(p)(students, teachers)
    keys = {f"grad_s{stage}": f"in_s{stage}" for stage in range(len(students))}
    return {"out_loss_at": loss, "out_loss_stage": torch.stack(stages)} | g.gradients(loss, keys)


CHECKS = {"AT": check_at}
