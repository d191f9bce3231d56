"""Listens to one training forward: what the distiller is given, and from which images and boxes.

Nothing is computed, copied or kept in between, and hooks exist only inside :func:`watching`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kd_det.bench.workbench import PixelInput
from kd_det.core.distiller import Distiller
from kd_det.core.taps import Tap
from kd_det.core.terms import Term
from kd_det.visualize.pixels import Pictures, seen_pictures

Values = Mapping[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Subject:
    """A run to look at.

    Attributes:
        student: the stock model.
        distiller: its losses.
        entrance: path of the module of ``student`` that takes the normalised batch.
        pixels: what it expects of its pixels.
        box_tap: where the student's sampled boxes pass; None without RoIs.
        class_names: the student's, in the order of its outputs; None if nobody knows them.
        background: where the box logits have the background, behind or before the classes.
    """

    student: nn.Module
    distiller: Distiller
    entrance: str
    pixels: PixelInput
    box_tap: Tap | None = None
    class_names: Sequence[str] | None = None
    background: Literal["first", "last"] = "last"


@dataclass(frozen=True)
class Recording:
    """One forward of the distiller; tensors are detached and on their device.

    Attributes:
        pictures: the first images of the batch.
        student: tensors by tap name, a list where a name stands for several.
        teacher: likewise.
        context: see :meth:`kd_det.Distiller.forward`.
        boxes: per stage of a cascade, per image ``[R, 4]`` in pixels of the padded batch; empty
            without RoIs.
    """

    pictures: Pictures
    student: Values
    teacher: Values
    context: Mapping[str, Any]
    boxes: Sequence[Sequence[Tensor]]

    def pairs(self, term: Term) -> list[tuple[str, Tensor, Tensor]]:
        """Label, student's and teacher's tensor of everything a term compares, in its order."""
        pairs = []
        for s, t in term.taps:
            label = s if s == t else f"{s} | {t}"
            stages = list(zip(_listed(self.student[s]), _listed(self.teacher[t]), strict=True))
            for k, (own, other) in enumerate(stages, 1):
                pairs.append((f"{label} stage {k}" if len(stages) > 1 else label, own, other))
        return pairs

    def narrowed(self, name: str, term: Term) -> Any:
        """A part of the context; of a mapping by tap, the entries of the term's taps."""
        value = self.context[name]
        return [value[tap] for tap, _ in term.taps] if isinstance(value, Mapping) else value


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def watching(subject: Subject, images: int) -> Iterator[list[Recording]]:
    """Record every forward of the distiller inside the block.

    Args:
        subject: whom to listen to.
        images: keep pictures of so many images of each batch, from the first on.

    Yields:
        The recordings, growing.
    """
    watch = _Watch(subject, images)
    entrance = subject.student.get_submodule(subject.entrance)
    handles = [
        entrance.register_forward_pre_hook(watch.see_pixels),
        subject.distiller.register_forward_pre_hook(watch.see_distiller, with_kwargs=True),
    ]
    if subject.box_tap is not None:
        pooler = subject.student.get_submodule(subject.box_tap.path)
        handles.append(pooler.register_forward_pre_hook(watch.see_boxes))
    try:
        yield watch.recordings
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    def __init__(self, subject: Subject, images: int) -> None:
        self.subject = subject
        self.images = images
        self.recordings: list[Recording] = []
        self._pixels: Tensor | None = None
        self._boxes: list[list[Tensor]] = []

    def see_pixels(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A student may run more than once before its distiller does; the last run counts.
        self._pixels = args[0]
        self._boxes = []

    def see_boxes(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert self.subject.box_tap is not None
        boxes = args[int(self.subject.box_tap.select or 0)]
        # Detectron2 wraps each image's boxes.
        self._boxes.append([getattr(b, "tensor", b).detach() for b in boxes])

    def see_distiller(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        assert self._pixels is not None
        self.recordings.append(
            Recording(
                seen_pictures(self._pixels, self.subject.pixels, self.images),
                _detached(given["student"]),
                _detached(given["teacher"]),
                given.get("context") or {},
                self._boxes,
            )
        )
        self._pixels = None


def _detached(values: Mapping[str, Any]) -> Values:
    return {
        name: [v.detach() for v in value] if isinstance(value, (list, tuple)) else value.detach()
        for name, value in values.items()
        # Hosts also hand on what only they need, such as boxes.
        if isinstance(value, Tensor) or _is_tensors(value)
    }


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
