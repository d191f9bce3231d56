"""KD: softened logits."""

from __future__ import annotations

import math

import pytest
import torch

from kd_det.core.errors import KDError
from kd_det.losses import KDLoss, TapSpec, kd_loss

SIGMOID = {"activation": "sigmoid"}
VARIANTS = [
    {},
    {"reduction": "mean", "temperature": 4.0},
    {"reduction": "batchmean", **SIGMOID},
    {"reduction": "mean", "temperature": 2.0, **SIGMOID},
    {"reduction": "foreground", **SIGMOID},
]


def slow_softmax(row):
    exponentials = [math.exp(value) for value in row]
    return [e / sum(exponentials) for e in exponentials]


def slow_softmax_kl(student, teacher, temperature):
    """The sum over rows of the KL divergence between softened predictions."""
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        q = slow_softmax([z / temperature for z in z_s])
        p = slow_softmax([z / temperature for z in z_t])
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total


def slow_bernoulli_kl(student, teacher, temperature):
    total = 0.0
    for z_s, z_t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        q = 1 / (1 + math.exp(-z_s / temperature))
        p = 1 / (1 + math.exp(-z_t / temperature))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(5, 3), (1, 7), (4, 1)])
def test_matches_slow_loop(randn, rows, classes, temperature):
    student, teacher = 3 * randn(rows, classes), 3 * randn(rows, classes)
    expected = temperature**2 * slow_softmax_kl(student, teacher, temperature) / rows
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 6)], ids=str)
def test_sigmoid_matches_slow_loop(randn, shape):
    student, teacher = 2 * randn(*shape), 2 * randn(*shape)
    expected = 2.0**2 * slow_bernoulli_kl(student, teacher, 2.0) / shape[0]
    loss = kd_loss(student, teacher, 2.0, **SIGMOID)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_several_pairs_are_averaged(randn):
    students, teachers = [randn(5, 3), randn(2, 3)], [randn(5, 3), randn(2, 3)]
    pairs = [kd_loss(s, t, 2.0) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(KDLoss(temperature=2.0)(students, teachers), sum(pairs) / 2)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_zero_when_equal(randn, arguments):
    logits = randn(5, 3)
    assert abs(kd_loss(logits, logits, **arguments).item()) < 1e-14


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_positive_when_different(randn, arguments):
    assert kd_loss(randn(5, 3), randn(5, 3), **arguments) > 0


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_gradcheck(randn, arguments):
    student, teacher = randn(4, 3, grad=True), randn(4, 3)
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, **arguments), student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_temperature_times_difference_of_probabilities(randn, temperature):
    student, teacher = randn(6, 5, grad=True), randn(6, 5)
    kd_loss(student, teacher, temperature).backward()
    q = torch.softmax(student.detach() / temperature, dim=1)
    p = torch.softmax(teacher / temperature, dim=1)
    torch.testing.assert_close(student.grad, temperature * (q - p) / 6)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_empty_stays_in_graph(randn, arguments):
    student = randn(0, 6, grad=True)
    loss = KDLoss(**arguments)([student], [randn(0, 6)])
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None


def test_an_empty_stage_leaves_the_others(randn):
    student = [randn(0, 6, grad=True), randn(3, 6, grad=True)]
    teacher = [randn(0, 6), randn(3, 6)]
    loss = KDLoss()(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, kd_loss(student[1], teacher[1]) / 2)
    assert all(s.grad is not None for s in student)


def test_shape_error_names_both_shapes(randn):
    with pytest.raises(KDError, match=r"student \(4, 3\), teacher \(4, 5\)"):
        kd_loss(randn(4, 3), randn(4, 5))


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_half_precision_is_computed_in_float32(randn, half, arguments):
    student, teacher = randn(4, 3, dtype=torch.float32), randn(4, 3, dtype=torch.float32)
    student, teacher = student.to(half).requires_grad_(), teacher.to(half)
    loss = kd_loss(student, teacher, **arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd_loss(student.float(), teacher.float(), **arguments))
    loss.backward()
    assert student.grad.dtype == half


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_autocast_changes_nothing(randn, arguments):
    student, teacher = randn(4, 3, dtype=torch.float32), randn(4, 3, dtype=torch.float32)
    expected = kd_loss(student, teacher, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kd_loss(student, teacher, **arguments), expected)


def test_float64_passes_through(randn):
    assert kd_loss(randn(4, 3), randn(4, 3)).dtype == torch.float64


def test_non_contiguous_input_gives_the_same_loss(randn):
    student, teacher = randn(3, 5).t(), randn(10, 6)[::2, ::2]
    assert not student.is_contiguous()
    expected = kd_loss(student.contiguous(), teacher.contiguous())
    torch.testing.assert_close(kd_loss(student, teacher), expected)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_no_gradient_reaches_the_teacher(randn, arguments):
    student, teacher = randn(4, 3, grad=True), randn(4, 3, grad=True)
    kd_loss(student, teacher, **arguments).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_opposite_certainties_cost_their_distance(temperature):
    student = torch.tensor([[0.0, 1e4, 0.0]], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[1e4, 0.0, 0.0]]), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(temperature * 1e4, rel=1e-6)
    expected = temperature * torch.tensor([[-1.0, 1.0, 0.0]])
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_extreme_logits_stay_finite(arguments):
    student = torch.tensor([[1e4, -1e4, 0.0], [-3e4, 3e4, 1.0]], requires_grad=True)
    loss = kd_loss(student, -student.detach(), **arguments)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_element_mean_is_batchmean_over_the_classes(randn, activation):
    student, teacher = randn(4, 7), randn(4, 7)
    mean, batchmean = (
        kd_loss(student, teacher, 2.0, reduction, activation) for reduction in ("mean", "batchmean")
    )
    torch.testing.assert_close(mean * 7, batchmean)


def test_foreground_divides_by_the_expected_foreground_rows(randn):
    student, teacher = randn(6, 4), randn(6, 4)
    expected_rows = sum(1 / (1 + math.exp(-max(row))) for row in teacher.tolist())
    assert expected_rows > 1
    loss = kd_loss(student, teacher, 1.0, "foreground", "sigmoid")
    batchmean = kd_loss(student, teacher, 1.0, "batchmean", "sigmoid")
    torch.testing.assert_close(loss * expected_rows, batchmean * 6)


def test_foreground_divides_by_one_where_the_teacher_sees_nothing(randn):
    student, teacher = randn(6, 4), randn(6, 4) - 20
    loss = kd_loss(student, teacher, 1.0, "foreground", "sigmoid")
    total = kd_loss(student, teacher, 1.0, "batchmean", "sigmoid") * 6
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "expected KD to get a temperature above 0; received 0.0; remedy"),
        ({"temperature": float("nan")}, "above 0; received nan"),
        ({"reduction": "batch_mean"}, "received 'batch_mean'; remedy: did you mean 'batchmean'"),
        ({"activation": "sigmoids"}, "received 'sigmoids'; remedy: did you mean 'sigmoid'"),
        ({"reduction": "foreground"}, "with activation 'sigmoid'; received activation 'softmax'"),
    ],
)
def test_bad_arguments_are_refused_by_function_and_module(randn, arguments, message):
    with pytest.raises(KDError, match=message):
        kd_loss(randn(4, 3), randn(4, 3), **arguments)
    with pytest.raises(KDError, match=message):
        KDLoss(**arguments)


def test_lists_of_different_length_are_refused(randn):
    with pytest.raises(KDError, match="received 2 student and 1 teacher tensors; remedy"):
        KDLoss()([randn(4, 3), randn(4, 3)], [randn(4, 3)])


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (TapSpec(81), TapSpec(21), "student 81 logits, teacher 21 logits"),
        (TapSpec(3, size=(28, 28)), TapSpec(3, size=(14, 14)), "at 28x28, teacher 3 logits at 14"),
    ],
)
def test_heads_of_different_classes_are_refused_when_built(student, teacher, message):
    with pytest.raises(KDError, match=message):
        KDLoss.tap_arguments([student], [teacher], {})
