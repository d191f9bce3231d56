"""FitNet: hints (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
https://arxiv.org/abs/1412.6550).

Shapes: student map ``[N, C_s, H_s, W_s]``, teacher map ``[N, C_t, H_t, W_t]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.adaptors import ConvAdaptor, Size
from kd_det.core.errors import check_channels, check_choice, check_same_length, check_same_shape
from kd_det.core.loss import Arguments, DistillLoss, Specs, channel_arguments, check_strides
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Reduction = Literal["mean", "paper"]


def hint_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error of a hint. Scalar; an exact zero in the graph for an empty batch.

    Args:
        student: the adapted student map, of the teacher's shape.
        teacher: the teacher's map; no gradient flows into it.
        reduction: ``"mean"`` averages over everything (RepDistiller, mdistiller); ``"paper"`` is
            ``1/2 ||.||^2`` per sample, averaged over the batch: ``C_t H_t W_t / 2`` times as large.

    Raises:
        KDError: the shapes differ, or an unknown reduction.
    """
    check_choice("reduction", reduction, Reduction)
    check_same_shape("FitNet", student, teacher)
    if student.numel() == 0:
        return zero_in_graph([student])
    with no_autocast(student):
        error = F.mse_loss(full_precision(student), full_precision(teacher.detach()))
    return error if reduction == "mean" else error * (student[0].numel() / 2)


@LOSSES.register("FitNet")
class FitNetLoss(DistillLoss):
    """Regress each teacher map from the student's through a :class:`ConvAdaptor`.

    Args:
        student_channels, teacher_channels: channels per map.
        student_sizes, teacher_sizes: fixed ``(H, W)`` per map (classification), or None for
            detectors, where the adaptor is 1x1 and the adapted map is resized bilinearly if sizes
            differ.
        relu: end the adaptor in a ReLU. True fits ResNet stages, which end in one; use False on
            FPN levels, which are signed.
        reduction: see :func:`hint_loss`.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        student_sizes: Sequence[Size] | None = None,
        teacher_sizes: Sequence[Size] | None = None,
        relu: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        check_same_length("FitNet", student_channels, teacher_channels)
        n = len(student_channels)
        sizes_s: Sequence[Size | None] = student_sizes or [None] * n
        sizes_t: Sequence[Size | None] = teacher_sizes or [None] * n
        check_same_length("FitNet", sizes_s, student_channels)
        check_same_length("FitNet", sizes_t, student_channels)
        self.student_channels = list(student_channels)
        self.reduction: Reduction = reduction
        self.adaptors = nn.ModuleList(
            ConvAdaptor(c_s, c_t, size_s, size_t, relu)
            for c_s, c_t, size_s, size_t in zip(
                student_channels, teacher_channels, sizes_s, sizes_t, strict=True
            )
        )

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Widths, and sizes where both sides have fixed ones; else equal strides are required."""
        fixed = all(spec.size is not None for spec in [*student, *teacher])
        if not fixed:
            remedy = "tap the stage of the same stride, for example c3 on both"
            check_strides("FitNet", student, teacher, remedy)
        return {
            **channel_arguments(student, teacher),
            "student_sizes": [spec.size for spec in student] if fixed else None,
            "teacher_sizes": [spec.size for spec in teacher] if fixed else None,
        }

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Sum over taps of :func:`hint_loss` on adapted maps. Scalar."""
        check_same_length("FitNet", student, teacher)
        check_channels("FitNet", "student", student, self.student_channels)
        losses = []
        for adaptor, s, t in zip(self.adaptors, student, teacher, strict=True):
            if s.numel() == 0:
                losses.append(zero_in_graph([s, *adaptor.parameters()]))
                continue
            adapted = adaptor(full_precision(s))
            if adapted.shape[-2:] != t.shape[-2:]:
                adapted = F.interpolate(adapted, t.shape[-2:], mode="bilinear", align_corners=False)
            losses.append(hint_loss(adapted, t, self.reduction))
        return torch.stack(losses).sum()
