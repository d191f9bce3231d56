"""MHGD: vectors, heads and their graphs, the network's training, and degenerate maps."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_det.losses import MHGDLoss, mhgd_loss
from kd_det.losses.mhgd.loss import _NORM_EPS, AttentionModule
from kd_det.losses.mhgd.singular import (
    TOLERANCE,
    direction_gradient,
    dominant_directions,
    most_similar,
    student_vectors,
    teacher_vectors,
)
from tests.golden.reader import Golden

PARAMETERS = {
    "Wk": "w_key",
    "Wq": "w_query",
    "W1": "w_value",
    "W2": "w_out",
    "b2": "b_out",
    "bnk_gamma": "bn_key.weight",
    "bnk_beta": "bn_key.bias",
    "bnq_gamma": "bn_query.weight",
    "bnq_beta": "bn_query.bias",
    "bn1_gamma": "bn_value.weight",
    "bn1_beta": "bn_value.bias",
}
STATISTICS = {"bnk": "bn_key", "bnq": "bn_query", "bn1": "bn_value"}


def module(g: Golden, m: int) -> AttentionModule:
    """The stored module between taps m - 1 and m; its parameters are the file's own tensors."""
    prefix, hyper = f"param_m{m}_", g.meta["hyper"]
    back, front = g[f"{prefix}Wk"].shape[0], g[f"{prefix}Wq"].shape[0]
    heads = AttentionModule(front, back, hyper["num_heads"]).to(g.dtype)
    for key, path in PARAMETERS.items():
        if g.has(prefix + key):
            owner, _, leaf = path.rpartition(".")
            target = heads.get_submodule(owner)
            assert getattr(target, leaf).shape == g[prefix + key].shape, key
            del target._parameters[leaf]
            setattr(target, leaf, g[prefix + key])
    for key, path in STATISTICS.items():
        bn = heads.get_submodule(path)
        if g.has(f"{prefix}{key}_mean"):
            bn.running_mean = g[f"{prefix}{key}_mean"].detach().clone()
            bn.running_var = g[f"{prefix}{key}_var"].detach().clone()
        bn.eps = hyper.get("bn_eps", bn.eps)
        bn.momentum = hyper.get("bn_momentum", bn.momentum)
    return heads


def check_transfer(g: Golden) -> dict[str, Tensor]:
    n = g.meta["hyper"]["num_student_vectors"]
    teacher, student = g.series("in_feat_t"), g.series("in_feat_s")
    out, v_t, v_s = {}, [], []
    for k, (t, s) in enumerate(zip(teacher, student, strict=True)):
        v_t.append(teacher_vectors(t))
        v_s.append(student_vectors(s, v_t[k], n))
        directions, values = dominant_directions(s, n)
        out |= {
            f"out_v_t{k}": v_t[k],
            f"out_v_s{k}": v_s[k],
            f"out_selected{k}": most_similar(directions, v_t[k]),
            f"out_sigma_s{k}": values,
        }
    loss = MHGDLoss(
        [s.shape[1] for s in student],
        [t.shape[1] for t in teacher],
        heads=g.meta["hyper"]["num_heads"],
        vectors=n,
    ).to(g.dtype)
    for m in range(1, len(teacher)):
        heads = module(g, m)
        loss.network.pairs[m - 1] = heads
        s_t = heads.similarity(v_t[m - 1], v_t[m])
        s_s = heads.similarity(v_s[m - 1], v_s[m])
        out |= {
            f"out_m{m}_S_t": s_t,
            f"out_m{m}_S_s": s_s,
            f"out_m{m}_G_t": s_t.tanh().softmax(dim=2),
            f"out_m{m}_G_s": s_s.tanh().softmax(dim=2),
            f"out_m{m}_loss": mhgd_loss(s_s, s_t),
        }
    by_parts = sum(out[f"out_m{m}_loss"] for m in range(1, len(teacher)))
    by_vector = torch.autograd.grad(by_parts, v_s, retain_graph=True)
    out |= {f"grad_v_s{k}": gradient for k, gradient in enumerate(by_vector)}
    loss.finish_pre_stage()
    out["out_loss"] = loss(student, teacher)
    keys = {f"grad_feat_s{k}": f"in_feat_s{k}" for k in range(len(student))}
    return out | g.gradients(out["out_loss"], keys)


def check_training(g: Golden) -> dict[str, Tensor]:
    assert g.meta["hyper"].get("estimator_norm_eps", _NORM_EPS) == _NORM_EPS
    front, back, kept = g["in_v_front"], g["in_v_back"], g["in_drop_mask"]
    heads = module(g, 1)
    s = heads.similarity(front, back, batch_statistics=True)
    graph = s.softmax(dim=2) * kept
    out = {"out_S": s, "out_G_masked": graph, "out_prediction": heads.estimate(front, graph)}
    heads = module(g, 1)  # with the stored statistics: each step moves them
    out["out_loss"] = heads.training_loss(front, back, kept)
    for key, path in STATISTICS.items():
        bn = heads.get_submodule(path)
        out[f"out_{key}_running_mean"] = bn.running_mean
        out[f"out_{key}_running_var_unbiased"] = bn.running_var
    return out | g.gradients(out["out_loss"], {f"grad_{k}": f"param_m1_{k}" for k in PARAMETERS})


def check_degenerate(g: Golden) -> dict[str, Tensor]:
    out = {}
    if g.has("in_bw_U"):
        u, values, v = g["in_bw_U"], g["in_bw_s"], g["in_bw_V"]
        tolerance = g.meta["hyper"].get("gap_tol", TOLERANCE)
        gradient = direction_gradient(
            (u * values)[None], v[None], values[None], g["in_bw_grad_V"][None], tolerance
        )
        out["grad_bw_X"] = gradient[0]
    if g.has("in_b1_back_t"):
        heads = module(g, 1)
        s_t = heads.similarity(g["in_b1_front_t"], g["in_b1_back_t"])
        s_s = heads.similarity(g["in_b1_front_s"], g["in_b1_back_s"])
        out |= {"out_b1_S_t": s_t, "out_b1_S_s": s_s, "out_b1_loss": mhgd_loss(s_s, s_t)}
    if g.has("in_sat_S_s"):
        loss = mhgd_loss(g["in_sat_S_s"], g["in_sat_S_t"])
        out |= {"out_sat_loss": loss} | g.gradients(loss, {"grad_sat_S_s": "in_sat_S_s"})
    if g.has("in_zero_map"):
        out["out_zero_v"] = teacher_vectors(g["in_zero_map"])
    return out


def check_mhgd(g: Golden) -> dict[str, Tensor]:
    if g.has("in_feat_t0"):
        return check_transfer(g)
    return check_training(g) if g.has("in_v_front") else check_degenerate(g)


CHECKS = {"MHGD": check_mhgd}
