"""Data sets by name: the files of each. The only module that reads ``DETECTRON2_DATASETS``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_det.core.errors import fail, nearest
from kd_det.data.coco_json import category_names
from kd_det.data.digits import CLASS_NAMES, DIGITS, digits_paths

_COCO = re.compile(r"coco_(2014|2017)_(train|val)")


def data_root() -> Path:
    """The folder of all data sets: ``$DETECTRON2_DATASETS``, or ``datasets`` as in Detectron2."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def detection_paths(name: str, entries: Mapping[str, Any]) -> tuple[Path, Path]:
    """Annotation file and image folder of a detection data set, whether or not they exist.

    Args:
        name: an entry, one of the digits, or COCO's ``coco_2017_train``, ``coco_2017_val``, ...
        entries: ``DATASETS.COCO_JSON``; an entry goes before a built-in name.

    Raises:
        KDError: an unknown name, or an entry that is not ``[json, image_root]``.
    """
    if name in entries:
        entry = entries[name]
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            fail(
                expected=f"DATASETS.COCO_JSON.{name} to be [json, image_root]",
                received=repr(entry),
                remedy="give the annotation file and the folder its file_name fields start from",
            )
        return Path(entry[0]), Path(entry[1])
    if name in DIGITS:
        return digits_paths(data_root() / "digits")[name]
    if match := _COCO.fullmatch(name):
        year, split = match.groups()
        folder = data_root() / "coco"
        return folder / "annotations" / f"instances_{split}{year}.json", folder / f"{split}{year}"
    fail(
        expected="a known data set: a built-in name or an entry of DATASETS.COCO_JSON",
        received=f"'{name}'",
        remedy=nearest(name, [*DIGITS, "coco_2017_train", "coco_2017_val", *entries]),
    )


def prepare_detection(name: str, entries: Mapping[str, Any]) -> tuple[Path, Path]:
    """:func:`detection_paths` of a data set to be read; the digits are written if missing.

    Raises:
        KDError: see :func:`detection_paths` and :func:`require_coco`.
    """
    json_file, images = detection_paths(name, entries)
    if name in DIGITS and name not in entries:
        # Rendering needs OpenCV, reading other data sets does not.
        from kd_det.data.digits.detection import write_digits

        write_digits(data_root() / "digits")
    elif name not in entries:
        require_coco(json_file)
    return json_file, images


def require_coco(json_file: Path) -> None:
    """Refuse an annotation file of COCO that was not downloaded."""
    if not json_file.is_file():
        fail(
            expected=f"COCO 2017 at $DETECTRON2_DATASETS (now '{data_root()}') as "
            "coco/annotations/instances_{train,val}2017.json and coco/{train,val}2017/*.jpg",
            received=f"no file '{json_file}'",
            remedy="download it from https://cocodataset.org and set DETECTRON2_DATASETS to the "
            "folder that holds coco/",
        )


def detection_class_names(name: str, entries: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes in the order of their ids; None where the data set is not available."""
    if name in DIGITS and name not in entries:
        return list(CLASS_NAMES)
    if name not in entries and not _COCO.fullmatch(name):
        return None
    return category_names(name, detection_paths(name, entries)[0])
