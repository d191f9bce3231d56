"""Objects that detectors find, and the images in which two detectors differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_det.bench.workbench import Detections
from kd_det.document.blocks import Block, Gallery, Picture, Table, Text, row
from kd_det.document.detections import annotated, jpeg
from kd_det.report.scores import Truth

MIN_SCORE = MIN_IOU = 0.5
SHOWN = 4  # images in each direction

_WIDEST = 640  # pixels; larger images are made smaller
_TRUE, _RIGHT, _WRONG = (124, 58, 167), (0, 114, 178), (213, 94, 0)

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """Detections of one image with a score of at least 0.5, and the indices of the objects found.

    ``correct`` is whether each finds an object: one of its class at an IoU of at least 0.5 that no
    detection of a higher score has found.
    """

    detections: list[Annotation]
    correct: list[bool]
    objects: frozenset[int]


def match(truth: Sequence[Annotation], detections: Sequence[Annotation]) -> Match:
    """Give each detection of an image the free object of its class that it overlaps most.

    Both have ``bbox`` ``[x, y, width, height]`` and ``category_id``, detections also ``score``.
    """
    kept = [d for d in detections if d["score"] >= MIN_SCORE]
    kept.sort(key=lambda d: d["score"], reverse=True)
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
    return Match(kept, correct, frozenset(taken))


def match_all(
    truth: Mapping[int, Sequence[Annotation]], predictions: Sequence[Annotation]
) -> dict[int, Match]:
    """:func:`match` by image id, also of images without detections."""
    own: dict[int, list[Annotation]] = defaultdict(list)
    for prediction in predictions:
        own[prediction["image_id"]].append(prediction)
    return {image: match(objects, own[image]) for image, objects in truth.items()}


def ranked(better: Mapping[int, Match], worse: Mapping[int, Match]) -> list[int]:
    """Images in which ``better`` finds more objects than ``worse``, the clearest first.

    Of equal differences, the image with fewer wrong detections of ``better`` is first.
    """

    def rank(image: int) -> tuple[int, int, int]:
        ahead = len(better[image].objects) - len(worse[image].objects)
        return -ahead, better[image].correct.count(False), image

    return sorted((k for k in better if len(better[k].objects) > len(worse[k].objects)), key=rank)


def tally(one: Mapping[int, Match], other: Mapping[int, Match]) -> dict[str, int]:
    """How many objects are found by ``both``, only by ``one``, only by the ``other``."""
    pairs = [(one[image].objects, other[image].objects) for image in one]
    return {
        "both": sum(len(a & b) for a, b in pairs),
        "one": sum(len(a - b) for a, b in pairs),
        "other": sum(len(b - a) for a, b in pairs),
    }


def detection_blocks(
    truth: Truth, label: str, predictions: Mapping[str, Sequence[Annotation]]
) -> tuple[list[Block], list[str]]:
    """The objects that two detectors find, and images in which they differ most.

    ``predictions`` has the detections of the run of this label, of ``"baseline"`` and, if there is
    one, of the teacher. Also returns sentences about images that could not be shown.
    """
    objects = {image: _objects(truth, image) for image in sorted(truth.coco.imgs)}
    matches = {name: match_all(objects, entries) for name, entries in predictions.items()}
    own, alone = matches[label], matches["baseline"]
    counts = tally(own, alone)
    rows = [
        row("by both", f"{counts['both']:,}"),
        row(f"only by {label}", f"{counts['one']:,}"),
        row("only by the baseline", f"{counts['other']:,}"),
        row("by neither", f"{sum(map(len, objects.values())) - sum(counts.values()):,}"),
    ]
    note = (
        "An object is found by a detection of its class with an IoU of at least "
        f"{MIN_IOU:g} and a score of at least {MIN_SCORE:g}."
    )
    blocks: list[Block] = [Table("Objects found", ["", "objects"], rows, note)]
    problems: list[str] = []
    for title, name, better, worse in (
        (f"{label} right, baseline wrong", "better", own, alone),
        (f"baseline right, {label} wrong", "worse", alone, own),
    ):
        images: list[tuple[str, list[Picture]]] = []
        for image in ranked(better, worse):
            if len(images) == SHOWN:
                break
            file_name = truth.coco.imgs[image]["file_name"]
            try:
                pixels = _read(truth.root / file_name)
            # Decoders raise many types; the next image is as good an example.
            except Exception as error:
                problems.append(f"{file_name} cannot be decoded ({type(error).__name__}: {error})")
                continue
            drawn = _drawn(pixels, truth, image, [one[image] for one in matches.values()])
            names = (f"{name}_{len(images)}_{k}.jpg" for k in range(len(drawn)))
            pictures = [Picture(*pair, file_name) for pair in zip(names, drawn, strict=True)]
            counted = f"{len(better[image].objects)} against {len(worse[image].objects)}"
            caption = f"{file_name}: {counted} of {len(objects[image])} objects found"
            images.append((caption, pictures))
        if images:
            note = "The clearest images first. Blue: right; orange: wrong; purple: ground truth."
            blocks.append(Gallery(title, ["ground truth", *matches], images, note))
        else:
            blocks.append(Text(f"{title}: no such image."))
    return blocks, problems


def _objects(truth: Truth, image: int) -> list[Annotation]:
    """The objects of an image that count; crowds do not."""
    return [a for a in truth.coco.imgToAnns[image] if not a["iscrowd"]]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def _drawn(pixels: Image.Image, truth: Truth, image: int, matches: Sequence[Match]) -> list[bytes]:
    """JPEGs of one image: its objects, then the detections of each detector."""
    record, objects = truth.coco.imgs[image], _objects(truth, image)
    shrink = min(1.0, _WIDEST / pixels.width)
    small = pixels.resize((round(pixels.width * shrink), round(pixels.height * shrink)))
    # Predictions are in pixels of the annotated size, which the file should have.
    factor = small.width / record.get("width", pixels.width)
    classes = sorted(truth.classes)
    names = [truth.classes[key] for key in classes]

    def draw(annotations: Sequence[Annotation], colours: Sequence[tuple[int, int, int]]) -> bytes:
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([classes.index(a["category_id"]) for a in annotations]).long()
        detections = Detections(boxes * factor, labels, torch.ones(len(annotations)))
        return jpeg(annotated(pil_to_tensor(small), detections, names, colours))

    colours = [[_RIGHT if right else _WRONG for right in m.correct] for m in matches]
    drawn = [draw(m.detections, own) for m, own in zip(matches, colours, strict=True)]
    return [draw(objects, [_TRUE] * len(objects)), *drawn]


def _overlaps(detections: Sequence[Annotation], truth: Sequence[Annotation]) -> np.ndarray:
    if not detections or not truth:
        return np.zeros((len(detections), len(truth)))
    boxes = [np.array([a["bbox"] for a in side], dtype=float) for side in (detections, truth)]
    return np.asarray(rle.iou(*boxes, [0] * len(truth)))
