"""Balances in the distiller: resumed runs, what is logged, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from kd_det import Distiller
from kd_det.balance import MeasuredBalance, Uncertainty, build_balance
from kd_det.losses import TapSpec
from kd_det.run.config import add_kd_config
from tests.balance.toy import terms

SPECS = {"map": TapSpec(3), "logits": TapSpec(5)}
CONFIG = {
    "hint": {"LOSS": "FitNet", "TAPS": ["map"], "WEIGHT": 4.0},
    "soft": {"LOSS": "KD", "TAPS": ["logits"], "WEIGHT": 0.5},
}
SCHEMES = {
    "measure": {},
    "gradient_share": {"SHARES": {"hint": 0.3, "soft": 0.2}},
    "gradnorm": {},
    "uncertainty": {},
}


def config(name="none", config_terms=CONFIG, **keys):
    cfg = CfgNode()
    add_kd_config(cfg)
    cfg.KD.TERMS = CfgNode(config_terms)
    shares = keys.pop("SHARES", {})
    cfg.KD.BALANCE.SHARES.update(shares)
    cfg.KD.BALANCE.merge_from_list([x for pair in {"NAME": name, **keys}.items() for x in pair])
    return cfg


def run(name, steps, state=None, start=0, **keys):
    """Train a linear student with its distiller; returns both, the losses and the metrics."""
    torch.manual_seed(3)
    student = nn.Linear(4, 3 * 6 * 6 + 5)
    keys = {**SCHEMES.get(name, {}), "PERIOD": 2, **keys}
    built = Distiller(CONFIG, SPECS, SPECS)
    balance = build_balance(config(name, **keys), built.specs)
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=balance)
    distiller.terms.load_state_dict(built.terms.state_dict())
    both = nn.ModuleDict({"student": student, "distiller": distiller})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.01, momentum=0.9)
    if state is not None:
        both.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    seen, metrics = [], []
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator)
        taps = [split(student(x)), split(torch.randn(8, 113, generator=generator) * 0.3)]
        task = {"loss_cls": student(x)[:, :50].pow(2).mean()}
        losses = distiller(*taps, task=task, shared=list(student.parameters()))
        total = sum({**task, **losses}.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append({k: v.detach().clone() for k, v in losses.items()})
        metrics.append(distiller.metrics)
    return both, optimizer, seen, metrics


def split(outputs):
    return {"map": outputs[:, :108].reshape(-1, 3, 6, 6), "logits": outputs[:, 108:]}


@pytest.mark.parametrize("name", ["none", *SCHEMES])
def test_a_resumed_run_goes_on_as_it_would_have(name):
    whole, _, losses, _ = run(name, 12)
    half, optimizer, *_ = run(name, 5)
    state = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, _, rest, _ = run(name, 12, state, start=5)
    assert rest == losses[5:]
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    own = {k for k in ours if k.startswith("distiller.balance.")}
    assert bool(own) == (name in ("gradient_share", "gradnorm", "uncertainty"))


def test_measuring_changes_nothing_but_the_log():
    plain, _, losses, metrics = run("none", 6)
    watched, _, same, logged = run("measure", 6)
    assert losses == same
    state = plain.state_dict()
    assert state.keys() == watched.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in watched.state_dict().items())
    usual = {"raw/hint", "raw/soft", "weight/hint", "weight/soft"}
    shares = {"share/task", "share/hint", "share/soft"}
    assert [m.keys() for m in metrics] == [usual] * 6
    assert [m.keys() for m in logged] == [usual | shares, usual] * 3
    for step, loss in zip(metrics, losses, strict=True):
        for term in CONFIG:
            assert step[f"weight/{term}"] == CONFIG[term]["WEIGHT"]
            torch.testing.assert_close(step[f"raw/{term}"] * step[f"weight/{term}"], loss[term])
    assert not any(v.requires_grad for m in logged for v in m.values())
    assert all(float(sum(m[k] for k in shares)) == pytest.approx(1) for m in logged[::2])


def test_weights_that_were_found_are_the_ones_that_train():
    *_, losses, metrics = run("gradient_share", 5)
    assert float(metrics[0]["share/hint"]) == pytest.approx(0.3, rel=1e-4)
    for step, loss in zip(metrics, losses, strict=True):
        for term in CONFIG:
            assert step[f"weight/{term}"] != CONFIG[term]["WEIGHT"]
            torch.testing.assert_close(step[f"raw/{term}"] * step[f"weight/{term}"], loss[term])


def test_nothing_is_measured_in_evaluation_or_without_gradients(randn):
    taps = split(randn(2, 113, dtype=torch.float32))
    specs = terms(hint=4.0, soft=0.5)
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=MeasuredBalance(specs, 1))
    arguments = {"task": {}, "shared": list(distiller.parameters())}
    distiller.eval()(taps, taps, **arguments)
    assert not any(name.startswith("share/") for name in distiller.metrics)
    with torch.no_grad():
        distiller.train()(taps, taps, **arguments)
    assert not any(name.startswith("share/") for name in distiller.metrics)


def test_a_term_that_is_off_stays_off_and_is_reported(randn):
    config_terms = {**CONFIG, "off": {**CONFIG["hint"], "WEIGHT": 0.0}}
    specs = Distiller(config_terms, SPECS, SPECS).specs
    distiller = Distiller(config_terms, SPECS, SPECS, balance=Uncertainty(specs))
    student = split(randn(2, 113, grad=True, dtype=torch.float32))
    teacher = split(torch.full((2, 113), math.inf))
    teacher["logits"] = student["logits"].detach()
    shared = list(distiller.terms["hint"].parameters()) or [distiller.balance.log_variances]
    losses = distiller(student, teacher, task={}, shared=shared)
    assert losses["off"] == 0
    losses["off"].backward()
    assert not distiller.balance.log_variances.grad.any()
    assert distiller.metrics["weight/off"] == 0
    assert distiller.report_silent() == ["soft", "off"]


# What is refused


def build(name, config_terms=CONFIG, task_weight=1.0, **keys):
    cfg = config(name, config_terms, **keys)
    cfg.KD.TASK_WEIGHT = task_weight
    return build_balance(cfg, Distiller(config_terms, SPECS, SPECS).specs)


def test_the_default_is_no_balance():
    assert build("none") is None
    assert config().KD.BALANCE.NAME == "none"


def test_shares_that_cannot_be_are_refused(refuses):
    with refuses("sum to less than 1", "0.7 + 0.4 = 1.1"):
        build("gradient_share", SHARES={"hint": 0.7, "soft": 0.4})
    with refuses("sum to less than 1"):
        build("gradient_share", SHARES={"hint": 0.5, "soft": 0.5})
    for share in (0, -0.1, 1.0, math.nan, "half", True, [0.1]):
        with refuses("SHARES.hint", repr(share)):
            build("gradient_share", SHARES={"hint": share})
    with refuses("'reviev'", "did you mean 'review'"):
        build("gradient_share", {"review": CONFIG["hint"]}, SHARES={"reviev": 0.3})
    with refuses("SHARES to name a term", "none"):
        build("gradient_share")
    with refuses("WEIGHT above 0", "'hint'"):
        off = {"hint": {**CONFIG["hint"], "WEIGHT": 0.0}}
        build("gradient_share", off, SHARES={"hint": 0.3})


def test_shares_of_terms_that_a_stage_switches_off_are_left_out():
    cfg = config("gradient_share", SHARES={"hint": 0.3, "soft": 0.2})
    balance = build_balance(cfg, Distiller({"soft": CONFIG["soft"]}, SPECS, SPECS).specs)
    assert balance.chosen == {"soft": 0.2}


def test_schemes_that_cannot_work_are_refused(refuses):
    with refuses("KD.BALANCE.NAME", "'gradnrom'", "did you mean 'gradnorm'"):
        build("gradnrom")
    with refuses("PERIOD", "0"):
        build("measure", PERIOD=0)
    for name in ("gradient_share", "gradnorm"):
        with refuses("KD.TASK_WEIGHT 0", name):
            build(name, task_weight=0.0, **SCHEMES[name])
    assert build("measure", task_weight=0.0) is not None
    for name in SCHEMES:
        clipped = {**CONFIG, "hint": {**CONFIG["hint"], "CLIP": "task_norm"}}
        with refuses("'hint'", "CLIP task_norm"):
            build(name, clipped, **SCHEMES[name])
        with refuses("term 'task'"):
            build(name, {"task": CONFIG["hint"], **CONFIG}, **SCHEMES[name])
    for name in ("gradnorm", "uncertainty"):
        with refuses("hint.WEIGHT -1", name):
            build(name, {"hint": {**CONFIG["hint"], "WEIGHT": -1.0}})
    for key in ("ALPHA", "LR"):
        with refuses(f"KD.BALANCE.{key}", "-1"):
            build("gradnorm", **{key: -1.0})


def test_a_caller_that_gives_no_task_is_told_so(randn, refuses):
    taps = split(randn(2, 113, grad=True, dtype=torch.float32))
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=MeasuredBalance(terms(hint=4.0, soft=0.5)))
    with refuses("task", "Distiller.forward"):
        distiller(taps, {name: value.detach() for name, value in taps.items()})
