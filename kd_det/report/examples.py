"""Images on which the distilled student is right and the baseline wrong, and the reverse."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from kd_det.bench.workbench import Detections
from kd_det.document.detections import annotated
from kd_det.report.blocks import Picture
from kd_det.report.matching import Annotation, Found, ranked
from kd_det.report.truth import Truth

SHOWN = 4  # images in each direction
_WIDEST = 640  # pixels; larger images are made smaller
_QUALITY = 85
_TRUE, _RIGHT, _WRONG = (124, 58, 167), (0, 114, 178), (213, 94, 0)


@dataclass(frozen=True)
class Contrast:
    """Images that one student reads better than the other.

    Attributes:
        images: ``(caption, pictures)``; the pictures are in the order of the columns.
        left_out: what could not be shown, and why.
    """

    images: list[tuple[str, list[Picture]]]
    left_out: list[str]


def contrast(
    truth: Truth,
    better: Mapping[int, Found],
    worse: Mapping[int, Found],
    columns: Sequence[Mapping[int, Found]],
    name: str,
) -> Contrast:
    """Draw the images in which ``better`` finds most more objects than ``worse``.

    Args:
        truth: the data set.
        better: image id to what one student finds.
        worse: likewise, the other.
        columns: whose detections are drawn, beside the ground truth.
        name: of the picture files, before their numbers.
    """
    result = Contrast([], [])
    for image in ranked(better, worse):
        if len(result.images) == SHOWN:
            break
        record = truth.coco.imgs[image]
        try:
            pixels = _read(truth.root / record["file_name"])
        # Whatever a decoder raises: the next image is as good an example.
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            result.left_out.append(f"{record['file_name']} cannot be decoded ({told})")
            continue
        at = len(result.images)
        objects = own_annotations(truth, image)
        drawn = [_draw(pixels, objects, [_TRUE] * len(objects), truth, record)]
        for found in columns:
            colours = [_RIGHT if right else _WRONG for right in found[image].correct]
            drawn.append(_draw(pixels, found[image].detections, colours, truth, record))
        pictures = [
            Picture(f"{name}_{at}_{k}.jpg", content, record["file_name"])
            for k, content in enumerate(drawn)
        ]
        counts = f"{len(better[image].objects)} against {len(worse[image].objects)}"
        caption = f"{record['file_name']}: {counts} of {len(objects)} objects found"
        result.images.append((caption, pictures))
    return result


def own_annotations(truth: Truth, image: int) -> list[Annotation]:
    """The objects of an image that count; crowds do not."""
    return [a for a in truth.coco.imgToAnns[image] if not a["iscrowd"]]


def encoded(image: Tensor) -> bytes:
    """A uint8 RGB image ``[3, H, W]`` as a JPEG."""
    buffer = io.BytesIO()
    to_pil_image(image.cpu()).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def _draw(
    pixels: Image.Image,
    annotations: Sequence[Annotation],
    colours: Sequence[tuple[int, int, int]],
    truth: Truth,
    record: Mapping[str, float],
) -> bytes:
    shrink = min(1.0, _WIDEST / pixels.width)
    small = pixels.resize((round(pixels.width * shrink), round(pixels.height * shrink)))
    # Predictions are in pixels of the annotated size, which the file should have.
    factor = small.width / record.get("width", pixels.width)
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes = sorted(truth.classes)
    found = Detections(
        boxes * factor,
        torch.tensor([classes.index(a["category_id"]) for a in annotations], dtype=torch.int64),
        torch.ones(len(annotations)),
    )
    names = [truth.classes[key] for key in classes]
    return encoded(annotated(pil_to_tensor(small), found, names, colours))
