"""Runs of a few iterations on a small data set."""

from __future__ import annotations

import pytest

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.torchvision_detection.config import load_config

SMALL = ["MODEL.BACKBONE.WIDTH", "4", "MODEL.FPN.OUT_CHANNELS", "8", "SOLVER.IMS_PER_BATCH", "2"]
SMALL += ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.AMP.ENABLED", "False"]
SMALL += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "digits"
    return write_digits(root, DigitsSpec(canvas=96, train_images=6, val_images=3))


@pytest.fixture
def options(digits, tmp_path):
    """Overrides for a run of 4 iterations on the small data set."""
    names = {"digits_train": "small_train", "digits_val": "small_val"}
    options = [*SMALL, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", str(tmp_path / "run")]
    options += ["DATASETS.TRAIN", "('small_train',)", "DATASETS.TEST", "('small_val',)"]
    for name, (json_file, images) in digits.items():
        options += [f"DATASETS.COCO_JSON.{names[name]}", repr([str(json_file), str(images)])]
    return options


@pytest.fixture
def digits_config(options, tmp_path):
    """``digits_config(name, KEY, value, ..., output="run")``: a shipped config made small."""

    def load(name, *opts, output="run"):
        own = ["OUTPUT_DIR", str(tmp_path / output), "KD.TEACHER.WEIGHTS", ""]
        own += ["KD.TEACHER.ALLOW_RANDOM", "True", "STAGES", "[]"]
        opts = map(str, opts)
        return load_config(f"configs/digits_torchvision/{name}.yaml", [*options, *own, *opts])

    return load
