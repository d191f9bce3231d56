"""The AP numbers are those of pycocotools on the saved predictions, in all and in every part."""

from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.report.scores import detection_scores, find_truth, read_predictions
from tests.report.made_up import NAMES, detections, write_truth


@pytest.fixture
def json_file(tmp_path):
    return write_truth(tmp_path / "data")


@pytest.fixture
def truth(json_file):
    return load(json_file)


def load(json_file):
    key = "DATASETS.COCO_JSON.made_up"
    return find_truth("made_up", {key: [str(json_file), str(json_file.parent / "images")]})


def by_summarize(json_file, found, kind, categories=None):
    """What pycocotools prints, from the files alone; of some categories if asked."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(json_file))
        kept = [{k: v for k, v in f.items() if k != "bbox" or kind == "bbox"} for f in found]
        evaluation = COCOeval(coco, coco.loadRes(kept), kind)
        if categories:
            evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_they_equal_what_pycocotools_summarizes(truth, json_file, kind):
    found = detections(json_file, 0.6, 3, masks=True)
    scores = detection_scores(truth, found)
    expected = by_summarize(json_file, found, kind)[:6]
    for name, value in zip(["AP", "AP50", "AP75", "APs", "APm", "APl"], expected, strict=True):
        if value < 0:  # nothing is large
            assert f"{kind}/{name}" not in scores
        else:
            assert math.isclose(scores[f"{kind}/{name}"], value, abs_tol=1e-9), name
    assert 5 < scores[f"{kind}/AP"] < 95


def test_a_class_has_the_ap_of_an_evaluation_of_it_alone(truth, json_file):
    found = detections(json_file, 0.6, 3)
    scores = detection_scores(truth, found)
    for category, name in zip([2, 5, 9], NAMES, strict=True):
        alone = by_summarize(json_file, found, "bbox", [category])[0]
        assert math.isclose(scores[f"bbox/AP-{name}"], alone, abs_tol=1e-9)


def slow_ap50(objects, found):
    """AP of one class by its definition: the best precision from each of 101 recalls on."""

    def iou(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(0.0, width) * max(0.0, height)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    taken, hits = set(), []
    for detection in sorted(found, key=lambda d: -d["score"]):
        best = None
        for k, real in enumerate(objects):
            if real["image_id"] != detection["image_id"] or k in taken:
                continue
            overlap = iou(detection["bbox"], real["bbox"])
            if overlap >= 0.5 and (best is None or overlap > best[0]):
                best = overlap, k
        hits.append(best is not None)
        if best is not None:
            taken.add(best[1])
    correct = np.cumsum(hits)
    recall, precision = correct / len(objects), correct / np.arange(1, len(hits) + 1)
    levels = np.linspace(0, 1, 101)
    return 100 * np.mean([precision[recall >= r].max(initial=0) for r in levels])


def test_ap50_is_that_of_the_definition(truth, json_file):
    found = detections(json_file, 0.6, 4)
    annotations = json.loads(json_file.read_text())["annotations"]
    values = [
        slow_ap50(*([a for a in side if a["category_id"] == k] for side in (annotations, found)))
        for k in (2, 5, 9)
    ]
    assert math.isclose(detection_scores(truth, found)["bbox/AP50"], np.mean(values), abs_tol=1e-6)


def test_the_truth_itself_scores_100_and_nothing_scores_0(truth):
    perfect = [{**a, "score": 0.9} for a in truth.coco.dataset["annotations"]]
    perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox", "score")} for a in perfect]
    assert set(detection_scores(truth, perfect).values()) == {100.0}
    assert set(detection_scores(truth, []).values()) == {0.0}


def test_masks_are_measured_where_every_detection_has_one(truth, json_file):
    found = detections(json_file, 0.6, 3, masks=True)
    del found[0]["segmentation"]
    assert not [name for name in detection_scores(truth, found) if name.startswith("segm")]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('[{"image_id": 1, "catego', ["not JSON", "evaluate the run again"]),
        ('{"bbox": {"AP": 30.0}}', ["a JSON list of detections of 'made_up'"]),
        ("[1, 2]", ["without image_id"]),
        ('[{"image_id": 1, "category_id": 2, "bbox": 3, "score": 1}]', ["without image_id"]),
        ('[{"image_id": 1, "score": 1}]', ["without image_id, category_id, bbox or score"]),
    ],
)
def test_files_that_are_no_detections_are_refused(truth, tmp_path, refuses, content, parts):
    path = tmp_path / "coco_instances_results.json"
    path.write_text(content)
    with refuses(*parts):
        read_predictions(path, truth)


@pytest.mark.parametrize(("key", "kind"), [("image_id", "image"), ("category_id", "category")])
def test_detections_of_another_data_set_are_refused(truth, json_file, tmp_path, refuses, key, kind):
    found = detections(json_file, 0.6, 3)
    found[0][key] = found[1][key] = 77
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    with refuses("detections of 'made_up'", f"2 of an unknown {kind}"):
        read_predictions(path, truth)


def test_classes_of_one_name_are_told_apart_by_their_ids(json_file):
    content = json.loads(json_file.read_text())
    for category in content["categories"]:
        category["name"] = "cat" if category["id"] != 9 else "fish"
    json_file.write_text(json.dumps(content))
    assert load(json_file).classes == {2: "cat (2)", 5: "cat (5)", 9: "fish"}


def test_area_and_crowd_may_be_missing_in_the_truth(json_file):
    content = json.loads(json_file.read_text())
    found = detections(json_file, 0.6, 3)
    before = detection_scores(load(json_file), found)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    json_file.write_text(json.dumps(content))
    assert detection_scores(load(json_file), found) == before


def test_a_data_set_that_nobody_knows_is_refused(refuses):
    with refuses("known data set", "'mine'", "DATASETS.COCO_JSON"):
        find_truth("mine", {})


@pytest.mark.parametrize("name", ["coco_2017_val", "digits_val"])
def test_built_in_data_sets_are_looked_for_below_the_data_root(
    tmp_path, monkeypatch, refuses, name
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "here"))
    with refuses(f"COCO annotations of '{name}' at {tmp_path / 'here'}", "No such file"):
        find_truth(name, {})
