"""AT: attention transfer (Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
https://arxiv.org/abs/1612.03928).

Shapes: student map ``[N, C_s, H_s, W_s]``, teacher map ``[N, C_t, H_t, W_t]``; an attention map
is ``[N, H * W]``.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.adaptors import pool_to_common_size
from kd_det.core.errors import check_at_least, check_choice, check_maps, check_same_length
from kd_det.core.loss import DistillLoss
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Mode = Literal["code", "paper"]
_EPS = 1e-12  # of F.normalize, as in the authors' code: an all-zero map stays zero

logger = logging.getLogger(__name__)


def attention_map(feature: Tensor, p: float = 2) -> Tensor:
    """The energy of each position, ``mean_c |F_c|^p``, as ``[N, H * W]``.

    Rows have Euclidean length 1, or 0 where the whole map is zero. The map of any floating dtype is
    computed in at least float32. Because the sign is lost, a map tapped before its ReLU gives
    another result than after it. The exponent p is at least 1; the paper's experiments use 2.

    Raises:
        KDError: the tensor is not a map, or p is below 1.
    """
    check_maps("AT", feature=feature)
    _check_p(p)
    with no_autocast(feature):
        feature = full_precision(feature)
        energy = feature.square() if p == 2 else feature.abs().pow(p)
        return F.normalize(energy.mean(dim=1).flatten(1), dim=1, eps=_EPS)


def at_loss(student: Tensor, teacher: Tensor, p: float = 2, mode: Mode = "code") -> Tensor:
    r"""Distance between the attention maps of a student's and a teacher's map. Scalar.

    Widths may differ. If sizes differ, feature maps are average-pooled to the smaller height and
    the smaller width first. An empty batch gives an exact zero in the graph. No gradient flows into
    the teacher.

    Args:
        p: see :func:`attention_map`.
        mode: ``"code"``: squared difference, averaged over samples and positions (the authors'
            code, RepDistiller, mdistiller; the published weight of 1000 belongs to it).
            ``"paper"``: Euclidean distance, averaged over samples; a weight here is the paper's
            ``beta / 2``.

    Raises:
        KDError: not two maps of one batch, p below 1, or an unknown mode.
    """
    check_choice("mode", mode, Mode)
    _check_p(p)
    check_maps("AT", student=student, teacher=teacher)
    if student.numel() == 0:
        return zero_in_graph([student])
    with no_autocast(student):
        student, teacher = full_precision(student), full_precision(teacher.detach())
        student, teacher = pool_to_common_size(student, teacher, "avg")
        difference = attention_map(student, p) - attention_map(teacher, p)
        if mode == "paper":
            return torch.linalg.vector_norm(difference, dim=1).mean()
        return difference.square().mean()


def _check_p(p: float) -> None:
    remedy = "use the paper's 2; below 1 the gradient at 0 is infinite"
    check_at_least("AT to get an exponent p", p, 1, remedy)


@LOSSES.register("AT")
class ATLoss(DistillLoss):
    """:func:`at_loss`, summed over the taps. Nothing is learned."""

    def __init__(self, p: float = 2, mode: Mode = "code") -> None:
        super().__init__()
        _check_p(p)
        check_choice("mode", mode, Mode)
        self.p = p
        self.mode: Mode = mode
        self._warned = False

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Maps ``[N, C, H, W]`` of any widths and sizes. Scalar."""
        check_same_length("AT", student, teacher)
        losses = [at_loss(s, t, self.p, self.mode) for s, t in zip(student, teacher, strict=True)]
        if not self._warned:
            self._warn_of_single_cells(student, teacher)
        return torch.stack(losses).sum()

    def _warn_of_single_cells(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        for tap, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if min(s.shape[2], t.shape[2]) == 1 and min(s.shape[3], t.shape[3]) == 1:
                self._warned = True
                logger.warning(
                    f"AT tap {tap} is compared at 1x1 (student {tuple(s.shape)}, teacher "
                    f"{tuple(t.shape)}): its attention is 1 on both sides and it teaches nothing"
                )
