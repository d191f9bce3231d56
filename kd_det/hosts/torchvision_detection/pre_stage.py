"""What the teacher computes in a pre-stage, where there is no student to sample boxes.

Nodes are images for taps of the backbone and RoIs for taps of the box branch. RoIs must be like
those of the later training, because the network keeps their statistics: the teacher's own
proposals, joined by the ground truth and sampled by torchvision's own rule, are. Jittered ground
truth alone would lack the background, which is half or more of what a student samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kd_det.core.class_map import ClassMap
from kd_det.core.taps import Tap, TapRecorder
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.detection.heads import Detector, TapTable
from kd_det.hosts.torchvision_detection.family import FAMILY


class TeacherCaptures:
    """Batch to teacher tensors by tap name: the stock teacher, recorded, without a student.

    Args:
        teacher: a frozen stock torchvision detector.
        table: its taps, of which ``wanted`` are recorded.
        sizes: shorter sides of the run's training images; one is drawn for each.
        max_size: longest side.
        class_map: from the teacher's classes to the student's, where they differ.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        table: TapTable,
        wanted: Sequence[str],
        sizes: Sequence[int],
        max_size: int,
        class_map: ClassMap | None = None,
    ) -> None:
        self.teacher, self.class_map = teacher, class_map
        self.sizes, self.max_size = tuple(sizes), max_size
        self._wanted, self._heads = wanted, table.heads
        heads = FAMILY.heads_of(wanted)
        self._through_heads = bool(heads)
        taps = {name: table.taps[name] for name in wanted if name in table.taps}
        for head, names in heads:
            places = head.places(teacher.model, names)
            taps |= {name: place for name, place in places.items() if isinstance(place, Tap)}
        self._recorder = TapRecorder(teacher, taps)

    def __call__(self, batch: tuple[Sequence[Tensor], Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """From images ``[3, H, W]`` in 0..1 and their targets."""
        images, targets = batch
        self.teacher.follow(images[0])
        with self.teacher.inference() as model, _as_in_training(model):
            model.transform.min_size, model.transform.max_size = self.sizes, self.max_size
            with self._recorder.recording():
                if self._through_heads:
                    model(list(images), list(targets))
                else:
                    model.backbone(model.transform(list(images))[0].tensors)
            recorded = self._recorder.read()
            self._recorder.release()
            for name, tap in self._heads.items():
                if name in self._wanted and tap.rows == "RoIs" and tap.classes:
                    recorded[name] = tap.mapped(recorded[name], self.class_map)
        return {name: recorded[name] for name in self._wanted}


@contextmanager
def _as_in_training(model: Detector) -> Iterator[None]:
    """Draw image sizes and sample boxes as training does; every layer stays in eval mode."""
    parts = [model.transform, *([model.roi_heads] if hasattr(model, "roi_heads") else [])]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part in parts:
            part.training = False
