"""FSP: flow of solution procedure (Yim et al., "A Gift from Knowledge Distillation: Fast
Optimization, Network Minimization and Transfer Learning", CVPR 2017,
https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html).

Shapes: two maps of one network, first ``[N, m, h, w]`` and second ``[N, n, h', w']``, give one FSP
matrix per sample, ``[N, m, n]``, large where two channels are active at the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_det.core.adaptors import pool_to_common_size
from kd_det.core.errors import check_channels, check_choice, check_maps, check_same_length, fail
from kd_det.core.loss import Arguments, DistillLoss, Specs, TapSpec, channel_arguments
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Pool = Literal["max", "avg"]
Reduction = Literal["frobenius", "mean"]
Pairs = Literal["disjoint", "chain"]


def fsp_matrix(first: Tensor, second: Tensor, pool: Pool = "max") -> Tensor:
    r"""Co-activation of two layers, ``G_ij = 1/(hw) * sum_yx first_i second_j``.

    The result is ``[N, m, n]``. Maps of different size are pooled, adaptively, to the smaller
    height and the smaller width.

    Args:
        first, second: maps of one network, any floating dtype, computed in at least float32.
        pool: ``"max"`` (the paper) or ``"avg"`` (RepDistiller).

    Raises:
        KDError: not two maps of one batch, or an unknown ``pool``.
    """
    check_choice("pool", pool, Pool)
    check_maps("FSP", first=first, second=second)
    with no_autocast(first):
        first, second = pool_to_common_size(full_precision(first), full_precision(second), pool)
        # Dividing a factor instead of the product keeps the sum over positions in range.
        first = first.flatten(2) / (first.shape[2] * first.shape[3])
        return torch.bmm(first, second.flatten(2).transpose(1, 2))


def fsp_loss(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    pool: Pool = "max",
    reduction: Reduction = "frobenius",
) -> Tensor:
    """Squared difference of the FSP matrices of one pair of layers. Scalar.

    The widths m and n of the two networks must agree; their spatial sizes need not. An empty batch
    gives an exact zero in the graph. No gradient flows into the teacher's maps.

    Args:
        pool: see :func:`fsp_matrix`.
        reduction: ``"frobenius"`` sums over the matrix and averages samples (the paper);
            ``"mean"`` averages every element (RepDistiller), m * n times smaller.

    Raises:
        KDError: matrices of different shape, unknown choices, or see :func:`fsp_matrix`.
    """
    check_choice("reduction", reduction, Reduction)
    student = fsp_matrix(student_first, student_second, pool)
    teacher = fsp_matrix(teacher_first.detach(), teacher_second.detach(), pool)
    if student.shape != teacher.shape:
        fail(
            expected="FSP matrices [N, m, n] of one shape, that is, pairs of layers as wide in the "
            "student as in the teacher",
            received=f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            remedy="tap layers of the same widths, or build FSPLoss with adapt=True",
        )
    if student.numel() == 0:
        return zero_in_graph([student_first, student_second])
    total = (student - teacher).square().sum()
    return total / (student.numel() if reduction == "mean" else len(student))


@LOSSES.register("FSP")
class FSPLoss(DistillLoss):
    """:func:`fsp_loss`, summed over pairs of layers.

    In the paper it is minimised alone in a first stage; a second trains without a teacher.

    Args:
        pool, reduction: see :func:`fsp_loss`.
        pairs: how taps t0, t1, ... are paired: ``"disjoint"`` reads (t0, t1), (t2, t3), ..., for
            example first and last layer of each section (the paper); ``"chain"`` reads (t0, t1),
            (t1, t2), ..., consecutive stages (RepDistiller).
        resize: pool two maps of one pair that differ in size; False makes that an error, as the
            paper's pairs do not differ.
        adapt: bridge other widths by a 1x1 convolution without bias on the student's map (ours;
            the paper and RepDistiller require equal widths).
        student_channels, teacher_channels: widths of the taps; needed with ``adapt`` only.
    """

    def __init__(
        self,
        pool: Pool = "max",
        reduction: Reduction = "frobenius",
        pairs: Pairs = "disjoint",
        resize: bool = True,
        adapt: bool = False,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("pool", pool, Pool)
        check_choice("reduction", reduction, Reduction)
        check_choice("pairs", pairs, Pairs)
        self.pool: Pool = pool
        self.reduction: Reduction = reduction
        self.pairs: Pairs = pairs
        self.resize = resize
        self.adaptors = _adaptors(student_channels, teacher_channels) if adapt else None

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Widths for ``adapt``; without it, refuses taps of different width.

        Also refuses a number of taps that makes no pairs and, without ``resize``, pairs whose
        sizes or strides are known to differ.
        """
        check_same_length("FSP", student, teacher)
        pairs = _pair_up(len(student), given.get("pairs", "disjoint"))
        if not given.get("resize", True):
            _check_sizes(pairs, student, teacher)
        widths = channel_arguments(student, teacher)
        if given.get("adapt", False):
            return widths
        own, others = widths.values()
        if own != others:
            fail(
                expected="FSP taps as wide in the student as in the teacher",
                received=f"student channels {own}, teacher channels {others}",
                remedy="choose a pair of models that differ in depth only, or set ADAPT: True for "
                "a learned 1x1 convolution",
            )
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Maps ``[N, C, H, W]`` in the order that ``pairs`` reads. Scalar."""
        check_same_length("FSP", student, teacher)
        pairs = _pair_up(len(student), self.pairs)
        if not self.resize:
            _check_sizes(pairs, *([_spec(x) for x in maps] for maps in (student, teacher)))
        if any(x.numel() == 0 for x in student):
            return zero_in_graph([*student, *self.parameters()])
        student = self._adapt(student)
        losses = [
            fsp_loss(student[a], student[b], teacher[a], teacher[b], self.pool, self.reduction)
            for a, b in pairs
        ]
        return torch.stack(losses).sum()

    def _adapt(self, student: list[Tensor]) -> list[Tensor]:
        if self.adaptors is None:
            return student
        check_same_length("FSP", student, self.adaptors)
        adapted = []
        for adaptor, x in zip(self.adaptors, student, strict=True):
            if isinstance(adaptor, nn.Conv2d):
                check_channels("FSP", "student", [x], [adaptor.in_channels])
                x = adaptor(full_precision(x))
            adapted.append(x)
        return adapted


def _adaptors(
    student_channels: Sequence[int] | None, teacher_channels: Sequence[int] | None
) -> nn.ModuleList:
    if student_channels is None or teacher_channels is None:
        fail(
            expected="FSP with adapt to know the widths of its taps",
            received=f"student_channels {student_channels}, teacher_channels {teacher_channels}",
            remedy="pass both lists, one width per tap",
        )
    check_same_length("FSP", student_channels, teacher_channels)
    # Without a bias, the adapted matrix is a linear image of the student's own.
    return nn.ModuleList(
        nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1, bias=False)
        for c_s, c_t in zip(student_channels, teacher_channels, strict=True)
    )


def _pair_up(count: int, pairs: str) -> list[tuple[int, int]]:
    check_choice("pairs", pairs, Pairs)
    if count < 2 or (pairs == "disjoint" and count % 2):
        fail(
            expected="FSP to get pairs of taps, "
            + ("an even number" if pairs == "disjoint" else "at least two"),
            received=f"{count} per network with pairs '{pairs}'",
            remedy="list the first and the second layer of each pair; or, for consecutive stages, "
            "set PAIRS: chain",
        )
    step = 2 if pairs == "disjoint" else 1
    return [(first, first + 1) for first in range(0, count - 1, step)]


def _spec(x: Tensor) -> TapSpec:
    return TapSpec(x.shape[1], size=(x.shape[2], x.shape[3]))


def _check_sizes(pairs: list[tuple[int, int]], student: Specs, teacher: Specs) -> None:
    """Refuse pairs whose sizes, or strides where a size is unknown, are known to differ."""
    for side, specs in (("student", student), ("teacher", teacher)):
        for a, b in pairs:
            pair = specs[a], specs[b]
            by_size = all(spec.size for spec in pair)
            known = [spec.size if by_size and spec.size else (spec.stride,) for spec in pair]
            if (None,) not in known and known[0] != known[1]:
                what = "sizes" if by_size else "strides"
                fail(
                    expected=f"FSP without resize to get {side} taps {a} and {b} of equal {what}",
                    received=" and ".join("x".join(map(str, values)) for values in known),
                    remedy="tap two layers of one stage, or set RESIZE: True to pool the larger",
                )
