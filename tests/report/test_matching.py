"""What counts as found, and in which images two detectors differ most."""

from __future__ import annotations

import json

import pytest

from kd_det.report.detected import Match, match, match_all, ranked, tally
from tests.report.made_up import detections, write_truth

OBJECT = {"bbox": [10.0, 10.0, 20.0, 20.0], "category_id": 1}


def detected(box=(10.0, 10.0, 20.0, 20.0), score=0.9, category=1):
    return {"bbox": list(box), "score": score, "category_id": category}


@pytest.mark.parametrize(
    ("detection", "found"),
    [
        (detected(), True),
        (detected(score=0.5), True),
        (detected(category=2), False),
        # A box of the object's size, moved by x of 20 pixels: IoU (20 - x) / (20 + x).
        (detected((16.0, 10.0, 20.0, 20.0)), True),
        (detected((17.0, 10.0, 20.0, 20.0)), False),
    ],
)
def test_an_object_is_found_by_its_class_at_half_overlap(detection, found):
    result = match([OBJECT], [detection])
    assert result.correct == [found]
    assert result.objects == (frozenset({0}) if found else frozenset())


def test_detections_below_half_certainty_are_not_there():
    assert match([OBJECT], [detected(score=0.49)]) == Match([], [], frozenset())


def test_an_object_is_found_once_by_the_surest_detection():
    result = match([OBJECT], [detected(score=0.6), detected(score=0.8)])
    assert [d["score"] for d in result.detections] == [0.8, 0.6]
    assert result.correct == [True, False]


def test_two_objects_are_found_by_two_detections_whatever_their_order():
    near = {"bbox": [12.0, 10.0, 20.0, 20.0], "category_id": 1}
    pair = [detected(score=0.9), detected((12.0, 10.0, 20.0, 20.0), 0.8)]
    for objects in ([OBJECT, near], [near, OBJECT]):
        assert match(objects, pair).objects == {0, 1}


def test_an_image_without_objects_or_detections_has_nothing_found():
    assert match([], [detected()]).correct == [False]
    assert match([OBJECT], []).objects == frozenset()


def a_study(tmp_path):
    truth = write_truth(tmp_path / "data", images=12)
    own = {}
    for annotation in json.loads(truth.read_text())["annotations"]:
        own.setdefault(annotation["image_id"], []).append(annotation)
    return own, *(match_all(own, detections(truth, share, 7)) for share in (0.8, 0.4))


def test_images_are_ranked_by_the_difference_of_found_objects(tmp_path):
    own, better, worse = a_study(tmp_path)
    order = ranked(better, worse)
    ahead = {k: len(better[k].objects) - len(worse[k].objects) for k in own}
    assert sorted(order) == sorted(k for k in own if ahead[k] > 0)
    assert [ahead[k] for k in order] == sorted((ahead[k] for k in order), reverse=True)
    assert not set(order) & set(ranked(worse, better))
    assert len(order) > 2


def test_the_tally_is_that_of_single_objects(tmp_path):
    own, better, worse = a_study(tmp_path)
    counts = {"both": 0, "one": 0, "other": 0}
    for image, objects in own.items():
        for k in range(len(objects)):
            pair = k in better[image].objects, k in worse[image].objects
            if any(pair):
                counts[{(1, 1): "both", (1, 0): "one", (0, 1): "other"}[pair]] += 1
    assert tally(better, worse) == counts
