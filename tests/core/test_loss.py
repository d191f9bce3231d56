"""What all losses share: precision and the zero that stays in the graph."""

from __future__ import annotations

import pytest
import torch

from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.losses import DistillLoss


def test_half_precision_is_raised_and_the_rest_is_left_alone(half):
    assert full_precision(torch.ones(2, dtype=half)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(2, dtype=dtype)
        assert full_precision(tensor) is tensor


def test_autocast_is_off_inside(randn):
    x = randn(3, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with no_autocast(x):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_the_zero_is_exact_whatever_the_values(value):
    tensors = [torch.full(shape, value, requires_grad=True) for shape in [(2, 3), (0, 4), ()]]
    zero = zero_in_graph(tensors)
    assert zero.item() == 0.0
    zero.backward()
    for tensor in tensors:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_the_zero_of_half_precision_is_float32(half):
    tensor = torch.ones(2, dtype=half, requires_grad=True)
    zero = zero_in_graph([tensor])
    zero.backward()
    assert (zero.dtype, tensor.grad.dtype) == (torch.float32, half)


def test_a_loss_must_say_what_it_computes():
    with pytest.raises(NotImplementedError):
        DistillLoss()([], [])
    assert DistillLoss.tap_arguments([], [], {}) == {}
