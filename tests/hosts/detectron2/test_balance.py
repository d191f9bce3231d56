"""Automatic weights of the terms on Detectron2's meta-architectures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage

from tests.hosts.detectron2.models import (
    ARCHITECTURES,
    all_terms,
    batch,
    build,
    distilled_cfg,
    write_teacher,
)

pytestmark = pytest.mark.detectron2

ASKED = {"review": 0.3, "logits": 0.1}


def balanced(name, tmp_path, scheme="gradient_share"):
    cfg = distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name, 1.0))
    cfg.KD.BALANCE.NAME, cfg.KD.BALANCE.PERIOD = scheme, 1
    if scheme == "gradient_share":
        cfg.KD.BALANCE.SHARES = CfgNode(ASKED, new_allowed=True)
    return cfg


def losses_of(model):
    with EventStorage():
        torch.manual_seed(1)
        return model(batch())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_backbone_gets_the_asked_shares_from_the_first_step(name, tmp_path):
    model = build(balanced(name, tmp_path))
    losses = losses_of(model)
    metrics = model.distiller.metrics
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    terms = set(model.distiller.terms)
    parts = {term: losses[term] for term in terms}
    parts["task"] = sum(loss for key, loss in losses.items() if key not in terms)
    norms = {}
    for key, loss in parts.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = [g.flatten() for g in gradients if g is not None]
        norms[key] = torch.cat(found).norm() if found else torch.tensor(0.0)
    for key, norm in norms.items():
        share = norm / sum(norms.values())
        torch.testing.assert_close(metrics[f"share/{key}"].float(), share, atol=1e-5, rtol=1e-3)
    for term, share in ASKED.items():
        assert float(metrics[f"share/{term}"]) == pytest.approx(share, rel=1e-4)


def test_measuring_leaves_losses_gradients_and_statistics_alone(tmp_path):
    results = []
    for scheme in ("none", "measure"):
        model = build(balanced("faster", tmp_path, scheme))
        losses = losses_of(model)
        sum(losses.values()).backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients, model.state_dict()))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_stock_optimiser_trains_the_log_variances(tmp_path):
    cfg = balanced("faster", tmp_path, "uncertainty")
    model = build(cfg)
    sum(losses_of(model).values()).backward()
    learned = model.distiller.balance.log_variances
    assert learned.grad.all()
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    assert any(p is learned for group in optimizer.param_groups for p in group["params"])
