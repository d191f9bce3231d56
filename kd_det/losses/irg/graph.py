"""The graphs of IRG (:mod:`kd_det.losses.irg.loss`): nodes, edges, movements, and their losses.

Shapes: N nodes (images, or RoIs on detectors), K classes, C channels. A feature is ``[N, C]`` or
a map ``[N, C, H, W]``, which is averaged over its positions first. Edges are ``[N, N]``, a
movement is ``[N]``. Widths may differ between student and teacher. All of it is computed in at
least float32, and no gradient flows into the teacher's features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kd_det.core.errors import check_choice, check_same_shape, fail
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph

Reduction = Literal["caffe", "mean"]
Bridge = Literal["error", "average"]


def pool_nodes(feature: Tensor) -> Tensor:
    """The attribute of each node, ``[N, C]``; features of other dimensions are refused."""
    if feature.dim() not in (2, 4):
        fail(
            expected="IRG to get vectors [N, C] or maps [N, C, H, W]",
            received=f"shape {tuple(feature.shape)}",
            remedy="flatten the tapped tensor to one vector per sample",
        )
    feature = full_precision(feature)
    if feature.dim() == 2:
        return feature
    # Not mean(): its backward writes a whole map where that of a sum is a view of the vectors.
    return feature.sum(dim=(2, 3)) / (feature.shape[2] * feature.shape[3])


def edge_matrix(feature: Tensor, normalize: bool = True, detach_max: bool = True) -> Tensor:
    """Squared Euclidean distances between all nodes of one layer.

    The result is ``[N, N]``, symmetric and zero on the diagonal.

    Args:
        normalize: divide by the matrix's own maximum, as the reference does (the paper's
            equations do not); a matrix of zeros stays one, with zero gradient.
        detach_max: hold that maximum constant in the backward pass, as the reference does.
    """
    nodes = pool_nodes(feature)
    with no_autocast(nodes):
        # By differences: through products of the vectors, close ones would cancel to noise.
        distances = torch.cdist(nodes, nodes, compute_mode="donot_use_mm_for_euclid_dist")
        edges = distances.square()
        return _over_maximum(edges, detach_max) if normalize else edges


def movement(
    first: Tensor,
    last: Tensor,
    normalize: bool = True,
    detach_max: bool = True,
    bridge: Bridge = "error",
) -> Tensor:
    """Squared Euclidean distance of each node between two layers of one network, ``[N]``.

    Args:
        first, last: features of the layers, whose spatial sizes may differ.
        normalize, detach_max: as in :func:`edge_matrix`, for the largest movement.
        bridge: ``"error"`` refuses layers of different width; ``"average"`` averages groups of
            neighbouring channels of the wider layer, a multiple of the narrower.

    Raises:
        KDError: a different number of nodes, or widths that ``bridge`` does not cover.
    """
    first, last = pool_nodes(first), pool_nodes(last)
    check_rows(first, last)
    check_movement_widths("one network", first.shape[1], last.shape[1], bridge)
    width = min(first.shape[1], last.shape[1])
    with no_autocast(first):
        difference = _narrowed(last, width) - _narrowed(first, width)
        moved = difference.square().sum(dim=1)
        return _over_maximum(moved, detach_max) if normalize else moved


def vertex_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "caffe") -> Tensor:
    """Squared error of the nodes themselves, in the last layer: the logits. Scalar.

    Without nodes the loss is an exact zero in the graph.

    Args:
        student, teacher: ``[N, K]``.
        reduction: ``"caffe"`` divides the sum by 2N; ``"mean"`` averages over N and K, which is
            ``2 / K`` times as large.

    Raises:
        KDError: shapes differ, or an unknown reduction.
    """
    check_choice("reduction", reduction, Reduction)
    check_same_shape("IRG", student, teacher)
    if student.numel() == 0:
        return zero_in_graph([student])
    student, teacher = pool_nodes(student), pool_nodes(teacher.detach())
    return squared_error(student, teacher, reduction, 2 * len(student))


def edge_loss(
    student: Tensor,
    teacher: Tensor,
    reduction: Reduction = "caffe",
    normalize: bool = True,
    detach_max: bool = True,
) -> Tensor:
    """Squared error between the edges of both graphs. Scalar.

    For fewer than two nodes the loss is an exact zero in the graph. With two, normalised edges are
    1 on both sides and the loss is 0.

    Args:
        reduction: ``"caffe"`` divides the sum by 2N; ``"mean"`` averages over the N * N edges,
            which is ``2 / N`` times as large: at the published N = 64, a weight w for ``"caffe"``
            is 32 w for ``"mean"``.
        normalize, detach_max: see :func:`edge_matrix`.

    Raises:
        KDError: different numbers of nodes, or an unknown reduction.
    """
    check_choice("reduction", reduction, Reduction)
    check_rows(student, teacher)
    if len(student) < 2:
        return zero_in_graph([student])
    target = edge_matrix(teacher.detach(), normalize, detach_max)
    edges = edge_matrix(student, normalize, detach_max)
    return squared_error(edges, target, reduction, 2 * len(edges))


def movement_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    reduction: Reduction = "caffe",
    normalize: bool = True,
    detach_max: bool = True,
    bridge: Bridge = "error",
) -> Tensor:
    """Squared error between the movements of both networks from a first to a last layer. Scalar.

    Without nodes the loss is an exact zero in the graph. A normalised movement of a single node is
    1, or 0 where it does not move.

    Args:
        student, teacher: features of the first and of the last layer.
        reduction: ``"caffe"`` divides the sum by 2, not by N; ``"mean"`` averages over N, which
            is ``2 / N`` times as large.
        normalize, detach_max, bridge: see :func:`movement`.
    """
    check_choice("reduction", reduction, Reduction)
    check_rows(*student, *teacher)
    if len(student[0]) == 0:
        return zero_in_graph(student)
    first, last = (feature.detach() for feature in teacher)
    target = movement(first, last, normalize, detach_max, bridge)
    moved = movement(*student, normalize, detach_max, bridge)
    return squared_error(moved, target, reduction, 2)


def squared_error(student: Tensor, teacher: Tensor, reduction: Reduction, divisor: int) -> Tensor:
    """The sum over ``divisor`` for ``"caffe"``, the mean over all elements for ``"mean"``."""
    with no_autocast(student):
        error = (student - teacher).square()
        return error.mean() if reduction == "mean" else error.sum() / divisor


def _over_maximum(values: Tensor, detach_max: bool) -> Tensor:
    if values.numel() == 0:
        return values
    maximum = values.amax()
    if detach_max:
        maximum = maximum.detach()
    return values / torch.where(maximum == 0, torch.ones_like(maximum), maximum)


def _narrowed(nodes: Tensor, width: int) -> Tensor:
    return nodes if nodes.shape[1] == width else nodes.unflatten(1, (width, -1)).mean(dim=2)


def check_rows(*features: Tensor) -> None:
    """Refuse features of different numbers of nodes."""
    if len({len(feature) for feature in features}) > 1:
        fail(
            expected="IRG to relate the same samples in every tapped tensor",
            received="shapes " + ", ".join(str(tuple(feature.shape)) for feature in features),
            remedy="tap student and teacher on the same images, or on the same RoIs",
        )


def check_movement_widths(side: str, first: int, last: int, bridge: str) -> None:
    """Refuse a movement between widths that ``bridge`` does not cover."""
    narrow, wide = sorted((first, last))
    if narrow != wide and (bridge == "error" or wide % narrow):
        fail(
            expected=f"an IRG movement of {side} between layers of one width"
            + (", or of a multiple of it" if bridge == "average" else ""),
            received=f"{first} channels, then {last}",
            remedy="tap the first and last block of one stage"
            + ("" if bridge == "average" else ", or set BRIDGE: average"),
        )
