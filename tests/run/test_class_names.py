"""Where names of classes come from, and when a run needs them."""

from __future__ import annotations

import json
import logging

from fvcore.common.config import CfgNode

from kd_det.data.coco_json import category_names
from kd_det.run.class_names import (
    SideClasses,
    find_class_map,
    run_class_map,
    side_classes,
)
from kd_det.run.config import add_kd_config, merge_config


def known(*names):
    return SideClasses(len(names), names)


def test_unknown_names_of_equal_counts_change_nothing():
    unknown = SideClasses(2, None, "its data is elsewhere")
    assert find_class_map(known("a", "b"), unknown, {}) is None
    assert find_class_map(unknown, unknown, {}) is None
    assert find_class_map(known("a", "b"), known("a", "b"), {}) is None


def test_names_map_where_they_are_known():
    found = find_class_map(known("a", "b"), known("b", "c", "a"), {})
    assert found is not None
    assert found.indices == (2, 0)


def test_unknown_names_are_an_error_where_they_are_needed(refuses):
    unknown = SideClasses(3, None, "its training data 'x' is not at hand")
    with refuses("student 2 classes, teacher 3 classes", "'x' is not at hand", "CLASS_NAMES"):
        find_class_map(known("a", "b"), unknown, {})
    with refuses("student 3 classes, teacher 3 classes", "KD.TEACHER.CLASS_NAMES"):
        find_class_map(known("a", "b", "c"), unknown, {"a": "z"})


def test_names_that_are_not_as_many_as_the_classes_are_not_used(caplog):
    with caplog.at_level(logging.WARNING, logger="kd_det.run.class_names"):
        found = side_classes("teacher", 80, ["a", "b"], "pets_train")
    assert found.names is None
    assert "'pets_train' has 2 names for 80 classes" in found.reason
    assert "teacher" in caplog.text


def test_given_names_go_first_and_must_be_complete(refuses):
    found = side_classes("teacher", 2, ["x", "y"], "data", ["a", 3])
    assert found.names == ("a", "3")
    with refuses("KD.TEACHER.CLASS_NAMES", "2 classes", "1 names: a"):
        side_classes("teacher", 2, ["x", "y"], "data", ["a"])


def run_cfg(names):
    cfg = CfgNode({"NAMES": names})
    add_kd_config(cfg)
    cfg.DATASETS.TRAIN = ("data",)
    return cfg


def class_map_of(student, teacher, taps=("box_logits",), **node):
    cfg, teacher_cfg = run_cfg(student), run_cfg(teacher)
    cfg.KD.TERMS = CfgNode({"x": {"LOSS": "KD", "TAPS": list(taps)}}, new_allowed=True)
    cfg.KD.CLASS_MAP = CfgNode(node.get("class_map", {}), new_allowed=True)
    cfg.KD.TEACHER.CLASS_NAMES = node.get("names", [])
    return run_class_map(
        cfg, teacher_cfg, ("box_logits",), lambda own: len(own.NAMES), lambda own: own.NAMES
    )


def test_a_run_is_mapped_only_where_it_compares_logits(refuses):
    assert class_map_of(["a", "b"], ["b", "a"]).indices == (1, 0)
    assert class_map_of(["a", "b"], ["x", "y"], taps=["p2"]) is None
    with refuses("2 of 2", "'a', 'b'"):
        class_map_of(["a", "b"], ["x", "y"])


def test_a_run_takes_names_and_map_of_its_config():
    assert class_map_of(["a", "b"], ["x", "y"], names=["b", "a"]).indices == (1, 0)
    assert class_map_of(["a", "b"], ["b", "z"], class_map={"a": "z"}).indices == (1, 0)


def test_names_and_map_are_read_from_file_and_command_line(tmp_path, refuses):
    path = tmp_path / "config.yaml"
    path.write_text(
        "KD:\n  CLASS_MAP: {auto: car, '3': 5}\n  TEACHER: {CLASS_NAMES: [car, 5, traffic light]}\n"
    )
    cfg = CfgNode()
    add_kd_config(cfg)
    cfg.KD.ENABLED = False
    merge_config(cfg, str(path), ["KD.CLASS_MAP.lamp", "traffic light"])
    assert list(map(str, cfg.KD.TEACHER.CLASS_NAMES)) == ["car", "5", "traffic light"]
    student, teacher = known("auto", "3", "lamp"), known("traffic light", "car", "5")
    found = find_class_map(student, teacher, cfg.KD.CLASS_MAP)
    assert found is not None
    assert found.indices == (1, 2, 0)
    path.write_text("KD:\n  CLASS_MAP: {3: car}\n")
    with refuses("KD.CLASS_MAP", "3 (int)", "'3'"):
        merge_config(cfg, str(path))


def test_categories_are_read_in_the_order_of_their_ids(tmp_path, refuses):
    path = tmp_path / "data.json"
    assert category_names("data", path) is None
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
    path.write_text(json.dumps({"categories": categories}))
    assert category_names("data", path) == ["cat", "dog"]
    categories[0]["name"] = "wolf!"
    path.write_text(json.dumps({"categories": categories}))
    assert category_names("data", path) == ["cat", "wolf!"]
    path.write_text("{}")
    with refuses("'data'", "categories"):
        category_names("data", path)
