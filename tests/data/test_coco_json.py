"""Every fault of a COCO json is one clear error that names the entry."""

from __future__ import annotations

import copy
import json
import logging

import pytest

from kd_det.core.errors import KDError
from kd_det.data.coco_json import NAMED_OFFENDERS, check_coco_json

GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ],
    "annotations": [
        {"id": 11, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 30]},
        {"id": 12, "image_id": 1, "category_id": 4, "bbox": [5.5, 6.5, 7.0, 8.0]},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
}


@pytest.fixture
def good():
    return copy.deepcopy(GOOD)


@pytest.fixture
def check(tmp_path):
    """Write a json beside two image files and check it."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).touch()

    def run(content, **options):
        file = tmp_path / "mine.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return check_coco_json("mine_train", file, tmp_path / "images", **options)

    return run


def test_a_good_data_set_is_summarised(check, good):
    assert check(good) == {
        "name": "mine_train",
        "images": 2,
        "annotations": 2,
        "categories": {3: "cat", 4: "dog"},
        "images_without_annotations": 1,
        "annotations_without_mask": 2,
        "boxes_of_zero_size": 0,
    }


def test_a_missing_json_is_named_with_its_data_set(tmp_path):
    with pytest.raises(KDError, match=r"'mine_train' at .*gone\.json; received no such file"):
        check_coco_json("mine_train", tmp_path / "gone.json", tmp_path)


def test_a_folder_in_place_of_a_json_is_named(tmp_path):
    with pytest.raises(KDError, match="received a folder"):
        check_coco_json("mine_train", tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["", "{'images': []}", "\x00\xff"])
def test_text_that_is_not_json_is_refused(check, text):
    with pytest.raises(KDError, match="not JSON"):
        check(text)


def test_json_that_is_no_object_is_refused(check):
    with pytest.raises(KDError, match="a JSON list"):
        check([1, 2])


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(check, good, key):
    del good[key]
    with pytest.raises(KDError, match=f"received no '{key}'"):
        check(good)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_an_empty_list_is_named(check, good, key):
    good[key] = []
    with pytest.raises(KDError, match=f"received an empty '{key}'"):
        check(good)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", ["text", {"1": {}}, [1, 2]])
def test_a_list_of_another_kind_is_named(check, good, key, value):
    good[key] = value
    with pytest.raises(KDError, match=f"'{key}' of another kind"):
        check(good)


@pytest.mark.parametrize(
    ("key", "field", "value", "named"),
    [
        ("images", "id", None, "entry 1"),
        ("images", "id", 1, r"image 1 \(2 times\)"),
        ("images", "file_name", None, "image 2"),
        ("images", "width", None, "image 2"),
        ("images", "height", 0, "image 2"),
        ("categories", "id", 3, r"category 3 \(2 times\)"),
        ("categories", "name", "", "category 4"),
        ("annotations", "id", 11, r"annotation 11 \(2 times\)"),
        ("annotations", "image_id", 99, r"annotation 12 \(image_id 99\)"),
        ("annotations", "image_id", [1], r"annotation 12 \(image_id \[1\]\)"),
        ("annotations", "category_id", 0, r"annotation 12 \(category_id 0\)"),
        ("annotations", "category_id", None, r"annotation 12 \(category_id None\)"),
        ("annotations", "bbox", None, "annotation 12"),
        ("annotations", "bbox", [1, 2, 3], "annotation 12"),
        ("annotations", "bbox", [1, 2, float("nan"), 4], "annotation 12"),
        ("annotations", "bbox", [5, 5, 0, 4], "positive width and height.*annotation 12"),
        ("annotations", "bbox", [5, 5, 4, -4], "positive width and height.*annotation 12"),
        ("annotations", "bbox", [30, 5, 12, 4], "inside their image.*annotation 12 of image 1"),
        ("annotations", "bbox", [5, 25, 4, 6.5], "inside their image.*annotation 12 of image 1"),
        ("annotations", "bbox", [-2, 5, 4, 4], "inside their image.*annotation 12 of image 1"),
    ],
)
def test_a_wrong_entry_is_named(check, good, key, field, value, named):
    good[key][1][field] = value
    with pytest.raises(KDError, match=named):
        check(good)


def test_a_missing_field_is_named(check, good):
    del good["annotations"][0]["bbox"]
    with pytest.raises(KDError, match=r"'bbox'.*annotation 11"):
        check(good)


def test_a_box_within_a_pixel_of_the_border_is_accepted(check, good):
    good["annotations"][1]["bbox"] = [-1, -1, 42, 32]
    assert check(good)["annotations"] == 2


def test_only_the_first_offenders_are_listed_with_the_total(check, good):
    good["annotations"] = [
        {"id": at, "image_id": 1, "category_id": 3, "bbox": [0, 0, 400, 300]} for at in range(12)
    ]
    with pytest.raises(KDError) as caught:
        check(good)
    message = str(caught.value)
    assert "12 that do not" in message
    assert message.count("annotation ") == NAMED_OFFENDERS
    assert "and 7 more" in message


def stray(number_of_boxes, sides):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {"id": at, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]}
        for at in range(number_of_boxes)
    ]
    content["annotations"][77]["bbox"] = [1, 1, *sides]
    return content


def test_one_zero_size_box_in_ten_thousand_is_reported_but_accepted(check, caplog):
    """COCO train2017 itself has such boxes."""
    with caplog.at_level(logging.WARNING):
        assert check(stray(10_000, sides=[2, 0.0]))["boxes_of_zero_size"] == 1
    assert "annotation 77" in caplog.text


@pytest.mark.parametrize(("number_of_boxes", "sides"), [(9_000, [2, 0]), (10_000, [2, -1])])
def test_frequent_zero_sizes_and_negative_sizes_are_refused(check, number_of_boxes, sides):
    with pytest.raises(KDError, match="annotation 77"):
        check(stray(number_of_boxes, sides))


def test_a_missing_image_folder_is_named(tmp_path, good):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(good))
    with pytest.raises(KDError, match="no such folder"):
        check_coco_json("mine_train", file, tmp_path / "nowhere")


def test_a_missing_image_file_is_named(check, good):
    good["images"][1]["file_name"] = "c.png"
    with pytest.raises(KDError, match=r"image 2 \(c\.png\)"):
        check(good)


def test_a_sample_is_spread_over_the_data_set(check, good):
    good["images"] = [
        {"id": at, "file_name": "a.png" if at < 50 else "c.png", "width": 40, "height": 30}
        for at in range(100)
    ]
    with pytest.raises(KDError, match=r"the 4 images .* received 2 that do not: image 50"):
        check(good, sample=4)
    assert check(good, sample=1)["images"] == 100
