"""The graphs of IRG: edges, movements and vertices, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_det.losses import IRGLoss, edge_loss, edge_matrix, movement, movement_loss, vertex_loss
from tests import slow

REDUCTIONS = ("caffe", "mean")
EITHER = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPES = pytest.mark.parametrize(
    ("shape_s", "shape_t"),
    [((6, 3), (6, 5)), ((5, 2, 3, 4), (5, 4, 2, 2)), ((4, 3), (4, 2, 1, 5))],
    ids=str,
)


def slow_nodes(feature):
    if feature.ndim == 2:
        return feature
    return np.array([[channel.sum() / channel.size for channel in node] for node in feature])


def slow_edges(feature, normalize=True):
    nodes = slow_nodes(feature)
    edges = np.zeros((len(nodes), len(nodes)))
    for i, j in np.ndindex(*edges.shape):
        edges[i, j] = sum((a - b) ** 2 for a, b in zip(nodes[i], nodes[j], strict=True))
    return edges / edges.max() if normalize and edges.max() > 0 else edges


def slow_movement(first, last, normalize=True):
    pairs = zip(slow_nodes(first), slow_nodes(last), strict=True)
    moved = np.array([sum((a - b) ** 2 for a, b in zip(f, g, strict=True)) for f, g in pairs])
    return moved / moved.max() if normalize and moved.max() > 0 else moved


def slow_error(student, teacher, reduction, divisor):
    total = sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat, strict=True))
    return total / (student.size if reduction == "mean" else divisor)


def slow_edge_loss(student, teacher, reduction, normalize=True):
    s, t = (slow_edges(slow.array(x), normalize) for x in (student, teacher))
    return slow_error(s, t, reduction, 2 * len(s))


def slow_movement_loss(student, teacher, reduction, normalize=True):
    s, t = (slow_movement(*map(slow.array, pair), normalize) for pair in (student, teacher))
    return slow_error(s, t, reduction, 2)


def slow_row_gradient(student, teacher):
    """What a layer back-propagates that differentiates edge (i, j) by node i alone."""
    s, t = slow_edges(student), slow_edges(teacher)
    maximum = slow_edges(student, normalize=False).max()
    gradient = np.zeros_like(student)
    for i, j in np.ndindex(*s.shape):
        gradient[i] += (s[i, j] - t[i, j]) / len(s) * 2 * (student[i] - student[j]) / maximum
    return gradient


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@SHAPES
@pytest.mark.parametrize("normalize", [True, False])
def test_edges_and_movements_match_slow_loops(randn, shape_s, shape_t, normalize):
    for shape in (shape_s, shape_t):
        first, last = randn(*shape), randn(*shape)
        np.testing.assert_allclose(
            edge_matrix(first, normalize), slow_edges(slow.array(first), normalize), rtol=1e-12
        )
        np.testing.assert_allclose(
            movement(first, last, normalize),
            slow_movement(slow.array(first), slow.array(last), normalize),
            rtol=1e-12,
        )


@SHAPES
@EITHER
@pytest.mark.parametrize("normalize", [True, False])
def test_edge_loss_matches_slow_loop(randn, shape_s, shape_t, reduction, normalize):
    student, teacher = randn(*shape_s), randn(*shape_t)
    expected = slow_edge_loss(student, teacher, reduction, normalize)
    loss = edge_loss(student, teacher, reduction, normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@SHAPES
@EITHER
@pytest.mark.parametrize("normalize", [True, False])
def test_movement_loss_matches_slow_loop(randn, shape_s, shape_t, reduction, normalize):
    student, teacher = (randn(*shape_s), randn(*shape_s)), (randn(*shape_t), randn(*shape_t))
    expected = slow_movement_loss(student, teacher, reduction, normalize)
    loss = movement_loss(student, teacher, reduction, normalize)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@EITHER
def test_vertex_loss_matches_slow_loop(randn, reduction):
    student, teacher = randn(5, 3), randn(5, 3)
    expected = slow_error(slow.array(student), slow.array(teacher), reduction, 10)
    assert vertex_loss(student, teacher, reduction).item() == pytest.approx(expected, rel=1e-12)


def test_maps_of_different_size_are_compared_by_their_means(randn):
    first, last = randn(4, 3, 6, 5), randn(4, 3, 2, 3)
    expected = movement(first.mean(dim=(2, 3)), last.mean(dim=(2, 3)))
    torch.testing.assert_close(movement(first, last), expected)


def test_edges_are_normalised_symmetric_and_zero_on_the_diagonal(randn):
    edges = edge_matrix(randn(7, 4))
    assert edges.max() == 1
    assert torch.equal(edges, edges.t())
    assert not edges.diagonal().any()


@EITHER
def test_zero_when_equal(randn, reduction):
    first, last = randn(5, 3), randn(5, 3)
    assert vertex_loss(first, first, reduction) == 0
    assert edge_loss(first, first, reduction) == 0
    assert movement_loss((first, last), (first, last), reduction) == 0


def test_edges_see_no_rotation_shift_scale_or_empty_channel(randn):
    teacher = randn(6, 4)
    rotation, _ = torch.linalg.qr(randn(4, 4))
    student = torch.cat([3.0 * teacher @ rotation + randn(4), torch.zeros(6, 2)], dim=1)
    assert edge_loss(student, teacher) < 1e-28
    assert edge_loss(student, teacher, normalize=False) > 1


def test_gradcheck(randn):
    student, teacher = randn(4, 3, grad=True), randn(4, 5)
    last, pair = randn(4, 3, grad=True), (randn(4, 5), randn(4, 5))
    for reduction in REDUCTIONS:
        # A maximum held constant is not what finite differences see.
        for settings in ({"normalize": False}, {"detach_max": False}):

            def edges(s, reduction=reduction, settings=settings):
                return edge_loss(s, teacher, reduction, **settings)

            def moved(f, g, reduction=reduction, settings=settings):
                return movement_loss((f, g), pair, reduction, **settings)

            assert torch.autograd.gradcheck(edges, student)
            assert torch.autograd.gradcheck(moved, (student, last))

        def vertices(s, reduction=reduction):
            return vertex_loss(s, pair[0][:, :3], reduction)

        assert torch.autograd.gradcheck(vertices, student)


def test_the_maximum_is_a_constant_in_the_gradient(randn):
    student, teacher = randn(5, 3, grad=True), randn(5, 4)
    maximum = edge_matrix(student, normalize=False).max().item()

    def error(edges):
        return (edges - edge_matrix(teacher)).square().sum() / 10

    expected = gradient(error(edge_matrix(student, normalize=False) / maximum), student)
    torch.testing.assert_close(gradient(edge_loss(student, teacher), student), expected)
    full = gradient(edge_loss(student, teacher, detach_max=False), student)
    assert not torch.allclose(full, expected)

    first, last = randn(5, 3, grad=True), randn(5, 3)
    pair = (randn(5, 4), randn(5, 4))
    maximum = movement(first, last, normalize=False).max().item()
    moved = movement(first, last, normalize=False) / maximum
    expected = gradient((moved - movement(*pair)).square().sum() / 2, first)
    torch.testing.assert_close(gradient(movement_loss((first, last), pair), first), expected)


def test_half_the_gradient_is_what_the_released_layer_back_propagates(randn):
    student, teacher = randn(8, 5, grad=True), randn(8, 7)
    row = slow_row_gradient(slow.array(student), slow.array(teacher))
    ours = gradient(edge_loss(student, teacher), student).numpy()
    np.testing.assert_allclose(ours / 2, row, rtol=1e-10, atol=1e-15)
    preset = IRGLoss(lambda2=0.0025, vertices=False)([student], [teacher])
    np.testing.assert_allclose(gradient(preset, student), 0.005 * row, rtol=1e-10, atol=1e-15)


def test_a_mean_weight_is_32_times_a_caffe_weight_at_the_published_batch(randn):
    student, teacher = randn(64, 4), randn(64, 4)
    torch.testing.assert_close(
        edge_loss(student, teacher), 32 * edge_loss(student, teacher, "mean")
    )
    pairs = (student, randn(64, 4)), (teacher, randn(64, 4))
    torch.testing.assert_close(movement_loss(*pairs), 32 * movement_loss(*pairs, "mean"))
    torch.testing.assert_close(
        vertex_loss(student, teacher), 4 / 2 * vertex_loss(student, teacher, "mean")
    )


def test_close_vectors_far_from_the_origin_keep_their_distances(randn):
    feature = (50 + 1e-3 * randn(8, 16)).float()
    exact = edge_matrix(feature.double())
    torch.testing.assert_close(edge_matrix(feature).double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["caffe", "mean"])
def test_a_single_sample_moves_too(randn, reduction, normalize):
    student, teacher = [(randn(1, 4), randn(1, 4)) for _ in range(2)]
    for own in (student, (student[0], student[0])):  # the second stays where it is
        expected = slow_movement_loss(own, teacher, reduction, normalize)
        loss = movement_loss(own, teacher, reduction, normalize)
        assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    assert loss > 0.4


def test_averaging_bridges_a_wider_layer(randn):
    narrow, wide = randn(4, 2), randn(4, 6)
    means = torch.stack([wide[:, :3].mean(dim=1), wide[:, 3:].mean(dim=1)], dim=1)
    expected = movement(narrow, means)
    torch.testing.assert_close(movement(narrow, wide, bridge="average"), expected)
    torch.testing.assert_close(movement(wide, narrow, bridge="average"), expected)


@pytest.mark.parametrize("detach_max", [True, False])
def test_identical_samples_have_no_edges_and_no_gradient(randn, detach_max):
    student, teacher = randn(1, 3).repeat(4, 1).requires_grad_(), randn(4, 5)
    loss = edge_loss(student, teacher, detach_max=detach_max)
    assert not edge_matrix(student).any()
    assert loss.item() == pytest.approx((edge_matrix(teacher) ** 2).sum().item() / 8)
    assert not gradient(loss, student).any()
    # ... and neither is a teacher of one kind of sample an obstacle.
    assert torch.isfinite(edge_loss(teacher, student.detach(), detach_max=detach_max))


@pytest.mark.parametrize("detach_max", [True, False])
def test_samples_that_stay_in_place_have_no_gradient(randn, detach_max):
    first, teacher = randn(4, 3, grad=True), (randn(4, 5), randn(4, 5))
    last = first.detach().clone().requires_grad_()
    loss = movement_loss((first, last), teacher, detach_max=detach_max)
    assert loss.item() == pytest.approx((movement(*teacher) ** 2).sum().item() / 2)
    loss.backward()
    assert not first.grad.any()
    assert not last.grad.any()


def test_two_nodes_have_nothing_to_learn_from_edges(randn):
    student, teacher = randn(2, 3, grad=True), randn(2, 5)
    loss = edge_loss(student, teacher)
    assert loss.item() == 0.0
    assert not gradient(loss, student).any()
    pairs = (randn(2, 3), randn(2, 3)), (randn(2, 5), randn(2, 5))
    assert movement_loss(*pairs) > 0


def test_non_contiguous_input_gives_the_same_loss(randn):
    student, teacher = randn(4, 6).t(), randn(12, 5)[::2]
    assert not student.is_contiguous()
    expected = edge_loss(student.contiguous(), teacher.contiguous())
    torch.testing.assert_close(edge_loss(student, teacher), expected)


def test_shape_error_names_both_shapes(randn, refuses):
    with refuses("student (4, 3), teacher (4, 5)"):
        vertex_loss(randn(4, 3), randn(4, 5))
    with refuses("(4, 3), (5, 3)", "the same RoIs"):
        edge_loss(randn(4, 3), randn(5, 3))
    with refuses("(4, 3), (4, 3), (5, 3), (5, 3)"):
        movement_loss((randn(4, 3), randn(4, 3)), (randn(5, 3), randn(5, 3)))
    with refuses("(5, 3), (4, 3)"):
        IRGLoss(vertices=False)([randn(4, 3)], [randn(5, 3)])
    with refuses("2 channels, then 3"):
        movement(randn(4, 2), randn(4, 3))
    with refuses("shape (4, 3, 2)", "flatten"):
        edge_matrix(randn(4, 3, 2))
