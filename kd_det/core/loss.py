"""The contract of a distillation loss, which is unweighted and knows no schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class TapSpec:
    """What is known about a tap before the first image.

    Attributes:
        channels: length of the channel axis (dim 1 of a map, last of a matrix of logits).
        stride: input pixels per cell, or None where it has no meaning.
        size: ``(H, W)`` where the input size is fixed (classification), else None.
    """

    channels: int
    stride: int | None = None
    size: tuple[int, int] | None = None


class DistillLoss(nn.Module):
    """A loss over aligned lists of student and teacher tensors.

    Subclasses are registered in :data:`kd_det.LOSSES`. A term's config keys are the arguments of
    their constructor, except for those that :meth:`tap_arguments` gives.

    Attributes:
        needs: context a host must offer, passed to ``forward`` by keyword (``"gt_boxes"``).
    """

    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def tap_arguments(
        cls, student: Sequence[TapSpec], teacher: Sequence[TapSpec], given: dict[str, Any]
    ) -> dict[str, Any]:
        """Constructor arguments that follow from the taps; also the place to refuse taps.

        ``given`` holds the arguments that the config sets; they take precedence.
        """
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Unweighted scalar loss.

        Args:
            student: maps or logits with a gradient graph.
            teacher: as many tensors, aligned with ``student``.
            **context: what ``needs`` names.
        """
        raise NotImplementedError


def channel_arguments(
    student: Sequence[TapSpec], teacher: Sequence[TapSpec]
) -> dict[str, list[int]]:
    """The widths of both sides, for :meth:`DistillLoss.tap_arguments`."""
    return {
        "student_channels": [spec.channels for spec in student],
        "teacher_channels": [spec.channels for spec in teacher],
    }
