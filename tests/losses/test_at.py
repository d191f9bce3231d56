"""AT: attention transfer."""

from __future__ import annotations

import logging
import math
from itertools import product

import numpy as np
import pytest
import torch

from kd_det.losses import ATLoss, TapSpec, at_loss, attention_map
from tests import slow

MODES = ["code", "paper"]
EXPONENTS = [1, 2, 3, 4, 2.5]
# Sizes of the student's and the teacher's map.
SIZES = {
    "equal": ((4, 4), (4, 4)),
    "student larger": ((8, 8), (4, 4)),
    "teacher larger": ((3, 5), (7, 9)),
    "rectangles": ((10, 14), (5, 7)),
    "each larger on one axis": ((6, 5), (4, 9)),
    "width alone": ((4, 6), (4, 3)),
}


def slow_pool(x, size):
    """Averages over the cells of each bin, whose edges are rounded outwards."""
    height, width = x.shape[2:]
    y = np.zeros((*x.shape[:2], *size))
    for i, j in np.ndindex(*size):
        rows = range(i * height // size[0], -(-(i + 1) * height // size[0]))
        columns = range(j * width // size[1], -(-(j + 1) * width // size[1]))
        y[:, :, i, j] = sum(x[:, :, r, c] for r, c in product(rows, columns))
        y[:, :, i, j] /= len(rows) * len(columns)
    return y


def slow_attention(sample, p):
    """Of one ``[C, H, W]`` map, as a flat list."""
    channels, height, width = sample.shape
    energy = [
        sum(abs(sample[c, i, j]) ** p for c in range(channels)) / channels
        for i, j in product(range(height), range(width))
    ]
    length = max(math.sqrt(sum(e * e for e in energy)), 1e-12)
    return [e / length for e in energy]


def slow_at(student, teacher, p, mode):
    student, teacher = slow.array(student), slow.array(teacher)
    size = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    total = 0.0
    for s, t in zip(slow_pool(student, size), slow_pool(teacher, size), strict=True):
        maps = zip(slow_attention(s, p), slow_attention(t, p), strict=True)
        squares = sum((a - b) ** 2 for a, b in maps)
        total += math.sqrt(squares) if mode == "paper" else squares / (size[0] * size[1])
    return total / len(student)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_slow_loop(randn, sizes, p, mode):
    size_s, size_t = SIZES[sizes]
    student, teacher = randn(3, 5, *size_s), randn(3, 2, *size_t)
    expected = slow_at(student, teacher, p, mode)
    assert at_loss(student, teacher, p, mode).item() == pytest.approx(expected, rel=1e-12)


def test_stages_are_summed(randn):
    students, teachers = (
        [randn(2, 3, 8, 8), randn(2, 6, 4, 4)],
        [randn(2, 5, 8, 8), randn(2, 9, 4, 4)],
    )
    expected = sum(at_loss(s, t, 4, "paper") for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(ATLoss(4, "paper")(students, teachers), expected)


@pytest.mark.parametrize("p", EXPONENTS)
def test_attention_has_length_one_per_sample(randn, p):
    lengths = torch.linalg.vector_norm(attention_map(10 * randn(4, 3, 5, 6), p), dim=1)
    torch.testing.assert_close(lengths, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_zero_when_equal(randn, mode):
    feature = randn(3, 4, 5, 6, grad=True)
    loss = at_loss(feature, feature.detach(), mode=mode)
    loss.backward()
    assert loss.item() == 0.0
    assert not feature.grad.any()


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("mode", MODES)
def test_scale_sign_and_order_of_channels_do_not_count(randn, mode, p):
    student, teacher = randn(3, 4, 5, 6), randn(3, 7, 5, 6)
    other = -5.0 * student[:, torch.randperm(4)]
    torch.testing.assert_close(at_loss(other, teacher, p, mode), at_loss(student, teacher, p, mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_faint_map_counts_fully_unless_its_energy_is_below_the_epsilon(randn, mode):
    student, teacher = randn(3, 4, 5, 6), randn(3, 7, 5, 6)
    full = at_loss(student, teacher, mode=mode)
    torch.testing.assert_close(at_loss(1e-4 * student, teacher, mode=mode), full)
    faint = 1e-7 * student
    assert at_loss(faint, teacher, mode=mode) > full + 0.001
    expected = slow_at(faint, teacher, 2, mode)
    assert at_loss(faint, teacher, mode=mode).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("sizes", ["equal", "each larger on one axis"])
def test_gradcheck(randn, sizes, p, mode):
    size_s, size_t = SIZES[sizes]
    student, teacher = randn(2, 3, *size_s, grad=True), randn(2, 4, *size_t)
    assert torch.autograd.gradcheck(lambda s: at_loss(s, teacher, p, mode), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", EXPONENTS)
def test_an_all_zero_map_has_no_attention_and_a_zero_gradient(randn, p, mode, dtype):
    student, teacher = torch.zeros(3, 4, 2, 5, dtype=dtype), randn(3, 4, 2, 5, dtype=dtype)
    teacher[2] = 0
    assert not attention_map(student, p).any()
    student.requires_grad_()
    loss = at_loss(student, teacher, p, mode)
    loss.backward()
    # Two of three teacher maps have length 1, the third agrees with the student.
    expected = 2 / 3 if mode == "paper" else 2 / 30
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not student.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size_s", "size_t"), [((1, 1), (1, 1)), ((1, 6), (4, 1))], ids=str)
def test_a_single_cell_teaches_nothing_and_is_reported_once(randn, caplog, mode, size_s, size_t):
    loss = ATLoss(mode=mode)
    single, normal = randn(2, 3, *size_s, grad=True), randn(2, 3, 4, 4)
    students, teachers = [normal, single], [randn(2, 3, 4, 4), randn(2, 5, *size_t)]
    with caplog.at_level(logging.WARNING):
        value = loss(students, teachers)
        value.backward()
        loss(students, teachers)
    torch.testing.assert_close(value, at_loss(normal, teachers[0], mode=mode))
    assert not single.grad.any()
    (record,) = caplog.records
    message = record.getMessage()
    assert "tap 1 is compared at 1x1" in message
    assert str(tuple(single.shape)) in message
    assert str(tuple(teachers[1].shape)) in message


def test_a_row_of_cells_is_not_reported(randn, caplog):
    assert ATLoss()([randn(2, 3, 1, 6)], [randn(2, 3, 1, 6)]) > 0
    assert not caplog.records


@pytest.mark.parametrize("mode", MODES)
def test_empty_stays_in_graph(randn, mode):
    student = randn(0, 3, 4, 4, grad=True)
    loss = ATLoss(mode=mode)([student], [randn(0, 5, 8, 8)])
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3, 4, 4), (3, 3, 4, 4)), ((2, 3, 4, 4), (2, 3)), ((2, 10), (2, 10))],
    ids=str,
)
def test_shape_error_names_both_shapes(randn, refuses, student, teacher):
    with refuses(f"student {student}, teacher {teacher}"):
        at_loss(randn(*student), randn(*teacher))


def test_attention_needs_a_map(randn, refuses):
    with refuses("maps [N, C, H, W]", "(2, 10)"):
        attention_map(randn(2, 10))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_computed_in_float32(randn, half, mode):
    # 300 squared exceeds what float16 can hold.
    student, teacher = 300 * randn(2, 3, 4, 6), 300 * randn(2, 5, 2, 3)
    student, teacher = student.to(half).requires_grad_(), teacher.to(half)
    loss = at_loss(student, teacher, mode=mode)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.equal(loss, at_loss(student.float(), teacher.float(), mode=mode))
    loss.backward()
    assert student.grad.dtype == half
    assert attention_map(student).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(randn, mode):
    student, teacher = randn(2, 3, 4, 6).float(), randn(2, 5, 2, 3).float()
    expected = at_loss(student, teacher, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(at_loss(student, teacher, mode=mode), expected)


def test_float64_passes_through(randn):
    assert at_loss(randn(2, 3, 4, 4), randn(2, 3, 4, 4)).dtype == torch.float64


def test_non_contiguous_input_gives_the_same_loss(randn):
    student = randn(2, 4, 6, 3).permute(0, 3, 1, 2)
    teacher = randn(2, 5, 8, 12)[:, :, ::2, ::2]
    assert not student.is_contiguous()
    expected = at_loss(student.contiguous(), teacher.contiguous())
    torch.testing.assert_close(at_loss(student, teacher), expected)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_the_teacher(randn, mode):
    student, teacher = randn(2, 3, 4, 4, grad=True), randn(2, 5, 8, 8, grad=True)
    at_loss(student, teacher, mode=mode).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.5}, "exponent p of at least 1; received 0.5"),
        ({"p": float("nan")}, "at least 1; received nan"),
        ({"mode": "papers"}, "received 'papers'; remedy: did you mean 'paper'"),
    ],
)
def test_bad_arguments_are_refused_by_function_and_module(randn, refuses, arguments, message):
    with refuses(message):
        at_loss(randn(2, 3, 4, 4), randn(2, 3, 4, 4), **arguments)
    with refuses(message):
        ATLoss(**arguments)


def test_lists_of_different_length_are_refused(randn, refuses):
    with refuses("received 2 student and 1 teacher tensors"):
        ATLoss()([randn(2, 3, 4, 4)] * 2, [randn(2, 3, 4, 4)])


def test_any_widths_and_sizes_can_be_tapped():
    assert ATLoss.tap_arguments([TapSpec(3, 8)], [TapSpec(64, size=(4, 4))], {}) == {}
    assert not list(ATLoss().parameters())
