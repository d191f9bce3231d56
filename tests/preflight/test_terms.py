"""What is said about terms and the task, from measured steps that a test makes up."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from kd_det.preflight import steps
from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Section
from kd_det.preflight.steps import Step, Steps, TermValues, _Watch
from kd_det.preflight.terms import inspect_terms
from kd_det.run.config import add_kd_config
from tests.balance.toy import terms


def look(*steps):
    """The section for steps of terms ``a`` and ``b``."""
    cfg, specs = CfgNode(), terms(a=1.0, b=1.0)
    add_kd_config(cfg)
    bench = SimpleNamespace(
        cfg=cfg,
        student=nn.ModuleDict({"backbone": nn.Identity()}),
        distiller=SimpleNamespace(terms={t.name: nn.Identity() for t in specs}, specs=specs),
        pre_stage=[],
    )
    section = Section("Terms")
    found = SimpleNamespace(bench=bench, steps=Steps(4, list(steps)), settings=Settings())
    inspect_terms(section, found)
    return section


def step(task=1.0, task_norm=1.0, **norms):
    values = {name: TermValues(0.5, 1.0, norm, 0.1) for name, norm in norms.items()}
    return Step({"loss_cls": task}, task_norm, values, {})


def messages(section, level):
    return [f.message for f in section.findings if f.level == level]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_an_error_and_counts_in_no_share(broken):
    section = look(step(a=2.0, b=1e-4), step(a=broken, b=1e-4))
    (error,) = messages(section, "error")
    assert "'a' is not finite" in error
    assert f"its gradient on the student's backbone is {broken} on 1 of 2 batches" in error
    assert messages(section, "ok") == []
    assert "share" not in section.data["a"]
    assert section.data["b"]["share"] == pytest.approx(1e-4 / (1 + 1e-4))
    (warning,) = messages(section, "warning")
    # 0.25 of what is left, the task alone, and 1e-4 of it per weight of 1.
    assert "'b' has hardly any effect" in warning
    assert "WEIGHT 2.5e+03 would give it 20%" in warning


def test_a_loss_that_its_weight_makes_infinite_is_named():
    (error,) = messages(look(step(a=None, b=1.0)), "error")
    assert (
        "'a' is not finite: its loss is 0.5, too large for its weight 1, on 1 of 1 batch" in error
    )


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"task": math.inf, "task_norm": math.nan}, "the task's loss 'loss_cls' is inf on 1 of 2"),
        ({"task_norm": math.nan}, "the task's gradient on the student's backbone is nan on 1 of 2"),
    ],
)
def test_a_task_that_is_not_finite_is_an_error_and_proposes_no_weights(broken, says):
    section = look(step(a=1.0, b=1e-9), step(**broken, a=1.0, b=1e-9))
    (error,) = messages(section, "error")
    assert says in error
    assert messages(section, "warning") == messages(section, "ok") == []
    assert section.data["task"] == {"norm": None, "share": None}


# Measuring them


def watch(half=True, **weights):
    """Watches a student of one shared layer; ``(watch, what the layer gives)``."""
    student = nn.Linear(4, 4, bias=False)
    cfg = CfgNode({"MODEL": {"DEVICE": "cuda"}, "SOLVER": {"AMP": {"ENABLED": half}}})
    scalars = {f"{kind}/{name}": torch.ones(()) for kind in ("raw", "weight") for name in weights}
    distiller = SimpleNamespace(terms=weights, metrics=scalars)
    bench = SimpleNamespace(cfg=cfg, student=student, distiller=distiller)
    out = student(torch.ones(1, 4))
    return _Watch(bench), out.half().float() if half else out


def test_norms_are_measured_where_the_scale_of_a_training_step_would_overflow_twice():
    looked, out = watch(soft=1.0)
    # Of 16 weights each; 0.5 * 2 ** 20 is far outside of float16.
    found, task, norm = looked._measure({"loss_cls": 0.5 * out.sum(), "soft": 0.25 * out.sum()})
    assert (norm, found["soft"].norm) == (2.0, 1.0)
    assert found["soft"].cosine == pytest.approx(1)
    assert task.keys() == {"loss_cls"}


def test_a_run_without_a_task_measures_its_terms():
    looked, out = watch(half=False, soft=1.0)
    found, task, norm = looked._measure({"soft": 0.25 * out.sum()})
    assert (task, norm) == ({}, 0.0)
    assert (found["soft"].norm, found["soft"].cosine) == (1.0, 0.0)


def test_the_peak_is_that_of_forward_or_backward_but_not_of_measuring(monkeypatch):
    looked, out = watch(half=False, soft=1.0)
    looked.device = "cpu"  # there may be no GPU to wait for
    peak = [0]

    def rise(to):
        peak[0] = max(peak[0], to * 2**20)

    def losses(batch):
        rise(batch)
        return {"soft": out.sum()}

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    monkeypatch.setattr(steps, "peak_memory", lambda device: peak[0] / 2**20)
    monkeypatch.setattr(looked, "_hooks", lambda watches: nullcontext())
    monkeypatch.setattr(looked, "_measure", lambda found: (rise(900), ({}, {}, 0.0))[1])
    looked.bench.model, looked.bench.losses = looked.bench.student, losses
    out.register_hook(lambda gradient: rise(200))
    rise(800)  # of what was done before the step
    looked.step(500, 0.0)
    assert looked.memory == 500
