"""MHGD: the transfer of the teacher's graphs."""

from __future__ import annotations

import logging

import pytest
import torch

from kd_det import Distiller
from kd_det.losses import MHGDLoss, TapSpec, mhgd_loss
from kd_det.losses.mhgd.singular import student_vectors, teacher_vectors
from tests.losses.mhgd.cases import (
    CHANNELS,
    OTHER_SIZES,
    SIZES,
    build,
    pyramid,
    slow_similarity,
    slow_transfer,
)
from tests.slow import array

VARIANTS = [{}, {"reduction": "mean"}, {"heads": 1}, {"vectors": 1}]


@pytest.mark.parametrize("heads", [1, 4])
def test_transfer_matches_slow_loop(randn, heads):
    student, teacher = 2 * randn(heads, 5, 5), 2 * randn(heads, 5, 5)
    expected = slow_transfer(array(student), array(teacher))
    assert mhgd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    mean = mhgd_loss(student, teacher, "mean").item()
    assert mean == pytest.approx(expected / (heads * 5), rel=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"heads": 1}, {"vectors": 2}], ids=str)
def test_loss_on_maps_matches_slow_loop(randn, arguments):
    loss = build(**arguments)
    student, teacher = pyramid(randn), pyramid(randn, OTHER_SIZES)
    targets = [teacher_vectors(t) for t in teacher]
    ours = [
        student_vectors(s, t, arguments.get("vectors", 4))
        for s, t in zip(student, targets, strict=True)
    ]
    expected = 0.0
    for m, pair in enumerate(loss.network.pairs):
        graphs = [
            slow_similarity(pair, array(rows[m]), array(rows[m + 1])) for rows in (ours, targets)
        ]
        expected += slow_transfer(*graphs)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_zero_when_equal(randn, arguments):
    maps = pyramid(randn)
    assert abs(build(**arguments)(maps, maps).item()) < 1e-12


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_positive_when_different(randn, arguments):
    assert build(**arguments)(pyramid(randn), pyramid(randn)) > 1e-3


@pytest.mark.parametrize("arguments", [*VARIANTS, {"max_nodes": 3}], ids=str)
def test_gradcheck(randn, arguments):
    loss, teacher = build(**arguments), pyramid(randn, OTHER_SIZES, samples=4)
    student = pyramid(randn, [(2, 2), (1, 3), (1, 2)], samples=4, grad=True)
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher), student)


def test_gradient_reaches_both_ends_of_every_pair(randn):
    loss = build()
    student = pyramid(randn, grad=True)
    loss(student, pyramid(randn)).backward()
    assert all(s.grad.flatten(1).norm(dim=1).min() > 0 for s in student)


def test_no_gradient_reaches_the_teacher(randn):
    student, teacher = pyramid(randn, grad=True), pyramid(randn, grad=True)
    loss = build()
    loss(student, teacher).backward()
    loss.start_pre_stage()
    loss.pre_stage_loss(teacher).backward()
    assert all(t.grad is None for t in teacher)


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("student_channels", [CHANNELS, (2, 4, 5)], ids=["same", "adapted"])
@pytest.mark.parametrize("gather", [False, True])
def test_less_than_two_samples_warn_once_and_stay_in_the_graph(
    randn, caplog, samples, student_channels, gather
):
    loss = MHGDLoss(student_channels, CHANNELS, gather=gather).double()
    loss.finish_pre_stage()
    student = pyramid(randn, samples=samples, channels=student_channels, grad=True)
    teacher = pyramid(randn, samples=samples)
    with caplog.at_level(logging.WARNING):
        values = [loss(student, teacher) for _ in range(3)]
    assert [value.item() for value in values] == [0.0] * 3
    values[0].backward()
    trained = [*student, *loss.adaptors.parameters()]
    assert all(tensor.grad is not None for tensor in trained)
    assert len([r for r in caplog.records if "fewer than two samples" in r.message]) == 1


@pytest.mark.parametrize("sizes", [SIZES, [(), (), ()]], ids=["maps", "rows"])
def test_other_widths_are_adapted_and_the_adaptor_learns_with_the_student(randn, sizes):
    loss = MHGDLoss((2, 4, 7), CHANNELS, heads=2).double()
    loss.finish_pre_stage()
    student = pyramid(randn, sizes, channels=(2, 4, 7), grad=True)
    loss(student, pyramid(randn, sizes)).backward()
    learning = [name for name, p in loss.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in learning} == {"adaptors"}
    assert {name.split(".")[1] for name in learning} == {"0", "2"}
    weights = [p for name, p in loss.named_parameters() if name.endswith("conv.weight")]
    assert all(p.grad.abs().sum() > 0 for p in weights)
    assert all(s.grad is not None for s in student)


def test_an_adaptor_is_a_linear_map_and_batch_norm_per_pixel(randn):
    loss = MHGDLoss((2, 4, 6), CHANNELS, heads=2).double()
    loss.finish_pre_stage()
    student, teacher = pyramid(randn, channels=(2, 4, 6)), pyramid(randn)
    weight = loss.adaptors[0].conv.weight[:, :, 0, 0]
    adapted = torch.einsum("ck,nkhw->nchw", weight, student[0])  # BatchNorm removes the bias
    mean = adapted.mean(dim=(0, 2, 3), keepdim=True)
    deviation = (adapted.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    same_width = MHGDLoss(CHANNELS, CHANNELS, heads=2).double()
    same_width.load_pre_stage_state(loss.pre_stage_state())
    expected = same_width([(adapted - mean) / deviation, *student[1:]], teacher)
    torch.testing.assert_close(loss(student, teacher), expected)


def test_max_nodes_takes_the_same_evenly_spaced_samples_of_both_sides(randn):
    loss = build()
    limited = build(max_nodes=3)
    limited.load_state_dict(loss.state_dict())
    student, teacher = pyramid(randn, samples=8), pyramid(randn, samples=8)
    rows = [0, 2, 5]
    expected = loss([s[rows] for s in student], [t[rows] for t in teacher])
    torch.testing.assert_close(limited(student, teacher), expected)
    few = pyramid(randn, samples=3), pyramid(randn, samples=3)
    torch.testing.assert_close(limited(*few), loss(*few))


def test_half_precision_is_computed_in_float32(randn, half):
    loss = build().float()
    student = [s.to(half).requires_grad_() for s in pyramid(randn)]
    teacher = [t.to(half) for t in pyramid(randn)]
    value = loss(student, teacher)
    expected = loss([s.float() for s in student], [t.float() for t in teacher])
    assert torch.equal(value, expected)
    value.backward()
    assert student[0].grad.dtype == half


def test_autocast_changes_nothing(randn):
    loss = build().float()
    student, teacher = ([m.float() for m in pyramid(randn)] for _ in range(2))
    expected, training = loss(student, teacher), loss.pre_stage_loss(teacher)
    loss.network.draws.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), loss(student, teacher))
        loss.network.draws.zero_()
        assert torch.equal(loss.pre_stage_loss(teacher), training)
    assert expected.dtype == torch.float32


def test_non_contiguous_maps_give_the_same_loss(randn):
    loss, student, teacher = build(), pyramid(randn), pyramid(randn)
    turned = [s.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for s in student]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(loss(turned, teacher), loss(student, teacher))


def test_saturated_similarities_stay_finite():
    student = torch.tensor([[[1e6, -1e6], [0.0, 50.0]]], requires_grad=True)
    value = mhgd_loss(student, -student.detach())
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_a_config_needs_only_taps(randn):
    specs = {name: TapSpec(c) for name, c in zip(("c2", "c3", "c4"), CHANNELS, strict=True)}
    terms = {"graph": {"LOSS": "MHGD", "TAPS": list(specs), "CLIP": "task_norm"}}
    distiller = Distiller(terms, specs, specs).double()
    distiller.terms["graph"].finish_pre_stage()
    student, teacher = (dict(zip(specs, pyramid(randn), strict=True)) for _ in range(2))
    direct = distiller.terms["graph"](list(student.values()), list(teacher.values()))
    assert torch.equal(distiller(student, teacher)["graph"], direct)
    assert distiller.specs[0].clip == "task_norm"
    assert not any(p.requires_grad for p in distiller.parameters())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (([3], [3]), ["a number of taps of at least 2", "received 1", "a front and a back one"]),
        (([3, 4], [3, 4, 5]), ["2 student and 3 teacher"]),
        (([3, 4], [3, 4], 0), ["heads of at least 1", "received 0"]),
        (([3, 4], [3, 4], 8, 0), ["vectors of at least 1"]),
        (([3, 4], [3, 4], 8, 4, "average"), ["'sum', 'mean'", "'average'"]),
        (([3, 4], [3, 4], 8, 4, "sum", False, -1), ["max_nodes of at least 0", "received -1"]),
    ],
)
def test_bad_arguments_are_refused(refuses, arguments, parts):
    with refuses(*parts):
        MHGDLoss(*arguments)


def test_bad_maps_are_refused_naming_both_sides(randn, refuses):
    loss, maps = build(), pyramid(randn)
    with refuses("3 student and 2 teacher tensors"):
        loss(maps, maps[:2])
    with refuses("2 student and 3 teacher tensors"):
        loss(maps[:2], maps[:2])
    with refuses("teacher maps with 3 channels", "(5, 4, 3, 3)"):
        loss(maps, maps[1:] + maps[:1])
    with refuses("5 of the student, 4 of the teacher"):
        loss(maps, pyramid(randn, samples=4))
    with refuses("the same samples at every teacher tap", "[5, 5, 2]"):
        loss(maps, [*maps[:2], maps[2][:2]])
    with refuses("student (2, 3, 3), teacher (2, 4, 4)"):
        mhgd_loss(randn(2, 3, 3), randn(2, 4, 4))
    with refuses("did you mean 'mean'"):
        mhgd_loss(randn(2, 3, 3), randn(2, 3, 3), "means")
