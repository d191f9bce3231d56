"""Checks of the class lists: which class of the teacher corresponds to which of the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.document.detections import class_label
from kd_det.preflight.answers import confusion
from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section, counted

_SURE = 0.3  # least confidence for which an object counts as found
_ENOUGH = 3  # found objects of a class that allow a judgement
_ENOUGH_IN_ALL = 20
# A class is taken for another one where at most the first share of its objects is named rightly
# and at least the second share is given the same other class.
_RIGHT, _AGREED = 0.3, 0.6


def inspect_classes(section: Section, context: Context) -> None:
    """Fill the section."""
    bench = context.bench
    if bench.teacher is None:
        section.note("the run has no frozen teacher")
        return
    students, teachers = bench.class_names("student"), bench.class_names("teacher")
    indices = context.indices
    if indices is None:
        section.note("the correspondence of the classes of both sides is not known")
        return
    own = students or [f"class {k}" for k in range(len(indices))]
    others = teachers or [f"class {k}" for k in range(bench.num_classes("teacher"))]
    counts = confusion(context.answers, _SURE) if context.answers else None
    rows = []
    for k, t in enumerate(indices):
        names = (str(t), others[t]) if t >= 0 else ("-", "none")
        rows.append((str(k), own[k], *names, *_predicted(counts, k, t, others)))
    section.table(
        "The teacher's class of each of the student's classes, and its predictions for objects of "
        f"{counted(len(context.answers), 'training image')}",
        ("", "student", "", "teacher", "objects found", "named rightly", "mostly as"),
        rows,
    )
    section.data["teacher_index"] = dict(zip(own, indices, strict=True))
    _judge_names(section, own, others, indices, teachers is not None and students is not None)
    if counts is not None and context.shares_classes:
        _judge_answers(section, counts, indices, own, others)


def _judge_names(
    section: Section, own: Sequence[str], others: Sequence[str], indices: list[int], known: bool
) -> None:
    if not known:
        section.warn(
            "the names of one side's classes are not known, or not as many as its outputs: class k "
            "of the teacher is taken for class k of the student. KD.TEACHER.CLASS_NAMES can name "
            "the teacher's"
        )
    missing = [name for name, index in zip(own, indices, strict=True) if index < 0]
    if missing:
        section.warn(
            f"the teacher has no class for {', '.join(missing)}: it can teach features, but no "
            "logits"
        )
    elif not known:
        return
    elif list(own) == list(others):
        section.ok(f"{len(own)} classes, the same names in the same order")
    elif indices == list(range(len(others))):
        section.ok(f"{len(own)} classes in the same order, renamed by KD.CLASS_MAP")
    elif len(own) == len(others):
        section.ok(f"{len(own)} classes, the same names in another order: mapped by name")
    else:
        section.ok(f"{len(own)} classes found by name among {len(others)} of the teacher")


def _judge_answers(
    section: Section, counts: Tensor, indices: list[int], own: Sequence[str], others: Sequence[str]
) -> None:
    wrong, judged = [], 0
    right = sum(int(counts[k, t]) for k, t in enumerate(indices[: len(counts)]) if t >= 0)
    comparable = torch.tensor([t >= 0 for t in indices[: len(counts)]])
    total = int(counts[comparable].sum())
    for k, row in enumerate(counts):
        found, place = int(row.sum()), indices[k]
        if found < _ENOUGH or place < 0:
            continue
        judged += 1
        most = int(row.argmax())
        if most != place and row[place] <= _RIGHT * found and row[most] >= _AGREED * found:
            wrong.append(
                f"objects of '{own[k]}' are predicted as the teacher's class {most} "
                f"('{others[most]}')"
            )
    if len(wrong) > 1:
        section.error(
            "the teacher's outputs are in another order than its class names: "
            + "; ".join(wrong)
            + ". Give the names in the order of its outputs (KD.TEACHER.CLASS_NAMES, or the "
            "categories of its training data)"
        )
    elif wrong:
        section.warn(f"one class is taken for another: {wrong[0]}")
    elif total >= _ENOUGH_IN_ALL and right <= _RIGHT * total:
        section.error(
            f"the teacher names only {right} of the {total} objects it finds rightly: its class "
            "names do not belong to its outputs, or it was trained on other classes"
        )
    elif judged:
        section.ok(f"the teacher names {right} of the {total} objects it finds rightly")
    else:
        section.note(f"too few objects ({total}) to judge the order of the teacher's classes")


def _predicted(
    counts: Tensor | None, own: int, place: int, others: Sequence[str]
) -> tuple[str, str, str]:
    if counts is None or own >= len(counts) or not int(counts[own].sum()):
        return "0", "-", "-"
    row = counts[own]
    right = int(row[place]) if place >= 0 else 0
    total, most = int(row.sum()), int(row.argmax())
    return str(total), f"{right / total:.0%}", class_label(most, others)
