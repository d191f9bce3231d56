"""Records the arguments of the distiller in a training forward, with the images and boxes.

Hooks exist only inside :func:`watching`; outside it nothing is computed, copied or kept. Images are
taken from the tensor that enters the student's backbone, because taps and boxes lie on its grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.bench.workbench import PixelInput, Workbench
from kd_det.core.terms import Term

Values = Mapping[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Pictures:
    """Images of one batch.

    Attributes:
        images: per image uint8 RGB ``[3, h, w]``, without padding.
        size: ``(H, W)`` of the padded batch, the pixels that feature maps cover; padding is at
            the right and at the bottom.
    """

    images: Sequence[Tensor]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)


def seen_pictures(batch: Tensor, pixels: PixelInput, most: int) -> Pictures:
    """Undo the normalisation of a batch.

    Args:
        batch: ``[N, 3, H, W]`` as it enters the backbone.
        pixels: what the model expects, hence what was done to it.
        most: the largest number of images to take, from the first on.
    """
    size = (batch.shape[2], batch.shape[3])
    batch = batch[:most].detach().float().cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pixels.mean, pixels.std))
    values = ((batch * std + mean) * (255 / pixels.scale)).round().clamp(0, 255).to(torch.uint8)
    if pixels.order == "BGR":
        values = values.flip(1)
    return Pictures(
        [image[:, :h, :w] for image, (h, w) in zip(values, map(_filled, batch), strict=True)], size
    )


def _filled(image: Tensor) -> tuple[int, int]:
    """Height and width without padding, which is exactly 0 after normalisation."""
    filled = (image != 0).any(dim=0)
    h, w = (int(filled.any(dim=d).nonzero().max()) + 1 if filled.any() else 0 for d in (1, 0))
    return h or image.shape[1], w or image.shape[2]


@dataclass(frozen=True)
class Recording:
    """One forward of the distiller; tensors are detached and on their device.

    Attributes:
        pictures: the first images of the batch.
        student, teacher: tensors by tap name, a list where a name stands for several.
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
            several = list(zip(listed(self.student[s]), listed(self.teacher[t]), strict=True))
            for k, (own, other) in enumerate(several, 1):
                pairs.append((f"{label} stage {k}" if len(several) > 1 else label, own, other))
        return pairs

    def narrowed(self, name: str, term: Term) -> Any:
        """A part of the context; of a mapping by tap, the entries of the term's taps."""
        value = self.context[name]
        return [value[tap] for tap, _ in term.taps] if isinstance(value, Mapping) else value


def listed(value: Any) -> list[Tensor]:
    """The tensors that a name stands for, one or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def watching(bench: Workbench, images: int) -> Iterator[list[Recording]]:
    """Record every forward of the distiller inside the block.

    Args:
        bench: the run, with a distiller.
        images: how many images of each batch to keep, from the first on.

    Yields:
        The recordings so far.
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
        name: value.detach() if isinstance(value, Tensor) else [v.detach() for v in value]
        for name, value in values.items()
        # Hosts add values for their own use, such as boxes.
        if all(isinstance(v, Tensor) for v in listed(value))
    }
