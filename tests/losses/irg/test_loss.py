"""IRG, IRG-t and MTK: the weighted sums over taps, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch

from kd_det import Distiller
from kd_det.losses import (
    IRGLoss,
    IRGMovementLoss,
    MTKLoss,
    TapSpec,
    edge_loss,
    edge_matrix,
    movement_loss,
    vertex_loss,
)
from kd_det.losses.irg import loss as irg

EITHER = pytest.mark.parametrize("reduction", ["caffe", "mean"])


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def mtk_inputs(randn, **kwargs):
    """Logits, two student layers for one teacher layer, and one movement."""
    shapes_s = [(5, 3), (5, 4), (5, 2, 3, 3), (5, 2, 4, 4), (5, 2, 2, 2)]
    student = [randn(*shape, **kwargs) for shape in shapes_s]
    last = randn(5, 6, 2, 2)
    return student, [randn(5, 3), last, last, randn(5, 7), randn(5, 7)]


@EITHER
@pytest.mark.parametrize("detach_max", [True, False])
def test_irg_is_the_weighted_sum_of_vertices_and_edges(randn, reduction, detach_max):
    student, teacher = (taps[:3] for taps in mtk_inputs(randn, grad=True))
    loss = IRGLoss(0.5, 0.25, reduction=reduction, detach_max=detach_max)(student, teacher)
    expected = 0.5 * vertex_loss(student[0], teacher[0], reduction) + 0.25 * sum(
        edge_loss(s, t, reduction, detach_max=detach_max)
        for s, t in zip(student[1:], teacher[1:], strict=True)
    )
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@EITHER
@pytest.mark.parametrize("detach_max", [True, False])
def test_irg_t_is_the_weighted_sum_over_pairs(randn, reduction, detach_max):
    student = [randn(5, width, grad=True) for width in (3, 3, 2, 2)]
    teacher = [randn(5, width) for width in (6, 6, 4, 4)]
    loss = IRGMovementLoss(0.25, reduction, detach_max)(student, teacher)
    expected = 0.25 * sum(
        movement_loss(tuple(s), tuple(t), reduction, detach_max=detach_max)
        for s, t in ((student[:2], teacher[:2]), (student[2:], teacher[2:]))
    )
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mtk_is_irg_and_irg_t(randn):
    student, teacher = mtk_inputs(randn)
    settings = {"reduction": "mean", "detach_max": False, "max_nodes": 4}
    loss = MTKLoss(0.5, 0.25, 0.75, edges=2, **settings)(student, teacher)
    graph = IRGLoss(0.5, 0.25, **settings)(student[:3], teacher[:3])
    moved = IRGMovementLoss(0.75, **settings)(student[3:], teacher[3:])
    assert moved > 0
    torch.testing.assert_close(loss, graph + moved)
    assert MTKLoss(edges=0)([student[0], *student[3:]], [teacher[0], *teacher[3:]]) > 0


def test_modules_average_channels_only_if_told(randn, refuses):
    student, teacher = [randn(4, 2), randn(4, 6)], [randn(4, 5), randn(4, 5)]
    loss = IRGMovementLoss(1.0, bridge="average")(student, teacher)
    expected = movement_loss(tuple(student), tuple(teacher), bridge="average")
    torch.testing.assert_close(loss, expected)
    with refuses("2 channels, then 6", "BRIDGE: average"):
        IRGMovementLoss()(student, teacher)


def test_edges_shared_by_several_student_layers_are_computed_once(randn, monkeypatch):
    seen = []

    def counting(feature, **settings):
        seen.append(feature.shape[1])
        return edge_matrix(feature, **settings)

    monkeypatch.setattr(irg, "edge_matrix", counting)
    last, other = randn(5, 9), randn(5, 8)
    student = [randn(5, 1), randn(5, 2), randn(5, 3), randn(5, 4)]
    loss = IRGLoss(vertices=False, lambda2=1.0)(student, [last, other, last, last])
    assert sorted(seen) == [1, 2, 3, 4, 8, 9]
    expected = sum(edge_loss(student[k], last) for k in (0, 2, 3)) + edge_loss(student[1], other)
    torch.testing.assert_close(loss, expected)


def test_a_weight_of_zero_lets_no_infinity_through(randn):
    student, teacher = mtk_inputs(randn)
    bad = [torch.full_like(s, float("inf")).requires_grad_() for s in student]
    for weights, part in (((0, 0, 1), slice(3, 5)), ((0, 1, 0), slice(1, 3)), ((1, 0, 0), 0)):
        taps = list(bad)
        taps[part] = student[part]
        loss = MTKLoss(*map(float, weights), edges=2)(taps, teacher)
        assert torch.isfinite(loss)
        assert loss > 0
        loss.backward()
    assert all(not b.grad.any() for b in bad)


@pytest.mark.parametrize(("nodes", "rows"), [(3, [0, 2, 4]), (4, [0, 1, 3, 5]), (7, range(7))])
def test_max_nodes_keeps_evenly_spaced_rows_of_both_sides(randn, nodes, rows):
    shapes_s = [(7, 3), (7, 4), (7, 2, 3, 3), (7, 2, 2, 2)]
    shapes_t = [(7, 3), (7, 5, 2, 2), (7, 6), (7, 6)]
    student, teacher = ([randn(*shape) for shape in shapes] for shapes in (shapes_s, shapes_t))
    chosen = list(rows)
    expected = MTKLoss()([s[chosen] for s in student], [t[chosen] for t in teacher])
    torch.testing.assert_close(MTKLoss(max_nodes=nodes)(student, teacher), expected)
    unchanged = MTKLoss()(student, teacher)
    torch.testing.assert_close(MTKLoss(max_nodes=7)(student, teacher), unchanged)
    torch.testing.assert_close(MTKLoss(max_nodes=100)(student, teacher), unchanged)


def test_a_single_process_gathers_nothing(randn):
    student, teacher = mtk_inputs(randn)
    expected = MTKLoss(edges=2)(student, teacher)
    assert torch.equal(MTKLoss(edges=2, gather=True)(student, teacher), expected)


def test_losses_have_no_parameters_and_can_be_copied(randn):
    loss = MTKLoss(edges=2)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    student, teacher = mtk_inputs(randn)
    assert torch.equal(copy.deepcopy(loss)(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_nodes_are_an_exact_zero_in_the_graph(randn, rows):
    shapes = [(rows, 3), (rows, 4), (rows, 4, 2, 2), (rows, 4)]
    student = [randn(*shape, grad=True) for shape in shapes]
    with torch.no_grad():
        student[1] += float("nan")  # 0 times a value would not do
    teacher = [randn(*shape) for shape in shapes]
    loss = MTKLoss(lambda1=0.0)(student, teacher)
    assert loss.item() == 0.0
    loss.backward()
    assert all(s.grad is not None and not s.grad.any() for s in student)
    assert edge_loss(student[1], teacher[1]).item() == 0.0
    assert movement_loss((student[2], student[3]), (teacher[2], teacher[3])).item() == 0.0


def test_empty_stays_in_graph(randn):
    student = [randn(0, 3, grad=True), randn(0, 4, 2, 2, grad=True)]
    loss = IRGLoss()(student, [randn(0, 3), randn(0, 7, 2, 2)])
    assert loss.item() == 0.0
    loss.backward()
    assert all(s.grad is not None for s in student)


def test_the_logits_of_a_single_sample_still_teach(randn):
    student, teacher = [randn(1, 3), randn(1, 4)], [randn(1, 3), randn(1, 4)]
    loss = IRGLoss(lambda1=2.0)(student, teacher)
    torch.testing.assert_close(loss, 2.0 * vertex_loss(student[0], teacher[0]))


@pytest.mark.parametrize(
    ("rows", "edges", "movements"), [(1, 1, 1), (2, 1, 0), (3, 0, 0)], ids=["1", "2", "3"]
)
def test_a_batch_too_small_to_relate_warns_once(randn, caplog, rows, edges, movements):
    taps = [randn(rows, 4), randn(rows, 4)]
    for loss, expected in (
        (IRGLoss(vertices=False), edges),
        (IRGMovementLoss(), movements),
    ):
        caplog.clear()
        for _ in range(3):
            loss(taps, taps)
        assert len(caplog.records) == expected
        assert all(f": {rows} in a batch" in record.message for record in caplog.records)


def test_half_precision_is_computed_in_float32(randn, half):
    student, teacher = mtk_inputs(randn)
    student = [300 * s.to(half) for s in student]
    loss = MTKLoss(edges=2)(student, teacher)
    expected = MTKLoss(edges=2)([s.float() for s in student], teacher)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    leaf = student[1].requires_grad_()
    assert gradient(edge_loss(leaf, teacher[1].to(half)), leaf).dtype == half
    assert edge_loss(leaf, teacher[1].to(half)).dtype == torch.float32


def test_autocast_changes_nothing(randn):
    student, teacher = ([x.float() for x in taps] for taps in mtk_inputs(randn))
    loss = MTKLoss(edges=2)
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)


def test_float64_passes_through(randn):
    assert MTKLoss(edges=2)(*mtk_inputs(randn)).dtype == torch.float64


def test_no_gradient_reaches_the_teacher(randn):
    student, teacher = mtk_inputs(randn, grad=True)
    teacher = [t.clone().requires_grad_() for t in teacher]
    MTKLoss(edges=2)(student, teacher).backward()
    assert all(t.grad is None for t in teacher)
    assert all(s.grad is not None and s.grad.any() for s in student)
    pair = (student[3].detach(), student[4].detach())
    for loss in (
        vertex_loss(student[0], teacher[0]),
        edge_loss(student[1], teacher[1]),
        movement_loss((student[3], pair[1]), (teacher[3], teacher[4])),
    ):
        loss.backward()
    assert all(t.grad is None for t in teacher)


def test_a_config_pairs_several_student_layers_with_one_teacher_layer(randn):
    terms = {
        "mtk": {
            "LOSS": "MTK",
            "TAPS": [
                "logits",
                ["stage2", "stage3"],
                ["stage3", "stage3"],
                "stage1_first",
                "stage1",
            ],
            "EDGES": 2,
            "LAMBDA1": 0.5,
            "LAMBDA3": 1,
        }
    }
    widths_s = {"logits": 5, "stage1_first": 2, "stage1": 2, "stage2": 3, "stage3": 4}
    widths_t = {"logits": 5, "stage1_first": 6, "stage1": 6, "stage2": 7, "stage3": 8}
    distiller = Distiller(
        terms, *({n: TapSpec(c) for n, c in w.items()} for w in (widths_s, widths_t))
    )
    s, t = ({n: randn(4, c) for n, c in w.items()} for w in (widths_s, widths_t))
    expected = (
        0.5 * vertex_loss(s["logits"], t["logits"])
        + 0.005 * edge_loss(s["stage2"], t["stage3"])
        + 0.005 * edge_loss(s["stage3"], t["stage3"])
        + movement_loss((s["stage1_first"], s["stage1"]), (t["stage1_first"], t["stage1"]))
    )
    torch.testing.assert_close(distiller(s, t)["mtk"], expected)


def specs(*channels):
    return [TapSpec(c) for c in channels]


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "given", "parts"),
    [
        (IRGLoss, (10, 4), (100, 4), {}, ("student 10 logits, teacher 100", "VERTICES: False")),
        (MTKLoss, (10, 4, 2, 2), (100, 4, 2, 2), {}, ("student 10 logits, teacher 100",)),
        (IRGLoss, (10,), (10,), {}, ("IRG", "the logits and at least one layer of", "1 tap(s)")),
        (
            IRGMovementLoss,
            (2, 2, 4),
            (2, 2, 4),
            {},
            ("IRG-t", "a first and a last layer", "3 tap(s)"),
        ),
        (IRGMovementLoss, (), (), {}, ("IRG-t", "0 tap(s)")),
        (MTKLoss, (10, 4, 2), (10, 4, 2), {}, ("MTK", "1 layer(s) of edges", "3 tap(s)")),
        (MTKLoss, (10, 4, 2, 2), (10, 4, 2, 2), {"edges": 2}, ("2 layer(s) of edges",)),
        (MTKLoss, (10, 4), (10, 4), {"edges": -1}, ("EDGES of at least 0", "-1")),
        (IRGMovementLoss, (2, 3), (5, 5), {}, ("the student", "2 channels, then 3", "BRIDGE")),
        (IRGMovementLoss, (2, 2), (4, 8), {}, ("the teacher", "4 channels, then 8", "BRIDGE")),
        (MTKLoss, (9, 1, 2, 4), (9, 1, 2, 2), {}, ("the student", "2 channels, then 4")),
        (
            IRGMovementLoss,
            (2, 3),
            (5, 5),
            {"bridge": "average"},
            ("the student", "multiple", "2 channels, then 3"),
        ),
    ],
)
def test_taps_a_loss_cannot_read_are_refused_when_built(
    refuses, loss, student, teacher, given, parts
):
    with refuses(*parts):
        loss.tap_arguments(specs(*student), specs(*teacher), given)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "given"),
    [
        (IRGLoss, (10, 4, 8), (10, 6, 6), {}),
        (IRGLoss, (4,), (6,), {"vertices": False}),
        (IRGMovementLoss, (2, 6), (5, 5), {"bridge": "average"}),
        (MTKLoss, (10, 4, 8, 2, 2), (10, 6, 6, 3, 3), {"edges": 2}),
        (MTKLoss, (10, 2, 2), (10, 3, 3), {"edges": 0}),
    ],
)
def test_taps_of_other_widths_across_the_networks_are_accepted(loss, student, teacher, given):
    assert loss.tap_arguments(specs(*student), specs(*teacher), given) == {}


def test_lists_of_different_length_are_refused(randn, refuses):
    with refuses("2 student and 1 teacher tensors"):
        IRGLoss()([randn(4, 3), randn(4, 3)], [randn(4, 3)])
    with refuses("3 tap(s)"):
        IRGMovementLoss()([randn(4, 3)] * 3, [randn(4, 3)] * 3)


@pytest.mark.parametrize("loss", [IRGLoss, IRGMovementLoss, MTKLoss])
def test_bad_arguments_are_refused(randn, refuses, loss):
    with refuses("reduction", "'sum'", "'caffe', 'mean'"):
        loss(reduction="sum")
    with refuses("MAX_NODES of at least 0", "-1"):
        loss(max_nodes=-1)
    for function in (vertex_loss, edge_loss):
        with refuses("'sum'"):
            function(randn(3, 2), randn(3, 2), "sum")
    pair = (randn(3, 2), randn(3, 2))
    with refuses("'sum'"):
        movement_loss(pair, pair, "sum")
    with refuses("bridge", "'mean'"):
        IRGMovementLoss(bridge="mean")
    with refuses("EDGES"):
        MTKLoss(edges=-1)
