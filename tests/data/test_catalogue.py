"""Names lead to the same files on every host, below one data root."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_det.data.catalogue import (
    data_root,
    detection_class_names,
    detection_paths,
    prepare_detection,
)
from kd_det.data.digits import DIGITS
from kd_det.data.digits.detection import DigitsSpec, write_digits


@pytest.mark.parametrize(
    ("value", "root"),
    [(None, Path("datasets")), ("/data", Path("/data")), ("~/coco", Path.home() / "coco")],
)
def test_data_sets_live_where_detectron2_looks(monkeypatch, value, root):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    if value:
        monkeypatch.setenv("DETECTRON2_DATASETS", value)
    assert data_root() == root


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home directory, with ``~/sets`` as the data root."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    return tmp_path


def test_built_in_names_and_entries_lead_to_their_files(home):
    folder = home / "sets"
    annotations = folder / "coco" / "annotations"
    coco = (annotations / "instances_val2017.json", folder / "coco" / "val2017")
    assert detection_paths("coco_2017_val", {}) == coco
    digits = folder / "digits"
    for name, split in zip(DIGITS, ("train", "val"), strict=True):
        files = (digits / "annotations" / f"{name}.json", digits / split)
        assert detection_paths(name, {}) == files
        assert detection_paths(name, {name: ["a.json", "images"]}) == (
            Path("a.json"),
            Path("images"),
        )
    assert list(home.iterdir()) == []


def test_unknown_names_and_entries_that_are_no_pair_are_refused(refuses):
    with refuses("'digit_train'", "did you mean 'digits_train'", "DATASETS.COCO_JSON"):
        detection_paths("digit_train", {})
    with refuses("did you mean 'mine'"):
        detection_paths("nine", {"mine": ["a.json", "images"]})
    with refuses("DATASETS.COCO_JSON.half to be [json, image_root]", "only.json"):
        detection_paths("half", {"half": ["only.json"]})


def test_digits_are_written_and_coco_is_not(home, monkeypatch, refuses):
    # The whole data set takes a while to draw.
    few = DigitsSpec(canvas=96, train_images=1, val_images=1)
    monkeypatch.setattr(
        "kd_det.data.digits.detection.write_digits", lambda root: write_digits(root, few)
    )
    json_file, images = prepare_detection("digits_val", {})
    assert json_file.is_file()
    assert len(list(images.iterdir())) == 1
    missing = home / "sets" / "coco" / "annotations" / "instances_train2017.json"
    with refuses(str(missing), "$DETECTRON2_DATASETS", "cocodataset.org"):
        prepare_detection("coco_2017_train", {})


def test_class_names_come_without_writing_anything(home, tmp_path):
    assert detection_class_names("digits_train", {}) == [str(k) for k in range(10)]
    path = tmp_path / "two.json"
    path.write_text('{"categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}]}')
    assert detection_class_names("two", {"two": [str(path), "."]}) == ["a", "b"]
    assert detection_class_names("coco_2017_train", {}) is None
    assert detection_class_names("unknown", {}) is None
    assert not (home / "sets").exists()


def test_a_home_in_the_data_root_is_one_folder_for_all_hosts(home):
    from fvcore.common.config import CfgNode

    from kd_det.hosts.classification import data as classification
    from kd_det.hosts.torchvision_detection import data as torchvision_detection
    from kd_det.hosts.torchvision_detection.classes import class_names
    from kd_det.report.scores import find_truth

    few = DigitsSpec(canvas=96, train_images=1, val_images=1)
    write_digits(home / "sets" / "digits", few)
    assert find_truth("digits_val", {}).root == home / "sets" / "digits" / "val"
    annotations = home / "sets" / "coco" / "annotations" / "instances_train2017.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text('{"categories": [{"id": 1, "name": "person"}]}')
    cfg = CfgNode({"DATASETS": {"TRAIN": ["coco_2017_train"], "COCO_JSON": {}}})
    assert class_names(cfg) == ["person"]
    (home / "sets" / "imagenet" / "train" / "n0").mkdir(parents=True)
    root = classification.data_root()
    assert classification.SOURCES["imagenet_train"].names(root) == ["n0"]
    assert torchvision_detection.prepare_detection("coco_2017_train", {})[0] == annotations
