"""What every detection host refuses about terms before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from kd_det.core.errors import check_known, fail
from kd_det.core.loss import TapSpec
from kd_det.core.registry import LOSSES
from kd_det.core.terms import Term
from kd_det.hosts.detection.family import Family
from kd_det.hosts.detection.heads import HeadTap, TapTable


def check_detection_terms(terms: Sequence[Term], family: Family) -> None:
    """Refuse terms that a detector's loop or its taps cannot serve, whatever the models are.

    Raises:
        KDError: no terms, a clipped term, a term named like a task loss, or taps whose rows do not
            correspond.
    """
    if not terms:
        fail(
            expected="KD.TERMS to name at least one loss",
            received="none",
            remedy="add a term, or set KD.ENABLED False to train the plain student",
        )
    for term in terms:
        if term.clip != "none":
            fail(
                expected=f"term '{term.name}' without a clip: detectors add up their losses and "
                "take one gradient",
                received=f"CLIP {term.clip}",
                remedy="set CLIP: none, and for MHGD REDUCTION: mean with a WEIGHT of its own",
            )
        if term.name in family.task_losses:
            refuse_name(term.name)
        _check_rows(term, family)


def refuse_name(names: str) -> None:
    """Fail for terms that have names of the student's own losses."""
    fail(
        expected="names of terms other than those of the student's own task losses",
        received=f"'{names}', the name of a task loss",
        remedy="rename the term in KD.TERMS",
    )


def check_pairs(terms: Sequence[Term], student: TapTable, teacher: TapTable) -> None:
    """Refuse pairs of known taps whose comparison would mean nothing.

    The specs of ``teacher`` are those in the student's classes.

    Raises:
        KDError: a loss over anchors on another map, logits of classes beside something else, or
            classes of another number or activation.
    """
    for term in terms:
        loss = LOSSES.get(term.loss)
        over_classes = "activation" in inspect.signature(loss.__init__).parameters
        for s, t in term.taps:
            if "anchors" in loss.needs:
                check_known(f"tap with anchors for term '{term.name}'", s, student.levels)
            both = (student.heads.get(s), teacher.heads.get(t))
            heads = [tap for tap in both if tap is not None and tap.classes]
            if s != t and heads and over_classes:
                fail(
                    expected=f"term '{term.name}' to compare logits with the same logits",
                    received=f"{s} with {t}",
                    remedy=f"write TAPS: [{s}]",
                )
            if s == t and len(heads) == 2:
                _check_classes(term.name, s, heads, [student.specs[s], teacher.specs[s]])


def _check_classes(
    term: str, tap: str, heads: Sequence[HeadTap], specs: Sequence[TapSpec | list[TapSpec]]
) -> None:
    counts = []
    for spec, head in zip(specs, heads, strict=True):
        first = spec[0] if isinstance(spec, list) else spec
        counts.append(first.channels - (head.background is not None))
    if counts[0] != counts[1]:
        fail(
            expected=f"student and teacher of term '{term}' ({tap}) to have the same classes",
            received=f"student {counts[0]} classes, teacher {counts[1]} classes",
            remedy="map the teacher's classes (KD.CLASS_MAP), or distil features only",
        )
    if heads[0].activation != heads[1].activation:
        fail(
            expected=f"heads of one kind on both sides of term '{term}' ({tap})",
            received=f"a student with {heads[0].activation}, a teacher with {heads[1].activation}",
            remedy="set MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE alike, or distil features",
        )


def _check_rows(term: Term, family: Family) -> None:
    """Only rows of one kind correspond."""
    rows = {s: family.rows(s) for s, _ in term.taps}
    for s, t in term.taps:
        own, other = rows[s], family.rows(t)
        if own != other:
            fail(
                expected=f"term '{term.name}' to compare {own} with {own}",
                received=f"student {s} with teacher {t}, one row for each of the {other}",
                remedy="tap the same kind of rows on both sides",
            )
    # Losses over a graph relate the rows of all their taps.
    arguments = inspect.signature(LOSSES.get(term.loss).__init__).parameters
    if "gather" in arguments and len(set(rows.values())) > 1:
        fail(
            expected=f"all taps of term '{term.name}' ({term.loss}) to have the same nodes",
            received=", ".join(f"{s}: {own}" for s, own in rows.items()),
            remedy=f"tap maps only, or only {', '.join(family.with_rows('RoIs'))}",
        )
