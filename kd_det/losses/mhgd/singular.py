"""Dominant directions: a feature map's first right singular vectors, with a guarded gradient.

Shapes: B maps (images or boxes), P pixels, C channels; ``X = U diag(sigma) V^T`` is one map with
a row per pixel, ``r = min(P, C)``. Vectors are columns of ``V``, unit length, ``[C]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.core.errors import fail
from kd_det.core.numerics import full_precision, no_autocast

# Singular values, and gaps between their squares, below this part of the largest count as zero.
TOLERANCE = 1e-6


def dominant_directions(maps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of each map and their singular values.

    They are computed by an eigen-decomposition of the smaller of the two Gram matrices, batched
    over maps. Signs are fixed: the mean pixel's projection on a vector is not negative; where it is
    numerically zero, the vector's largest entry is positive.

    Args:
        maps: ``[B, C, H, W]``, or ``[B, C]`` which is a map of one pixel; any floating dtype,
            computed in at least float32.
        k: number of vectors; at most ``r`` exist.

    Returns:
        Vectors ``[B, C, min(k, r)]``, by descending value, and values ``[B, min(k, r)]`` without
        gradient. Vectors beyond the rank of a map are zero, and so is their gradient.

    Raises:
        KDError: neither a batch of maps nor of rows.
    """
    if maps.dim() not in (2, 4):
        fail(
            expected="maps [B, C, H, W] or rows [B, C]",
            received=f"shape {tuple(maps.shape)}",
            remedy="tap feature maps or vectors",
        )
    with no_autocast(maps):
        values = full_precision(maps)
        pixels = values[:, None, :] if maps.dim() == 2 else values.flatten(2).transpose(1, 2)
        return _DominantDirections.apply(pixels, k)


def teacher_vectors(maps: Tensor) -> Tensor:
    """The first direction of each map, ``[B, C]``, without gradient."""
    with torch.no_grad():
        return dominant_directions(maps, 1)[0][:, :, 0]


def student_vectors(maps: Tensor, teacher: Tensor, n: int = 4) -> Tensor:
    """The direction of each map that is most like the teacher's vector, with its sign: ``[B, C]``.

    It is chosen among the first n (4 in the authors' code): the teacher's first direction may be
    the student's second. The choice and the sign carry no gradient.

    Raises:
        KDError: another number of maps or channels than in ``teacher``, ``[B, C]``.
    """
    if maps.shape[:2] != teacher.shape:
        fail(
            expected=f"student maps with the teacher's {tuple(teacher.shape)} maps and channels",
            received=f"shape {tuple(maps.shape)}",
            remedy="bridge the widths with an adaptor",
        )
    directions, _ = dominant_directions(maps, n)
    chosen = most_similar(directions, teacher)
    vectors = directions.gather(2, chosen[:, None, None].expand(-1, maps.shape[1], 1))[:, :, 0]
    opposite = (vectors.detach() * teacher).sum(dim=1, keepdim=True) < 0
    return torch.where(opposite, -vectors, vectors)


def most_similar(directions: Tensor, teacher: Tensor) -> Tensor:
    """Index ``[B]`` of the direction ``[B, C, n]`` with the largest ``|cosine|`` to ``[B, C]``."""
    return torch.einsum("bcn,bc->bn", directions.detach(), teacher).abs().argmax(dim=1)


def direction_gradient(
    scores: Tensor, vectors: Tensor, values: Tensor, grad: Tensor, tolerance: float = TOLERANCE
) -> Tensor:
    r"""Gradient with respect to ``X``, ``[B, P, C]``, from that for its first directions.

    With ``M[i, j] = (v_i . g_j) / (sigma_j^2 - sigma_i^2)``, zero on the diagonal:

    .. math:: U \Sigma (M + M^T) V^T + U \Sigma^{-1} (g - V V^T g)^T

    This is exact for ``P >= C`` and ``P < C``. Directions of value 0 may be given as zero: the
    second term then holds what the first lacks.

    Args:
        scores: ``U diag(sigma)``, ``[B, P, r]``.
        vectors: ``V``, ``[B, C, r]``.
        values: ``sigma``, ``[B, r]``, descending.
        grad: ``g``, ``[B, C, k]`` for the first k directions.
        tolerance: pairs with ``|sigma_j^2 - sigma_i^2| <= tolerance * sigma_0^2`` and divisions by
            ``sigma_j <= tolerance * sigma_0`` are left out; they would explode.
    """
    k = grad.shape[2]
    first, largest = vectors[:, :, :k], values[:, :1]
    squares = values.square()
    gaps = squares[:, None, :k] - squares[:, :, None]
    apart = gaps.abs() > tolerance * largest.square()[:, :, None]
    along = vectors.transpose(1, 2) @ grad
    mixing = along / gaps.where(apart, torch.inf)
    present = values[:, :k] > tolerance * largest
    inverse = 1 / squares[:, :k].where(present, torch.inf)
    outside = (grad - vectors @ along) * inverse[:, None, :]
    rotated = vectors @ mixing + outside
    return scores @ (mixing @ first.transpose(1, 2)) + scores[:, :, :k] @ rotated.transpose(1, 2)


class _DominantDirections(torch.autograd.Function):
    """``X [B, P, C]`` to vectors ``[B, C, k]`` and values ``[B, k]``.

    The derivative of ``eigh`` itself divides by every gap, also by those of vectors that are not
    used, and is not finite where values repeat.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pixels, channels = x.shape[1:]
        # Norms of projections are accurate where square roots of eigenvalues are not: the Gram
        # matrix cannot resolve a value below sqrt(eps) of the largest.
        if pixels >= channels:
            vectors = torch.linalg.eigh(x.transpose(1, 2) @ x).eigenvectors.flip(2)
            scores = x @ vectors
            values = torch.linalg.vector_norm(scores, dim=1)
            present = values > TOLERANCE * values[:, :1]
            vectors = vectors * present[:, None, :]
        else:
            left = torch.linalg.eigh(x @ x.transpose(1, 2)).eigenvectors.flip(2)
            projected = x.transpose(1, 2) @ left
            values = torch.linalg.vector_norm(projected, dim=1)
            present = values > TOLERANCE * values[:, :1]
            vectors = projected / values.where(present, torch.inf)[:, None, :]
            scores = left * values[:, None, :]
        signs = _signs(scores, vectors, values)
        scores, vectors = scores * signs, vectors * signs
        ctx.save_for_backward(scores, vectors, values, present)
        first_values = values[:, :k].clone()
        ctx.mark_non_differentiable(first_values)
        return vectors[:, :, :k].clone(), first_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        scores, vectors, values, present = ctx.saved_tensors
        with no_autocast(grad):
            grad = grad * present[:, None, : grad.shape[2]]
            return direction_gradient(scores, vectors, values, grad), None


def _signs(scores: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """+1 or -1 per vector, ``[B, 1, r]``."""
    projection = scores.sum(dim=1)
    undecided = projection.abs() <= TOLERANCE * values * scores.shape[1] ** 0.5
    largest_entry = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))[:, 0]
    deciding = torch.where(undecided, largest_entry, projection)
    return torch.where(deciding < 0, -1.0, 1.0).to(scores.dtype)[:, None, :]
