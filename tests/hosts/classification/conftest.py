"""A small configuration of the classification host that trains in a second."""

from __future__ import annotations

import pytest
import torch

from kd_det.hosts.classification.config import get_cfg
from kd_det.hosts.classification.models import build_classifier

SMALL = {
    "HOST": "classification",
    "SEED": 1,
    "MODEL": {"NAME": "resnet8_x0.25", "DEVICE": "cpu"},
    "INPUT": {"SIZE": 16, "CROP": {"PADDING": 2}, "RANDOM_FLIP": "none"},
    "DATASETS": {"TRAIN_PER_CLASS": 4},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"MAX_EPOCH": 2, "IMS_PER_BATCH": 16, "EPOCH_STEPS": [1]},
}
TEACHER = "MODEL: {NAME: resnet8_x0.5, DEVICE: cpu}\nHOST: classification\nINPUT: {SIZE: 16}\n"


@pytest.fixture
def config(tmp_path):
    """``config(KD={...}, **sections)``: a config with a random but fixed teacher."""

    def make(name="run", **sections):
        teacher = tmp_path / "teacher.yaml"
        weights = tmp_path / "teacher.pth"
        if not weights.exists():
            teacher.write_text(TEACHER)
            with torch.random.fork_rng():
                torch.manual_seed(5)
                torch.save(build_classifier("resnet8_x0.5", 10).state_dict(), weights)
        cfg = get_cfg()
        _merge(cfg, SMALL)
        cfg.KD.TEACHER.CONFIG_FILE = str(teacher)
        cfg.KD.TEACHER.WEIGHTS = str(weights)
        cfg.OUTPUT_DIR = str(tmp_path / name)
        cfg.KD.ENABLED = "KD" in sections
        _merge(cfg, sections)
        return cfg

    return make


def _merge(node, values):
    for key, value in values.items():
        if isinstance(value, dict) and key in node and key != "TERMS":
            _merge(node[key], value)
        else:
            node[key] = type(node)(value) if isinstance(value, dict) else value
