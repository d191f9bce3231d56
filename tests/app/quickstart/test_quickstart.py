"""The first thing a stranger runs works on both hosts, and continues where it was."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from PIL import Image

from kd_det.app.quickstart import run
from kd_det.data.digits.detection import DigitsSpec, digits_paths

HOSTS = [
    "torchvision_detection",
    pytest.param(
        "detectron2",
        marks=[
            pytest.mark.detectron2,
            pytest.mark.skipif(
                importlib.util.find_spec("detectron2") is None, reason="needs Detectron2"
            ),
        ],
    ),
]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Twelve images and two iterations; options that send every phase there."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(run, "DigitsSpec", lambda: DigitsSpec(train_images=8, val_images=4))
    opts = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
    for name, (json_file, images) in digits_paths(tmp_path / "digits").items():
        opts += [f"DATASETS.COCO_JSON.small_{name}", repr([str(json_file), str(images)])]
        opts += [f"DATASETS.{'TEST' if 'val' in name else 'TRAIN'}", f"('small_{name}',)"]
    return [*opts, "TEST.EVAL_PERIOD", "1", "DATALOADER.NUM_WORKERS", "0"]


@pytest.mark.parametrize("host", HOSTS)
def test_it_trains_three_models_draws_two_pictures_and_does_nothing_twice(
    host, small, tmp_path, capsys
):
    output = tmp_path / "quickstart"
    results = run.quickstart(host, output, small)
    assert set(results) == {"teacher", "student_alone", "student_distilled"}
    printed = capsys.readouterr().out
    assert "gap recovered" in printed
    assert "your own data" in printed
    for picture in ("curves.png", "detections.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 300
    weights = {p: p.stat().st_mtime_ns for p in output.rglob("model_final.pth")}
    assert len(weights) == 3
    again = run.quickstart(host, output, small)
    assert json.dumps(again) == json.dumps(results)
    assert "done before" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in output.rglob("model_final.pth")} == weights


def test_a_run_that_was_cut_off_continues(small, tmp_path, monkeypatch):
    output = tmp_path / "quickstart"

    def cut_off(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_table", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.quickstart("torchvision_detection", output, small)
    distilled = output / "torchvision_detection" / "student_distilled"
    (distilled / "results.json").unlink()
    (distilled / "model_final.pth").unlink()
    before = torch.load(distilled / "last.ckpt", weights_only=False)["global_step"]
    run.quickstart("torchvision_detection", output, small)
    after = torch.load(distilled / "model_final.pth")["model"]["distiller.step"]
    assert before == after == 2


def test_a_repeated_iteration_counts_once_and_the_later_value_holds(tmp_path):
    lines = [{"iteration": i, "bbox/AP": v} for i, v in ((9, 1.0), (19, 2.0), (9, 3.0))]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 29}]))
    assert run.read_curve(path, "bbox/AP") == ([10, 20], [3.0, 2.0])
