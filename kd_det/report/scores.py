"""Scores of runs, measured again from their saved predictions where there are any."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.core.errors import KDError, fail
from kd_det.data.catalogue import detection_paths
from kd_det.report.classified import accuracy, read_answers
from kd_det.report.runs import MAIN, Run, describe
from kd_det.run.folder import DETECTIONS, PREDICTIONS, RESULTS

# Evaluators round differently; predictions of other weights differ by more. In percent.
_SAME = 0.1
# Positions in COCOeval's table of precisions [T, R, K, A, M]: IoU thresholds 0.50, 0.55, ..., 0.95;
# areas all, small, medium, large; at most 1, 10, 100 detections.
_IOUS = {"AP50": 0, "AP75": 5}
_AREAS = {"APs": 1, "APm": 2, "APl": 3}


@dataclass(frozen=True)
class Truth:
    """A COCO-format data set: its indexed annotations, and the folder of its images.

    ``classes`` has names by category id; a name of several categories is followed by the id.
    """

    name: str
    coco: COCO
    root: Path
    classes: dict[int, str]


Truths = dict[str, Truth | KDError]


def score(run: Run, truths: Truths) -> None:
    """Replace the scores of a run by those of its saved predictions.

    If they cannot be used, the reason is added to the run's problems, and its scores stay. Data
    sets that are read are added to ``truths``.
    """
    detections, answers = run.predictions, run.file(PREDICTIONS)
    try:
        if detections is not None:
            truth = truth_of(run, truths)
            measured = detection_scores(truth, read_predictions(detections, truth))
            _take(run, measured, DETECTIONS)
        elif answers is not None:
            _take(run, accuracy(read_answers(answers)), PREDICTIONS)
    # Any exception of one run: the report of the others is still of use.
    except Exception as error:
        run.problems.append(f"its saved predictions are not used: {describe(error)}")
    if not run.scores:
        run.problems.append(f"no scores: no {RESULTS}, no evaluation in its metrics")


def truth_of(run: Run, truths: Truths) -> Truth:
    """The first data set of a run's ``DATASETS.TEST``, which is read once for all runs."""
    name = run.test_sets[0] if run.test_sets else ""
    key = " ".join(run.data)
    if key not in truths:
        try:
            truths[key] = find_truth(name, run.config)
        except KDError as error:
            truths[key] = error
    if isinstance(truth := truths[key], KDError):
        raise truth
    return truth


def find_truth(name: str, config: Mapping[str, Any]) -> Truth:
    """A data set of ``DATASETS.TEST``; ``config`` has dotted keys.

    Raises:
        KDError: a name without a known place, or no readable json there.
    """
    entry = config.get(f"DATASETS.COCO_JSON.{name}")
    json_file, root = detection_paths(name, {} if entry is None else {name: entry})
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


def read_predictions(path: Path, truth: Truth) -> list[dict[str, Any]]:
    """Saved detections of a data set.

    Raises:
        KDError: no JSON list of detections, or of images or classes that the data set lacks.
    """
    try:
        predictions = json.loads(path.read_bytes())
    except ValueError as error:
        _refuse(truth, path, f"a file that is not JSON ({error})")
    if not isinstance(predictions, list) or not all(map(_is_detection, predictions)):
        _refuse(truth, path, "entries without image_id, category_id, bbox or score")
    unknown = Counter(
        kind
        for entry in predictions
        for kind, ids in (("image", truth.coco.imgs), ("category", truth.classes))
        if entry[f"{kind}_id"] not in ids
    )
    if unknown:
        counts = (f"{count} of an unknown {kind}" for kind, count in unknown.items())
        _refuse(truth, path, ", ".join(counts))
    return predictions


def detection_scores(truth: Truth, predictions: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's average precisions in percent, by the names Detectron2 gives them.

    These are ``bbox/AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` and ``AP-<class>``, and the
    same of ``segm`` if every detection and object has a mask. Classes and sizes without objects are
    left out.
    """
    kinds = ["bbox"]
    annotations = truth.coco.dataset["annotations"]
    if predictions and all("segmentation" in e for e in predictions + annotations):
        kinds.append("segm")
    return {k: v for kind in kinds for k, v in _measured(truth, predictions, kind).items()}


def _take(run: Run, measured: Mapping[str, float], source: str) -> None:
    for kind, name in MAIN.items():
        before, now = run.scores.get(name), measured.get(name)
        if before is not None and now is not None and not math.isclose(before, now, abs_tol=_SAME):
            run.problems.append(
                f"its saved predictions give {name} {now:.2f}, its {run.sources.get(kind)} "
                f"{before:.2f}: they are of different evaluations; the former are shown"
            )
    run.take(measured, source)


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
    measured = {name: part[part > -1] for name, part in parts.items()}
    return {f"{kind}/{name}": 100 * float(p.mean()) for name, p in measured.items() if p.size}


def _results(coco: COCO, predictions: list[dict[str, Any]], kind: str) -> COCO:
    if not predictions:  # loadRes looks at the first
        results = COCO()
        results.dataset = {**coco.dataset, "annotations": []}
        results.createIndex()
        return results
    # loadRes takes the area, which sorts detections by size, from the box if there is one.
    left_out = "bbox" if kind == "segm" else "segmentation"
    return coco.loadRes([{k: v for k, v in p.items() if k != left_out} for p in predictions])
