"""FSP: flow between the layers of a network."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from kd_det import Distiller
from kd_det.losses import FSPLoss, TapSpec, fsp_loss, fsp_matrix
from tests import slow

POOLS = ["max", "avg"]
REDUCTIONS = ["frobenius", "mean"]
VARIANTS = list(product(POOLS, REDUCTIONS))
# Sizes of the first and the second map of a pair.
SIZES = {
    "equal": ((4, 4), (4, 4)),
    "single cells": ((1, 1), (1, 1)),
    "first larger": ((8, 8), (4, 4)),
    "second larger": ((3, 2), (6, 8)),
    "uneven bins": ((7, 11), (3, 4)),
    "each larger on one axis": ((6, 5), (4, 9)),
}


def slow_pool(x, size, pool):
    """The maximum or the average of each bin, whose edges are rounded outwards."""
    height, width = x.shape[2:]
    y = np.zeros((*x.shape[:2], *size))
    for n, c, i, j in np.ndindex(*y.shape):
        rows = range(i * height // size[0], -(-(i + 1) * height // size[0]))
        columns = range(j * width // size[1], -(-(j + 1) * width // size[1]))
        cells = [x[n, c, r, q] for r, q in product(rows, columns)]
        y[n, c, i, j] = max(cells) if pool == "max" else sum(cells) / len(cells)
    return y


def slow_matrix(first, second, pool):
    first, second = slow.array(first), slow.array(second)
    height, width = np.minimum(first.shape[2:], second.shape[2:])
    first, second = (slow_pool(x, (height, width), pool) for x in (first, second))
    matrix = np.zeros((len(first), first.shape[1], second.shape[1]))
    for b, i, j in np.ndindex(*matrix.shape):
        cells = product(range(height), range(width))
        matrix[b, i, j] = sum(first[b, i, y, x] * second[b, j, y, x] for y, x in cells)
    return matrix / (height * width)


def slow_fsp(student, teacher, pool, reduction):
    difference = slow_matrix(*student, pool) - slow_matrix(*teacher, pool)
    total = sum(d * d for d in difference.flat)
    return total / (difference.size if reduction == "mean" else len(difference))


@pytest.fixture
def pair(randn):
    """``pair(sizes, widths=(3, 5), n=2, grad=False)``: the two maps of one network."""

    def make(sizes="equal", widths=(3, 5), n=2, grad=False):
        return [randn(n, c, *size, grad=grad) for c, size in zip(widths, SIZES[sizes], strict=True)]

    return make


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matrix_matches_slow_loop(pair, sizes, pool):
    first, second = pair(sizes)
    matrix = fsp_matrix(first, second, pool)
    assert matrix.shape == (2, 3, 5)
    np.testing.assert_allclose(matrix.numpy(), slow_matrix(first, second, pool), rtol=1e-12)


@pytest.mark.parametrize(("pool", "reduction"), VARIANTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_slow_loop(pair, sizes, pool, reduction):
    student, teacher = pair(sizes), pair("equal")
    expected = slow_fsp(student, teacher, pool, reduction)
    value = fsp_loss(*student, *teacher, pool, reduction).item()
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("pairs", "starts"), [("disjoint", [0, 2]), ("chain", [0, 1, 2])])
def test_pairs_are_summed(randn, pairs, starts):
    widths, sides = (2, 3, 4, 5), (8, 8, 4, 2)
    student, teacher = (
        [randn(2, c, side, side) for c, side in zip(widths, sides, strict=True)] for _ in range(2)
    )
    expected = sum(slow_fsp(student[i : i + 2], teacher[i : i + 2], "avg", "mean") for i in starts)
    loss = FSPLoss("avg", "mean", pairs)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_pair_divides_by_its_own_batch(pair, reduction):
    student, teacher = pair(n=1) + pair(n=4), pair(n=1) + pair(n=4)
    expected = sum(
        slow_fsp(student[i : i + 2], teacher[i : i + 2], "max", reduction) for i in (0, 2)
    )
    loss = FSPLoss(reduction=reduction)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_frobenius_is_the_mean_times_the_size_of_the_matrix(pair):
    maps = [*pair(), *pair()]
    frobenius, mean = (fsp_loss(*maps, reduction=reduction) for reduction in REDUCTIONS)
    torch.testing.assert_close(frobenius, mean * 3 * 5)


@pytest.mark.parametrize(("pool", "reduction"), VARIANTS)
def test_zero_when_equal(pair, pool, reduction):
    maps = pair("first larger")
    assert fsp_loss(*maps, *maps, pool, reduction).item() == 0.0


@pytest.mark.parametrize("pool", POOLS)
def test_exchanging_the_layers_transposes_the_matrix(pair, pool):
    first, second = pair("uneven bins")
    transposed = fsp_matrix(second, first, pool).transpose(1, 2)
    torch.testing.assert_close(fsp_matrix(first, second, pool), transposed)


def test_moving_both_maps_alike_changes_nothing(pair):
    first, second = pair("equal")
    rolled = fsp_matrix(first.roll(1, -1), second.roll(1, -1))
    torch.testing.assert_close(rolled, fsp_matrix(first, second))


@pytest.mark.parametrize(("pool", "reduction"), VARIANTS)
@pytest.mark.parametrize("sizes", ["equal", "uneven bins", "each larger on one axis"])
def test_gradcheck(pair, sizes, pool, reduction):
    student, teacher = pair(sizes, grad=True), pair("equal")
    assert torch.autograd.gradcheck(
        lambda a, b: fsp_loss(a, b, *teacher, pool, reduction), tuple(student)
    )


def test_gradcheck_where_chained_pairs_share_a_map(randn):
    student = tuple(randn(2, c, 3, 3, grad=True) for c in (2, 3, 2))
    teacher = [randn(2, c, 3, 3) for c in (2, 3, 2)]
    loss = FSPLoss(pairs="chain")
    assert torch.autograd.gradcheck(lambda *maps: loss(list(maps), teacher), student)


@pytest.mark.parametrize("adapt", [False, True])
def test_empty_stays_in_graph(pair, adapt):
    student, teacher = pair(n=0, grad=True), pair(n=0, widths=(7, 5) if adapt else (3, 5))
    loss = FSPLoss(adapt=adapt, student_channels=[3, 5], teacher_channels=[7, 5]).double()
    value = loss(student, teacher)
    assert value.item() == 0.0
    value.backward()
    for tensor in (*student, *loss.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_the_function_also_keeps_an_empty_batch_in_the_graph(pair):
    student = pair(n=0, grad=True)
    value = fsp_loss(*student, *pair(n=0))
    assert value.item() == 0.0
    value.backward()
    assert all(s.grad is not None for s in student)


def test_width_error_names_both_shapes(pair, refuses):
    with refuses("student (2, 3, 5), teacher (2, 3, 6)"):
        fsp_loss(*pair(), *pair(widths=(3, 6)))
    # One teacher sample would be broadcast over the batch in silence.
    with refuses("student (2, 3, 5), teacher (1, 3, 5)"):
        FSPLoss()(pair(), pair(n=1))


@pytest.mark.parametrize("second", [(3, 5, 4, 4), (2, 5)], ids=str)
def test_matrix_needs_two_maps_of_the_same_images(randn, refuses, second):
    with refuses(f"first (2, 3, 4, 4), second {second}"):
        fsp_matrix(randn(2, 3, 4, 4), randn(*second))


def test_sums_that_float16_cannot_hold(half):
    maps = [torch.full((2, 3, 56, 56), 30.0, dtype=half) for _ in range(2)]
    torch.testing.assert_close(fsp_matrix(*maps), torch.full((2, 3, 3), 900.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", ["equal", "first larger"])
def test_half_precision_is_computed_in_float32(pair, half, sizes):
    student = [x.to(half).detach().requires_grad_() for x in pair(sizes)]
    teacher = [x.to(half) for x in pair(sizes)]
    loss = fsp_loss(*student, *teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, fsp_loss(*(x.float() for x in [*student, *teacher])))
    loss.backward()
    assert all(s.grad.dtype == half for s in student)


def test_autocast_changes_nothing(pair):
    maps = [x.float() for x in [*pair(), *pair()]]
    expected = fsp_loss(*maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fsp_loss(*maps), expected)


def test_float64_passes_through(pair):
    assert fsp_loss(*pair(), *pair()).dtype == torch.float64


def test_non_contiguous_input_gives_the_same_loss(randn):
    student = [randn(2, 4, 6, c).permute(0, 3, 1, 2) for c in (3, 5)]
    teacher = [randn(2, c, 8, 12)[:, :, ::2, ::2] for c in (3, 5)]
    assert not student[0].is_contiguous()
    expected = fsp_loss(*(x.contiguous() for x in [*student, *teacher]))
    torch.testing.assert_close(fsp_loss(*student, *teacher), expected)


def test_no_gradient_reaches_the_teacher(pair):
    student, teacher = pair(grad=True), pair(grad=True)
    FSPLoss()(student, teacher).backward()
    assert all(s.grad.any() for s in student)
    assert all(t.grad is None for t in teacher)


# An adaptor for other widths


def test_adapted_matrix_is_a_linear_image_of_the_students(pair):
    student, teacher = pair(), pair(widths=(6, 4))
    loss = FSPLoss(adapt=True, student_channels=[3, 5], teacher_channels=[6, 4]).double()
    a, b = (slow.array(conv.weight)[:, :, 0, 0] for conv in loss.adaptors)
    difference = a @ slow_matrix(*student, "max") @ b.T - slow_matrix(*teacher, "max")
    expected = (difference**2).sum() / 2
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_equal_widths_are_not_adapted(pair):
    loss = FSPLoss(adapt=True, student_channels=[3, 5], teacher_channels=[3, 4]).double()
    assert [type(a) for a in loss.adaptors] == [nn.Identity, nn.Conv2d]
    assert not list(FSPLoss().parameters())


def test_gradcheck_with_adaptors(pair):
    student, teacher = pair("first larger", grad=True), pair(widths=(6, 4))
    loss = FSPLoss("avg", adapt=True, student_channels=[3, 5], teacher_channels=[6, 4]).double()
    names, parameters = zip(*loss.named_parameters(), strict=True)

    def call(first, second, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, state, ([first, second], teacher))

    assert torch.autograd.gradcheck(call, (*student, *parameters))


def test_adaptors_take_half_precision_maps(pair, half):
    student, teacher = [x.to(half) for x in pair()], [x.to(half) for x in pair(widths=(6, 5))]
    loss = FSPLoss(adapt=True, student_channels=[3, 5], teacher_channels=[6, 5])
    expected = loss([x.float() for x in student], [x.float() for x in teacher])
    assert torch.equal(loss(student, teacher), expected)


def test_adaptors_need_the_widths_they_were_built_for(pair, refuses):
    with refuses("student_channels None, teacher_channels [3]"):
        FSPLoss(adapt=True, teacher_channels=[3])
    with refuses("2 student and 1 teacher"):
        FSPLoss(adapt=True, student_channels=[3, 5], teacher_channels=[3])
    loss = FSPLoss(adapt=True, student_channels=[3, 5], teacher_channels=[6, 4]).double()
    with refuses("student maps with 3 channels", "(2, 9, 4, 4)"):
        loss(pair(widths=(9, 5)), pair(widths=(6, 4)))
    with refuses("received 4 student and 2 teacher"):
        loss(pair() + pair(), pair() + pair())


# What is refused, before training where the taps are known


def specs(*widths, **fixed):
    return [TapSpec(width, **fixed) for width in widths]


def test_widths_that_differ_are_refused_when_built(refuses):
    student, teacher = specs(16, 32), specs(16, 64)
    with refuses("student channels [16, 32], teacher channels [16, 64]", "ADAPT: True"):
        FSPLoss.tap_arguments(student, teacher, {})
    given = {"adapt": True}
    loss = FSPLoss(**given, **FSPLoss.tap_arguments(student, teacher, given))
    assert (loss.adaptors[1].in_channels, loss.adaptors[1].out_channels) == (32, 64)


@pytest.mark.parametrize(
    ("count", "pairs", "received"),
    [
        (3, "disjoint", "3 per network with pairs 'disjoint'"),
        (1, "disjoint", "1 per network with pairs 'disjoint'"),
        (1, "chain", "1 per network with pairs 'chain'"),
    ],
)
def test_taps_that_make_no_pairs_are_refused_when_built_and_when_called(
    randn, refuses, count, pairs, received
):
    taps = specs(*[8] * count)
    with refuses(received):
        FSPLoss.tap_arguments(taps, taps, {"pairs": pairs})
    maps = [randn(2, 8, 4, 4)] * count
    with refuses(received):
        FSPLoss(pairs=pairs)(maps, maps)


@pytest.mark.parametrize("known", ["size", "stride"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_pair_of_different_sizes_is_refused_when_built_if_it_may_not_be_pooled(
    refuses, side, known
):
    values = {"size": [(8, 6), (4, 3)], "stride": [8, 16]}[known]
    bad = [TapSpec(16, **{known: value}) for value in values]
    good = [TapSpec(16, **{known: values[0]})] * 2
    taps = (bad, good) if side == "student" else (good, bad)
    said = "sizes; received 8x6 and 4x3" if known == "size" else "strides; received 8 and 16"
    with refuses(f"{side} taps 0 and 1 of equal {said}", "RESIZE: True"):
        FSPLoss.tap_arguments(*taps, {"resize": False})
    assert FSPLoss.tap_arguments(*taps, {}) == {}
    assert FSPLoss.tap_arguments(good, good, {"resize": False}) == {}
    # Only maps of one pair are compared.
    sections = [*good, *[TapSpec(16, **{known: values[1]})] * 2]
    assert FSPLoss.tap_arguments(sections, sections, {"resize": False}) == {}


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_pair_of_different_sizes_is_refused_when_called_if_it_may_not_be_pooled(
    pair, refuses, side
):
    maps = {"student": pair("equal"), "teacher": pair("equal"), side: pair("uneven bins")}
    with refuses(f"{side} taps 0 and 1 of equal sizes; received 7x11 and 3x4"):
        FSPLoss(resize=False)(maps["student"], maps["teacher"])
    assert FSPLoss(resize=False)(pair("equal"), pair("single cells")) > 0


def test_a_config_is_refused_before_training(refuses):
    term = {"LOSS": "FSP", "TAPS": ["stem", "stage1", "stage2"]}
    taps = {"stem": TapSpec(16), "stage1": TapSpec(16), "stage2": TapSpec(32)}
    with refuses("3 per network"):
        Distiller({"fsp": term}, taps, taps)
    chain = {"fsp": {**term, "PAIRS": "chain"}}
    with refuses("student channels [16, 16, 32], teacher channels [16, 16, 64]"):
        Distiller(chain, taps, {**taps, "stage2": TapSpec(64)})
    assert isinstance(Distiller(chain, taps, taps).terms["fsp"], FSPLoss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "mean"}, "received 'mean'"),
        ({"reduction": "frobenus"}, "received 'frobenus'; remedy: did you mean 'frobenius'"),
    ],
)
def test_bad_arguments_are_refused_by_function_and_module(pair, refuses, arguments, message):
    with refuses(message):
        fsp_loss(*pair(), *pair(), **arguments)
    with refuses(message):
        FSPLoss(**arguments)


def test_unknown_pairs_are_refused(refuses):
    with refuses("received 'chained'; remedy: did you mean 'chain'"):
        FSPLoss(pairs="chained")


def test_lists_of_different_length_are_refused(pair, refuses):
    with refuses("received 4 student and 2 teacher tensors"):
        FSPLoss()(pair() + pair(), pair())
    with refuses("received 2 student and 4 teacher tensors"):
        FSPLoss.tap_arguments(specs(8, 8), specs(8, 8, 8, 8), {})
