"""What a host knows about its detectors: maps of their backbones, anchors, and heads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from kd_det.bench.looks import evaluating
from kd_det.core.errors import fail, nearest
from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap, TapRecorder
from kd_det.hosts.detection.heads import Detector, Head, Specs, Step, TapTable

#: The student's padded batch, recorded in every step.
IMAGES = "images"
PROBE_SIZE = 256  # pixels; enough for one cell at stride 128 after padding


class Family(ABC):
    """The detectors of one host.

    Attributes:
        task_losses: names that no term may have, as far as they are known beforehand.
    """

    task_losses: ClassVar[Collection[str]] = ()

    def __init__(self, *heads: Head) -> None:
        self.heads = list(heads)

    @abstractmethod
    def features(self, model: Detector, wanted: Collection[str]) -> TapTable:
        """The table without heads; wanted module paths inside the backbone join its maps."""

    @abstractmethod
    def context_taps(self, model: Detector, needs: Collection[str]) -> dict[str, Tap]:
        """What to record for the context that losses need, and for :meth:`gt_boxes`."""

    @abstractmethod
    def anchors(self, step: Step) -> dict[str, Tensor]:
        """Anchors ``[H * W * A, 4]`` of one padded image by level; all images share them."""

    @abstractmethod
    def gt_boxes(self, step: Step) -> list[Tensor]:
        """Per image the ground truth ``[G, 4]`` in the coordinates of the anchors."""

    def tap_table(self, model: Detector, wanted: Collection[str] = ()) -> TapTable:
        """What ``model`` offers.

        Raises:
            KDError: a wanted name is neither a tap of this model nor a module in its backbone.
        """
        maps = self.features(model, wanted)
        specs, heads = Specs(maps.specs), dict(maps.heads)
        for head in self.heads:
            if own := head.specs(model):
                specs |= own
                heads |= {name: tap for name, tap in head.describe(model).items() if name in own}
        for name in wanted:
            if name not in specs:
                fail(
                    expected=f"a tap of {type(model).__name__}, or a module path in its backbone",
                    received=f"'{name}'",
                    remedy=nearest(name, specs),
                )
        return replace(maps, specs=specs, heads=heads)

    def rows(self, tap: str) -> str:
        """What dimension 0 of a tap counts; images for maps of the backbone."""
        return next((head.taps[tap].rows for head in self.heads if tap in head.taps), "images")

    def with_rows(self, rows: str) -> list[str]:
        """Names of the taps of heads with such rows."""
        return [name for head in self.heads for name, tap in head.taps.items() if tap.rows == rows]

    @property
    def class_taps(self) -> list[str]:
        """Names of the taps whose channels are classes."""
        return [name for head in self.heads for name, tap in head.taps.items() if tap.classes]

    def heads_of(self, wanted: Collection[str]) -> list[tuple[Head, list[str]]]:
        """The heads that have some of the wanted taps, with these."""
        pairs = [(head, [name for name in wanted if name in head.taps]) for head in self.heads]
        return [(head, names) for head, names in pairs if names]

    def uncertain_head(self, specs: Mapping[str, Any]) -> Head:
        """The head of a student whose logits tell how uncertain it is.

        Raises:
            KDError: the student has none.
        """
        for head in self.heads:
            if head.uncertain in specs:
                return head
        known = [head.uncertain for head in self.heads if head.uncertain]
        fail(
            expected=f"a student with {' or '.join(known)} for KD.KCD",
            received=f"one with {', '.join(specs)}",
            remedy="use an R-CNN on an FPN or a dense detector",
        )


def probe_backbone(model: Detector, taps: Mapping[str, Tap]) -> dict[str, Any]:
    """What a blank image leaves at some taps of a backbone; the model stays as it was."""
    recorder = TapRecorder(model, taps)
    blank = next(model.backbone.parameters()).new_zeros(1, 3, PROBE_SIZE, PROBE_SIZE)
    with evaluating(model), recorder.recording():
        model.backbone(blank)
    captures = recorder.read()
    recorder.release()
    return captures


def map_spec(name: str, value: Any) -> TapSpec:
    """Width and stride of a map that :func:`probe_backbone` recorded.

    Raises:
        KDError: it is no map.
    """
    if not isinstance(value, Tensor) or value.dim() != 4:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        fail(
            expected=f"{name} to be a map [N, C, H, W]",
            received=str(shape),
            remedy="tap a convolutional layer",
        )
    return TapSpec(value.shape[1], stride=math.ceil(PROBE_SIZE / value.shape[-1]))


def padded_to_divisor(pixels: Tensor, student: Tensor, divisor: int) -> Tensor:
    """A batch padded to at least the student's padded size, and to a multiple of ``divisor``.

    Every cell of the student then has a cell of the teacher.
    """
    sides = zip(student.shape[-2:], pixels.shape[-2:], strict=True)
    below, right = (max(math.ceil(own / divisor) * divisor - side, 0) for own, side in sides)
    return F.pad(pixels, (0, right, 0, below)) if below or right else pixels


def crop_to_cells(value: Tensor, padded: Sequence[int], stride: int) -> Tensor:
    """Cut off a map ``[..., H, W]`` what lies outside the student's padded batch, in pixels.

    Both sides begin at the same pixel; only the teacher's padding is cut off.
    """
    height, width = (math.ceil(side / stride) for side in padded)
    return value[..., :height, :width]
