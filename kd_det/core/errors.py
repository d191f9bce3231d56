"""Errors about bad input, which name what was expected, what was received, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence, Sized
from typing import Any, NoReturn, get_args

from torch import Tensor


class KDError(ValueError):
    """A configuration or input that cannot work, reported before training time is spent."""


def fail(*, expected: str, received: str, remedy: str) -> NoReturn:
    """Raise :class:`KDError` with these three parts in one sentence."""
    raise KDError(f"expected {expected}; received {received}; remedy: {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? known: ..."``, the remedy for every unknown name."""
    names = sorted(set(known))
    close = closest(name, names)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}known: {', '.join(names) or '(none)'}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``, regardless of case; None if none is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return lowered[close[0]] if close else None


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not in ``known``, suggesting the nearest one."""
    names = list(known)
    if name not in names:
        fail(expected=f"a known {what}", received=f"'{name}'", remedy=nearest(str(name), names))


def check_choice(argument: str, value: str, choices: Any) -> None:
    """Refuse a value outside ``choices``: a sequence of strings, or their ``Literal`` type."""
    names: Sequence[str] = get_args(choices) or choices
    if value not in names:
        fail(
            expected=f"{argument} to be one of {', '.join(map(repr, names))}",
            received=repr(value),
            remedy=nearest(str(value), names),
        )


def check_at_least(
    what: str, value: float, least: float, remedy: str = "correct this value"
) -> None:
    """Refuse numbers below ``least``, and NaN."""
    if not value >= least:
        fail(expected=f"{what} of at least {least}", received=str(value), remedy=remedy)


def check_share(what: str, value: float, remedy: str, zero: bool = False) -> None:
    """Refuse numbers outside (0, 1], or [0, 1] with ``zero``, and NaN."""
    if not (0 < value <= 1 or (zero and value == 0)):
        interval = "[0, 1]" if zero else "(0, 1]"
        fail(expected=f"{what}, in {interval}", received=str(value), remedy=remedy)


def check_same_length(loss: str, student: Sized, teacher: Sized) -> None:
    """Refuse empty lists and lists of different length, of which zipping would drop a tensor."""
    if len(student) != len(teacher) or not student:
        fail(
            expected=f"{loss} to get as many student as teacher tensors, at least one",
            received=f"{len(student)} student and {len(teacher)} teacher tensors",
            remedy="tap the same levels on both sides",
        )


def check_same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse two tensors of different shape."""
    if student.shape != teacher.shape:
        fail(
            expected=f"{loss} to compare tensors of one shape",
            received=f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            remedy="bridge them with an adaptor, or tap layers of the same stride and width",
        )


def check_maps(loss: str, **maps: Tensor) -> None:
    """Refuse tensors, by their names, that are not maps or not of the same number of images."""
    if any(x.dim() != 4 for x in maps.values()) or len({len(x) for x in maps.values()}) > 1:
        fail(
            expected=f"{loss} to get maps [N, C, H, W] of the same images",
            received=", ".join(f"{name} {tuple(x.shape)}" for name, x in maps.items()),
            remedy="tap feature maps; logits and pooled vectors have no positions",
        )


def check_channels(
    loss: str, side: str, tensors: Sequence[Tensor], channels: Sequence[int]
) -> None:
    """Refuse tensors whose channel axes (dim 1) are not those the loss was built for."""
    check_same_length(loss, tensors, channels)
    for tensor, width in zip(tensors, channels, strict=True):
        if tensor.dim() < 2 or tensor.shape[1] != width:
            fail(
                expected=f"{loss} to get {side} maps with {width} channels on dim 1",
                received=f"shape {tuple(tensor.shape)}",
                remedy="build the loss with the channel count of this tap",
            )


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, cut after ``limit`` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
