"""KCD: a run on stored logits, its edge cases, and the costs of KCD and UNIX."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.numerics import logit_entropy
from kd_det.losses import kd_loss
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.ledger import SampleLedger, rank
from kd_det.procedures.kcd.sampler import RecipeDataset
from kd_det.procedures.kcd.selection import blend_ratios, kcd_cost, keep_counts, partition
from kd_det.procedures.unix import unix_cost
from tests.golden.reader import Golden


def check_kcd(g: Golden) -> dict[str, Tensor]:
    return _pipeline(g) if g.has("out_counts") else _edge_cases(g)


def _pipeline(g: Golden) -> dict[str, Tensor]:
    hyper = g.meta["hyper"]
    size, total, period = hyper["N"], hyper["I"], hyper["T"]
    kcd = Condensation(
        size,
        hyper["rho"],
        period,
        total,
        alpha=hyper["alpha"],
        schedule=hyper["schedule"],
        pool=hyper["pool"],
        epsilon=hyper["eps_m"],
        epsilon_rule=hyper["eps_rule"],
    )
    images = g["in_images"].to(g.dtype)
    points = RecipeDataset([(image, 0) for image in images], kcd)
    entropy = torch.full((total, size), -1.0, dtype=g.dtype)
    out = {"out_counts": torch.tensor(kcd.counts), "out_entropy": entropy}
    for epoch in range(total):
        entropy[epoch, kcd.active] = logit_entropy(g["in_logits"][epoch, kcd.active])
        kcd.update(kcd.active, entropy[epoch, kcd.active])
        # After every period, also the last, after which a run would not condense again.
        if (epoch + 1) % period == 0:
            parts = kcd.condense()
            stage = {
                "visits": kcd.ledger.count.clone(),
                "value": kcd.ledger.means(),
                "score": kcd.ledger.scores(kcd.alpha),
                "order": parts.order,
                "keep": parts.keep,
                "drop": parts.drop,
                "tail": parts.tail,
                "eps": kcd.epsilons[parts.tail],
                "images": torch.stack([points[i][0] for i in range(size)]),
            }
            out |= {f"out_s{kcd.current_period}_{key}": value for key, value in stage.items()}
    out["out_measured_cost"] = torch.tensor(kcd.measured_cost(), dtype=torch.float64)
    if g.has("in_loss_logits_s"):
        out |= _loss(g)
    return out


def _loss(g: Golden) -> dict[str, Tensor]:
    hyper, logits = g.meta["hyper"], g["in_loss_logits_s"]
    ce = F.cross_entropy(logits, g["in_loss_target"])
    kd = kd_loss(logits, g["in_loss_logits_t"], hyper["kd_temperature"])
    total = hyper["ce_weight"] * ce + hyper["kd_weight"] * kd
    out = {"out_loss_ce": ce, "out_loss_kd": kd, "out_loss_total": total}
    return out | g.gradients(total, {"grad_loss_logits_s": "in_loss_logits_s"})


def _edge_cases(g: Golden) -> dict[str, Tensor]:
    alpha = g.meta["hyper"]["alpha"]
    size = len(g["in_logits"])
    ledger = SampleLedger(size)
    entropy = logit_entropy(g["in_logits"])
    visits = torch.repeat_interleave(torch.arange(size), g["in_visits"])
    ledger.update(visits, entropy[visits])
    scores = ledger.scores(alpha)
    parts = partition(rank(scores), len(g["out_keep"]), size)
    nodrop = partition(rank(scores), size, size)
    out = {
        "out_entropy": entropy,
        "out_score": scores,
        "out_order": parts.order,
        "out_keep": parts.keep,
        "out_drop": parts.drop,
        "out_tail": parts.tail,
        "out_eps_reference": blend_ratios(
            len(parts.tail), g.meta["hyper"].get("eps_m", 0.3), "reference"
        ),
        "out_nodrop_keep": nodrop.keep,
        "out_nodrop_drop": nodrop.drop,
        "out_nodrop_tail": nodrop.tail,
    }
    merged = SampleLedger(g["in_merge_sum"].shape[1])
    for sums, counts in zip(g["in_merge_sum"], g["in_merge_count"], strict=True):
        merged.add(sums.detach(), counts)
    out["out_merge_value"] = merged.means()
    out["out_merge_score"] = merged.scores(alpha)
    out["out_merge_order"] = rank(merged.scores(alpha))
    # Counts must be exact in both precisions, so their inputs are read as they are stored.
    for key in (key for key in g.arrays if key.startswith("in_schedule")):
        points, rho, stages, linear = g.arrays[key].tolist()
        counts = keep_counts(int(points), rho, int(stages), "linear" if linear else "exp")
        out[key.replace("in_", "out_", 1)] = torch.tensor(counts)
    return out


def check_costs(g: Golden) -> dict[str, Tensor]:
    kcd = []
    for rho, total, period in g.arrays["in_kcd"].tolist():
        run = rho, int(total), int(period)
        costs = kcd_cost(*run), kcd_cost(*run, "full"), kcd_cost(*run, "full", "linear")
        kcd.append([rho, total, period, *costs])
    unix = []
    for ratio, k, batch in g.arrays["in_unix"].tolist():
        share = k / batch
        unix.append([ratio, k, batch, unix_cost(ratio, share), unix_cost(ratio, share, 2.0)])
    return {
        "out_kcd": torch.from_numpy(np.array(kcd)),
        "out_unix": torch.from_numpy(np.array(unix)),
    }


CHECKS = {"KCD": check_kcd, "KCD+UNIX cost": check_costs}
