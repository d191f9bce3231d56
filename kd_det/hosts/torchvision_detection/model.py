"""``DistilledDetector``: a stock torchvision detector that trains under a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.checkpoint import name_keys_as_student
from kd_det.core.distiller import Distiller
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import Term, parse_terms
from kd_det.hosts.detection.distillation import DistillationBranch, DistillationPlan
from kd_det.hosts.detection.family import IMAGES, padded_to_divisor
from kd_det.hosts.detection.heads import Detector
from kd_det.hosts.torchvision_detection.family import FAMILY, TRANSFORMED
from kd_det.hosts.torchvision_detection.pre_stage import TeacherCaptures
from kd_det.procedures.pre_stage import pre_stage_losses


class DistilledDetector(DistillationBranch):
    """A stock detector, its frozen teacher, and the terms between them.

    In training the stock forward runs unchanged under hooks; in evaluation it is the stock
    detector. Random number streams are left alone, so with every weight at 0 training is
    bit-identical to the stock detector's.

    ``state_dict()`` has the student's own keys and, under ``distiller.``, what the losses learn.

    Args:
        student: ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet`` or ``FCOS``.
        teacher: another one; see :func:`~kd_det.hosts.torchvision_detection.teacher.build_teacher`.
        terms: parsed terms, or the mapping :func:`kd_det.core.terms.parse_terms` reads.
        **options: of :class:`~kd_det.hosts.detection.distillation.DistillationPlan`.

    Raises:
        KDError: a negative task weight, or what :meth:`attach` refuses.
    """

    family = FAMILY
    distiller: Distiller

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher,
        terms: Sequence[Term] | Mapping[str, Mapping[str, Any]],
        **options: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        parsed = parse_terms(terms) if isinstance(terms, Mapping) else list(terms)
        self.attach(DistillationPlan(self.teacher, parsed, **options))
        name_keys_as_student(self)

    @property
    def stock(self) -> Detector:
        return self.student

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Any:
        """As the stock detector, with the weighted terms among the losses.

        Args:
            images: per image ``[3, H, W]`` RGB in 0..1.
            targets: per image ``boxes [G, 4]``, ``labels [G]`` from 1, and ``masks [G, H, W]``
                for Mask R-CNN.

        Returns:
            In training the losses by name, in evaluation the detections per image.
        """
        if not self.training:
            return self.student(images, targets)
        return self.distilled_losses(lambda: self.student(images, targets), (images, targets))

    def teacher_pixels(self, teacher: Detector, batch: Any, recorded: dict[str, Any]) -> Tensor:
        """With the teacher's own mean, standard deviation and padding divisor."""
        pixels: Tensor = recorded[IMAGES]
        own, other = self.stock.transform, teacher.transform
        statistics = [(list(each.image_mean), list(each.image_std)) for each in (own, other)]
        if statistics[0] != statistics[1]:
            pixels = pixels.new_zeros(pixels.shape)
            sizes = recorded[TRANSFORMED][0].image_sizes
            for row, image, (h, w) in zip(pixels, batch[0], sizes, strict=True):
                image = other.normalize(image)[None]
                if image.shape[-2:] != (h, w):
                    image = F.interpolate(image, (h, w), mode="bilinear", align_corners=False)
                row[:, :h, :w] = image[0]
        return padded_to_divisor(pixels, pixels, other.size_divisible)

    def teacher_captures(self, sizes: Sequence[int], max_size: int) -> TeacherCaptures:
        """What the teacher computes for the terms that learn from it alone, beforehand."""
        losses = pre_stage_losses(self.distiller).values()
        names = list(dict.fromkeys(tap for _, taps in losses for tap in taps))
        table = self.family.tap_table(self.teacher.model, names)
        return TeacherCaptures(self.teacher, table, names, sizes, max_size, self.class_map)
