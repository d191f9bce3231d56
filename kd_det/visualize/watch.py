"""Records the arguments of the distiller in a training forward, with the images and boxes.

Hooks exist only inside :func:`watching`; outside it nothing is computed, copied or kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from kd_det.bench.workbench import PixelInput, Workbench
from kd_det.core.terms import Term
from kd_det.visualize.pixels import Pictures, seen_pictures

Values = Mapping[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Recording:
    """One forward of the distiller; tensors are detached and on their device.

    Attributes:
        pictures: the first images of the batch.
        student: tensors by tap name, a list where a name stands for several.
        teacher: tensors by tap name, as of the student.
        context: see :meth:`kd_det.Distiller.forward`.
        boxes: per cascade stage, per image ``[R, 4]`` in pixels of the padded batch; empty
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
            several = list(zip(_listed(self.student[s]), _listed(self.teacher[t]), strict=True))
            for k, (own, other) in enumerate(several, 1):
                pairs.append((f"{label} stage {k}" if len(several) > 1 else label, own, other))
        return pairs

    def narrowed(self, name: str, term: Term) -> Any:
        """A part of the context; of a mapping by tap, the entries of the term's taps."""
        value = self.context[name]
        return [value[tap] for tap, _ in term.taps] if isinstance(value, Mapping) else value


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def watching(bench: Workbench, images: int) -> Iterator[list[Recording]]:
    """Record every forward of the distiller inside the block.

    Args:
        bench: the run, with a distiller.
        images: how many images of each batch to keep, from the first on.

    Yields:
        The recordings, growing.
    """
    assert bench.distiller is not None
    watch = _Watch(bench.pixel_input("student"), images)
    entrance = bench.student.get_submodule(bench.entrance)
    handles = [
        entrance.register_forward_pre_hook(watch.see_pixels),
        bench.distiller.register_forward_pre_hook(watch.see_distiller, with_kwargs=True),
    ]
    if bench.box_tap is not None:
        pooler = bench.student.get_submodule(bench.box_tap.path)
        see_boxes = partial(watch.see_boxes, int(bench.box_tap.select or 0))
        handles.append(pooler.register_forward_pre_hook(see_boxes))
    try:
        yield watch.recordings
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    def __init__(self, pixels: PixelInput, images: int) -> None:
        self.pixels = pixels
        self.images = images
        self.recordings: list[Recording] = []
        self._batch: Tensor | None = None
        self._boxes: list[list[Tensor]] = []

    def see_pixels(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A student may run more than once before its distiller does; the last run counts.
        self._batch = args[0]
        self._boxes = []

    def see_boxes(self, argument: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Detectron2 wraps each image's boxes.
        self._boxes.append([getattr(b, "tensor", b).detach() for b in args[argument]])

    def see_distiller(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        assert self._batch is not None
        self.recordings.append(
            Recording(
                seen_pictures(self._batch, self.pixels, self.images),
                _detached(given["student"]),
                _detached(given["teacher"]),
                given.get("context") or {},
                self._boxes,
            )
        )
        self._batch = None


def _detached(values: Mapping[str, Any]) -> Values:
    return {
        name: [v.detach() for v in value] if isinstance(value, (list, tuple)) else value.detach()
        for name, value in values.items()
        # Hosts add values for their own use, such as boxes.
        if isinstance(value, Tensor) or _is_tensors(value)
    }


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
