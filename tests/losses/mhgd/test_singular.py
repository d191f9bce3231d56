"""Dominant directions of feature maps, and the gradient through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_det.losses.mhgd.singular import (
    direction_gradient,
    dominant_directions,
    most_similar,
    student_vectors,
    teacher_vectors,
)
from tests.slow import array

SHAPES = {
    "more pixels": (3, 4, 3, 5),
    "fewer pixels": (3, 7, 2, 2),
    "as many": (2, 6, 2, 3),
    "one pixel": (3, 5, 1, 1),
    "one channel": (2, 1, 2, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def slow_directions(maps, k):
    """Vectors [B, C, k] and values [B, k] with the sign rule, map by map."""
    vectors, values = [], []
    for one in array(maps):
        x = one.reshape(one.shape[0], -1).T
        _, sigma, rows = np.linalg.svd(x, full_matrices=False)
        signed = []
        for row in rows[:k]:
            projection = sum(float(pixel @ row) for pixel in x)
            signed.append(row if projection >= 0 else -row)
        vectors.append(np.stack(signed, axis=1))
        values.append(sigma[:k])
    return np.stack(vectors), np.stack(values)


def slow_gradient(u, sigma, v, grad, tolerance=1e-6):
    """Of one map, entry by entry; ``grad`` [C, k]."""
    r = len(sigma)
    pixels, channels = u.shape[0], v.shape[0]
    result = np.zeros((pixels, channels))
    for j in range(grad.shape[1]):
        for i in range(r):
            gap = sigma[j] ** 2 - sigma[i] ** 2
            if abs(gap) <= tolerance * sigma[0] ** 2:
                continue
            m = v[:, i] @ grad[:, j] / gap
            result += sigma[i] * m * np.outer(u[:, i], v[:, j])
            result += sigma[j] * m * np.outer(u[:, j], v[:, i])
        if sigma[j] > tolerance * sigma[0]:
            rest = grad[:, j] - sum(v[:, i] * (v[:, i] @ grad[:, j]) for i in range(r))
            result += np.outer(u[:, j], rest) / sigma[j]
    return result


def maps_of(u, sigma, v, height):
    """[1, C, H, W] with these singular vectors and values."""
    x = (u * sigma) @ v.T
    return torch.from_numpy(x.T.reshape(1, v.shape[0], height, -1).copy())


def orthonormal(randn, rows, columns):
    return np.linalg.qr(array(randn(rows, columns)))[0]


@shapes
@pytest.mark.parametrize("k", [1, 3])
def test_matches_slow_loop(randn, shape, k):
    maps = randn(*shape)
    vectors, values = dominant_directions(maps, k)
    expected_vectors, expected_values = slow_directions(maps, k)
    np.testing.assert_allclose(array(vectors), expected_vectors, atol=1e-11)
    np.testing.assert_allclose(array(values), expected_values, rtol=1e-12)


@shapes
def test_gradcheck(randn, shape):
    maps = randn(*shape, grad=True)
    assert torch.autograd.gradcheck(lambda x: dominant_directions(x, 3)[0], maps)


@pytest.mark.parametrize("values", [(3.0, 3.0, 2.0, 1.5), (3.0, 2.0, 2.0, 0.0), (2.0, 1e-9, 0, 0)])
@pytest.mark.parametrize(("pixels", "channels"), [(9, 4), (4, 9), (4, 4)])
def test_repeated_and_zero_values_leave_out_exploding_terms(randn, pixels, channels, values):
    r = min(pixels, channels)
    u, v = orthonormal(randn, pixels, r), orthonormal(randn, channels, r)
    sigma, grad = np.array(values), array(randn(channels, 2))
    given = (torch.from_numpy(np.array(a))[None] for a in (u * sigma, v, sigma, grad))
    ours = direction_gradient(*given)[0]
    np.testing.assert_allclose(array(ours), slow_gradient(u, sigma, v, grad), atol=1e-12)


@pytest.mark.parametrize(("pixels", "channels"), [(9, 4), (4, 9)])
@pytest.mark.parametrize("values", [(3.0, 3.0, 3.0, 3.0), (3.0, 3.0, 1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_repeated_values_stays_moderate(randn, pixels, channels, values, dtype):
    u, v = orthonormal(randn, pixels, 4), orthonormal(randn, channels, 4)
    maps = maps_of(u, np.array(values), v, 1).to(dtype).requires_grad_()
    vectors, _ = dominant_directions(maps, 4)
    vectors.backward(randn(*vectors.shape).to(dtype))
    assert maps.grad.abs().max() < 10


@pytest.mark.parametrize(("pixels", "channels"), [(9, 4), (3, 7)])
def test_a_vanishing_direction_does_not_disturb_the_first(randn, pixels, channels):
    # Its vector is dropped from the forward pass; what it owes the gradient must not be lost.
    sigma = np.array([3.0, 2.0, 0.0] if pixels < channels else [3.0, 2.0, 1.0, 0.0])
    u, v = orthonormal(randn, pixels, len(sigma)), orthonormal(randn, channels, len(sigma))
    maps = maps_of(u, sigma, v, 1).requires_grad_()
    vectors, _ = dominant_directions(maps, 1)
    grad = randn(1, channels, 1)
    vectors.backward(grad)
    signed = v * np.sign(v[:, 0] @ array(vectors)[0, :, 0])
    expected = slow_gradient(u * np.sign(signed[0] * v[0]), sigma, signed, array(grad)[0])
    np.testing.assert_allclose(array(maps.grad)[0].reshape(channels, -1).T, expected, atol=1e-12)


@shapes
def test_first_direction_of_a_positive_map_is_positive(randn, shape):
    vectors = teacher_vectors(randn(*shape).abs())
    assert (vectors > 0).all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_mean_pixel_decides_nothing_the_largest_entry_is_positive(randn, dtype):
    half = randn(4, 3, 2, 4)
    maps = torch.cat([half, -half], dim=2)  # the mean pixel is zero
    for version in (maps, maps.flip(2)):
        vectors, _ = dominant_directions(version.to(dtype), 3)
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()


def test_rows_are_normalised(randn):
    rows, grad = randn(4, 5, grad=True), randn(4, 5)
    vectors, values = dominant_directions(rows, 4)
    assert vectors.shape == (4, 5, 1)
    norms = rows.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(vectors[:, :, 0], rows / norms)
    torch.testing.assert_close(values, norms)
    vectors[:, :, 0].backward(grad)
    unit = rows.detach() / norms
    expected = (grad - unit * (unit * grad).sum(dim=1, keepdim=True)) / norms
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 9, 2, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_map_has_zero_vectors_and_gradient_and_leaves_others_alone(randn, shape, dtype):
    maps = randn(*shape).to(dtype)
    maps[0] = 0
    alone = maps[1:].clone().requires_grad_()
    maps.requires_grad_()
    vectors, values = dominant_directions(maps, 2)
    alone_vectors, _ = dominant_directions(alone, 2)
    assert not vectors[0].any()
    assert not values[0].any()
    torch.testing.assert_close(vectors[1:], alone_vectors)
    grad = randn(*vectors.shape).to(dtype)
    vectors.backward(grad)
    alone_vectors.backward(grad[1:])
    assert not maps.grad[0].any()
    torch.testing.assert_close(maps.grad[1:], alone.grad)


@pytest.mark.parametrize(("channels", "pixels"), [(64, 400), (256, 49)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_of_low_rank_offers_fewer_directions(randn, channels, pixels, dtype):
    maps = (randn(2, channels, 2) @ randn(2, 2, pixels)).unsqueeze(2).to(dtype).requires_grad_()
    vectors, _ = dominant_directions(maps, 4)
    lengths = vectors.norm(dim=1)
    torch.testing.assert_close(lengths[:, :2], torch.ones(2, 2, dtype=dtype))
    assert not lengths[:, 2:].any()
    vectors[:, :, 2:].backward(randn(2, channels, 2).to(dtype))
    assert not maps.grad.any()


def test_the_student_direction_is_the_one_most_like_the_teacher(randn):
    u, v = orthonormal(randn, 9, 4), orthonormal(randn, 6, 4)
    maps = maps_of(u, np.array([4.0, 3.0, 2.0, 1.0]), v, 3)
    teacher = -torch.from_numpy(v[:, 2])[None] + 0.1 * randn(1, 6)
    directions, _ = dominant_directions(maps, 4)
    assert most_similar(directions, teacher).tolist() == [2]
    expected = torch.from_numpy(-v[:, 2])[None]
    torch.testing.assert_close(student_vectors(maps, teacher, 4), expected)
    # Out of reach with fewer candidates.
    assert (student_vectors(maps, teacher, 2) * expected).sum().abs() < 1e-9


@shapes
def test_student_vectors_match_slow_loop(randn, shape):
    maps, teacher = randn(*shape), teacher_vectors(randn(*shape))
    directions, _ = slow_directions(maps, 4)
    expected = []
    for candidates, target in zip(directions, array(teacher), strict=True):
        cosines = [float(candidates[:, j] @ target) for j in range(candidates.shape[1])]
        best = max(range(len(cosines)), key=lambda j, c=cosines: abs(c[j]))
        expected.append(candidates[:, best] * np.sign(cosines[best]))
    np.testing.assert_allclose(array(student_vectors(maps, teacher)), expected, atol=1e-11)


@shapes
def test_student_vectors_gradcheck(randn, shape):
    teacher = teacher_vectors(randn(*shape))
    maps = randn(*shape, grad=True)
    assert torch.autograd.gradcheck(lambda x: student_vectors(x, teacher), maps)


def test_the_same_maps_give_the_same_vectors(randn):
    maps = randn(3, 5, 4, 4)
    teacher = teacher_vectors(maps)
    torch.testing.assert_close(student_vectors(maps, teacher), teacher)


def test_vectors_do_not_depend_on_scale_or_memory_layout(randn):
    maps = randn(3, 5, 4, 6)
    vectors, values = dominant_directions(maps, 3)
    scaled, scaled_values = dominant_directions(1e-3 * maps, 3)
    torch.testing.assert_close(scaled, vectors)
    torch.testing.assert_close(scaled_values, 1e-3 * values)
    turned = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(dominant_directions(turned, 3)[0], vectors)


def test_no_gradient_reaches_the_teacher(randn):
    assert not teacher_vectors(randn(2, 3, 4, 4, grad=True)).requires_grad


def test_half_precision_is_computed_in_float32(randn, half):
    maps = randn(2, 3, 4, 4, dtype=torch.float32).to(half).requires_grad_()
    vectors, _ = dominant_directions(maps, 2)
    assert torch.equal(vectors, dominant_directions(maps.float(), 2)[0])
    vectors.sum().backward()
    assert maps.grad.dtype == half


def test_autocast_changes_nothing_forward_or_backward(randn):
    maps = randn(2, 3, 4, 4, dtype=torch.float32).requires_grad_()
    grad = randn(2, 3, 2, dtype=torch.float32)
    expected, _ = dominant_directions(maps, 2)
    (expected_gradient,) = torch.autograd.grad(expected, maps, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, _ = dominant_directions(maps, 2)
        (gradient,) = torch.autograd.grad(vectors, maps, grad)
    assert torch.equal(vectors, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (0, 5, 1, 2), (0, 4)], ids=str)
def test_no_maps_give_no_vectors_in_the_graph(randn, shape):
    maps = randn(*shape, grad=True)
    vectors = student_vectors(maps, teacher_vectors(maps))
    assert vectors.shape == shape[:2]
    vectors.sum().backward()
    assert maps.grad.shape == shape


def test_other_shapes_are_refused(randn, refuses):
    with refuses("maps [B, C, H, W] or rows [B, C]", "shape (2, 3, 4)"):
        dominant_directions(randn(2, 3, 4), 1)
    with refuses("the teacher's (2, 3) maps and channels", "(2, 4, 2, 2)"):
        student_vectors(randn(2, 4, 2, 2), randn(2, 3))
