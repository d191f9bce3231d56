"""Some classes of a data set: annotations of others go, images stay, the order is the asked one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_det.data.coco_json import category_names, check_coco_json
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.data.subset_json import write_subset

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("subset") / "digits"
    return write_digits(root, DigitsSpec(canvas=96, train_images=8, val_images=1))["digits_train"]


def named(content):
    """Every annotation with its class's name in place of the id."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [{**a, "category_id": names[a["category_id"]]} for a in content["annotations"]]


def test_annotations_keep_their_class_and_all_images_stay(digits, tmp_path):
    source, images = digits
    classes = ["3", "7", "1", "9"]
    whole = json.loads(source.read_text())
    target = write_subset(source, tmp_path / "new" / "four.json", classes)
    part = json.loads(target.read_text())
    assert named(part) == [a for a in named(whole) if a["category_id"] in classes]
    assert part["images"] == whole["images"]
    assert [c["id"] for c in part["categories"]] == [1, 2, 3, 4]
    assert category_names("four", target) == classes
    assert check_coco_json("four", target, images)["images_without_annotations"] > 0


def test_all_classes_in_another_order_permute_the_ids_alone(digits, tmp_path):
    order = list("7209418365")
    whole = json.loads(digits[0].read_text())
    part = json.loads(write_subset(digits[0], tmp_path / "ten.json", order).read_text())
    assert named(part) == named(whole)
    assert category_names("ten", tmp_path / "ten.json") == order


def test_the_same_subset_again_is_no_fault_but_another_one_is(digits, tmp_path, refuses):
    target = write_subset(digits[0], tmp_path / "a.json", ["1", "2"])
    before = target.read_bytes()
    write_subset(digits[0], target, ["1", "2"])
    with refuses("an empty place", "nothing was changed"):
        write_subset(digits[0], target, ["2", "1"])
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        (["1", "one"], ["'one'", "known: 0, 1"]),
        (["1", "2", "1"], ["each once", "1, 2, 1"]),
        ([], ["each once", "none"]),
    ],
)
def test_classes_that_are_not_there_or_there_twice_are_refused(
    digits, tmp_path, refuses, classes, parts
):
    with refuses(*parts):
        write_subset(digits[0], tmp_path / "b.json", classes)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_is_refused(tmp_path, refuses):
    with refuses("no such file"):
        write_subset(tmp_path / "no.json", tmp_path / "b.json", ["1"])


def test_the_tool_writes_a_subset_and_names_its_data_sets(tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / "make_digits.py"), "--output", "data"]
    command += ["--train-images", "2", "--val-images", "1", "--canvas", "96"]
    command += ["--classes", "3", "7", "--name", "two"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "two_train: [data/annotations/two_train.json, data/train]" in done.stdout
    assert category_names("two", tmp_path / "data" / "annotations" / "two_val.json") == ["3", "7"]
