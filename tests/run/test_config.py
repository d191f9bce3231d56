"""Configs: the keys every host shares, overrides and mistakes."""

from __future__ import annotations

import pytest
from fvcore.common.config import CfgNode

from kd_det.core.schedules import Delay
from kd_det.run.config import add_kd_config, merge_config, read_terms

REVIEW = """
KD:
  TERMS:
    review:
      LOSS: ReviewKD
      WEIGHT: 0.8
      TAPS: [p2, p3]
"""


@pytest.fixture
def cfg():
    """A host's own keys with the shared ones."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "./output"
    cfg.SOLVER = CfgNode({"BASE_LR": 0.01, "MAX_ITER": 100, "STEPS": (60, 80)})
    cfg.MODEL = CfgNode({"DEVICE": "cpu", "BACKBONE": CfgNode({"FREEZE_AT": 2})})
    add_kd_config(cfg)
    return cfg


@pytest.fixture
def write(tmp_path):
    def make(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return make


def test_defaults_distil_nothing_and_refuse_a_random_teacher(cfg):
    assert cfg.HOST == "detectron2"
    assert cfg.KD.ENABLED is True
    teacher = {"CONFIG_FILE": "", "WEIGHTS": "", "ALLOW_RANDOM": False}
    assert cfg.KD.TEACHER == {**teacher, "CLASS_NAMES": [], "MIN_AP": 0.0}
    assert read_terms(cfg) == ()


def test_keys_of_a_host_are_kept(cfg):
    cfg = CfgNode({"DATASETS": CfgNode({"TRAIN": ("a",)})})
    add_kd_config(cfg)
    assert cfg.DATASETS.TRAIN == ("a",)
    assert cfg.DATASETS.COCO_JSON == {}


def test_terms_of_a_file_are_read(cfg, write):
    merge_config(cfg, write(REVIEW))
    (term,) = read_terms(cfg)
    assert (term.name, term.loss, term.weight) == ("review", "ReviewKD", 0.8)
    assert term.taps == (("p2", "p2"), ("p3", "p3"))


def test_a_file_changes_one_key_of_a_term_of_its_base(cfg, write):
    write(REVIEW, "base.yaml")
    merge_config(cfg, write("_BASE_: base.yaml\nKD: {TERMS: {review: {WEIGHT: 2}}}"))
    (term,) = read_terms(cfg)
    assert (term.loss, term.weight) == ("ReviewKD", 2.0)


@pytest.mark.parametrize(
    ("options", "attribute", "value"),
    [
        (["KD.TERMS.review.WEIGHT", "1"], "weight", 1.0),
        (["KD.TERMS.review.WEIGHT", "0.25"], "weight", 0.25),
        (["KD.TERMS.review.MID_CHANNELS", "64"], "arguments", {"mid_channels": 64}),
        (["KD.TERMS.review.TAPS", "['p4', ['p5', 'p6']]"], "taps", (("p4", "p4"), ("p5", "p6"))),
        (["KD.TERMS.review.TAPS", "p6"], "taps", (("p6", "p6"),)),
        (
            ["KD.TERMS.review.SCHEDULE", "{'NAME': 'delay', 'ITERS': 9}"],
            "schedule",
            Delay(9),
        ),
        (
            ["KD.TERMS.review.SCHEDULE.NAME", "delay", "KD.TERMS.review.SCHEDULE.ITERS", "9"],
            "schedule",
            Delay(9),
        ),
    ],
    ids=str,
)
def test_a_term_is_changed_by_an_override(cfg, write, options, attribute, value):
    merge_config(cfg, write(REVIEW), options)
    assert getattr(read_terms(cfg)[0], attribute) == value


def test_a_term_is_added_by_overrides(cfg, write):
    options = ["KD.TERMS.soft.LOSS", "KD", "KD.TERMS.soft.TAPS", "box_logits"]
    merge_config(cfg, write(REVIEW), options)
    assert [term.name for term in read_terms(cfg)] == ["review", "soft"]


def test_a_data_set_is_added_by_an_override(cfg, write):
    merge_config(cfg, write(REVIEW), ["DATASETS.COCO_JSON.mine", "['a.json', 'images']"])
    assert cfg.DATASETS.COCO_JSON.mine == ["a.json", "images"]


def test_an_override_of_a_float_may_be_an_integer(cfg, write):
    merge_config(cfg, write(REVIEW), ["SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "7"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (1.0, 7)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert isinstance(cfg.SOLVER.MAX_ITER, int)


def test_terms_of_a_plain_student_are_not_read(cfg, write):
    merge_config(cfg, write(REVIEW), ["KD.ENABLED", "False", "KD.TERMS.review.LOSS", "Nonsense"])
    assert cfg.KD.ENABLED is False


BAD_FILES = {
    "unknown key": ("SOLVR: {BASE_LR: 0.1}", "received 'SOLVR'; remedy: did you mean 'SOLVER'?"),
    "unknown key below": (
        "KD: {TEACHER: {WEIGTHS: x}}",
        "received 'KD.TEACHER.WEIGTHS'; remedy: did you mean 'KD.TEACHER.WEIGHTS'?",
    ),
    "value of another type": ("SOLVER: {BASE_LR: fast}", "received Type mismatch"),
    "value for a node": ("KD: {TERMS: 3}", "for config key: KD.TERMS"),
    "term that is no mapping": ("KD: {TERMS: {review: 3}}", "'review' to be a mapping with a LOSS"),
    "unknown loss": (REVIEW.replace("ReviewKD", "Revue"), "received 'Revue'; remedy: did you mean"),
    "unknown host": (
        "HOST: mmdet",
        "HOST to be one of 'detectron2'; received 'mmdet'; remedy: known: detectron2",
    ),
    "broken": ("SOLVER: [", "to be YAML mappings of config keys; received while parsing"),
}


@pytest.mark.parametrize(("text", "part"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused(cfg, write, refuses, text, part):
    with refuses(part):
        merge_config(cfg, write(text))


BAD_OPTIONS = {
    "no value": (["SOLVER.BASE_LR"], "expected overrides as KEY VALUE pairs; received SOLVER."),
    "unknown key": (
        ["SOLVER.BASE_LT", "1"],
        "received 'SOLVER.BASE_LT'; remedy: did you mean 'SOLVER.BASE_LR'? known: SOLVER.BASE_LR,",
    ),
    "unknown node": (
        ["MODL.BACKBONE.FREEZE_AT", "1"],
        "received 'MODL.BACKBONE.FREEZE_AT'; remedy: did you mean 'MODEL'?",
    ),
    "unknown node in the middle": (
        ["KD.TEACHR.WEIGHTS", "x"],
        "received 'KD.TEACHR.WEIGHTS'; remedy: did you mean 'KD.TEACHER'? known: KD.ACTIVE_TERMS,",
    ),
    "key below a value": (
        ["SOLVER.BASE_LR.FIRST", "1"],
        "received 'SOLVER.BASE_LR.FIRST'; remedy: did you mean 'SOLVER.BASE_LR'?",
    ),
    "key below a value of a term": (
        ["KD.TERMS.review.WEIGHT.FIRST", "1"],
        "received 'KD.TERMS.review.WEIGHT.FIRST'",
    ),
    "value of another type": (["SOLVER.MAX_ITER", "soon"], "for config key: SOLVER.MAX_ITER"),
    "integer for a boolean": (["KD.ENABLED", "1"], "for config key: KD.ENABLED"),
    "value for a term": (
        ["KD.TERMS.review", "0.5"],
        "received 0.5; remedy: to change a weight, set KD.TERMS.review.WEIGHT",
    ),
    "text for a weight": (
        ["KD.TERMS.review.WEIGHT", "heavy"],
        "WEIGHT of term 'review' to be float; received 'heavy' (str)",
    ),
    "no literal": (["KD.TERMS.review.WEIGHT", "{[]: 1}"], "received '{[]: 1}' (str)"),
    "unknown argument of a term": (
        ["KD.TERMS.review.MID_CHANNEL", "64"],
        "received 'mid_channel'; remedy: did you mean 'mid_channels'?",
    ),
    "unknown schedule of a term": (
        ["KD.TERMS.review.SCHEDULE.NAME", "dealy"],
        "received 'dealy'; remedy: did you mean 'delay'?",
    ),
}


@pytest.mark.parametrize(("options", "part"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_override_is_refused(cfg, write, refuses, options, part):
    with refuses(part):
        merge_config(cfg, write(REVIEW), options)
