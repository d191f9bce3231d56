"""The contract of a distillation loss, which is unweighted and knows no schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kd_det.core.errors import fail


@dataclass(frozen=True)
class TapSpec:
    """What is known about a tap before the first image.

    ``channels`` is the length of the channel axis (dim 1 of a map, last of a matrix of logits),
    ``stride`` counts input pixels per cell where that has a meaning, and ``size`` is ``(H, W)``
    where the size of the input is fixed (classification).
    """

    channels: int
    stride: int | None = None
    size: tuple[int, int] | None = None


Specs = Sequence[TapSpec]
Arguments = dict[str, Any]


class DistillLoss(nn.Module):
    """A loss over aligned lists of student and teacher tensors.

    Subclasses are registered in :data:`kd_det.LOSSES`. A term's config keys are the arguments of
    their constructor, except for those that :meth:`tap_arguments` gives.

    Attributes:
        needs: context a host must offer, passed to ``forward`` by keyword (``"gt_boxes"``).
    """

    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Constructor arguments that follow from the taps; also the place to refuse taps.

        ``given`` holds the arguments that the config sets; they take precedence.
        """
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Unweighted scalar loss of two aligned lists; ``context`` is what ``needs`` names."""
        raise NotImplementedError


def channel_arguments(student: Specs, teacher: Specs) -> dict[str, list[int]]:
    """The widths of both sides, for :meth:`DistillLoss.tap_arguments`."""
    return {
        "student_channels": [spec.channels for spec in student],
        "teacher_channels": [spec.channels for spec in teacher],
    }


def check_strides(loss: str, student: Specs, teacher: Specs, remedy: str) -> None:
    """Refuse pairs of taps of different stride."""
    for s, t in zip(student, teacher, strict=False):
        if s.stride != t.stride:
            fail(
                expected=f"{loss} taps of the same stride on both sides",
                received=f"student stride {s.stride}, teacher stride {t.stride}",
                remedy=remedy,
            )


def check_logits(loss: str, student: Specs, teacher: Specs, remedy: str) -> None:
    """Refuse pairs of logits of different class counts or mask sizes."""
    for s, t in zip(student, teacher, strict=False):
        if (s.channels, s.size) != (t.channels, t.size):
            fail(
                expected=f"{loss} to compare heads of the same classes",
                received=f"student {_logits(s)}, teacher {_logits(t)}",
                remedy=remedy,
            )


def _logits(spec: TapSpec) -> str:
    size = f" at {spec.size[0]}x{spec.size[1]}" if spec.size else ""
    return f"{spec.channels} logits{size}"
