"""What every detection host refuses about terms before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from kd_det.core.errors import check_known, fail
from kd_det.core.registry import LOSSES
from kd_det.core.terms import Term
from kd_det.hosts.detection.family import Family
from kd_det.hosts.detection.heads import HeadTap, Specs


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


def check_pairs(
    terms: Sequence[Term],
    student: tuple[Specs, Mapping[str, HeadTap]],
    teacher: tuple[Specs, Mapping[str, HeadTap]],
    levels: Sequence[str],
) -> None:
    """Refuse pairs of taps whose comparison would mean nothing.

    Args:
        terms: their taps are known on both sides.
        student: specs by tap name, and the taps of its heads.
        teacher: likewise, in the student's classes.
        levels: the student's taps that anchors are on.

    Raises:
        KDError: a loss over anchors on another map, logits of classes beside something else, or
            class counts that differ.
    """
    for term in terms:
        loss = LOSSES.get(term.loss)
        over_classes = "activation" in inspect.signature(loss.__init__).parameters
        for s, t in term.taps:
            if "anchors" in loss.needs:
                check_known(f"tap with anchors for term '{term.name}'", s, levels)
            heads = [student[1].get(s), teacher[1].get(t)]
            classes = [head is not None and head.classes for head in heads]
            if s != t and any(classes) and over_classes:
                fail(
                    expected=f"term '{term.name}' to compare logits with the same logits",
                    received=f"{s} with {t}",
                    remedy=f"write TAPS: [{s if classes[0] else t}]",
                )
            if s == t and all(classes):
                counts = [_classes(side, s) for side in (student, teacher)]
                if counts[0] != counts[1]:
                    fail(
                        expected=f"student and teacher of term '{term.name}' ({s}) to have the "
                        "same classes",
                        received=f"student {counts[0]} classes, teacher {counts[1]} classes",
                        remedy="map the teacher's classes (KD.CLASS_MAP), or distil features only",
                    )


def _classes(side: tuple[Specs, Mapping[str, HeadTap]], tap: str) -> int:
    specs, taps = side
    spec = specs[tap]
    channels = (spec[0] if isinstance(spec, list) else spec).channels
    return channels - (taps[tap].background is not None)


def _check_rows(term: Term, family: Family) -> None:
    """Only rows of one kind correspond."""
    rows = [(family.rows(s), family.rows(t)) for s, t in term.taps]
    for (s, t), (own, other) in zip(term.taps, rows, strict=True):
        if own != other:
            fail(
                expected=f"term '{term.name}' to compare {own} with {own}",
                received=f"student {s} with teacher {t}, one row for each of the {other}",
                remedy="tap the same kind of rows on both sides",
            )
    # Losses over a graph relate the rows of all their taps.
    arguments = inspect.signature(LOSSES.get(term.loss).__init__).parameters
    if "gather" in arguments and len(set(rows)) > 1:
        fail(
            expected=f"all taps of term '{term.name}' ({term.loss}) to have the same nodes",
            received=", ".join(f"{s}: {family.rows(s)}" for s, _ in term.taps),
            remedy=f"tap maps only, or only {', '.join(family.with_rows('RoIs'))}",
        )
