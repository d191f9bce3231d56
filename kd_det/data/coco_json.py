"""A check of a COCO-format data set that takes seconds, before a run that takes days.

Every fault is one error with the number of affected entries and the ids of the first five.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd_det.core.errors import fail

NAMED_OFFENDERS = 5
# Annotators draw boxes past the border by a fraction of a pixel; COCO itself has such boxes.
BORDER_TOLERANCE = 1.0
# COCO train2017 has a few boxes of zero height among 860,000. Detectron2's mappers drop such boxes,
# so a stray one is reported, and only a systematic fault stops a run.
STRAY_SHARE = 1e-4

logger = logging.getLogger(__name__)


def check_coco_json(
    name: str, json_file: str | Path, image_root: str | Path, sample: int = 50
) -> dict[str, Any]:
    """Refuse a COCO-format data set that would fail, or mislead, during training.

    Args:
        name: name of the data set, for the messages.
        json_file: COCO instances annotations, with boxes ``[x, y, width, height]`` in pixels.
        image_root: folder that ``file_name`` is relative to.
        sample: number of images, spread evenly over the data set, whose files must exist.

    Returns:
        ``name``, ``categories`` (``{id: name}``), and the numbers of ``images``, ``annotations``,
        ``images_without_annotations``, ``annotations_without_mask``, ``boxes_of_zero_size``.

    Raises:
        KDError: the json is missing, unreadable or empty; ids are missing or used twice; an
            annotation points at an unknown image or category; a box is malformed, has no size or
            lies outside its image by more than a pixel; an image file is missing.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    source = f"data set '{name}' ({json_file})"
    content = _read(name, json_file)
    images, annotations, categories = (
        _entries(source, content, key) for key in ("images", "annotations", "categories")
    )
    _check_fields(
        source, "image", images, {"file_name": _is_text, "width": _is_side, "height": _is_side}
    )
    _check_fields(source, "category", categories, {"name": _is_text})
    _check_fields(source, "annotation", annotations, {"bbox": _is_box})
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    names = {category["id"]: category["name"] for category in categories}

    for key, known in (("image_id", sizes), ("category_id", names)):
        _refuse_any(
            source,
            f"every annotation to have a {key} that the json lists",
            (
                f"annotation {entry['id']} ({key} {entry.get(key)!r})"
                for entry in annotations
                if not _is_id(entry.get(key)) or entry[key] not in known
            ),
            "add the missing entries, or remove these annotations",
        )
    zero_size = _check_boxes(source, annotations, sizes)
    _check_files(source, images, image_root, sample)
    annotated = {entry["image_id"] for entry in annotations}
    return {
        "name": name,
        "images": len(images),
        "annotations": len(annotations),
        "categories": names,
        "images_without_annotations": len(images) - len(annotated),
        "annotations_without_mask": sum(not entry.get("segmentation") for entry in annotations),
        "boxes_of_zero_size": zero_size,
    }


def category_names(name: str, json_file: str | Path) -> list[str] | None:
    """Names of a data set's classes in the order of their ids, which is that of the outputs.

    None where the file is not on this machine.

    Raises:
        KDError: a file that lists no categories with ids and names.
    """
    json_file = Path(json_file)
    if not json_file.is_file():
        return None
    state = json_file.stat()
    return list(_category_names(name, json_file, state.st_mtime_ns, state.st_size))


# Student and teacher often share a file, and COCO's takes seconds to read.
@lru_cache(maxsize=8)
def _category_names(name: str, json_file: Path, changed: int, size: int) -> tuple[str, ...]:
    source = f"data set '{name}' ({json_file})"
    categories = _entries(source, _read(name, json_file), "categories")
    _check_fields(source, "category", categories, {"name": _is_text})
    return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))


def _read(name: str, json_file: Path) -> Any:
    expected = f"COCO annotations of data set '{name}' at {json_file}"
    if not json_file.is_file():
        fail(
            expected=expected,
            received="a folder" if json_file.is_dir() else "no such file",
            remedy=f"create it, or correct the path of '{name}' (DATASETS.COCO_JSON)",
        )
    try:
        return json.loads(json_file.read_bytes())
    except ValueError as error:
        received = f"a file that is not JSON ({error})"
        fail(expected=expected, received=received, remedy="download or write it again")


def _entries(source: str, content: Any, key: str) -> list[dict[str, Any]]:
    """One of the three lists of a COCO json, neither missing nor empty."""
    if isinstance(content, dict) and key in content:
        entries = content[key]
        if isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries):
            return entries
        received = f"an empty '{key}'" if entries in ([], {}, None) else f"'{key}' of another kind"
    elif isinstance(content, dict):
        received = f"no '{key}', only {', '.join(map(repr, content)) or 'an empty object'}"
    else:
        received = f"a JSON {type(content).__name__}"
    fail(
        expected=f"'images', 'annotations' and 'categories' as lists of entries in {source}",
        received=received,
        remedy="use annotations in the COCO instances format",
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_side(value: Any) -> bool:
    return _is_number(value) and value > 0


def _check_fields(
    source: str,
    kind: str,
    entries: list[dict[str, Any]],
    fields: dict[str, Callable[[Any], bool]],
) -> None:
    """Refuse entries without an id of their own or without usable fields."""
    _refuse_any(
        source,
        f"every {kind} to have an id",
        (f"entry {at}" for at, entry in enumerate(entries) if not _is_id(entry.get("id"))),
        "number them",
    )
    counts = Counter(entry["id"] for entry in entries)
    _refuse_any(
        source,
        f"every {kind} to have an id of its own",
        (f"{kind} {key!r} ({count} times)" for key, count in counts.items() if count > 1),
        "number them anew",
    )
    for field, holds in fields.items():
        _refuse_any(
            source,
            f"every {kind} to have a usable '{field}'",
            (
                f"{kind} {entry['id']} ({entry.get(field)!r})"
                for entry in entries
                if not holds(entry.get(field))
            ),
            f"correct '{field}' of these entries",
        )


def _check_boxes(
    source: str, annotations: list[dict[str, Any]], sizes: dict[Any, tuple[float, float]]
) -> int:
    """Refuse boxes without a size or outside their image; the number of stray ones is returned."""

    def described(entry: dict[str, Any]) -> str:
        return f"annotation {entry['id']} of image {entry['image_id']} (bbox {entry['bbox']})"

    def outside() -> Iterator[str]:
        for entry in annotations:
            x, y, box_width, box_height = entry["bbox"]
            width, height = sizes[entry["image_id"]]
            overhang = max(-x, -y, x + box_width - width, y + box_height - height)
            if overhang > BORDER_TOLERANCE:
                yield f"{described(entry)}, image {width} x {height}"

    zero_size = [entry for entry in annotations if min(entry["bbox"][2:]) == 0]
    least = 0 if len(zero_size) <= STRAY_SHARE * len(annotations) else math.ulp(0.0)
    _refuse_any(
        source,
        "boxes [x, y, width, height] with positive width and height",
        (described(entry) for entry in annotations if min(entry["bbox"][2:]) < least),
        "remove these annotations, or convert boxes that were stored as corners",
    )
    if zero_size:
        logger.warning(
            "%s: %d of %d boxes have no width or no height and cannot be learned from, such as %s",
            source,
            len(zero_size),
            len(annotations),
            described(zero_size[0]),
        )
    _refuse_any(
        source,
        "boxes [x, y, width, height] inside their image",
        outside(),
        "clip these boxes, or convert boxes that were stored as corners",
    )
    return len(zero_size)


def _check_files(source: str, images: list[dict[str, Any]], image_root: Path, sample: int) -> None:
    if not image_root.is_dir():
        fail(
            expected=f"a folder with the images of {source} at {image_root}",
            received="a file" if image_root.exists() else "no such folder",
            remedy="correct the image folder (the second entry in DATASETS.COCO_JSON)",
        )
    count = min(sample, len(images))
    chosen = [images[at * len(images) // count] for at in range(count)]
    _refuse_any(
        source,
        f"the {count} images that were looked up in {image_root} to exist",
        (
            f"image {image['id']} ({image['file_name']})"
            for image in chosen
            if not (image_root / image["file_name"]).is_file()
        ),
        "correct the image folder (the second entry in DATASETS.COCO_JSON) or the file names",
    )


def _refuse_any(source: str, expected: str, offenders: Iterable[str], remedy: str) -> None:
    """Fail if there are offenders, naming the first few and their number."""
    names = list(offenders)
    if names:
        named = "; ".join(names[:NAMED_OFFENDERS])
        more = f"; and {len(names) - NAMED_OFFENDERS} more" if len(names) > NAMED_OFFENDERS else ""
        received = f"{len(names)} that do not: {named}{more}"
        fail(expected=f"{expected} in {source}", received=received, remedy=remedy)
