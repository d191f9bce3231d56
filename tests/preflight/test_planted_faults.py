"""Every planted fault is found, and the message names its cause."""

from __future__ import annotations

import copy
import math
import re
from typing import NamedTuple

import pytest
import torch

from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.losses.reviewkd import ReviewKDLoss
from kd_det.preflight import Settings, run_preflight
from tests.preflight import squares

SETTINGS = Settings(batches=2, images=8, seconds=600)


class Planted(NamedTuple):
    """A run with a fault."""

    cfg: object
    section: str
    level: str
    says: tuple[str, ...]


def empty_weights(world, folder, monkeypatch):
    return Planted(
        world.student("KD.TEACHER.WEIGHTS", ""), "Build", "error", ("KD.TEACHER.WEIGHTS", "''")
    )


def weights_of_another_depth(world, folder, monkeypatch):
    deeper = copy.deepcopy(world.teacher)
    deeper["MODEL"]["BACKBONE"]["BLOCKS"] = [1, 2, 1]
    model = build_model(load_config(str(squares.write_yaml(folder / "deeper.yaml", deeper))))
    torch.save({"model": model.state_dict()}, folder / "deeper.pth")
    cfg = world.student("KD.TEACHER.WEIGHTS", folder / "deeper.pth")
    return Planted(cfg, "Build", "error", ("unexpected", "layer2.1", "deeper.pth"))


def one_key_missing(world, folder, monkeypatch):
    path = world.changed_weights(folder / "cut.pth", lambda s: s.pop("rpn.head.cls_logits.bias"))
    cfg = world.student("KD.TEACHER.WEIGHTS", path)
    return Planted(cfg, "Build", "error", ("1 missing: rpn.head.cls_logits.bias",))


def bgr_and_rgb_swapped(world, folder, monkeypatch):
    def flip(state):
        # What training on BGR images would have given.
        state["backbone.body.conv1.weight"] = state["backbone.body.conv1.weight"].flip(1)

    cfg = world.student("KD.TEACHER.WEIGHTS", world.changed_weights(folder / "bgr.pth", flip))
    return Planted(
        cfg, "Teacher", "error", ("BGR instead of RGB", "reverse the input channels", "confidence")
    )


def mean_and_std_of_another_model(world, folder, monkeypatch):
    other = copy.deepcopy(world.teacher)
    other["MODEL"] |= {"PIXEL_MEAN": [0.1, 0.1, 0.1], "PIXEL_STD": [1.0, 1.0, 1.0]}
    path = squares.write_yaml(folder / "other.yaml", other)
    return Planted(
        world.student(teacher_yaml=path),
        "Teacher",
        "error",
        ("MODEL.PIXEL_MEAN, MODEL.PIXEL_STD", "other.yaml", "mean 0.1 0.1 0.1", "mean 0.5 0.5 0.5"),
    )


def class_order_permuted(world, folder, monkeypatch):
    def permute(state):
        prefix = "roi_heads.box_predictor."
        # Background, then green, yellow, red: the teacher's class 0 answers to green.
        order = torch.tensor([0, 2, 3, 1])
        for name in ("cls_score.weight", "cls_score.bias"):
            state[prefix + name] = state[prefix + name][order]
        rows = (4 * order[:, None] + torch.arange(4)).flatten()
        for name in ("bbox_pred.weight", "bbox_pred.bias"):
            state[prefix + name] = state[prefix + name][rows]

    path = world.changed_weights(folder / "permuted.pth", permute)
    return Planted(
        world.student("KD.TEACHER.WEIGHTS", path),
        "Class lists",
        "error",
        (
            "objects of 'red' are predicted as the teacher's class 2 ('yellow')",
            "objects of 'green' are predicted as the teacher's class 0 ('red')",
            "another order",
        ),
    )


def a_class_missing(world, folder, monkeypatch):
    cfg = world.student("KD.TEACHER.CLASS_NAMES", "['red', 'green', 'violet']")
    return Planted(cfg, "Build", "error", ("yellow", "KD.CLASS_MAP"))


def a_weight_of_1e_minus_9(world, folder, monkeypatch):
    return Planted(
        world.student("KD.TERMS.review.WEIGHT", "1e-9"),
        "Terms",
        "warning",
        (
            "'review' has hardly any effect",
            "WEIGHT 1e-09",
            "KD.TERMS.review.WEIGHT",
            "would give it 20%",
        ),
    )


def a_weight_of_1e6(world, folder, monkeypatch):
    return Planted(
        world.student("KD.TERMS.review.WEIGHT", "1e6"),
        "Terms",
        "warning",
        ("'review' dominates all others", "WEIGHT 1e+06", "would give it 20%"),
    )


def a_tap_that_does_not_exist(world, folder, monkeypatch):
    return Planted(
        world.student("KD.TERMS.review.TAPS", "['p2', 'p3', 'p7']"),
        "Build",
        "error",
        ("'p7'", "did you mean"),
    )


def a_loss_that_is_nan(world, folder, monkeypatch):
    forward = ReviewKDLoss.forward
    monkeypatch.setattr(ReviewKDLoss, "forward", lambda *a, **k: forward(*a, **k) * math.nan)
    return Planted(
        world.student(), "Terms", "error", ("'review' is not finite", "nan", "2 of 2 batches")
    )


def a_term_that_is_zero(world, folder, monkeypatch):
    forward = ReviewKDLoss.forward
    monkeypatch.setattr(ReviewKDLoss, "forward", lambda *a, **k: forward(*a, **k) * 0)
    return Planted(world.student(), "Terms", "warning", ("'review' is exactly zero",))


def a_student_with_other_strides(world, folder, monkeypatch):
    cfg = world.student(
        *("MODEL.BACKBONE.BLOCKS", "[1, 1, 1, 1]", "MODEL.FPN.LEVELS", "[3, 4, 5]"),
        *("KD.TERMS.review.TAPS", "[['p3', 'p2'], ['p4', 'p3'], ['p5', 'p4']]"),
    )
    return Planted(cfg, "Build", "error", ("student stride 8, teacher stride 4",))


def a_teacher_below_the_floor(world, folder, monkeypatch):
    cfg = world.student("KD.TEACHER.MIN_AP", 99.5)
    return Planted(cfg, "Teacher", "error", ("box AP", "below KD.TEACHER.MIN_AP 99.5"))


def a_floor_that_nothing_is_measured_against(world, folder, monkeypatch):
    cfg = world.student("KD.TEACHER.MIN_AP", 10, "DATASETS.TEST", [])
    return Planted(
        cfg, "Teacher", "error", ("MIN_AP 10 cannot be checked", "DATASETS.TEST is empty")
    )


def a_student_better_than_its_teacher(world, folder, monkeypatch):
    def forget(state):
        state["roi_heads.box_predictor.cls_score.weight"].zero_()

    cfg = world.student(
        *("KD.TEACHER.WEIGHTS", world.changed_weights(folder / "poor.pth", forget)),
        *("MODEL.WEIGHTS", world.weights, "MODEL.BACKBONE.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 16),
    )
    return Planted(cfg, "Teacher", "warning", ("student starts with box AP", "better than"))


FAULTS = [
    empty_weights,
    weights_of_another_depth,
    one_key_missing,
    bgr_and_rgb_swapped,
    mean_and_std_of_another_model,
    class_order_permuted,
    a_class_missing,
    a_weight_of_1e_minus_9,
    a_weight_of_1e6,
    a_tap_that_does_not_exist,
    a_loss_that_is_nan,
    a_term_that_is_zero,
    a_student_with_other_strides,
    a_teacher_below_the_floor,
    a_floor_that_nothing_is_measured_against,
    a_student_better_than_its_teacher,
]


def test_the_proposed_weight_gives_the_share_it_promises(world):
    before = run_preflight(world.student("KD.TERMS.review.WEIGHT", "1e-9"), SETTINGS)
    (found,) = before.section("Terms").findings
    weight = re.search(r"KD.TERMS.review.WEIGHT (\S+) would give it 20%", found.message)
    assert weight is not None
    after = run_preflight(world.student("KD.TERMS.review.WEIGHT", weight[1]), SETTINGS)
    assert after.section("Terms").data["review"]["share"] == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(fault, world, tmp_path, monkeypatch):
    planted = fault(world, tmp_path, monkeypatch)
    report = run_preflight(planted.cfg, SETTINGS)
    found = [f for f in report.section(planted.section).findings if f.level == planted.level]
    assert len(found) == 1, report.as_dict()
    for part in planted.says:
        assert part in found[0].message
    assert report.ready == (planted.level == "warning")


def test_a_sound_run_is_ready_without_a_warning(world):
    report = run_preflight(world.student(), SETTINGS)
    assert report.verdict == "ready", [f.message for f in report.errors + report.warnings]
    assert report.section("Teacher").data["confidence"] > 0.5
    assert report.section("Class lists").data["teacher_index"] == {
        "red": 0,
        "green": 1,
        "yellow": 2,
    }


def test_another_input_of_the_student_is_no_fault(world):
    cfg = world.student("MODEL.PIXEL_MEAN", [0.485, 0.456, 0.406], "MODEL.PIXEL_STD", [0.1] * 3)
    assert run_preflight(cfg, SETTINGS).verdict == "ready"


def test_names_in_another_order_are_mapped_and_shown(world, tmp_path):
    order = [2, 0, 1]  # of the teacher's outputs: yellow, red, green

    def permute(state):
        rows = torch.tensor([0, *(k + 1 for k in order)])
        for name in ("cls_score", "bbox_pred"):
            for kind in ("weight", "bias"):
                key = f"roi_heads.box_predictor.{name}.{kind}"
                blocks = state[key].unflatten(0, (4, -1))
                state[key] = blocks[rows].flatten(0, 1)

    cfg = world.student(
        *("KD.TEACHER.WEIGHTS", world.changed_weights(tmp_path / "permuted.pth", permute)),
        *("KD.TEACHER.CLASS_NAMES", [squares.NAMES[k] for k in order]),
    )
    report = run_preflight(cfg, SETTINGS)
    assert report.verdict == "ready", [f.message for f in report.errors + report.warnings]
    section = report.section("Class lists")
    assert section.data["teacher_index"] == {"red": 1, "green": 2, "yellow": 0}
    assert any("another order: mapped by name" in f.message for f in section.findings)
