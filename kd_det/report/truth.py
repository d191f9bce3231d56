"""The ground truth that a run was evaluated on, found again by the name of its data set."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from kd_det.core.errors import fail
from kd_det.data.catalogue import data_root
from kd_det.data.digits.detection import digits_paths

_COCO = re.compile(r"coco_(\d{4})_(train|val)")


@dataclass(frozen=True)
class Truth:
    """A COCO-format data set.

    Attributes:
        name: as configs name it.
        coco: its annotations, indexed.
        root: folder that ``file_name`` is relative to.
        classes: category id to name; a name that several categories have is followed by the id.
    """

    name: str
    coco: COCO
    root: Path
    classes: dict[int, str]


def find_truth(name: str, config: Mapping[str, Any]) -> Truth:
    """A data set of ``DATASETS.TEST``.

    Args:
        name: of the data set.
        config: dotted key to value.

    Raises:
        KDError: a name without a known place, or no readable json there.
    """
    json_file, root = _paths(config, name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(json_file))
            categories = coco.loadCats(sorted(coco.getCatIds()))
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        fail(
            expected=f"COCO annotations of '{name}' at {json_file}",
            received=f"{type(error).__name__}: {error}",
            remedy="set DETECTRON2_DATASETS, or the path in DATASETS.COCO_JSON",
        )
    coco.dataset.setdefault("info", {})
    for annotation in coco.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    counts = Counter(category["name"] for category in categories)
    classes = {
        c["id"]: c["name"] if counts[c["name"]] == 1 else f"{c['name']} ({c['id']})"
        for c in categories
    }
    return Truth(name, coco, root, classes)


def _paths(config: Mapping[str, Any], name: str) -> tuple[Path, Path]:
    entry = config.get(f"DATASETS.COCO_JSON.{name}")
    if isinstance(entry, (list, tuple)) and len(entry) == 2:
        return Path(entry[0]), Path(entry[1])
    digits = digits_paths(data_root() / "digits")
    if name in digits:
        return digits[name]
    if match := _COCO.fullmatch(name):
        year, split = match.groups()
        folder = data_root() / "coco"
        return folder / "annotations" / f"instances_{split}{year}.json", folder / f"{split}{year}"
    fail(
        expected=f"a known place of data set '{name}'",
        received="no entry in DATASETS.COCO_JSON and no built-in name",
        remedy="name it in DATASETS.COCO_JSON of the run's config.yaml",
    )
