"""A teacher that knows colours, trained once, and a student's config to plant faults in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kd_det.hosts.torchvision_detection.config import load_config
from tests.preflight import squares

TERMS = {
    "review": {"LOSS": "ReviewKD", "TAPS": ["p2", "p3", "p4"], "MID_CHANNELS": 16},
    "roi_logits": {
        "LOSS": "KD",
        "TAPS": ["box_logits"],
        "REDUCTION": "batchmean",
        "TEMPERATURE": 1.0,
    },
}


@dataclass(frozen=True)
class World:
    """A folder with data, the teacher's config, its weights, and a student's config."""

    root: Path
    data: dict[str, tuple[Path, Path]]
    teacher: dict
    weights: Path

    def student_file(self, teacher_yaml: Path | None = None) -> Path:
        content = squares.model_config(self.data, self.root / "run")
        content["MODEL"]["BACKBONE"]["WIDTH"] = 4
        content["MODEL"]["FPN"]["OUT_CHANNELS"] = 8
        content["SOLVER"]["IMS_PER_BATCH"] = 4
        content["KD"] = {
            "ENABLED": True,
            "TEACHER": {
                "CONFIG_FILE": str(teacher_yaml or self.root / "teacher.yaml"),
                "WEIGHTS": str(self.weights),
            },
            "TERMS": TERMS,
        }
        return squares.write_yaml(self.root / "student.yaml", content)

    def student(self, *opts, teacher_yaml=None):
        return load_config(str(self.student_file(teacher_yaml)), [str(o) for o in opts])

    def changed_weights(self, path: Path, change) -> Path:
        """The teacher's weights after ``change(state)``."""
        state = torch.load(self.weights)["model"]
        change(state)
        torch.save({"model": state}, path)
        return path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("squares")
    data = {
        "squares_train": squares.write_squares(root / "train", 60, seed=0),
        "squares_val": squares.write_squares(root / "val", 24, seed=1),
    }
    teacher = squares.model_config(data, root / "teacher")
    squares.train(squares.write_yaml(root / "teacher.yaml", teacher))
    return World(root, data, teacher, root / "teacher" / "model_final.pth")
