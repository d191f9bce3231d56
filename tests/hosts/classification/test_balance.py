"""Automatic weights of the terms of a classifier."""

from __future__ import annotations

import pytest
import torch

from kd_det.balance import build_balance
from kd_det.core.checkpoint import strip_distiller
from kd_det.hosts.classification.build import build_training_model
from kd_det.hosts.classification.train import run
from kd_det.hosts.lightning.optim import parameter_groups
from kd_det.run.plan import Start

TERMS = {
    "soft": {"LOSS": "KD", "TAPS": ["logits"], "TEMPERATURE": 4.0},
    "hint": {"LOSS": "FitNet", "TAPS": ["stage2"]},
}
ASKED = {"soft": 0.4, "hint": 0.1}


def balance(name, **keys):
    shares = {"SHARES": ASKED} if name == "gradient_share" else {}
    return {"TERMS": TERMS, "BALANCE": {"NAME": name, "PERIOD": 2, **shares, **keys}}


def step(cfg):
    model = build_training_model(cfg).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator)
    losses = model(images, torch.arange(8))
    return model, losses


def test_the_student_gets_the_asked_shares_from_the_first_step(config):
    model, losses = step(config(KD=balance("gradient_share")))
    metrics = model.distiller.metrics
    parameters = [p for p in model.student.parameters() if p.requires_grad]
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
    for name, share in ASKED.items():
        assert float(metrics[f"share/{name}"]) == pytest.approx(share, rel=1e-4)
        assert float(norms[name] / sum(norms.values())) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("name", ["gradient_share", "uncertainty"])
def test_a_run_interrupted_after_an_epoch_ends_in_the_same_weights(config, name):
    states = []
    for folder, epochs in (("whole", [2]), ("halves", [1, 2])):
        for epoch in epochs:
            cfg = config(folder, KD=balance(name), SOLVER={"MAX_EPOCH": epoch})
            run(cfg, Start(resume=epoch == 2))
        states.append(torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth")["model"])
    whole, halves = states
    assert whole.keys() == halves.keys()
    assert all(torch.equal(halves[k], whole[k]) for k in whole)
    assert any(k.startswith("distiller.balance.") for k in whole)


def test_measuring_trains_the_same_student(config):
    states = []
    for name in ("none", "measure"):
        cfg = config(name, KD=balance(name))
        run(cfg)
        states.append(torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth")["model"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_without_a_task_its_share_is_zero(config):
    model, losses = step(config(KD={**balance("measure"), "TASK_WEIGHT": 0.0}))
    assert set(losses) == set(TERMS)
    assert model.distiller.metrics["share/task"] == 0
    shares = [float(model.distiller.metrics[f"share/{name}"]) for name in TERMS]
    assert sum(shares) == pytest.approx(1)


def test_a_booster_is_balanced_too(config):
    joint = {"ENABLED": True, "NAME": "resnet8_x0.5"}
    model, _ = step(config(KD={**balance("gradient_share"), "JOINT": joint}))
    assert float(model.distiller.metrics["share/soft"]) == pytest.approx(0.4, rel=1e-4)


def test_the_optimiser_trains_the_log_variances_and_a_student_is_exported_without(config):
    model, losses = step(config(KD=balance("uncertainty")))
    sum(losses.values()).backward()
    learned = model.distiller.balance.log_variances
    assert learned.grad.all()
    groups = parameter_groups(model, 0.1, 0.0)
    assert any(p is learned for group in groups for p in group["params"])
    stock = strip_distiller(model.state_dict())
    assert stock.keys() == model.student.state_dict().keys()


def test_a_clipped_term_and_a_balance_are_refused(config, refuses):
    graph = {"LOSS": "MHGD", "TAPS": ["stage1", "stage2"], "HEADS": 2, "CLIP": "task_norm"}
    cfg = config(KD={**balance("measure"), "TERMS": {**TERMS, "graph": graph}})
    with refuses("'graph'", "CLIP task_norm"):
        build_training_model(cfg)


def test_constant_weights_build_nothing(config):
    assert build_balance(config(KD={"TERMS": TERMS}), []) is None
