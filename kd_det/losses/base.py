"""The contract of a distillation loss. Weighting and scheduling belong to the distiller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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


def full_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 unchanged.

    fp16 overflows at 65504, which squared activations reach easily.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the precision on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def zero_in_graph(tensors: Iterable[Tensor]) -> Tensor:
    """An exact zero that still depends on ``tensors``.

    A detached zero would leave parameters without a gradient and make DDP wait for ever. Summing
    an empty selection instead of multiplying by zero keeps it exact where values are not finite.
    """
    total: Tensor | None = None
    for tensor in tensors:
        term = full_precision(tensor).flatten()[:0].sum()
        total = term if total is None else total + term
    assert total is not None
    return total
