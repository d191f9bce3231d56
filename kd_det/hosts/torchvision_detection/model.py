"""``DistilledDetector``: a stock torchvision detector that trains under a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.balance import Balance
from kd_det.core.checkpoint import name_keys_as_student
from kd_det.core.class_map import ClassMap, mapped_specs
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.numerics import zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.core.taps import TapRecorder
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import Term, parse_terms
from kd_det.hosts.torchvision_detection.pre_stage import TeacherCaptures
from kd_det.hosts.torchvision_detection.taps import (
    ANCHORS,
    BOX_TAPS,
    BOXES,
    FEATURES,
    IMAGES,
    LOGITS,
    MASK_BOXES,
    MASK_CLASSES,
    TRANSFORMED,
    anchors_per_level,
    context_taps,
    tap_table,
)
from kd_det.hosts.torchvision_detection.teacher_pass import TeacherPass, select_class, true_classes
from kd_det.hosts.torchvision_detection.term_checks import check_terms
from kd_det.hosts.torchvision_detection.uncertainty import (
    anchor_values,
    recorded_matches,
    roi_values,
)
from kd_det.procedures.pre_stage import pre_stage_losses

CONTEXT = ("anchors", "gt_boxes")
_UNCERTAIN = ("box_logits", "cls_logits")


class DistilledDetector(nn.Module):
    """A stock detector, its frozen teacher, and the terms between them.

    In training the stock forward runs unchanged under hooks and the weighted terms join its
    losses; in evaluation it is the stock detector. Random number streams are left alone, so
    with every weight at 0 training is bit-identical to the stock detector's.

    ``state_dict()`` has the student's own keys and, under ``distiller.``, what the losses learn.

    Args:
        student: ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet`` or ``FCOS``.
        teacher: another one; see :func:`~kd_det.hosts.torchvision_detection.teacher.build_teacher`.
        terms: parsed terms, or the mapping :func:`kd_det.core.terms.parse_terms` reads.
        report_period: see :class:`kd_det.Distiller`.
        task_weight: multiplies the task losses in training. 1 leaves them untouched; 0 trains
            with the terms alone: parameters that no term reaches then get a zero gradient.
        values: in every training step, also leave in ``image_values`` how uncertain the student
            is about each image, ``[N]`` in 0..1; see
            :mod:`kd_det.hosts.torchvision_detection.uncertainty`.
        class_map: how the teacher's logits become those of the student's classes, from
            :func:`kd_det.core.class_map.match_classes`; None if they are already.
        balance: adapts the weights of the terms; gradients are compared on the student's backbone.
            See :mod:`kd_det.balance`.

    Raises:
        KDError: no terms, an unknown tap, a term named like a task loss, taps whose rows do not
            correspond, class counts or anchors that differ where logits are compared, softmax KD
            on a sigmoid head, a clipped term, or a negative task weight.
    """

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
        parsed = list(parse_terms(terms) if isinstance(terms, Mapping) else terms)
        if not parsed:
            fail(
                expected="KD.TERMS to name at least one loss",
                received="none",
                remedy="add a term, or set KD.ENABLED False to train the plain student",
            )
        if not (math.isfinite(task_weight) and task_weight >= 0):
            fail(
                expected="KD.TASK_WEIGHT to be a finite number of at least 0",
                received=str(task_weight),
                remedy="use 1 for the student's own losses as they are, 0 to train without them",
            )
        self.student = student
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        student_names = list(dict.fromkeys(s for term in parsed for s, _ in term.taps))
        teacher_names = list(dict.fromkeys(t for term in parsed for _, t in term.taps))
        student_table = tap_table(student, student_names)
        teacher_table = tap_table(self.teacher.model, teacher_names)
        self.class_map = class_map
        # torchvision counts a background in every head.
        specs = mapped_specs(teacher_table.specs, class_map, dict.fromkeys(LOGITS, 1))
        teacher_table = replace(teacher_table, specs=specs)
        check_terms(parsed, student, self.teacher.model, student_table, teacher_table)
        with torch.random.fork_rng(devices=[]):
            self.distiller = Distiller(
                parsed, student_table.specs, teacher_table.specs, CONTEXT, report_period, balance
            )
        self.distiller.to(next(student.parameters()).device)
        self._levels = student_table.levels
        self._student_names = student_names
        self._needs = {need for term in parsed for need in LOSSES.get(term.loss).needs}
        self._teacher_pass = TeacherPass(self.teacher, teacher_table, teacher_names, class_map)
        self.task_weight = task_weight
        self.image_values: Tensor | None = None
        # The logits whose entropy is measured; None: nothing is.
        self._uncertain = next(n for n in _UNCERTAIN if n in student_table.taps) if values else None
        wanted = {TRANSFORMED, IMAGES}
        wanted |= {ANCHORS, FEATURES} if "anchors" in self._needs else set()
        wanted |= {BOXES} if {*teacher_names, self._uncertain} & {*BOX_TAPS} else set()
        wanted |= {MASK_BOXES} if "mask_logits" in (*student_names, *teacher_names) else set()
        self._taps = {n: t for n, t in context_taps(student).items() if n in wanted}
        names = [*student_names, *([self._uncertain] if self._uncertain else [])]
        self._taps |= {name: student_table.taps[name] for name in names}
        name_keys_as_student(self)

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
        # Made anew in each forward, so that a deep copy records its own student.
        recorder = TapRecorder(self.student, self._taps)
        matches: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._uncertain == "cls_logits":
            matches = recorded_matches(self.student)
        with recorder.recording(), matches as matched:
            losses = self._weighted(self.student(images, targets))
        recorded = recorder.read()
        recorder.release()
        if MASK_BOXES in recorded:
            recorded[MASK_CLASSES] = true_classes(self.student, recorded)
        self.teacher.follow(recorded[IMAGES])
        teacher = self._teacher_pass(self.student, images, recorded)
        student = {name: self._student_value(name, recorded) for name in self._student_names}
        if self._uncertain:
            self.image_values = self._values(recorded[self._uncertain], recorded, matched)
        shared = [p for p in self.student.backbone.parameters() if p.requires_grad]  # type: ignore[union-attr]
        return losses | self.distiller(student, teacher, self._context(recorded), losses, shared)

    def teacher_captures(self, sizes: Sequence[int], max_size: int) -> TeacherCaptures:
        """What the teacher computes for the terms that learn from it alone, beforehand.

        Args:
            sizes: shorter sides of training images.
            max_size: their longest side.
        """
        losses = pre_stage_losses(self.distiller).values()
        names = list(dict.fromkeys(tap for _, taps in losses for tap in taps))
        table = self._teacher_pass.table
        return TeacherCaptures(self.teacher, table, names, sizes, max_size, self.class_map)

    def _weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.task_weight == 1:
            return losses
        if self.task_weight == 0:
            # One zero of all parameters: nothing is propagated through the task losses, and DDP
            # still finds every parameter.
            zero = zero_in_graph(p for p in self.student.parameters() if p.requires_grad)
            return dict.fromkeys(losses, zero)
        return {name: loss * self.task_weight for name, loss in losses.items()}

    def _values(
        self, logits: Tensor, recorded: Mapping[str, Any], matches: Sequence[Tensor]
    ) -> Tensor:
        if self._uncertain == "box_logits":
            return roi_values(logits, [len(boxes) for boxes in recorded[BOXES]])
        # As many negatives as an image may have detections.
        return anchor_values(logits, matches, self.student.detections_per_img)  # type: ignore[arg-type]

    def _student_value(self, name: str, recorded: Mapping[str, Any]) -> Tensor:
        value: Tensor = recorded[name]
        if name == "mask_logits":
            return select_class(value, recorded[MASK_CLASSES])
        return value.flatten(0, 1) if name == "cls_logits" else value

    def _context(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        context: dict[str, Any] = {}
        if "gt_boxes" in self._needs:
            context["gt_boxes"] = [target["boxes"] for target in recorded[TRANSFORMED][1]]
        if "anchors" in self._needs:
            maps = [recorded[FEATURES][key] for key in self._levels.values()]
            anchors = anchors_per_level(self.student, recorded[ANCHORS], maps)
            context["anchors"] = dict(zip(self._levels, anchors, strict=True))
        return context
