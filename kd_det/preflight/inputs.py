"""Whether the pixels that a model gets are of the kind that it was trained on.

The configured channel order, mean and standard deviation are compared with the conventions of
published weights; and the model predicts for the same images under other conventions: it is most
confident under the one it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.bench.workbench import PixelInput
from kd_det.preflight.answers import Answer, agreed, truth_confidence

_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)

#: Conventions of published weights, in pixel values 0..255.
CONVENTIONS = {
    "torchvision's ImageNet mean and std": PixelInput("RGB", _IMAGENET_MEAN, _IMAGENET_STD, 255, 1),
    "Detectron2's ImageNet mean, std 1": PixelInput(
        "BGR", _IMAGENET_MEAN[::-1], (1.0, 1.0, 1.0), 255, 1
    ),
    "pixels in 0..1": PixelInput("RGB", (0.0,) * 3, (255.0,) * 3, 255, 1),
    "pixels in -1..1": PixelInput("RGB", (127.5,) * 3, (127.5,) * 3, 255, 1),
}

_SAME = 2.0  # pixel values that a mean may differ by and still be the same convention
# Gains in confidence that make a warning and an error.
_NOTABLE, _CLEAR = 0.03, 0.1
_STANDARD_ERRORS = 3.0
_FEW_IMAGES, _CLEAR_ON_FEW = 4, 0.2


@dataclass(frozen=True)
class Better:
    """Another input under which a model predicts better than under its own.

    ``own`` and ``other`` are the confidence in the true classes, 0..1, under the configured input
    and under this one; ``clear`` is whether the gain makes an error.
    """

    what: str
    pixels: PixelInput
    own: float
    other: float
    clear: bool


def describe(pixels: PixelInput) -> str:
    """``"RGB, mean 123.7 116.3 103.5, std 58.4 57.1 57.4 (of 0..255)"``."""
    mean, std = numbers(pixels.mean), numbers(pixels.std)
    return f"{pixels.order}, mean {mean}, std {std} (of 0..{pixels.scale:g})"


def numbers(values: Sequence[float]) -> str:
    """``"123.7 116.3 103.5"``."""
    return " ".join(f"{v:g}" for v in values)


def oddities(pixels: PixelInput) -> list[str]:
    """Contradictions between a configured input and the conventions of published weights."""
    sentences = []
    if not all(math.isfinite(v) and v > 0 for v in pixels.std):
        sentences.append(f"a standard deviation is not positive: {describe(pixels)}")
    mean = _in_255(pixels).mean
    reverse = {"RGB": "BGR", "BGR": "RGB"}.get(pixels.order, "")
    right_way = _IMAGENET_MEAN if pixels.order == "RGB" else _IMAGENET_MEAN[::-1]
    if reverse and _near(mean, right_way[::-1]):
        sentences.append(
            f"the mean is ImageNet's in the order {reverse}, but the images are {pixels.order}: "
            f"one of INPUT.FORMAT and PIXEL_MEAN is that of other weights ({describe(pixels)})"
        )
    if pixels.scale > 1 and 0 < max(pixels.mean) <= 1:
        sentences.append(f"the mean looks like one of pixels in 0..1: {describe(pixels)}")
    if pixels.scale <= 1 and max(pixels.mean) > 1:
        sentences.append(f"the mean looks like one of pixels in 0..255: {describe(pixels)}")
    return sentences


def alternatives(own: PixelInput, student: PixelInput) -> dict[str, PixelInput]:
    """Inputs that a model may have been trained with other than its ``own``, by description."""
    other = "BGR" if own.order == "RGB" else "RGB"
    candidates = {
        f"{other} instead of {own.order}": replace(own, order=other),
        "the student's channel order, mean and std": student,
        **CONVENTIONS,
    }
    distinct: dict[str, PixelInput] = {}
    for what, pixels in candidates.items():
        if not any(_same(pixels, known) for known in (own, *distinct.values())):
            distinct[what] = pixels
    return distinct


def entry(model: nn.Module) -> nn.Module:
    """The module that gets the normalised images: a detector's backbone, a classifier itself."""
    module: nn.Module = getattr(model, "backbone", model)  # type: ignore[assignment]
    return module


@contextmanager
def under_input(model: nn.Module, own: PixelInput, other: PixelInput) -> Iterator[None]:
    """Within the block, ``model`` gets its images as if ``other`` were configured, not ``own``.

    ``model`` is a detector with a ``backbone``, or a classifier; its images arrive normalised.
    """
    mine, theirs = _in_255(own), _in_255(other)

    def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        mean, std, new_mean, new_std = (
            x.new_tensor(values).view(-1, 1, 1)
            for values in (mine.mean, mine.std, theirs.mean, theirs.std)
        )
        pixels = x * std + mean
        if mine.order != theirs.order:
            pixels = pixels.flip(1)
        # Pixels of exactly zero in all channels are padding, and stay so.
        filled = (x != 0).any(dim=1, keepdim=True)
        return (torch.where(filled, (pixels - new_mean) / new_std, x), *args[1:])

    handle = entry(model).register_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()


def find_better(
    own: Sequence[Answer],
    others: Mapping[str, tuple[PixelInput, Sequence[Answer]]],
    indices: Sequence[int],
) -> Better | None:
    """The input under which the model is more confident of the truth than under its own, or None.

    Gains are per image, as the images are the same; their mean must exceed three standard errors.
    An input must also explain more than another order of the classes does.

    Args:
        own: answers under the configured input.
        others: by description, another input and the answers under it on the same images.
        indices: per class of the student the model's index of it, -1 where it has none.
    """
    before = truth_confidence(own, indices)
    relabelled = float(truth_confidence(own, agreed(own, indices)).mean())
    best: Better | None = None
    for what, (pixels, answers) in others.items():
        after = truth_confidence(answers, indices)
        if float(after.mean()) < max(relabelled - _NOTABLE, best.other if best else 0.0):
            continue
        gain = after - before
        mean = float(gain.mean())
        if len(gain) < _FEW_IMAGES:
            counts = clear = mean >= _CLEAR_ON_FEW
        else:
            error = float(gain.std()) / math.sqrt(len(gain))
            counts = mean >= max(_NOTABLE, _STANDARD_ERRORS * error)
            clear = counts and mean >= _CLEAR
        if counts:
            best = Better(what, pixels, float(before.mean()), float(after.mean()), clear)
    return best


def _in_255(pixels: PixelInput) -> PixelInput:
    factor = 255 / pixels.scale
    return replace(
        pixels,
        mean=tuple(v * factor for v in pixels.mean),
        std=tuple(v * factor for v in pixels.std),
        scale=255,
    )


def _same(one: PixelInput, other: PixelInput) -> bool:
    a, b = _in_255(one), _in_255(other)
    close_std = all(abs(x - y) <= 0.02 * max(x, y) for x, y in zip(a.std, b.std, strict=True))
    return a.order == b.order and _near(a.mean, b.mean) and close_std


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    close = (abs(a - b) <= _SAME for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and all(close)
