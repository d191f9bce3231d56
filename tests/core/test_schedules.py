"""Schedules: how a term's weight changes over steps."""

from __future__ import annotations

import pickle

import pytest

from kd_det import SCHEDULES
from kd_det.core.terms import build_schedule

STEPS = (0, 1, 2, 3, 4, 5, 100)


def build(**node):
    return build_schedule("term 'x'", node)


@pytest.mark.parametrize(
    ("node", "factors"),
    [
        ({"NAME": "constant"}, (1, 1, 1, 1, 1, 1, 1)),
        ({"NAME": "linear_warmup", "ITERS": 4}, (0, 0.25, 0.5, 0.75, 1, 1, 1)),
        ({"NAME": "linear_warmup", "ITERS": 1}, (0, 1, 1, 1, 1, 1, 1)),
        ({"NAME": "linear_warmup", "ITERS": 4, "EVERY": 2}, (0, 0, 0.5, 0.5, 1, 1, 1)),
        ({"NAME": "delay", "ITERS": 3}, (0, 0, 0, 1, 1, 1, 1)),
        ({"NAME": "linear_decay", "ITERS": 4}, (1, 0.75, 0.5, 0.25, 0, 0, 0)),
    ],
    ids=str,
)
def test_factor_follows_its_definition(node, factors):
    schedule = build(**node)
    assert tuple(schedule(step) for step in STEPS) == factors
    assert tuple(pickle.loads(pickle.dumps(schedule))(step) for step in STEPS) == factors


def test_every_schedule_is_tested_here():
    assert {name for name, _ in SCHEDULES} == {
        "constant",
        "delay",
        "linear_decay",
        "linear_warmup",
    }


@pytest.mark.parametrize("name", ["linear_warmup", "delay", "linear_decay"])
@pytest.mark.parametrize("iters", [0, -3])
def test_a_length_below_one_is_refused(refuses, name, iters):
    with refuses(f"expected schedule {name} to get ITERS of at least 1; received {iters};"):
        build(NAME=name, ITERS=iters)


def test_a_rise_per_less_than_a_step_is_refused(refuses):
    with refuses("EVERY of at least 1; received 0;"):
        build(NAME="linear_warmup", ITERS=4, EVERY=0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"NAME": "linear_warmpu"},
            "known schedule; received 'linear_warmpu'; remedy: did you mean 'linear_warmup'",
        ),
        ({"NAME": 3}, "known schedule; received '3'; remedy: known: constant"),
        ({"NAME": "delay"}, "schedule delay of term 'x' to get ITERS; received nothing; remedy"),
        ({"NAME": "delay", "ITERS": 0.5}, "to be int; received 0.5 (float); remedy"),
        ({"NAME": "delay", "ITERS": True}, "to be int; received True (bool); remedy"),
        ({"NAME": "delay", "ITER": 5}, "received 'iter'; remedy: did you mean 'iters'"),
        ({"NAME": "constant", "ITERS": 5}, "received 'iters'; remedy: known: (none)"),
    ],
    ids=str,
)
def test_a_bad_schedule_is_refused(refuses, node, message):
    with refuses(message):
        build(**node)
