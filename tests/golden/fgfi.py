"""FGFI: masks and imitation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.losses import FGFILoss, fgfi_mask, imitation_loss
from tests.golden.reader import Golden


def check_fgfi(g: Golden) -> dict[str, Tensor]:
    gt = [b.detach() for b in g.series("in_gt_")]
    if g.has("in_feat_s"):
        return _fgfi_single(g, gt)
    hyper = g.meta["hyper"]
    student, teacher = g.series("in_s"), g.series("in_t")
    anchors = g.series("in_anchors_")
    sizes = [(s.shape[2], s.shape[3]) for s in student]
    channels = [s.shape[1] for s in student]
    out: dict[str, Tensor] = {}
    for assign in ("roi", "all", "anchor"):
        masks = fgfi_mask(anchors, gt, sizes, hyper["strides"], hyper["psi"], assign)
        out |= {f"out_mask_{assign}_{i}": m for i, m in enumerate(masks)}
        out[f"out_n_pos_{assign}"] = torch.stack([m.sum() for m in masks])
        for normalizer in ("global", "level_mean", "level_sum"):
            if g.has("param_0.weight"):
                module = FGFILoss(
                    channels, channels, hyper["strides"], hyper["psi"], assign, normalizer
                )
                g.load(module, lambda key: f"adaptors.{key}")
                loss = module(student, teacher, anchors=anchors, gt_boxes=gt)
            else:
                loss = imitation_loss(student, teacher, masks, normalizer)
            out[f"out_loss_{normalizer}_{assign}"] = loss
            keys = {f"grad_s{i}_{normalizer}_{assign}": f"in_s{i}" for i in range(len(student))}
            out |= g.gradients(loss, keys)
    return out


def _fgfi_single(g: Golden, gt: list[Tensor]) -> dict[str, Tensor]:
    s, t = g["in_feat_s"], g["in_feat_t"]
    plus_one = "plus_one" in g.meta["hyper"]["iou_convention"]
    masks = fgfi_mask(
        [g["in_anchors"]],
        gt,
        [(s.shape[2], s.shape[3])],
        None,
        g.meta["hyper"]["psi"],
        inclusive=plus_one,
    )
    module = FGFILoss([s.shape[1]], [t.shape[1]], relu="ReLU" in g.meta["hyper"]["adaptor"])
    g.load(module, lambda key: f"adaptors.{key}")
    adapted = module.adaptors[0](s).relu() if module.relu else module.adaptors[0](s)
    loss = imitation_loss([adapted], [t], masks)
    keys = {"grad_feat_s": "in_feat_s"} | g.parameters()
    return {
        "out_mask": masks[0],
        "out_n_pos": masks[0].sum(),
        "out_adapted": adapted,
        "out_loss_imitation": loss,
    } | g.gradients(loss, keys)


CHECKS = {"FGFI": check_fgfi}
