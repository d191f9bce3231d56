"""IRG: edges, movements, the complete method, and graphs without a relation."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.losses import MTKLoss, edge_loss, edge_matrix, movement, movement_loss, vertex_loss
from kd_det.losses.irg.graph import pool_nodes
from tests.golden.reader import Golden


def check_irg(g: Golden) -> dict[str, Tensor]:
    if g.has("in_logits_s"):
        return _complete(g)
    if g.has("in_p0_t_first"):
        return _movements(g)
    if g.has("in_feat_s"):
        return _edges(g)
    return _degenerate(g)


def _settings(g: Golden) -> dict[str, Any]:
    hyper = g.meta["hyper"]
    return {"normalize": hyper["normalize"] == "max", "detach_max": hyper["detach_max"]}


def _reduction(text: str) -> Any:
    return "caffe" if text.startswith("sum") else "mean"


def _edges(g: Golden) -> dict[str, Tensor]:
    settings = _settings(g)
    out: dict[str, Tensor] = {}
    for side in ("s", "t"):
        raw = edge_matrix(g[f"in_feat_{side}"], normalize=False)
        out |= {
            f"out_pooled_{side}": pool_nodes(g[f"in_feat_{side}"]),
            f"out_A_{side}_raw": raw,
            f"out_max_{side}": raw.max(),
            f"out_A_{side}": edge_matrix(g[f"in_feat_{side}"], **settings),
        }
    reduction = _reduction(g.meta["hyper"]["reduction"])
    loss = edge_loss(g["in_feat_s"], g["in_feat_t"], reduction, **settings)
    return out | {"out_loss_edge": loss} | g.gradients(loss, {"grad_feat_s": "in_feat_s"})


def _pairs(g: Golden) -> list[str]:
    found: list[str] = []
    while g.has(f"in_p{len(found)}_t_first"):
        found.append(f"p{len(found)}")
    return found


def _movements(g: Golden) -> dict[str, Tensor]:
    settings, reduction = _settings(g), _reduction(g.meta["hyper"]["reduction"])
    out: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    losses = []
    for p in _pairs(g):
        pairs = {}
        for side in ("s", "t"):
            pairs[side] = (g[f"in_{p}_{side}_first"], g[f"in_{p}_{side}_last"])
            out[f"out_{p}_lambda_{side}_raw"] = movement(*pairs[side], normalize=False)
            out[f"out_{p}_lambda_{side}"] = movement(*pairs[side], **settings)
        losses.append(movement_loss(pairs["s"], pairs["t"], reduction, **settings))
        out[f"out_{p}_loss"] = losses[-1]
        keys |= {f"grad_{p}_s_{end}": f"in_{p}_s_{end}" for end in ("first", "last")}
    total = torch.stack(losses).sum()
    return out | {"out_loss_trans": total} | g.gradients(total, keys)


def _complete(g: Golden) -> dict[str, Tensor]:
    hyper, settings = g.meta["hyper"], _settings(g)
    reductions = {name: _reduction(text) for name, text in hyper["reductions"].items()}
    layers, pairs = g.series("in_feat_s_layer"), _pairs(g)
    logits_s, logits_t = g["in_logits_s"], g["in_logits_t"]
    ce = F.cross_entropy(logits_s, g["in_target"], reduction=hyper["reductions"]["ce"])
    logits = vertex_loss(logits_s, logits_t, reductions["logits"])
    edges = [edge_loss(s, g["in_feat_t"], reductions["edges"], **settings) for s in layers]
    out = {
        "out_loss_ce": ce,
        "out_loss_logits": logits,
        "out_loss_edge": torch.stack(edges).sum(),
        "out_A_t": edge_matrix(g["in_feat_t"], **settings),
    }
    keys = {"grad_logits_s": "in_logits_s"}
    for k, (layer, edge) in enumerate(zip(layers, edges, strict=True)):
        out[f"out_loss_edge_layer{k}"] = edge
        out[f"out_A_s_layer{k}"] = edge_matrix(layer, **settings)
        keys[f"grad_feat_s_layer{k}"] = f"in_feat_s_layer{k}"
    movements, taps_s, taps_t = [], [logits_s, *layers], [logits_t, *[g["in_feat_t"]] * len(layers)]
    for p in pairs:
        s, t = ([g[f"in_{p}_{side}_{end}"] for end in ("first", "last")] for side in ("s", "t"))
        reduction = reductions["transformation"]
        movements.append(movement_loss((s[0], s[1]), (t[0], t[1]), reduction, **settings))
        out[f"out_{p}_loss"] = movements[-1]
        keys |= {f"grad_{p}_s_{end}": f"in_{p}_s_{end}" for end in ("first", "last")}
        taps_s += s
        taps_t += t
    out["out_loss_trans"] = torch.stack(movements).sum()
    module = MTKLoss(
        hyper["lambda_1"],
        hyper["lambda_2"],
        hyper["lambda_3"],
        edges=len(layers),
        reduction=reductions["edges"],
        detach_max=hyper["detach_max"],
    )
    total = ce + module(taps_s, taps_t)
    return out | {"out_loss_total": total} | g.gradients(total, keys)


def _degenerate(g: Golden) -> dict[str, Tensor]:
    settings = _settings(g)
    out: dict[str, Tensor] = {}
    for key in g.arrays:
        if match := re.fullmatch(r"in_(\w+)_feat_s", key):
            case = match[1]
            student, teacher = g[key], g[f"in_{case}_feat_t"]
            loss = edge_loss(student, teacher, **settings)
            out |= {
                f"out_{case}_loss_edge": loss,
                f"out_{case}_A_s": edge_matrix(student, **settings),
                f"out_{case}_A_t": edge_matrix(teacher, **settings),
            }
            out |= g.gradients(loss, {f"grad_{case}_feat_s": key})
        elif match := re.fullmatch(r"in_(\w+)_s_first", key):
            case = match[1]
            s, t = ((g[f"in_{case}_{x}_first"], g[f"in_{case}_{x}_last"]) for x in ("s", "t"))
            loss = movement_loss(s, t, **settings)
            out[f"out_{case}_loss"] = loss
            keys = {f"grad_{case}_s_{end}": f"in_{case}_s_{end}" for end in ("first", "last")}
            out |= g.gradients(loss, keys)
    return out


CHECKS = {"IRG": check_irg}
