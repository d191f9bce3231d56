"""On Detectron2, where the channel order is a key: wrong orders and statistics are named."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.hosts.base import open_bench
from kd_det.hosts.detectron2.config import load_config
from kd_det.preflight import Settings, run_preflight
from tests.preflight import squares

pytestmark = pytest.mark.detectron2

SETTINGS = Settings(batches=1, images=8, seconds=600)
ITERATIONS = 80
SIZE = squares.CANVAS
BASE = {
    "VERSION": 2,
    "SEED": 1,
    "DATASETS": {"TRAIN": ["d2_squares_train"], "TEST": ["d2_squares_val"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "INPUT": {
        "FORMAT": "BGR",
        "MIN_SIZE_TRAIN": [SIZE],
        "MAX_SIZE_TRAIN": SIZE,
        "MIN_SIZE_TEST": SIZE,
        "MAX_SIZE_TEST": SIZE,
    },
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "MASK_ON": False,
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [57.375, 57.12, 58.395],
        "BACKBONE": {"NAME": "build_basic_resnet_fpn_backbone", "FREEZE_AT": 0},
        "BASIC_RESNET": {"NORM": "BN", "TOP_BLOCK": "none", "WIDTH": 8, "BLOCKS": [1, 1, 1]},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[12], [20], [32]], "ASPECT_RATIOS": [[1.0]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4"],
            "PRE_NMS_TOPK_TRAIN": 100,
            "PRE_NMS_TOPK_TEST": 50,
            "POST_NMS_TOPK_TRAIN": 50,
            "POST_NMS_TOPK_TEST": 30,
            "BATCH_SIZE_PER_IMAGE": 32,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4"],
            "NUM_CLASSES": 3,
            "BATCH_SIZE_PER_IMAGE": 32,
            "POSITIVE_FRACTION": 0.5,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "NUM_FC": 1,
            "FC_DIM": 32,
            "POOLER_RESOLUTION": 5,
            "POOLER_SAMPLING_RATIO": 1,
        },
    },
    "SOLVER": {"IMS_PER_BATCH": 8},
    "TEST": {"DETECTIONS_PER_IMAGE": 10},
}
TERMS = {
    "review": {"LOSS": "ReviewKD", "TAPS": ["p2", "p3", "p4"], "MID_CHANNELS": 16, "WEIGHT": 0.05}
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The teacher's config, and its weights beside it."""
    root = tmp_path_factory.mktemp("d2_squares")
    content = copy.deepcopy(BASE)
    content["OUTPUT_DIR"] = str(root / "teacher")
    content["DATASETS"]["COCO_JSON"] = {
        f"d2_squares_{split}": [str(p) for p in squares.write_squares(root / split, count, seed)]
        for seed, (split, count) in enumerate([("train", 60), ("val", 16)])
    }
    cfg = load_config(str(squares.write_yaml(root / "teacher.yaml", content)))
    batches = open_bench(cfg).batches()
    torch.manual_seed(1)
    model = build_model(cfg).train()
    with EventStorage():
        squares.fit(model, (lambda: model(next(batches))), ITERATIONS)
    torch.save({"model": model.state_dict()}, root / "teacher.pth")
    return root, content


def look(teacher, folder, **changes):
    """Preflight with a teacher config in which ``MODEL`` or ``INPUT`` keys are others."""
    root, content = teacher
    changed = copy.deepcopy(content)
    for node in ("MODEL", "INPUT"):
        changed[node] |= changes.get(node, {})
    student = copy.deepcopy(content)
    student["OUTPUT_DIR"] = str(folder / "run")
    student["MODEL"]["META_ARCHITECTURE"] = "DistilledRCNN"
    student["MODEL"]["BASIC_RESNET"]["WIDTH"] = 4
    student["SOLVER"]["IMS_PER_BATCH"] = 4
    student["KD"] = {
        "TEACHER": {
            "CONFIG_FILE": str(squares.write_yaml(folder / "teacher.yaml", changed)),
            "WEIGHTS": str(root / "teacher.pth"),
        },
        "TERMS": TERMS,
    }
    report = run_preflight(
        load_config(str(squares.write_yaml(folder / "student.yaml", student))), SETTINGS
    )
    return report, [f.message for f in report.errors]


def test_the_right_input_is_no_fault(teacher, tmp_path):
    report, _ = look(teacher, tmp_path)
    assert report.verdict == "ready", [f.message for f in report.errors + report.warnings]


def test_the_wrong_channel_order_is_named_with_its_key(teacher, tmp_path):
    report, errors = look(teacher, tmp_path, INPUT={"FORMAT": "RGB"})
    assert len(errors) == 1
    for part in ("BGR instead of RGB", "correct INPUT.FORMAT in", "teacher.yaml"):
        assert part in errors[0]
    # Besides, the order contradicts the mean.
    assert any("ImageNet's in the order BGR" in f.message for f in report.warnings)


def test_mean_and_std_of_another_model_are_named_with_their_keys(teacher, tmp_path):
    # Of pixels in 0..1, where they are in 0..255.
    wrong = {"PIXEL_MEAN": [0.406, 0.456, 0.485], "PIXEL_STD": [0.225, 0.224, 0.229]}
    report, errors = look(teacher, tmp_path, MODEL=wrong)
    assert len(errors) == 1
    assert "correct MODEL.PIXEL_MEAN, MODEL.PIXEL_STD in" in errors[0]
    assert "the student's channel order, mean and std" in errors[0]
    assert any("mean looks like one of pixels in 0..1" in f.message for f in report.warnings)
