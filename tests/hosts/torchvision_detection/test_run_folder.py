"""What a run of the torchvision host leaves on disk, and the names of its curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.app.train import make_pictures
from kd_det.hosts.torchvision_detection.train import run
from kd_det.run.curves import CurveTag
from kd_det.run.plan import Start
from kd_det.run.record import read_record
from tests.hosts.run_folder import FILES
from tests.hosts.torchvision_detection.models import ARCHITECTURES, batch, student_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_loss_of_a_stock_detector_is_a_task_loss(name):
    losses = student_model(name).train()(*batch())
    tag = CurveTag(["review"])
    assert len(losses) >= 2
    assert {tag(loss).rpartition("/")[0] for loss in losses} == {"loss/task"}


def test_a_run_leaves_its_record_log_metrics_and_curves(digits_config, capsys):
    cfg = digits_config("kd_frcnn", "SEED", 5)
    results = run(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    assert {path.name for path in folder.iterdir()} == FILES
    record = read_record(folder)
    assert (record["status"], record["seed"], record["name"]) == ("done", 5, "run")
    assert record["teacher"]["config"] == cfg.KD.TEACHER.CONFIG_FILE
    assert record["teacher"]["sha256"] is None  # random on purpose
    assert record["parameters"]["teacher"] > record["parameters"]["student"] > 0

    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    terms = set(cfg.KD.TERMS)
    groups = {f"{group}/{term}" for group in ("raw", "weight") for term in terms}
    assert {"loss_classifier", "time", "data_time", "max_mem", *terms, *groups} <= lines[0].keys()
    assert lines[-1]["bbox/AP"] == results["bbox"]["AP"]
    log = (folder / "log.txt").read_text()
    assert log.count("iteration 3: total_loss") == 1
    assert log.rstrip().endswith("done")

    tags = set(EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"])
    assert {"loss/total", "loss/task/classifier", "bbox/AP"} <= tags
    assert {f"loss/kd/{term}" for term in terms} <= tags

    screen = capsys.readouterr().out
    shown = [line.rstrip() for line in screen.splitlines() if line.strip()]
    assert shown[0].startswith("Training")
    assert [line.split()[0] for line in shown if line.split()[0] in ("total", "task", "kd")]


def test_pictures_of_what_is_distilled_are_in_tensorboard(digits_config):
    cfg = digits_config("kd_frcnn", "VIS_PERIOD", 2, "DATASETS.TEST", "()")
    run(cfg, progress=lambda *_: None, pictures=make_pictures)
    folder = Path(cfg.OUTPUT_DIR) / "tensorboard"
    assert EventAccumulator(str(folder)).Reload().Tags()["images"]


def test_a_checkpoint_of_another_student_is_refused_and_kept(digits_config, refuses):
    cfg = digits_config("kd_frcnn", "DATASETS.TEST", "()")
    run(cfg, progress=lambda *_: None)
    checkpoint = Path(cfg.OUTPUT_DIR) / "last.ckpt"
    before = checkpoint.read_bytes()
    other = cfg.clone()
    other.defrost()
    other.MODEL.FPN.OUT_CHANNELS = 16
    with refuses("MODEL.FPN.OUT_CHANNELS 16, then 8", "config.yaml"):
        run(other, Start(resume=True), progress=lambda *_: None)
    assert checkpoint.read_bytes() == before
    assert "OUT_CHANNELS: 8" in (Path(cfg.OUTPUT_DIR) / "config.yaml").read_text()
