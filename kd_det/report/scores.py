"""Average precision of saved predictions, in all and by size and class, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.core.errors import fail
from kd_det.report.truth import Truth

# Positions in COCOeval's table of precisions [T, R, K, A, M]: IoU thresholds 0.50, 0.55, ..., 0.95;
# areas all, small, medium, large; at most 1, 10, 100 detections.
_IOUS = {"AP50": 0, "AP75": 5}
_AREAS = {"APs": 1, "APm": 2, "APl": 3}
SIZES = tuple(_AREAS)


def read_predictions(path: Path, truth: Truth) -> list[dict[str, Any]]:
    """Saved detections of a data set.

    Raises:
        KDError: no JSON list of detections, or detections of images or classes that the data set
            does not have.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        _refuse(truth, path, f"a file that is not JSON ({error})")
    if not isinstance(found, list) or not all(map(_is_detection, found)):
        _refuse(truth, path, "entries without image_id, category_id, bbox or score")
    strangers = Counter(
        kind
        for entry in found
        for kind, ids in (("image", truth.coco.imgs), ("category", truth.classes))
        if entry[f"{kind}_id"] not in ids
    )
    if strangers:
        named = (f"{count} of an unknown {kind}" for kind, count in strangers.items())
        _refuse(truth, path, ", ".join(named))
    return found


def detection_scores(truth: Truth, predictions: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's average precisions in percent, by the names Detectron2 gives them.

    Args:
        truth: the data set.
        predictions: a COCO result list; masks are measured if every detection has one.

    Returns:
        ``bbox/AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AP-<class>``, and the same
        of ``segm``. What the data set has no objects for is left out.
    """
    kinds = ["bbox"]
    annotations = truth.coco.dataset["annotations"]
    if predictions and all("segmentation" in found for found in predictions + annotations):
        kinds.append("segm")
    return {
        f"{kind}/{name}": value
        for kind in kinds
        for name, value in _measured(truth, predictions, kind).items()
    }


def _is_detection(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and {"image_id", "category_id", "bbox", "score"} <= entry.keys()
        and isinstance(entry["bbox"], list)
        and len(entry["bbox"]) == 4
    )


def _refuse(truth: Truth, path: Path, received: str) -> NoReturn:
    fail(
        expected=f"{path.name} to be a JSON list of detections of '{truth.name}'",
        received=received,
        remedy="evaluate the run again, on this data set (tools/train_net.py --eval-only)",
    )


def _measured(truth: Truth, predictions: list[dict[str, Any]], kind: str) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth.coco, _results(truth.coco, predictions, kind), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"]
    parts = {"AP": precision[:, :, :, 0, -1]}
    parts |= {name: precision[at, :, :, 0, -1] for name, at in _IOUS.items()}
    parts |= {name: precision[:, :, :, at, -1] for name, at in _AREAS.items()}
    for at, category in enumerate(evaluation.params.catIds):
        parts[f"AP-{truth.classes[category]}"] = precision[:, :, at, 0, -1]
    # COCOeval writes -1 where there is no object.
    return {k: 100 * float(p[p > -1].mean()) for k, p in parts.items() if (p > -1).any()}


def _results(coco: COCO, predictions: list[dict[str, Any]], kind: str) -> COCO:
    if not predictions:  # loadRes looks at the first
        results = COCO()
        results.dataset = {**coco.dataset, "annotations": []}
        results.createIndex()
        return results
    # loadRes takes the area, which sorts detections by size, from the box if there is one.
    left_out = "bbox" if kind == "segm" else "segmentation"
    return coco.loadRes([{k: v for k, v in p.items() if k != left_out} for p in predictions])
