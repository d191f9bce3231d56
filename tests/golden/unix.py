"""UNIX: scores, order, weights, the mixed batch and its losses."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.core.numerics import descending
from kd_det.losses import kd_loss
from kd_det.procedures.unix import UnixMixup, mix, mixup_weights, uncertainty, unix_task_loss
from tests.golden.reader import Golden


def check_unix(g: Golden) -> dict[str, Tensor]:
    hyper = g.meta["hyper"]
    batch = len(g["in_x"])
    nominal = hyper["k"], hyper["b"], hyper["nominal_batch"]
    transform = UnixMixup(slope=hyper["w"], strategy=hyper["strategy"], nominal=nominal)
    k, b, nominal_batch = transform.sizes(batch)
    score = uncertainty(g["in_logits_s_raw"], hyper["strategy"])
    order = descending(score)
    proto = mixup_weights(batch, b, hyper["w"], nominal_batch)
    mask = hyper["lam"] * proto
    mixed = mix(g["in_x"].detach(), g["in_target"], order, g["in_perm"], mask[:k])
    assert torch.equal(mixed.mu, mask[:k].to(g.dtype))
    logits = g["in_logits_s_mixed"]
    ce = unix_task_loss(logits, mixed.target_a, mixed.target_b, mixed.mu)
    kd = kd_loss(logits, g["in_logits_t_mixed"], hyper["T"])
    total = hyper["ce_weight"] * ce + hyper["kd_weight"] * kd
    return {
        "out_score": score,
        "out_order": order,
        "out_mask_proto": proto,
        "out_mask": mask,
        "out_mixed": mixed.images,
        "out_target_a": mixed.target_a,
        "out_target_b": mixed.target_b,
        "out_loss_ce": ce,
        "out_loss_kd": kd,
        "out_loss_total": total,
    } | g.gradients(total, {"grad_logits_s_mixed": "in_logits_s_mixed"})


CHECKS = {"UNIX": check_unix}
