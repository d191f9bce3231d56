"""``DistilledDetector``: a stock torchvision detector that trains under a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.checkpoint import name_keys_as_student
from kd_det.checks import check_known, fail
from kd_det.distiller import Distiller
from kd_det.hosts.torchvision_detection.taps import (
    ANCHORS,
    BOXES,
    FEATURES,
    IMAGES,
    LOGITS,
    MASK_BOXES,
    MASK_CLASSES,
    TRANSFORMED,
    TapTable,
    anchors_per_level,
    context_taps,
    tap_table,
)
from kd_det.hosts.torchvision_detection.teacher_pass import (
    TeacherPass,
    select_class,
    true_classes,
)
from kd_det.registry import LOSSES
from kd_det.taps import TapRecorder
from kd_det.teacher import FrozenTeacher
from kd_det.terms import Term, parse_terms

CONTEXT = ("anchors", "gt_boxes")
_TASK_LOSSES = (
    "loss_classifier",
    "loss_box_reg",
    "loss_objectness",
    "loss_rpn_box_reg",
    "loss_mask",
    "classification",
    "bbox_regression",
    "bbox_ctrness",
)
_SIGMOID_TAPS = ("mask_logits", "cls_logits")


class DistilledDetector(nn.Module):
    """A stock detector, its frozen teacher, and the terms between them.

    In training the stock forward runs unchanged under hooks and the weighted terms join its
    losses; in evaluation it is the stock detector. Random number streams are left alone, so
    with every weight at 0 training is bit-identical to the stock detector's.

    ``state_dict()`` has the student's own keys and, under ``distiller.``, what the losses learn.

    Args:
        student: ``FasterRCNN``, ``MaskRCNN``, ``RetinaNet`` or ``FCOS``.
        teacher: another one; see :func:`~kd_det.hosts.torchvision_detection.teacher.build_teacher`.
        terms: parsed terms, or the mapping :func:`kd_det.terms.parse_terms` reads.
        report_period: see :class:`kd_det.Distiller`.

    Raises:
        KDError: no terms, an unknown tap, a term named like a task loss, class counts or anchors
            that differ where logits are compared, or softmax KD on a sigmoid head.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher,
        terms: Sequence[Term] | Mapping[str, Mapping[str, Any]],
        report_period: int = 1000,
    ) -> None:
        super().__init__()
        parsed = list(parse_terms(terms) if isinstance(terms, Mapping) else terms)
        if not parsed:
            fail(
                expected="KD.TERMS to name at least one loss",
                received="none",
                remedy="add a term, or set KD.ENABLED False to train the plain student",
            )
        self.student = student
        self.teacher = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        student_names = list(dict.fromkeys(s for term in parsed for s, _ in term.taps))
        teacher_names = list(dict.fromkeys(t for term in parsed for _, t in term.taps))
        student_table = tap_table(student, student_names)
        teacher_table = tap_table(self.teacher.model, teacher_names)
        _check_terms(parsed, student, self.teacher.model, student_table, teacher_table)
        with torch.random.fork_rng(devices=[]):
            self.distiller = Distiller(
                parsed, student_table.specs, teacher_table.specs, CONTEXT, report_period
            )
        self.distiller.to(next(student.parameters()).device)
        _check_activations(parsed, self.distiller)
        self._levels = student_table.levels
        self._student_names = student_names
        self._needs = {need for term in parsed for need in LOSSES.get(term.loss).needs}
        self._teacher_pass = TeacherPass(self.teacher, teacher_table, teacher_names)
        wanted = {TRANSFORMED, IMAGES}
        wanted |= {ANCHORS, FEATURES} if "anchors" in self._needs else set()
        wanted |= {BOXES} if "box_logits" in teacher_names else set()
        wanted |= {MASK_BOXES} if "mask_logits" in (*student_names, *teacher_names) else set()
        self._taps = {n: t for n, t in context_taps(student).items() if n in wanted}
        self._taps |= {name: student_table.taps[name] for name in student_names}
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
        with recorder.recording():
            losses = self.student(images, targets)
        recorded = recorder.read()
        recorder.release()
        if MASK_BOXES in recorded:
            recorded[MASK_CLASSES] = true_classes(self.student, recorded)
        self.teacher.follow(recorded[IMAGES])
        teacher = self._teacher_pass(self.student, images, recorded)
        student = {name: self._student_value(name, recorded) for name in self._student_names}
        return losses | self.distiller(student, teacher, self._context(recorded))

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


def _check_terms(
    terms: Sequence[Term],
    student: nn.Module,
    teacher: nn.Module,
    student_table: TapTable,
    teacher_table: TapTable,
) -> None:
    for term in terms:
        if term.name in _TASK_LOSSES:
            fail(
                expected="a term to have a name of its own",
                received=f"'{term.name}', the name of a task loss",
                remedy="rename the entry in KD.TERMS",
            )
        if "anchors" in LOSSES.get(term.loss).needs:
            for tap, _ in term.taps:
                check_known(f"tap with anchors for term '{term.name}'", tap, student_table.levels)
        for s, t in term.taps:
            if (s in LOGITS or t in LOGITS) and s != t:
                fail(
                    expected=f"term '{term.name}' to compare logits with the same logits",
                    received=f"{s} with {t}",
                    remedy=f"write TAPS: [{s if s in LOGITS else t}]",
                )
            if s in LOGITS:
                _check_logits(term.name, s, student, teacher, student_table, teacher_table)


def _check_logits(
    term: str,
    tap: str,
    student: nn.Module,
    teacher: nn.Module,
    student_table: TapTable,
    teacher_table: TapTable,
) -> None:
    # torchvision counts the background; people count classes.
    counts = [table.specs[tap].channels - 1 for table in (student_table, teacher_table)]
    if counts[0] != counts[1]:
        fail(
            expected=f"student and teacher of term '{term}' ({tap}) to have the same classes",
            received=f"student {counts[0]} classes, teacher {counts[1]} classes",
            remedy="train the teacher on the student's data, or distil features only",
        )
    if tap == "cls_logits":
        layouts = [
            dict(zip(table.levels, model.anchor_generator.num_anchors_per_location(), strict=True))
            for table, model in ((student_table, student), (teacher_table, teacher))
        ]
        if layouts[0] != layouts[1]:
            fail(
                expected=f"student and teacher of term '{term}' ({tap}) to have the same anchors",
                received=f"anchors per cell: student {layouts[0]}, teacher {layouts[1]}",
                remedy="use the same MODEL.FPN.LEVELS and MODEL.ANCHOR_GENERATOR on both sides",
            )


def _check_activations(terms: Sequence[Term], distiller: Distiller) -> None:
    for term in terms:
        softmax = getattr(distiller.terms[term.name], "activation", "") == "softmax"
        for tap, _ in term.taps:
            if softmax and tap in _SIGMOID_TAPS:
                fail(
                    expected=f"term '{term.name}' to treat {tap} as its head was trained, sigmoid",
                    received="ACTIVATION softmax",
                    remedy="set ACTIVATION: sigmoid",
                )
