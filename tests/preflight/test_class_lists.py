"""Classes of both sides that differ: runs on features are looked at, and never refused for it."""

from __future__ import annotations

import copy

import pytest

from kd_det.preflight import Settings, run_preflight
from tests.preflight import squares

SETTINGS = Settings(batches=1, images=8, seconds=600)


def student_of(world, folder, names, *opts, **changes):
    """A student of its own classes that learns features, of a teacher with a changed config."""
    teacher = copy.deepcopy(world.teacher)
    teacher["DATASETS"] |= changes
    data = {
        name: [str(part) for part in squares.write_squares(folder / name, 12, seed, names)]
        for seed, name in enumerate(world.data)
    }
    return world.student(
        *("KD.ACTIVE_TERMS", ["review"], "MODEL.ROI_HEADS.NUM_CLASSES", len(names)),
        *(x for name, parts in data.items() for x in (f"DATASETS.COCO_JSON.{name}", parts)),
        *opts,
        teacher_yaml=squares.write_yaml(folder / "other.yaml", teacher),
    )


def texts(report, level):
    return [f.message for s in report.sections for f in s.findings if f.level == level]


def test_more_classes_of_a_teacher_whose_names_nobody_knows(world, tmp_path):
    cfg = student_of(world, tmp_path, ("red", "green"), TRAIN=["elsewhere"])
    report = run_preflight(cfg, SETTINGS)
    assert report.ready, texts(report, "error")
    assert report.section("Class lists").data["teacher_index"] == {"red": 0, "green": 1}
    (warning,) = (f.message for f in report.section("Class lists").findings[:1])
    assert "names of one side's classes are not known" in warning


def test_names_that_are_not_as_many_as_the_teachers_outputs_are_not_its_names(world, tmp_path):
    two = [str(part) for part in squares.write_squares(tmp_path / "two", 2, 0, ("red", "green"))]
    names = (*squares.NAMES, "blue")  # of which the teacher has no output
    cfg = student_of(world, tmp_path, names, TRAIN=["two"], COCO_JSON={"two": two})
    report = run_preflight(cfg, SETTINGS)
    assert report.ready, texts(report, "error")
    indices = report.section("Class lists").data["teacher_index"]
    assert indices == {"red": 0, "green": 1, "yellow": 2, "blue": -1}
    assert any("not as many as its outputs" in text for text in texts(report, "warning"))
    assert any("no class for blue" in text for text in texts(report, "warning"))


@pytest.mark.parametrize("names", [("jaune", "rouge", "vert"), ("a", "b", "c", "d", "e")])
def test_names_that_have_nothing_in_common_are_said_and_judged_no_further(world, tmp_path, names):
    report = run_preflight(student_of(world, tmp_path, names), SETTINGS)
    assert report.ready, texts(report, "error")
    assert report.section("Class lists").data["teacher_index"] == dict.fromkeys(names, -1)
    (warning,) = (f.message for f in report.section("Class lists").findings)
    assert f"no class for {', '.join(names)}" in warning
    # Neither right answers nor AP can be counted where no class is the same.
    assert report.section("Teacher").data.keys() == {"parameters"}
    assert any("the teacher has none of the student's" in text for text in texts(report, "note"))


def test_a_floor_for_a_teacher_of_other_classes_cannot_be_checked(world, tmp_path):
    cfg = student_of(world, tmp_path, ("a", "b"), "KD.TEACHER.MIN_AP", 5)
    (error,) = texts(run_preflight(cfg, SETTINGS), "error")
    assert "MIN_AP 5 cannot be checked: the teacher has none of the student's classes" in error


def test_names_that_are_renamed_are_not_called_the_same(world, tmp_path):
    names = ("red", "green", "amber")
    cfg = student_of(world, tmp_path, names, "KD.CLASS_MAP.amber", "yellow")
    report = run_preflight(cfg, SETTINGS)
    assert report.ready, texts(report, "error")
    oks = [f.message for f in report.section("Class lists").findings if f.level == "ok"]
    assert oks[0] == "3 classes in the same order, renamed by KD.CLASS_MAP"
