"""A detection data set without a download: handwritten digits on cluttered canvases.

scikit-learn bundles 1,797 real handwritten digits of 8 x 8 pixels. They are up-sampled smoothly and
pasted in random colours and sizes on canvases with gradients, texture, strokes and blobs, among
fragments and scrambled digits that are not labelled. Later objects partly hide earlier ones.
The result is an ordinary COCO data set with boxes and masks:

    root/spec.json                     the settings
    root/annotations/digits_train.json
    root/annotations/digits_val.json
    root/train/000000.png ...          (H, W, 3) RGB
    root/val/000000.png ...

Train and validation share no source digit. Every image depends only on the seed, its split and its
index, so any image can be rendered alone and in any order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kd_det.core.errors import check_choice, fail
from kd_det.data.digits import CLASS_NAMES, SPLITS, digits_paths
from kd_det.data.digits.polygons import mask_to_polygons
from kd_det.data.digits.scene import Scene

FORMAT_VERSION = 1
_EXTRA_TRIES = 100


@dataclasses.dataclass(frozen=True)
class DigitsSpec:
    """Everything the data set depends on.

    Args:
        canvas: height and width of every image in pixels, at least 96.
        train_images, val_images: numbers of images.
        seed: from 0, below 2**32.
        min_digits, max_digits: the range of the number of digits in an image, within 1..12.
        min_size, max_size: the range of the height of a digit before rotation, as shares of the
            canvas within 0.05..0.5.
        min_visible: share of its pixels, from 0.1, that every digit keeps under later objects.
        val_share: share of the source digits of every class for validation, within 0.05..0.9.

    Raises:
        KDError: a value is out of its range.
    """

    canvas: int = 160
    train_images: int = 1500
    val_images: int = 300
    seed: int = 0
    min_digits: int = 3
    max_digits: int = 8
    min_size: float = 0.0875
    max_size: float = 0.35
    min_visible: float = 0.4
    val_share: float = 0.25

    def __post_init__(self) -> None:
        for least, names, most, unit in (
            (96, ("canvas",), None, " pixels"),
            (1, ("train_images",), None, ""),
            (1, ("val_images",), None, ""),
            (0, ("seed",), 2**32 - 1, ""),
            (1, ("min_digits", "max_digits"), 12, ""),
            (0.05, ("min_size", "max_size"), 0.5, " of the canvas"),
            (0.1, ("min_visible",), 1, ""),
            (0.05, ("val_share",), 0.9, ""),
        ):
            bounds = [least, *(getattr(self, name) for name in names)]
            bounds += [] if most is None else [most]
            if not all(low <= high for low, high in pairwise(bounds)):
                limit = "" if most is None else f" <= {most}"
                fail(
                    expected=f"digits data with {least} <= {' <= '.join(names)}{limit}{unit}",
                    received=", ".join(f"{name}={getattr(self, name)}" for name in names),
                    remedy=f"choose {' and '.join(names)} within that range",
                )

    def images(self, split: str) -> int:
        """The number of images in a split, ``train`` or ``val``."""
        return self.train_images if split == "train" else self.val_images


@dataclasses.dataclass(frozen=True)
class DigitInstance:
    """One labelled digit."""

    label: int  # 0..9
    source_digit: int  # the index among scikit-learn's 1,797
    mask: NDArray[np.bool_]  # (H, W), the visible pixels

    @property
    def box(self) -> list[float]:
        """``[x, y, width, height]`` in pixels, tight around the visible pixels."""
        rows = np.flatnonzero(self.mask.any(axis=1))
        columns = np.flatnonzero(self.mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        return [float(v) for v in (x, y, columns[-1] + 1 - x, rows[-1] + 1 - y)]

    @property
    def area(self) -> float:
        """Number of visible pixels."""
        return float(self.mask.sum())


@lru_cache(maxsize=1)
def _sources() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """``(1797, 8, 8)`` in 0..1 and the ``(1797,)`` classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=8)
def source_digits(spec: DigitsSpec, split: str) -> NDArray[np.int64]:
    """Sorted indices of the source digits a split may use; disjoint, every class in proportion."""
    from sklearn.model_selection import train_test_split

    check_choice("split", split, SPLITS)
    _, classes = _sources()
    indices, share, seed = np.arange(len(classes)), spec.val_share, spec.seed
    train, val = train_test_split(indices, test_size=share, stratify=classes, random_state=seed)
    return np.sort(train if split == "train" else val)


def render_image(
    spec: DigitsSpec, split: str, index: int
) -> tuple[NDArray[np.uint8], list[DigitInstance]]:
    """Render one image; the same arguments always give the same pixels.

    Args:
        spec: the data set.
        split: ``train`` or ``val``.
        index: number of the image, from 0, without an upper limit.

    Returns:
        The ``(H, W, 3)`` uint8 RGB image and its digits, in the order they were pasted.

    Raises:
        KDError: an unknown split, or settings that leave no room for ``min_digits`` digits.
    """
    candidates = source_digits(spec, split)
    images, classes = _sources()
    # Half of such a digit cannot be confused with another digit, unlike half a 1, 7 or 8.
    for_distractors = candidates[np.isin(classes[candidates], [0, 2, 3, 5])]
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
    scene = Scene(rng, spec.canvas, spec.min_visible)

    placed: list[int] = []

    def random_size(largest: float = 1.0) -> float:
        low, high = np.log(spec.min_size), np.log(spec.max_size * largest)
        return float(np.exp(rng.uniform(low, max(low, high)))) * spec.canvas

    def place_digit(largest: float = 1.0) -> None:
        # The class is drawn first, so that all ten are equally frequent in every split.
        label = rng.integers(10)
        source = int(rng.choice(candidates[classes[candidates] == label]))
        if scene.add_digit(images[source], random_size(largest)):
            placed.append(source)

    wanted = int(rng.integers(spec.min_digits, spec.max_digits + 1))
    distractors = int(rng.integers(1, 6))
    for is_digit in rng.permutation([True] * wanted + [False] * distractors):
        if is_digit:
            place_digit()
        else:
            scene.add_distractor(images[rng.choice(for_distractors)], random_size())
    for _ in range(_EXTRA_TRIES):
        if len(placed) >= spec.min_digits:
            break
        # A crowded canvas has room for smaller digits only.
        place_digit(largest=0.3)
    else:
        fail(
            expected=f"room for {spec.min_digits} digits, each at least "
            f"{spec.min_visible:.0%} visible",
            received=f"room for {len(placed)} in image {index} of '{split}'",
            remedy="lower min_digits, min_size, max_size or min_visible",
        )
    for _ in range(rng.integers(0, 4)):
        scene.add_stroke()
    instances = [
        DigitInstance(int(classes[source]), source, mask)
        for source, mask in zip(placed, scene.visible, strict=True)
    ]
    return scene.finish(), instances


def write_digits(
    root: Path,
    spec: DigitsSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Path, Path]]:
    """Write the data set, or reuse it where it was written before with the same settings.

    It is written to a folder beside ``root`` and renamed at the end, so that ``root`` is either
    absent or complete. Nothing that exists is overwritten.

    Args:
        root: folder of the data set; it may be missing or empty.
        spec: the data set; by default ``DigitsSpec()``.
        progress: called after each image with the number of written and of all images.

    Returns:
        ``{"digits_train": (json, image_root), "digits_val": (json, image_root)}``, the shape of
        ``DATASETS.COCO_JSON``.

    Raises:
        KDError: ``root`` holds something else, other settings, or an incomplete data set.
    """
    root, spec = Path(root), spec or DigitsSpec()
    if _is_written(root, spec):
        return digits_paths(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        # The scratch folder itself is readable by its owner only.
        fresh = Path(scratch) / root.name
        (fresh / "annotations").mkdir(parents=True)
        done = 0
        for split in SPLITS:
            (fresh / split).mkdir()
            records: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in range(spec.images(split)):
                image, instances = render_image(spec, split, index)
                size = {"height": spec.canvas, "width": spec.canvas}
                records.append({"id": index + 1, "file_name": f"{index:06d}.png", **size})
                file = fresh / split / records[-1]["file_name"]
                if not cv2.imwrite(str(file), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
                    raise OSError(f"could not write {file}")
                for instance in instances:
                    annotations.append(_annotation(instance, index + 1, len(annotations) + 1))
                done += 1
                if progress is not None:
                    progress(done, spec.train_images + spec.val_images)
            _write_json(digits_paths(fresh)[f"digits_{split}"][0], _coco(records, annotations))
        _write_json(fresh / "spec.json", _stored(spec))
        try:
            os.replace(fresh, root)
        except OSError:
            # Another process may have written the same data set in the meantime.
            if not _is_written(root, spec):
                raise
    return digits_paths(root)


def _is_written(root: Path, spec: DigitsSpec) -> bool:
    """Whether the data set is there; an error where anything else is."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    stored_file, wanted = root / "spec.json", _stored(spec)
    try:
        stored = json.loads(stored_file.read_bytes()) if stored_file.is_file() else None
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or "format" not in stored:
        fail(
            expected=f"digits data or an empty place at {root}",
            received="something else: it holds no spec.json of digits data",
            remedy="choose another output folder; nothing was changed in this one",
        )
    differing = [key for key in wanted | stored if wanted.get(key) != stored.get(key)]
    if differing:
        fail(
            expected=f"digits data with {_listed(wanted, differing)} at {root}",
            received=f"digits data with {_listed(stored, differing)}, written earlier",
            remedy="choose another output folder, or remove this one to write it anew; "
            "nothing was changed in it",
        )
    for split, (json_file, image_root) in zip(SPLITS, digits_paths(root).values(), strict=True):
        found = len(list(image_root.glob("*.png")))
        if not json_file.is_file() or found != spec.images(split):
            fail(
                expected=f"{json_file} and {spec.images(split)} images in {image_root}",
                received=f"{'the' if json_file.is_file() else 'no'} json and {found} images",
                remedy=f"the data set was damaged after it was written: remove {root} and write "
                "it again",
            )
    return True


def _stored(spec: DigitsSpec) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, **dataclasses.asdict(spec)}


def _listed(settings: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={settings.get(key, 'unset')}" for key in keys)


def _annotation(instance: DigitInstance, image_id: int, annotation_id: int) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": instance.label + 1,
        "bbox": instance.box,
        "area": instance.area,
        "iscrowd": 0,
        "segmentation": mask_to_polygons(instance.mask),
        "source_digit": instance.source_digit,
    }


def _coco(records: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {
            "description": "Handwritten digits on cluttered canvases, made by kd_det from the test "
            "part of E. Alpaydin and C. Kaynak's Optical Recognition of Handwritten Digits (UCI "
            "Machine Learning Repository, CC BY 4.0) as bundled with scikit-learn"
        },
        "licenses": [],
        "images": records,
        "annotations": annotations,
        # Ids from 1: COCO reserves 0, and some readers take it for the background.
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "digit"}
            for label, name in enumerate(CLASS_NAMES)
        ],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
