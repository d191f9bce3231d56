"""What a model costs is measured on the model that a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.train import build_training_model
from kd_det.report.cost import count, deployment_table, measure_all
from kd_det.report.groups import collect
from tests.report.made_up import metric_lines, write_run, write_truth

CONFIG = Path(__file__).resolve().parents[2] / "configs/digits_torchvision/baseline_frcnn.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of real models with random weights: a narrow baseline, two like it, a wide teacher."""
    import yaml

    root = tmp_path_factory.mktemp("cost")
    truth = write_truth(root / "data", images=2)
    data = f'["{truth}", "{truth.parent / "images"}"]'
    for name, width, extra in (
        ("baseline", 8, []),
        ("kd", 8, ["SOLVER.BASE_LR", "0.02"]),
        ("broken", 8, ["SOLVER.BASE_LR", "0.03"]),
        ("teacher", 16, []),
    ):
        options = [
            *("DATASETS.COCO_JSON.tiny", data),
            *("DATASETS.TRAIN", '("tiny",)', "DATASETS.TEST", '("tiny",)'),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.BACKBONE.WIDTH", str(width)),
            *("MODEL.DEVICE", "cpu", *extra),
        ]
        cfg = load_config(str(CONFIG), options)
        model = build_training_model(cfg, "", distilled=False)
        folder = write_run(root / name, yaml.safe_load(cfg.dump()), lines=metric_lines())
        state = model.state_dict()
        if name == "kd":
            state |= {"distiller.losses.hint.weight": torch.zeros(1000)}
        torch.save({"model": state}, folder / "model_final.pth")
        if width == 16:
            torch.manual_seed(1)
    return root


def parameters_of(root, name):
    state = torch.load(root / name / "model_final.pth")["model"]
    counted = [k for k in state if not k.endswith(("mean", "var", "num_batches_tracked"))]
    return sum(state[k].numel() for k in counted if not k.startswith("distiller."))


def test_students_of_one_architecture_are_measured_once(root):
    told = []
    study = collect([str(root / "kd")], [str(root / "baseline")], [str(root / "teacher")])
    teacher, student = measure_all(study, told.append)
    assert told == [2, 2]
    assert [group.label for group in student.groups] == ["baseline", "kd"]
    assert student.cost.parameters == parameters_of(root, "baseline") == parameters_of(root, "kd")
    assert teacher.cost.parameters == parameters_of(root, "teacher")
    # Convolutions of twice the width cost up to four times as much.
    assert 1 < teacher.cost.macs / student.cost.macs < 4
    assert student.cost.size >= 4 * student.cost.parameters
    assert student.cost.seconds > 0

    table = {row[0].text: row[1:] for row in deployment_table([teacher, student]).rows}
    assert table["teacher"][0].text == count(teacher.cost.parameters)
    ratio = teacher.cost.parameters / student.cost.parameters
    assert table["baseline, kd"][0].note == f"teacher / {ratio:.1f}"


def test_a_model_that_cannot_be_built_says_so(root):
    (root / "broken" / "model_final.pth").write_bytes(b"no weights")
    config = root / "broken" / "config.yaml"
    config.write_text(config.read_text().replace("WIDTH: 8", "WIDTH: 24"))
    study = collect([str(root / "broken")], [str(root / "baseline")])
    student, broken = measure_all(study, lambda total: None)
    assert student.cost is not None
    assert broken.cost is None
    assert "model_final.pth" in broken.failure
    (row,) = [r for r in deployment_table([student, broken]).rows if r[0].text == "broken"]
    assert {cell.text for cell in row[1:]} == {"?"}


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12"), (1234, "1.23 k"), (342_000, "342 k"), (41.2e6, "41.2 M"), (2.5e9, "2.5 G")],
)
def test_counts_are_written_with_their_unit(number, text):
    assert count(number) == text
