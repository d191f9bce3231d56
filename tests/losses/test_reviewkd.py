"""ReviewKD: attention-based fusion and the hierarchical context loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kd_det.core.errors import KDError
from kd_det.losses import ReviewKDLoss, TapSpec, hcl_loss
from tests import slow

IN, MID, OUT = (2, 3, 4), 3, (3, 2, 4)
SIZES = [(5, 7), (3, 4), (2, 2)]
LARGER = [(9, 8), (5, 4), (2, 3)]  # teacher maps of another size


def build():
    loss = ReviewKDLoss(IN, OUT, MID).double()
    for module in loss.modules():
        if isinstance(module, nn.BatchNorm2d):  # not the identity
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return loss


def pyramids(randn, teacher_sizes=SIZES, images=2):
    student = [randn(images, c, *size, grad=True) for c, size in zip(IN, SIZES, strict=True)]
    teacher = [randn(images, c, *size) for c, size in zip(OUT, teacher_sizes, strict=True)]
    return student, teacher


def slow_hcl_level(student, teacher):
    difference = student - teacher
    numerator, denominator, weight = slow.mean_square(difference), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= difference.shape[2]:
            continue
        weight /= 2
        numerator += weight * slow.mean_square(slow.adaptive_avg_pool(difference, size))
        denominator += weight
    return numerator / denominator


def slow_fuse(loss, student, sizes):
    """Outputs by level, from the deepest level up."""
    outputs, residual = {}, None
    deepest = len(student) - 1
    for k, abf in enumerate(loss.abfs):
        level = deepest - k
        parameters = {name: slow.array(p) for name, p in abf.named_parameters()}
        x = slow.conv2d(slow.array(student[level]), parameters["conv1.0.weight"])
        x = slow.batch_norm(x, parameters["conv1.1.weight"], parameters["conv1.1.bias"])
        if level < deepest:
            y = slow.nearest(residual, x.shape[2:])
            joined = np.concatenate([x, y], axis=1)
            scores = slow.conv2d(
                joined, parameters["att_conv.0.weight"], parameters["att_conv.0.bias"]
            )
            attention = slow.sigmoid(scores)
            x = x * attention[:, 0:1] + y * attention[:, 1:2]
        x = residual = slow.nearest(x, sizes[level])
        x = slow.conv2d(x, parameters["conv2.0.weight"], padding=1)
        outputs[level] = slow.batch_norm(
            x, parameters["conv2.1.weight"], parameters["conv2.1.bias"]
        )
    return [outputs[level] for level in range(len(student))]


@pytest.mark.parametrize("sizes", [SIZES, LARGER], ids=["same size", "resized"])
def test_matches_slow_loop(randn, sizes):
    loss = build()
    student, teacher = pyramids(randn, sizes)
    fused = slow_fuse(loss, student, sizes)
    expected = sum(slow_hcl_level(f, slow.array(t)) for f, t in zip(fused, teacher, strict=True))
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5), (2, 3), (3, 7), (4, 2), (5, 3), (6, 9), (13, 11), (16, 16)], ids=str
)
def test_hcl_matches_slow_loop(randn, size):
    student, teacher = randn(2, 3, *size), randn(2, 3, *size)
    expected = slow_hcl_level(slow.array(student), slow.array(teacher))
    assert hcl_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("height", "weights"),
    [(1, 1.0), (2, 1.5), (3, 1.75), (4, 1.75), (5, 1.875), (16, 1.875)],
)
def test_hcl_uses_the_pool_sizes_below_the_height(height, weights):
    # Columns of alternating sign vanish in every pool, so only the first summand is left.
    student = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64).expand(1, 2, height, 16)
    loss = hcl_loss(student, torch.zeros_like(student))
    assert loss.item() == pytest.approx(1 / weights, rel=1e-12)


def test_hcl_of_a_list_is_the_sum_of_its_levels(randn):
    students, teachers = (
        [randn(2, 3, 6, 5), randn(2, 4, 3, 2)],
        [randn(2, 3, 6, 5), randn(2, 4, 3, 2)],
    )
    levels = [hcl_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(hcl_loss(students, teachers), sum(levels))


def test_zero_when_equal(randn):
    loss = build()
    student, _ = pyramids(randn)
    fused = loss.fuse(student, [torch.Size(size) for size in SIZES])
    assert loss(student, fused).item() == 0.0
    assert hcl_loss(fused, fused).item() == 0.0


@pytest.mark.parametrize("sizes", [SIZES, LARGER], ids=["same size", "resized"])
def test_gradcheck(randn, sizes):
    loss = build()
    student, teacher = pyramids(randn, sizes)
    names, parameters = zip(*loss.named_parameters(), strict=True)

    def call(*tensors):
        maps, values = list(tensors[: len(IN)]), tensors[len(IN) :]
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, state, (maps, teacher))

    assert torch.autograd.gradcheck(call, (*student, *parameters), fast_mode=True)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 3)], ids=str)
def test_hcl_gradcheck(randn, size):
    teacher = randn(2, 2, *size)
    assert torch.autograd.gradcheck(lambda s: hcl_loss(s, teacher), randn(2, 2, *size, grad=True))


def test_empty_stays_in_graph(randn):
    loss = build()
    student, teacher = pyramids(randn, images=0)
    value = loss(student, teacher)
    assert value.item() == 0.0
    value.backward()
    for tensor in (*student, *loss.parameters()):
        assert not tensor.grad.any()
    assert hcl_loss(student[0], randn(0, IN[0], *SIZES[0])).item() == 0.0


def test_shape_error_names_both_shapes(randn):
    student, teacher = pyramids(randn)
    teacher[1] = randn(2, 9, *SIZES[1])
    with pytest.raises(KDError, match=r"student \(2, 2, 3, 4\), teacher \(2, 9, 3, 4\)"):
        build()(student, teacher)
    with pytest.raises(KDError, match=r"student \(2, 3, 4, 6\), teacher \(2, 3, 6, 4\)"):
        hcl_loss(randn(2, 3, 4, 6), randn(2, 3, 6, 4))


def test_student_width_is_checked_before_the_fusion(randn):
    student, teacher = pyramids(randn)
    student[0] = randn(2, 9, *SIZES[0])
    with pytest.raises(KDError, match=r"student maps with 2 channels .* \(2, 9, 5, 7\)"):
        build()(student, teacher)


def test_half_precision_is_computed_in_float32(half):
    student = torch.full((2, 3, 5, 6), 300.0, dtype=half, requires_grad=True)
    teacher = torch.zeros_like(student)
    loss = hcl_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, hcl_loss(student.float(), teacher.float()))
    loss.backward()
    assert student.grad.dtype == half


def test_module_takes_half_precision_taps(randn, half):
    loss = build().float()
    student, teacher = ([x.to(half) for x in maps] for maps in pyramids(randn))
    expected = loss([x.float() for x in student], [x.float() for x in teacher])
    assert torch.equal(loss(student, teacher), expected)


def test_autocast_does_not_lower_the_precision_of_the_error(randn):
    student, teacher = randn(2, 3, 6, 5).float(), randn(2, 3, 6, 5).float()
    expected = hcl_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hcl_loss(student, teacher), expected)


def test_non_contiguous_input_gives_the_same_loss(randn):
    loss = build()
    student, teacher = ([x.transpose(2, 3) for x in maps] for maps in pyramids(randn))
    assert not student[0].is_contiguous()
    expected = loss([x.contiguous() for x in student], [x.contiguous() for x in teacher])
    torch.testing.assert_close(loss(student, teacher), expected)


def test_no_gradient_reaches_the_teacher(randn):
    student, teacher = pyramids(randn)
    for tensor in teacher:
        tensor.requires_grad_()
    build()(student, teacher).backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_first_abf_is_the_deepest_level_and_has_no_attention():
    abfs = build().abfs
    assert [abf.conv1[0].in_channels for abf in abfs] == list(reversed(IN))
    assert [abf.conv2[0].out_channels for abf in abfs] == list(reversed(OUT))
    assert [abf.att_conv is None for abf in abfs] == [True, False, False]


@pytest.mark.parametrize("level", range(len(IN)))
def test_each_level_is_taught_by_itself_and_deeper_levels(randn, level):
    student, _ = pyramids(randn)
    fused = build().fuse(student, [torch.Size(size) for size in SIZES])
    grads = torch.autograd.grad(fused[level].square().sum(), student, allow_unused=True)
    assert [grad is not None for grad in grads] == [i >= level for i in range(len(IN))]


def test_detection_adaptor_has_the_released_parameters():
    loss = ReviewKDLoss([256] * 5, [256] * 5)
    counts = [sum(p.numel() for p in abf.parameters()) for abf in loss.abfs]
    assert counts == [656_384] + [657_410] * 4
    assert sum(counts) == 3_286_024


def test_state_keys_follow_the_released_code():
    keys = {name for name, _ in ReviewKDLoss([4, 8], [4, 8]).named_parameters()}
    level = {"conv1.0.weight", "conv1.1.weight", "conv1.1.bias"}
    level |= {"conv2.0.weight", "conv2.1.weight", "conv2.1.bias"}
    attention = {"att_conv.0.weight", "att_conv.0.bias"}
    assert keys == {f"abfs.0.{k}" for k in level} | {f"abfs.1.{k}" for k in level | attention}


@pytest.mark.parametrize(("deepest", "mid"), [(64, 64), (512, 512), (2048, 512)])
def test_mid_width_is_the_deepest_student_width_up_to_512(deepest, mid):
    assert ReviewKDLoss([16, deepest], [8, 8]).abfs[0].conv1[0].out_channels == mid


def test_one_value_per_channel_is_refused_in_training_only(randn):
    loss = ReviewKDLoss([4, 8], [4, 8]).double()
    maps = [randn(1, 4, 4, 4), randn(1, 8, 1, 1)]
    with pytest.raises(KDError, match=r"expected more than one value per channel.*\(1, 8, 1, 1\)"):
        loss(maps, maps)
    assert torch.isfinite(loss.eval()(maps, maps))


def test_lists_of_different_length_are_refused(randn):
    student, teacher = pyramids(randn)
    with pytest.raises(KDError, match="received 3 student and 2 teacher tensors"):
        build()(student, teacher[:2])
    with pytest.raises(KDError, match="received 2 student and 3 teacher tensors"):
        build()(student[:2], teacher[:2])
    with pytest.raises(KDError, match="received 3 student and 2 teacher tensors"):
        hcl_loss(teacher, teacher[:2])


def test_a_vector_is_a_level_of_one_position(randn):
    loss = ReviewKDLoss([4, 6, 6], [4, 6, 7]).double()
    student = [randn(3, 4, 4, 4), randn(3, 6, 2, 2), randn(3, 6)]
    teacher = [randn(3, 4, 4, 4), randn(3, 6, 2, 2), randn(3, 7)]
    maps = [[*side[:2], side[2][:, :, None, None]] for side in (student, teacher)]
    assert torch.equal(loss(student, teacher), loss(*maps))
    specs = [TapSpec(4, 8), TapSpec(6, 16), TapSpec(6)]
    assert ReviewKDLoss.tap_arguments(specs, specs, {})["in_channels"] == [4, 6, 6]


def test_the_only_reduction_is_the_mean(refuses):
    with refuses("'sum'", "mean"):
        ReviewKDLoss([4], [4], reduction="sum")


def test_mid_width_must_be_positive():
    with pytest.raises(KDError, match="mid_channels of at least 1; received 0; remedy"):
        ReviewKDLoss([4], [4], 0)


def specs(*strides):
    return [TapSpec(256, stride=stride) for stride in strides]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (specs(8, 4), specs(8, 4), r"from shallow to deep; received strides \[8, 4\]"),
        (specs(4, 8), specs(4, 16), "student stride 8, teacher stride 16"),
    ],
)
def test_levels_out_of_order_or_of_other_strides_are_refused(student, teacher, message):
    with pytest.raises(KDError, match=message):
        ReviewKDLoss.tap_arguments(student, teacher, {})
