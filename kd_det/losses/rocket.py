"""Rocket launching (Zhou et al., "Rocket Launching: A Universal and Efficient Framework for
Training Well-performing Light Net", AAAI 2018, https://arxiv.org/abs/1708.04106).

A light net and a heavy booster share their lower layers and are trained together from scratch; the
hint ties their logits. Shapes: N samples, J classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kd_det.core.errors import check_choice, check_same_length, check_same_shape
from kd_det.core.loss import Arguments, DistillLoss, Specs, check_logits
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Reduction = Literal["batchmean", "mean"]


def rocket_hint(
    light_logits: Tensor,
    booster_logits: Tensor,
    block: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Squared distance of the logits before the softmax: ``1/N * sum_n ||l_n - z_n||^2``.

    A scalar; an exact zero in the graph for an empty batch. N counts the samples that are present;
    the authors' code divides by the configured batch size, which weakens a partial last batch.

    Args:
        light_logits, booster_logits: ``[N, J]``, any floating dtype, computed in at least float32.
        block: the gradient block: the hint does not pull the booster towards the light net.
            Default True, as in the paper; False is its ablation.
        reduction: ``"batchmean"`` sums over classes (paper and code), ``"mean"`` averages.

    Raises:
        KDError: the shapes differ, or an unknown reduction.
    """
    check_choice("reduction", reduction, Reduction)
    check_same_shape("Rocket", light_logits, booster_logits)
    if block:
        booster_logits = booster_logits.detach()
    if light_logits.numel() == 0:
        return zero_in_graph([light_logits, booster_logits])
    with no_autocast(light_logits):
        difference = full_precision(light_logits) - full_precision(booster_logits)
        error = difference.square()
        return error.mean() if reduction == "mean" else error.sum() / len(error)


@LOSSES.register("Rocket")
class RocketLoss(DistillLoss):
    """:func:`rocket_hint` with the light net as student and the booster as teacher.

    ``block`` False needs a teacher tensor that carries a gradient, which only a jointly trained
    booster has.
    """

    def __init__(self, block: bool = True, reduction: Reduction = "batchmean") -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        self.block = block
        self.reduction: Reduction = reduction

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Nothing to fill in; refuses a booster with other classes."""
        remedy = "give light net (student) and booster (teacher) the same number of classes"
        check_logits("Rocket", student, teacher, remedy)
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Mean over pairs of ``[N, J]`` logits, of which there is usually one. Scalar."""
        check_same_length("Rocket", student, teacher)
        pairs = [
            rocket_hint(s, t, self.block, self.reduction)
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(pairs).mean()
