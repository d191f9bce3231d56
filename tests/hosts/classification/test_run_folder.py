"""What a run of the classification host leaves on disk, through failures and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.hosts.classification.train import run
from kd_det.run.folder import PREDICTIONS
from kd_det.run.plan import Start
from kd_det.run.record import read_record
from tests.hosts.classification.test_train import SOFT, Stop
from tests.hosts.run_folder import FILES


@pytest.fixture
def long(config):
    """A run that logs: 42 iterations."""

    def make(name="run", **sections):
        solver = {"MAX_EPOCH": 14} | sections.pop("SOLVER", {})
        distillation = {"TERMS": SOFT} | sections.pop("KD", {})
        once = {"EVAL_PERIOD": 14}
        return config(name, KD=distillation, SOLVER=solver, TEST=once, **sections)

    return make


def lines(folder):
    found = []
    for line in (folder / "metrics.json").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(line)
    return found


def test_a_run_leaves_its_record_log_metrics_curves_and_predictions(long):
    cfg = long()
    results = run(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    assert {path.name for path in folder.iterdir()} == FILES

    record = read_record(folder)
    assert record["status"] == "done"
    assert record["seed"] == cfg.SEED
    assert record["host"] == "classification"
    assert record["teacher"]["bytes"] == Path(cfg.KD.TEACHER.WEIGHTS).stat().st_size
    assert record["parameters"]["adaptors"] == 0
    assert 0 < record["parameters"]["student"] < record["parameters"]["teacher"]

    log = (folder / "log.txt").read_text()
    for part in ("run started", f"seed {cfg.SEED}", "iteration 19: total_loss", "top1", "done"):
        assert log.count(part) >= 1, part
    assert log.count("iteration 19: ") == 1

    logged = [line for line in lines(folder) if "total_loss" in line]
    assert [line["iteration"] for line in logged] == [19, 39]
    expected = {"total_loss", "loss_cls", "soft", "raw/soft", "weight/soft", "lr"}
    assert expected | {"time", "data_time", "max_mem"} <= logged[0].keys()
    assert logged[0]["weight/soft"] == pytest.approx(0.9)
    assert logged[0]["soft"] == pytest.approx(0.9 * logged[0]["raw/soft"])

    curves = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = set(curves.Tags()["scalars"])
    assert {"loss/total", "loss/task/cls", "loss/kd/soft", "raw/soft", "accuracy/top1"} <= tags
    assert not tags & {"total_loss", "loss_cls", "soft"}
    soft = {event.step: event.value for event in curves.Scalars("loss/kd/soft")}
    assert soft == pytest.approx({line["iteration"]: line["soft"] for line in logged})

    predictions = json.loads((folder / PREDICTIONS).read_text())
    assert [p["index"] for p in predictions] == list(range(len(predictions)))
    right = sum(p["target"] == p["prediction"] for p in predictions)
    assert 100 * right / len(predictions) == pytest.approx(results["accuracy"]["top1"])
    assert all(0.1 <= p["confidence"] <= 1 for p in predictions)
    # Evaluation alone finds the same again, and touches nothing else.
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "inference"}
    (folder / PREDICTIONS).unlink()
    run(cfg, Start(eval_only=True))
    assert json.loads((folder / PREDICTIONS).read_text()) == predictions
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_baseline_has_no_teacher_and_no_terms_in_its_folder(long):
    cfg = long(KD={"ENABLED": False})
    run(cfg)
    record = read_record(cfg.OUTPUT_DIR)
    assert record["teacher"] is None
    assert record["parameters"]["teacher"] == 0
    logged = [line for line in lines(Path(cfg.OUTPUT_DIR)) if "total_loss" in line]
    assert "soft" not in logged[0]
    assert not any(key.startswith(("raw/", "weight/")) for key in logged[0])


class Diverge(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 20:
            module.model.student.fc.weight.data.fill_(float("nan"))


def test_a_run_that_diverges_says_so_in_its_record_and_its_log(long):
    cfg = long()
    with pytest.raises(FloatingPointError, match="not finite at iteration 20"):
        run(cfg, callbacks=[Diverge()])
    record = read_record(cfg.OUTPUT_DIR)
    assert record["status"] == "failed"
    assert "not finite at iteration 20" in record["error"]
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "the run failed" in log
    assert "FloatingPointError: losses are not finite at iteration 20" in log


def test_a_metrics_file_that_was_cut_in_a_line_does_not_break_a_resumed_run(long):
    cfg = long()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(cfg, callbacks=[Stop(8)])
    folder = Path(cfg.OUTPUT_DIR)
    assert read_record(folder)["status"] == "failed"
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 26, "total_lo')
    run(cfg, Start(resume=True))
    found = lines(folder)
    assert [line for line in found if isinstance(line, str)] == ['{"iteration": 26, "total_lo']
    assert [x["iteration"] for x in found if "total_loss" in x] == [19, 39]
    record = read_record(folder)
    assert record["status"] == "done"
    assert [start["resumed"] for start in record["starts"]] == [False, True]
    log = (folder / "log.txt").read_text()
    assert "run started" in log
    assert "run continued from its checkpoint" in log


def test_two_seeds_in_one_process_keep_their_logs_apart(long):
    folders = []
    for seed in (1, 2):
        cfg = long(f"seed_{seed}", SEED=seed, SOLVER={"MAX_EPOCH": 1})
        run(cfg)
        folders.append(Path(cfg.OUTPUT_DIR))
    for seed, folder in zip((1, 2), folders, strict=True):
        log = (folder / "log.txt").read_text()
        assert f"seed {seed};" in log
        assert log.count("run started") == 1


@pytest.mark.parametrize(("name", "hint"), [("mlfow", "did you mean 'mlflow'?"), ("tb", "known:")])
def test_an_unknown_logger_is_refused_before_anything_is_written(long, refuses, name, hint):
    cfg = long(LOGGERS=[name])
    with refuses(name, hint):
        run(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()
