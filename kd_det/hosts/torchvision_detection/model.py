"""``DistilledDetector``: a stock torchvision detector that trains under a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.balance import Balance
from kd_det.core.checkpoint import name_keys_as_student
from kd_det.core.class_map import ClassMap
from kd_det.core.distiller import Distiller
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import Term, parse_terms
from kd_det.hosts.detection.distillation import DistillationBranch, DistillationPlan
from kd_det.hosts.detection.family import IMAGES
from kd_det.hosts.detection.heads import Detector
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.heads import TRANSFORMED
from kd_det.hosts.torchvision_detection.pre_stage import TeacherCaptures
from kd_det.procedures.pre_stage import pre_stage_losses


class DistilledDetector(DistillationBranch):
    """A stock detector, its frozen teacher, and the terms between them.

    In training the stock forward runs unchanged under hooks and the weighted terms join its
    losses; in evaluation it is the stock detector. Random number streams are left alone, so
    with every weight at 0 training is bit-identical to the stock detector's.

    ``state_dict()`` has the student's own keys and, under ``distiller.``, what the losses learn.

    Args:
        student: ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet`` or ``FCOS``.
        teacher: another one; see :func:`~kd_det.hosts.torchvision_detection.teacher.build_teacher`.
        terms: parsed terms, or the mapping :func:`kd_det.core.terms.parse_terms` reads.
        report_period, task_weight, values, class_map, balance: see
            :class:`~kd_det.hosts.detection.distillation.DistillationPlan`.

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
        report_period: int = 1000,
        task_weight: float = 1.0,
        values: bool = False,
        class_map: ClassMap | None = None,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        parsed = parse_terms(terms) if isinstance(terms, Mapping) else list(terms)
        self.attach(
            DistillationPlan(
                self.teacher, parsed, report_period, task_weight, values, class_map, balance
            )
        )
        name_keys_as_student(self)

    @property
    def stock(self) -> Detector:
        """The student."""
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
        """The batch as the teacher would have prepared it, at the student's image sizes.

        The teacher's own mean, standard deviation and padding divisor are used.
        """
        own: Tensor = recorded[IMAGES]
        height, width = (
            math.ceil(side / teacher.transform.size_divisible) * teacher.transform.size_divisible
            for side in own.shape[-2:]
        )
        statistics = [
            (list(side.transform.image_mean), list(side.transform.image_std))
            for side in (self.stock, teacher)
        ]
        if statistics[0] == statistics[1]:
            pixels = own
        else:
            pixels = own.new_zeros(own.shape)
            sizes = recorded[TRANSFORMED][0].image_sizes
            for row, image, (h, w) in zip(pixels, batch[0], sizes, strict=True):
                image = teacher.transform.normalize(image)[None]
                if image.shape[-2:] != (h, w):
                    image = F.interpolate(image, (h, w), mode="bilinear", align_corners=False)
                row[:, :h, :w] = image[0]
        return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    def teacher_captures(self, sizes: Sequence[int], max_size: int) -> TeacherCaptures:
        """What the teacher computes for the terms that learn from it alone, beforehand.

        Args:
            sizes: shorter sides of training images.
            max_size: their longest side.
        """
        losses = pre_stage_losses(self.distiller).values()
        names = list(dict.fromkeys(tap for _, taps in losses for tap in taps))
        table = self.family.tap_table(self.teacher.model, names)
        return TeacherCaptures(self.teacher, table, names, sizes, max_size, self.class_map)
