"""Which objects of an image a detector finds, and where two detectors differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as rle

MIN_SCORE = MIN_IOU = 0.5

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Detections of one image, judged.

    Attributes:
        detections: those with a score of at least 0.5, the most certain first.
        correct: per detection, whether it is an object of the same class at an IoU of at least
            0.5. An object counts once.
        objects: indices of the ground truth that was found.
    """

    detections: list[Annotation]
    correct: list[bool]
    objects: frozenset[int]


def match(truth: Sequence[Annotation], detections: Sequence[Annotation]) -> Found:
    """Give each detection the free object of its class that it overlaps most.

    Args:
        truth: ground truth of one image: ``bbox`` ``[x, y, width, height]``, ``category_id``.
        detections: likewise, with ``score``.
    """
    kept = sorted(
        (d for d in detections if d["score"] >= MIN_SCORE), key=lambda d: d["score"], reverse=True
    )
    taken: set[int] = set()
    correct = []
    overlaps = _overlaps(kept, truth)
    for at, detection in enumerate(kept):
        free = [
            k
            for k, real in enumerate(truth)
            if k not in taken
            and real["category_id"] == detection["category_id"]
            and overlaps[at, k] >= MIN_IOU
        ]
        best = max(free, key=lambda k: overlaps[at, k], default=None)
        correct.append(best is not None)
        if best is not None:
            taken.add(best)
    return Found(kept, correct, frozenset(taken))


def match_all(
    truth: Mapping[int, Sequence[Annotation]], predictions: Sequence[Annotation]
) -> dict[int, Found]:
    """:func:`match` of every image, also of those without detections.

    Args:
        truth: image id to its ground truth.
        predictions: of all images, with ``image_id``.
    """
    own: dict[int, list[Annotation]] = defaultdict(list)
    for prediction in predictions:
        own[prediction["image_id"]].append(prediction)
    return {image: match(objects, own[image]) for image, objects in truth.items()}


def ranked(better: Mapping[int, Found], worse: Mapping[int, Found]) -> list[int]:
    """Images in which ``better`` finds more objects than ``worse``, the clearest first.

    Of equal differences, the image in which ``better`` errs less stands first.
    """

    def rank(image: int) -> tuple[int, int, int]:
        ahead = len(better[image].objects) - len(worse[image].objects)
        return -ahead, better[image].correct.count(False), image

    return sorted((k for k in better if len(better[k].objects) > len(worse[k].objects)), key=rank)


def tally(one: Mapping[int, Found], other: Mapping[int, Found]) -> dict[str, int]:
    """How many objects are found by ``both``, only by ``one``, only by the ``other``."""
    pairs = [(one[image].objects, other[image].objects) for image in one]
    return {
        "both": sum(len(a & b) for a, b in pairs),
        "one": sum(len(a - b) for a, b in pairs),
        "other": sum(len(b - a) for a, b in pairs),
    }


def _overlaps(detections: Sequence[Annotation], truth: Sequence[Annotation]) -> np.ndarray:
    if not detections or not truth:
        return np.zeros((len(detections), len(truth)))
    boxes = [np.array([a["bbox"] for a in side], dtype=float) for side in (detections, truth)]
    return np.asarray(rle.iou(*boxes, [0] * len(truth)))
