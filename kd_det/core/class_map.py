"""The teacher's class of each class of the student, and the teacher's logits in that order.

A teacher with more classes than the student, or with the same in another order, can teach logits
once its columns are the student's classes: :func:`match_classes` finds them by name,
:func:`map_logits` and :func:`map_labels` select them.

Shapes: K_s classes of the student, K_t of the teacher. Heads with a background have one logit
more, first (torchvision) or last (Detectron2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from kd_det.core.errors import closest, fail, listed, nearest
from kd_det.core.loss import TapSpec
from kd_det.core.numerics import full_precision

NAMES_KEY = "KD.TEACHER.CLASS_NAMES"


@dataclass(frozen=True)
class ClassMap:
    """The position of each class of the student among the teacher's outputs.

    ``student`` and ``teacher`` are names in the order of the outputs; ``indices`` hold, per class
    of the student, the index of the teacher's.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    indices: tuple[int, ...]

    @property
    def student_classes(self) -> int:
        """K_s, without a background."""
        return len(self.student)

    @property
    def teacher_classes(self) -> int:
        """K_t, without a background."""
        return len(self.teacher)

    @property
    def is_identity(self) -> bool:
        """Whether every column stays where it is."""
        return self.indices == tuple(range(self.teacher_classes))

    @property
    def unmapped(self) -> tuple[int, ...]:
        """Indices of the teacher's classes that the student does not have."""
        return tuple(k for k in range(self.teacher_classes) if k not in self.indices)

    def pairs(self) -> list[tuple[str, str, int]]:
        """Per student class: its name, the teacher's name for it, and the teacher's index."""
        return [(s, self.teacher[k], k) for s, k in zip(self.student, self.indices, strict=True)]

    def describe(self) -> str:
        """The map in one line, cut where there are many classes."""
        named = [f"{s} <- {t} ({k})" if s != t else f"{s} ({k})" for s, t, k in self.pairs()]
        rest = [self.teacher[k] for k in self.unmapped]
        counts = f"{self.student_classes} classes of the student from {self.teacher_classes}"
        text = f"{counts} of the teacher (index): {listed(named)}"
        return f"{text}; unknown to the student: {listed(rest)}" if rest else text


def match_classes(
    student: Sequence[str], teacher: Sequence[str], class_map: Mapping[Any, Any] | None = None
) -> ClassMap:
    """Match classes by name; ``class_map`` gives the teacher's name where the student's differs.

    Raises:
        KDError: a name twice on one side; a class that the teacher lacks; a name in ``class_map``
            that its side lacks; or two classes of the student on one of the teacher's.
    """
    own, others = as_names("the student's classes", student), as_names("the teacher's", teacher)
    _refuse_repeated("student", own)
    _refuse_repeated("teacher", others)
    keys = as_names("KD.CLASS_MAP's student classes", list(class_map or {}))
    values = as_names("KD.CLASS_MAP's teacher classes", list((class_map or {}).values()))
    for side, given, known in (("student", keys, own), ("teacher", values, others)):
        for name in given:
            if name not in known:
                fail(
                    expected=f"KD.CLASS_MAP to name classes of the {side}",
                    received=f"'{name}'",
                    remedy=nearest(name, known),
                )
    renamed = dict(zip(keys, values, strict=True))
    wanted = [renamed.get(name, name) for name in own]
    missing = [name for name in wanted if name not in others]
    if missing:
        _refuse_missing(missing, others, len(own))
    shared = [name for name, count in Counter(wanted).items() if count > 1]
    if shared:
        users = {
            name: [s for s, t in zip(own, wanted, strict=True) if t == name] for name in shared
        }
        fail(
            expected="each class of the teacher to teach one class of the student",
            received="; ".join(f"'{name}' for {', '.join(names)}" for name, names in users.items()),
            remedy="correct KD.CLASS_MAP, or distil features only: the teacher cannot tell these "
            "classes of the student apart",
        )
    return ClassMap(own, others, tuple(others.index(name) for name in wanted))


def map_logits(
    logits: Tensor,
    class_map: ClassMap | None,
    background: Literal["first", "last"] | None = None,
    exclusive: bool = True,
) -> Tensor:
    r"""The teacher's logits as logits of the student's classes.

    To the student, an object of a class that it does not have is background. Where classes exclude
    each other, the background therefore takes their probability,
    :math:`b' = \log(e^b + \sum_{k\ \mathrm{unknown}} e^{z_k})`, and at temperature 1 the softmax
    of the result holds the teacher's marginals exactly. Independent (sigmoid) classes are
    selected. Without a background the softmax of the selected logits is the teacher's probability
    conditioned on the student's classes. The result is ``[..., K_s]`` or ``[..., K_s + 1]``, the
    background in its place, in at least float32 where probabilities are summed.

    Args:
        logits: ``[..., K_t]``, or ``[..., K_t + 1]`` with a background; log-probabilities will do.
        class_map: None changes nothing, nor does the identity.
        background: its position; None for heads without one.
        exclusive: whether the head was trained with a softmax.

    Raises:
        KDError: another number of logits than the map is for.
    """
    if class_map is None or class_map.is_identity:
        return logits
    columns = class_map.teacher_classes + (background is not None)
    if logits.shape[-1] != columns:
        fail(
            expected=f"{columns} logits of the teacher",
            received=f"shape {tuple(logits.shape)}",
            remedy="match the classes of this teacher",
        )
    first, device = int(background == "first"), logits.device
    rest = tuple(k + first for k in class_map.unmapped) if exclusive and background else ()
    if rest:
        logits = full_precision(logits)
    known = logits.index_select(-1, _index(tuple(k + first for k in class_map.indices), device))
    if background is None:
        return known
    own = 0 if first else class_map.teacher_classes
    ground = logits.index_select(-1, _index((own, *rest), device))
    if rest:
        ground = ground.logsumexp(dim=-1, keepdim=True)
    return torch.cat([ground, known] if first else [known, ground], dim=-1)


def map_labels(labels: Tensor, class_map: ClassMap | None, first: int = 0) -> Tensor:
    """The teacher's labels for the student's labels, which select the teacher's channels.

    Labels are integers of any shape, without background. ``first`` is the label of the first class:
    1 where 0 is the background.
    """
    if class_map is None:
        return labels
    return _index(class_map.indices, labels.device)[labels - first] + first


def translation(
    student: Sequence[str] | None, teacher: Sequence[str] | None, class_map: Mapping[Any, Any]
) -> list[int] | None:
    """The student's index of each of the teacher's classes, by name; -1 where it has none.

    Unlike :func:`match_classes` it refuses nothing: a teacher that lacks classes can still be
    evaluated on the others. The result is None where names are unknown: indices are then the same
    on both sides.
    """
    if student is None or teacher is None:
        return None
    renamed = {str(own): str(name) for own, name in class_map.items()}
    places = {renamed.get(name, name): place for place, name in enumerate(student)}
    return [places.get(name, -1) for name in teacher]


def translated(classes: Tensor, table: Sequence[int] | None, count: int) -> Tensor:
    """The teacher's class indices as the student's; -1 where the student has no such class.

    ``classes`` are integers of any shape, ``table`` is a :func:`translation`, and ``count`` the
    number of the student's classes.
    """
    if table is None:
        return classes.where(classes < count, -1)
    return torch.tensor(table, device=classes.device)[classes]


def mapped_specs(
    specs: Mapping[str, Any], class_map: ClassMap | None, backgrounds: Mapping[str, int]
) -> dict[str, Any]:
    """The teacher's specs after :func:`map_logits`.

    Args:
        specs: a :class:`~kd_det.core.loss.TapSpec`, or a list of them, by tap name.
        class_map: None changes nothing.
        backgrounds: for each tap of logits, the number of channels that are no class.

    Raises:
        KDError: the map is for a teacher with another number of classes.
    """
    mapped = dict(specs)
    if class_map is None:
        return mapped
    for name in mapped.keys() & backgrounds.keys():
        extra, spec = backgrounds[name], mapped[name]
        if isinstance(spec, TapSpec):
            mapped[name] = _mapped(name, spec, class_map, extra)
        else:
            mapped[name] = [_mapped(name, s, class_map, extra) for s in spec]
    return mapped


def as_names(what: str, names: Collection[Any]) -> tuple[str, ...]:
    """Names of a config as strings, also those that YAML reads as a number; others are refused."""
    for name in names:
        # YAML reads an unquoted no as False, and the spelling is lost.
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            fail(
                expected=f"names in {what}",
                received=f"{name!r} ({type(name).__name__})",
                remedy="put the name in quotes",
            )
    return tuple(map(str, names))


def _mapped(name: str, spec: TapSpec, class_map: ClassMap, background: int) -> TapSpec:
    if spec.channels != class_map.teacher_classes + background:
        fail(
            expected=f"a class map for the teacher's {spec.channels - background} classes ({name})",
            received=f"one for {class_map.teacher_classes}",
            remedy="match the classes of this teacher",
        )
    return replace(spec, channels=class_map.student_classes + background)


def _refuse_repeated(side: str, names: Sequence[str]) -> None:
    repeated = [f"'{name}' ({n} times)" for name, n in Counter(names).items() if n > 1]
    if repeated:
        fail(
            expected=f"a name of its own for every class of the {side}",
            received=", ".join(repeated),
            remedy="rename them in the categories of its training data"
            + (f" or in {NAMES_KEY}" if side == "teacher" else ""),
        )


def _refuse_missing(missing: Sequence[str], teacher: Sequence[str], classes: int) -> None:
    hints = [(name, closest(name, teacher)) for name in missing]
    named = [f"'{name}' (nearest: '{hint}')" if hint else f"'{name}'" for name, hint in hints]
    fail(
        expected="the teacher to know every class of the student, where logits are compared",
        received=f"{len(missing)} of {classes} that it does not know: {listed(named)}",
        remedy="name the teacher's class for each in KD.CLASS_MAP {student: teacher}, or distil "
        f"features only; the teacher knows {listed(teacher)}",
    )


@lru_cache(maxsize=64)
def _index(columns: tuple[int, ...], device: torch.device) -> Tensor:
    # Copied to a device once: a copy in every step would make the host wait for it.
    return torch.tensor(columns, device=device)
