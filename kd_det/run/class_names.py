"""The names of the classes of a run, and the class map that follows from them.

Names come from the training data of each side's own config, or from the config itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from kd_det.core.class_map import NAMES_KEY, ClassMap, as_names, match_classes
from kd_det.core.errors import fail, listed
from kd_det.run.config import read_terms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SideClasses:
    """The classes of a student or a teacher."""

    count: int  # without a background
    names: tuple[str, ...] | None  # in the order of the outputs; None where they are unknown
    reason: str = ""  # why they are unknown, to complete "unknown: ..."


def side_classes(
    side: str, count: int, found: Sequence[str] | None, data: str, given: Sequence[Any] = ()
) -> SideClasses:
    """The classes of one side, from its training data and its config.

    Names of training data that are not as many as the head's classes are left out with a warning.

    Args:
        side: ``"student"`` or ``"teacher"``, for messages.
        count: classes of its head, without a background.
        found: names in its training data; None where it is unknown or not on this machine.
        data: name of the training data, for messages.
        given: names in place of those found (``KD.TEACHER.CLASS_NAMES``).

    Raises:
        KDError: ``given`` holds something else than ``count`` names.
    """
    if given:
        names = as_names(NAMES_KEY, given)
        if len(names) != count:
            fail(
                expected=f"{NAMES_KEY} to name the {side}'s {count} classes",
                received=f"{len(names)} names: {listed(names)}",
                remedy="give one name per class, in the order of the outputs, without background",
            )
        return SideClasses(count, names)
    if found is None:
        return SideClasses(count, None, f"its training data '{data}' is not at hand")
    if len(found) != count:
        reason = f"its training data '{data}' has {len(found)} names for {count} classes"
        logger.warning("the names of the %s's classes are unknown: %s", side, reason)
        return SideClasses(count, None, reason)
    return SideClasses(count, tuple(found))


def find_class_map(
    student: SideClasses, teacher: SideClasses, class_map: Mapping[Any, Any]
) -> ClassMap | None:
    """The map that a run needs before it may compare logits; None if columns stay as they are.

    Where a side's names are unknown, equal counts are taken for equal classes. ``class_map`` is
    ``KD.CLASS_MAP``: student's name to teacher's.

    Raises:
        KDError: see :func:`match_classes`; or unknown names where counts differ or where
            ``class_map`` refers to them.
    """
    if student.names is not None and teacher.names is not None:
        found = match_classes(student.names, teacher.names, class_map)
        if found.is_identity:
            return None
        logger.info("%s", found.describe())
        return found
    unknown = [
        f"the names of the {side}'s classes are unknown: {classes.reason}"
        for side, classes in (("student", student), ("teacher", teacher))
        if classes.names is None
    ]
    if class_map or student.count != teacher.count:
        fail(
            expected="classes of student and teacher that are the same or have names, where "
            "logits are compared",
            received=f"student {student.count} classes, teacher {teacher.count} classes; "
            + "; ".join(unknown),
            remedy=f"give the teacher's names in {NAMES_KEY} (the student's are those of its "
            "training data), use a teacher of the student's classes, or distil features only",
        )
    return None


def run_class_map(
    cfg: CfgNode,
    teacher_cfg: CfgNode,
    logits: Collection[str],
    num_classes: Callable[[CfgNode], int],
    class_names: Callable[[CfgNode], Sequence[str] | None],
) -> ClassMap | None:
    """The map of a run; None where it compares no logits, or its columns agree already.

    Args:
        cfg: the student's config.
        teacher_cfg: the teacher's own.
        logits: names of the host's taps of logits.
        num_classes: of a config: classes of the head, without a background.
        class_names: of a config: names in its training data, if known.

    Raises:
        KDError: see :func:`side_classes` and :func:`find_class_map`.
    """
    if not any(tap in logits for term in read_terms(cfg) for _, tap in term.taps):
        return None
    student, teacher = (
        side_classes(side, num_classes(own), class_names(own), ", ".join(own.DATASETS.TRAIN), given)
        for side, own, given in (
            ("student", cfg, ()),
            ("teacher", teacher_cfg, cfg.KD.TEACHER.CLASS_NAMES),
        )
    )
    return find_class_map(student, teacher, cfg.KD.CLASS_MAP)
