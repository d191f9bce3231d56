"""What this host refuses about terms before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd_det.core.errors import check_known, fail
from kd_det.core.registry import LOSSES
from kd_det.core.terms import Term, check_heads
from kd_det.hosts.detection.terms import check_detection_terms
from kd_det.hosts.torchvision_detection.taps import LOGITS, TapTable

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


def check_terms(
    terms: Sequence[Term],
    student: nn.Module,
    teacher: nn.Module,
    student_table: TapTable,
    teacher_table: TapTable,
) -> None:
    """Refuse terms that could not work, or whose comparison would mean nothing.

    Raises:
        KDError: see :class:`~kd_det.hosts.torchvision_detection.model.DistilledDetector`.
    """
    check_detection_terms(terms)
    check_heads(terms, _SIGMOID_TAPS)
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
            remedy="map the teacher's classes (KD.CLASS_MAP), or distil features only",
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
