"""KD: softened logits (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
2015, https://arxiv.org/abs/1503.02531).

Shapes: M rows (images, RoIs, anchors), J classes; for a Detectron2 box head J = K + 1 with the
background last, for torchvision background first: only the agreement of both sides matters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.errors import check_choice, check_same_length, check_same_shape, fail
from kd_det.core.loss import Arguments, DistillLoss, Specs, check_logits
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Reduction = Literal["batchmean", "mean", "foreground"]
Activation = Literal["softmax", "sigmoid"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    activation: Activation = "softmax",
) -> Tensor:
    r"""``T^2 * KL(p_t || q_s)`` between softened predictions. Scalar.

    Without rows the loss is an exact zero in the graph.

    Args:
        student_logits: ``[M, J]``, or ``[M, ...]`` for sigmoid; any floating dtype, computed in
            at least float32.
        teacher_logits: likewise; no gradient flows into it.
        temperature: T > 0, by which both logits are divided. The factor T^2 keeps the size of the
            gradient independent of T.
        reduction: ``"batchmean"`` sums over classes and averages rows (RepDistiller,
            mdistiller); ``"mean"`` averages every element, J times smaller;
            ``"foreground"`` (ours, sigmoid only) sums everything and divides by the teacher's
            expected number of foreground rows, at least 1, as focal loss divides by positives.
        activation: ``"softmax"`` for exclusive classes; ``"sigmoid"`` for independent ones
            (RetinaNet, FCOS, masks), a Bernoulli KL per element (ours).

    Raises:
        KDError: shapes differ, an unknown choice, or a temperature that is not positive.
    """
    check_same_shape("KD", student_logits, teacher_logits)
    _check_arguments(temperature, reduction, activation)
    if student_logits.numel() == 0:
        return zero_in_graph([student_logits])
    with no_autocast(student_logits):
        student = full_precision(student_logits) / temperature
        teacher = full_precision(teacher_logits.detach()) / temperature
        if activation == "softmax":
            total = F.kl_div(
                F.log_softmax(student, dim=-1),
                F.log_softmax(teacher, dim=-1),
                reduction="sum",
                log_target=True,
            )
        else:
            total = _bernoulli_kl(student, teacher)
        total = total * temperature**2
        if reduction == "mean":
            return total / student.numel()
        if reduction == "batchmean":
            return total / student.shape[0]
        foreground = torch.sigmoid(teacher).flatten(1).amax(dim=1).sum()
        return total / foreground.clamp(min=1.0)


def _bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    # From differences of log-probabilities: cross-entropy minus entropy would cancel to noise over
    # the many elements on which both sides agree.
    positive = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (positive + negative).sum()


def _check_arguments(temperature: float, reduction: str, activation: str) -> None:
    check_choice("reduction", reduction, Reduction)
    check_choice("activation", activation, Activation)
    if not temperature > 0:
        fail(
            expected="KD to get a temperature above 0",
            received=str(temperature),
            remedy="use 1 for detectors, 4 for CIFAR classifiers",
        )
    if reduction == "foreground" and activation != "sigmoid":
        fail(
            expected="reduction 'foreground' with activation 'sigmoid'",
            received=f"activation '{activation}'",
            remedy="softmax heads have a background class: use 'batchmean' or 'mean'",
        )


@LOSSES.register("KD")
class KDLoss(DistillLoss):
    """:func:`kd_loss`, averaged over the pairs (cascade stages, where a box head has several).

    All public detector codes use temperature 1, those for CIFAR 4.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "batchmean",
        activation: Activation = "softmax",
    ) -> None:
        super().__init__()
        _check_arguments(temperature, reduction, activation)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.activation: Activation = activation

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Nothing to fill in; refuses heads of different class counts or mask sizes."""
        remedy = (
            "use a teacher that was trained on the student's classes, or distil features instead"
        )
        check_logits("KD", student, teacher, remedy)
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Mean over pairs of ``[M_i, J]`` logits. Scalar."""
        check_same_length("KD", student, teacher)
        pairs = [
            kd_loss(s, t, self.temperature, self.reduction, self.activation)
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(pairs).mean()
