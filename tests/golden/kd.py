"""KD on classifier logits and on the logits of shared RoIs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.losses import kd_loss
from tests.golden.reader import Golden


def check_kd(g: Golden) -> dict[str, Tensor]:
    out = {}
    if g.has("in_boxes_0"):
        logits_s, logits_t, out = _roi_logits(g)
    else:
        logits_s, logits_t = g["in_logits_s"], g["in_logits_t"]
    temperature = g.meta["hyper"]["T"]
    loss = kd_loss(logits_s, logits_t, temperature)
    out["out_loss_kd"] = loss
    out["out_loss_kd_elementmean"] = kd_loss(logits_s, logits_t, temperature, "mean")
    keys = {"grad_logits_s": "in_logits_s"}
    for key in g.arrays:
        if key.startswith("grad_feat_s_"):
            keys[key] = key.replace("grad_", "in_", 1)
    out |= g.gradients(loss, keys | g.parameters())
    if g.has("out_loss_ce"):
        hyper = g.meta["hyper"]
        ce = F.cross_entropy(logits_s, g["in_target"])
        total = hyper["ce_weight"] * ce + hyper["kd_weight"] * loss
        out |= {"out_loss_ce": ce, "out_loss_total": total}
        out |= g.gradients(total, {"grad_total_logits_s": "in_logits_s"})
    return out


def _roi_logits(g: Golden) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both heads on the student's boxes, with torchvision's aligned RoIAlign."""
    from torchvision.ops import roi_align

    hyper = g.meta["hyper"]
    boxes = [b.detach() for b in g.series("in_boxes_")]
    rows = torch.cat(boxes)
    image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes])).to(rows)
    side = (rows[:, 2:] - rows[:, :2]).prod(dim=1).sqrt()
    lowest = int(np.log2(hyper["strides"][0]))
    level = hyper["canonical_level"] + torch.log2(side / hyper["canonical_box_size"] + 1e-8)
    level = level.floor().clamp(lowest, lowest + len(hyper["levels"]) - 1).long() - lowest

    def logits(who: str) -> Tensor:
        features = [g[f"in_feat_{who}_{name}"] for name in hyper["levels"]]
        size = hyper["pooler_resolution"]
        pooled = features[0].new_zeros(len(rows), features[0].shape[1], size, size)
        for k, (feature, stride) in enumerate(zip(features, hyper["strides"], strict=True)):
            here = (level == k).nonzero().flatten()
            rois = torch.cat([image[here, None], rows[here]], dim=1)
            values = roi_align(
                feature, rois, size, 1 / stride, hyper["sampling_ratio"], aligned=True
            )
            pooled = pooled.index_put((here,), values)
        hidden = F.linear(
            pooled.flatten(1),
            g[f"param_{who}.box_head.fc1.weight"],
            g[f"param_{who}.box_head.fc1.bias"],
        )
        return F.linear(
            hidden.relu(),
            g[f"param_{who}.box_predictor.cls_score.weight"],
            g[f"param_{who}.box_predictor.cls_score.bias"],
        )

    student, teacher = logits("s"), logits("t")
    # Stored levels are absolute (p3, p4) or counted from the lowest tapped one.
    offset = lowest if g.has("out_box_level") and int(g["out_box_level"].min()) >= lowest else 0
    return (
        student,
        teacher,
        {
            "out_box_level": level + offset,
            "out_logits_s": student,
            "out_logits_t": teacher,
        },
    )


CHECKS = {"KD": check_kd}
