"""The contract of a distillation loss. Weighting and scheduling belong to the distiller."""

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
    their constructor; arguments named in ``from_taps`` are filled from the tapped shapes.

    Attributes:
        needs: context a host must offer, passed to ``forward`` by keyword (``"gt_boxes"``).
        from_taps: constructor arguments that :meth:`tap_arguments` provides.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    from_taps: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def tap_arguments(
        cls, student: Sequence[TapSpec], teacher: Sequence[TapSpec], given: dict[str, Any]
    ) -> dict[str, Any]:
        """Constructor arguments that follow from the taps, for the names in ``from_taps``.

        ``given`` holds the arguments the config sets.
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
