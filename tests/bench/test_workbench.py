"""What every tool measures on a workbench: parameters, operations and time of one forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_det import FrozenTeacher
from kd_det.bench.workbench import latency, macs, parameters, side_model


class Counting(nn.Module):
    """A convolution and a linear layer of known cost."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.linear = nn.Linear(width, 5)
        self.runs = []

    def forward(self, images):
        self.runs.append((self.training, torch.is_grad_enabled()))
        return self.linear(self.conv(images).mean(dim=(2, 3)))


@pytest.fixture
def bench():
    return SimpleNamespace(
        student=Counting(4),
        teacher=FrozenTeacher(Counting(8)),
        example=lambda side: (torch.zeros(1, 3, 10, 12),),
    )


def test_a_side_has_its_stock_model_and_a_missing_teacher_is_named(bench, refuses):
    assert side_model(bench, "student") is bench.student
    assert side_model(bench, "teacher") is bench.teacher.model
    bench.teacher = None
    with refuses("KD.TEACHER"):
        side_model(bench, "teacher")


def test_parameters_are_the_stock_models_own(bench):
    expected = 4 * 3 * 9 + 4 + 5 * 4 + 5
    assert parameters(bench.student) == expected
    bench.student.distiller = nn.Linear(100, 100)
    assert parameters(bench.student) == expected


@pytest.mark.parametrize(("side", "width"), [("student", 4), ("teacher", 8)])
def test_operations_are_counted_by_multiply_accumulates(bench, side, width):
    assert macs(bench, side) == 10 * 12 * width * 3 * 9 + width * 5


def test_time_is_taken_in_eval_mode_without_gradients_and_modes_come_back(bench):
    bench.student.train()
    assert latency(bench, "student", repeats=3) > 0
    assert bench.student.training
    assert bench.student.runs == [(False, False)] * 5
