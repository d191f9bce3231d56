"""FitNet: hints through a regressor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kd_det.core.adaptors import ConvAdaptor
from kd_det.core.errors import KDError
from kd_det.losses import FitNetLoss, TapSpec, hint_loss
from tests import slow

C_S, C_T = 3, 4
# How a student map of one size is brought to the teacher's, by row of the regressor's table.
SIZES = {
    "equal": ((3, 5), (3, 5)),
    "double": ((6, 8), (3, 4)),
    "half": ((2, 3), (4, 6)),
    "valid": ((5, 6), (2, 5)),
}


def build(size_s=None, size_t=None, relu=True):
    """A loss of one tap whose BatchNorm is not the identity."""
    sizes = ([size_s], [size_t]) if size_s else (None, None)
    loss = FitNetLoss([C_S], [C_T], *sizes, relu=relu).double()
    nn.init.normal_(loss.adaptors[0].bn.weight)
    nn.init.normal_(loss.adaptors[0].bn.bias)
    return loss


def slow_regressor(adaptor, x, row):
    weight, bias = slow.array(adaptor.conv.weight), slow.array(adaptor.conv.bias)
    if row == "double":
        x = slow.conv2d(x, weight, bias, stride=2, padding=1)
    elif row == "half":
        x = slow.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    else:
        x = slow.conv2d(x, weight, bias)
    x = slow.batch_norm(x, slow.array(adaptor.bn.weight), slow.array(adaptor.bn.bias))
    return np.maximum(x, 0) if adaptor.relu else x


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("row", SIZES)
def test_matches_slow_loop(randn, row, relu):
    size_s, size_t = SIZES[row]
    loss = build(size_s, size_t, relu)
    student, teacher = randn(2, C_S, *size_s), randn(2, C_T, *size_t)
    adapted = slow_regressor(loss.adaptors[0], slow.array(student), row)
    expected = slow.mean_square(adapted - slow.array(teacher))
    assert loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)


def test_without_sizes_the_adapted_map_is_resized_bilinearly(randn):
    loss = build(relu=False)
    student, teacher = randn(2, C_S, 5, 4), randn(2, C_T, 3, 7)
    adapted = slow_regressor(loss.adaptors[0], slow.array(student), "equal")
    expected = slow.mean_square(slow.bilinear(adapted, (3, 7)) - slow.array(teacher))
    assert loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)


def test_the_papers_form_is_half_the_squared_norm_per_sample(randn, refuses):
    student, teacher = randn(3, 4, 2, 5), randn(3, 4, 2, 5)
    expected = sum(0.5 * (s - t).norm() ** 2 for s, t in zip(student, teacher, strict=True)) / 3
    torch.testing.assert_close(hint_loss(student, teacher, "paper"), expected)
    mean, paper = (FitNetLoss([4], [4], reduction=r).double() for r in ("mean", "paper"))
    paper.load_state_dict(mean.state_dict())
    half_an_image = 4 * 2 * 5 / 2
    expected = mean([student], [teacher]) * half_an_image
    torch.testing.assert_close(paper([student], [teacher]), expected)
    with refuses("'sum'"):
        FitNetLoss([4], [4], reduction="sum")


def test_several_taps_are_summed(randn):
    loss = FitNetLoss([2, 3], [4, 5]).double()
    students, teachers = (
        [randn(2, 2, 4, 6), randn(2, 3, 2, 3)],
        [randn(2, 4, 4, 6), randn(2, 5, 2, 3)],
    )
    expected = sum(
        hint_loss(adaptor(s), t)
        for adaptor, s, t in zip(loss.adaptors, students, teachers, strict=True)
    )
    torch.testing.assert_close(loss(students, teachers), expected)


def test_zero_when_equal(randn):
    loss, student = build(), randn(2, C_S, 3, 5)
    assert loss([student], [loss.adaptors[0](student)]).item() == 0.0
    assert hint_loss(student, student).item() == 0.0


@pytest.mark.parametrize("row", SIZES)
def test_gradcheck(randn, row):
    size_s, size_t = SIZES[row]
    loss = build(size_s, size_t)
    names, parameters = zip(*loss.named_parameters(), strict=True)
    student, teacher = randn(2, C_S, *size_s, grad=True), randn(2, C_T, *size_t)

    def call(x, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, state, ([x], [teacher]))

    assert torch.autograd.gradcheck(call, (student, *parameters))


def test_empty_stays_in_graph(randn):
    loss, student = build(), randn(0, C_S, 3, 5, grad=True)
    value = loss([student], [randn(0, C_T, 3, 5)])
    assert value.item() == 0.0
    value.backward()
    for tensor in (student, *loss.parameters()):
        assert not tensor.grad.any()


def test_shape_error_names_both_shapes(randn):
    with pytest.raises(KDError, match=r"student \(2, 3, 4, 6\), teacher \(2, 3, 6, 4\)"):
        hint_loss(randn(2, 3, 4, 6), randn(2, 3, 6, 4))
    with pytest.raises(KDError, match=r"student \(2, 4, 3, 5\), teacher \(2, 9, 3, 5\)"):
        build()([randn(2, C_S, 3, 5)], [randn(2, 9, 3, 5)])


def test_student_width_is_checked_before_the_convolution(randn):
    with pytest.raises(KDError, match=r"student maps with 3 channels .* \(2, 9, 3, 5\); remedy"):
        build()([randn(2, 9, 3, 5)], [randn(2, C_T, 3, 5)])


def test_half_precision_is_computed_in_float32(half):
    # 300 squared exceeds what float16 can hold.
    student, teacher = torch.full((2, 3, 4, 6), 300.0, dtype=half), torch.zeros(2, 3, 4, 6).to(half)
    student.requires_grad_()
    value = hint_loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, hint_loss(student.float(), teacher.float()))
    value.backward()
    assert student.grad.dtype == half


def test_module_takes_half_precision_taps(randn, half):
    loss = build().float()
    student, teacher = randn(2, C_S, 3, 5).to(half), randn(2, C_T, 3, 5).to(half)
    assert torch.equal(loss([student], [teacher]), loss([student.float()], [teacher.float()]))


def test_autocast_does_not_lower_the_precision_of_the_error(randn):
    student, teacher = randn(2, 3, 4, 6, dtype=torch.float32), randn(2, 3, 4, 6).float()
    expected = hint_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hint_loss(student, teacher), expected)


def test_non_contiguous_input_gives_the_same_loss(randn):
    loss = build()
    student = randn(2, 3, 5, C_S).permute(0, 3, 1, 2)
    teacher = randn(2, C_T, 6, 10)[:, :, ::2, ::2]
    assert not student.is_contiguous()
    torch.testing.assert_close(
        loss([student], [teacher]), loss([student.contiguous()], [teacher.contiguous()])
    )


def test_no_gradient_reaches_the_teacher(randn):
    teacher = randn(2, C_T, 3, 5, grad=True)
    build()([randn(2, C_S, 3, 5, grad=True)], [teacher]).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("size_s", "size_t"),
    [
        ((8, 3), (4, 4)),  # the height alone looks like a stride of 2
        ((4, 3), (8, 4)),  # the height alone looks like a stride of 1/2
        ((3, 3), (4, 4)),
    ],
    ids=str,
)
def test_sizes_are_compared_on_both_axes(size_s, size_t):
    message = "student {}x{}, teacher {}x{}; remedy".format(*size_s, *size_t)
    with pytest.raises(KDError, match=message):
        FitNetLoss([C_S], [C_T], [size_s], [size_t])


def test_a_height_that_doubles_alone_is_bridged_to_the_exact_size(randn):
    # The references look at the height, take stride 2 and deliver 4x3 for this 4x4 teacher.
    adaptor = ConvAdaptor(C_S, C_T, (8, 6), (4, 4)).double()
    assert adaptor(randn(2, C_S, 8, 6)).shape == (2, C_T, 4, 4)


def test_one_value_per_channel_is_refused_in_training_only(randn):
    loss = build()
    student, teacher = [randn(1, C_S, 1, 1)], [randn(1, C_T, 1, 1)]
    with pytest.raises(KDError, match=r"expected more than one value per channel.*\(1, 4, 1, 1\)"):
        loss(student, teacher)
    assert torch.isfinite(loss.eval()(student, teacher))


def test_lists_of_different_length_are_refused(randn):
    with pytest.raises(KDError, match="received 1 student and 2 teacher tensors"):
        build()([randn(2, C_S, 3, 5)], [randn(2, C_T, 3, 5)] * 2)
    with pytest.raises(KDError, match="received 1 student and 2 teacher"):
        FitNetLoss([3], [4, 4])


def test_fixed_sizes_come_from_the_taps():
    student, teacher = [TapSpec(3, size=(8, 6))], [TapSpec(4, size=(4, 3))]
    given = FitNetLoss.tap_arguments(student, teacher, {})
    assert isinstance(FitNetLoss(**given).adaptors[0].conv, nn.Conv2d)
    assert FitNetLoss(**given).adaptors[0].conv.stride == (2, 2)


def test_taps_of_different_stride_are_refused():
    with pytest.raises(KDError, match="student stride 8, teacher stride 16; remedy"):
        FitNetLoss.tap_arguments([TapSpec(3, stride=8)], [TapSpec(4, stride=16)], {})
