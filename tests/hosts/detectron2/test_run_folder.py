"""What a run leaves in its folder and shows on the screen: record, metrics, curves, the bar."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import statistics
import sys
import types

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog
from detectron2.engine.hooks import HookBase
from detectron2.utils.events import EventStorage
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.detectron2 import progress, trainer
from kd_det.hosts.detectron2.pictures import DrawPictures
from kd_det.hosts.detectron2.progress import ProgressBar, progress_bar, setup_logging
from kd_det.hosts.detectron2.train import check_run
from kd_det.hosts.detectron2.writers import RecordMetrics
from kd_det.run.plan import Start
from kd_det.run.record import read_record
from tests.hosts.detectron2.models import write_teacher
from tests.hosts.detectron2.runs import Interrupt, Stop, small_cfg, train

pytestmark = pytest.mark.detectron2

WEIGHT = 3.0
LOOK = {"look": {"LOSS": "AT", "MODE": "paper", "WEIGHT": WEIGHT, "TAPS": ["p2", "p3"]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_folder")
    images = write_digits(folder / "mini", DigitsSpec(train_images=4, val_images=2, canvas=96))
    return images, write_teacher(folder, "faster")


@pytest.fixture
def make_cfg(data, tmp_path):
    """``make_cfg(folder, *opts)``: a run of seconds."""
    images, teacher = data

    def make(folder="out", *opts, terms=LOOK):
        return small_cfg(images, teacher, terms, tmp_path / folder, *opts)

    return make


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


class Losses(HookBase):
    """Every loss of every iteration."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.seen.append({name: value for name, (value, _) in latest.items()})


class TestMetrics:
    def test_terms_are_recorded_unweighted_with_their_weights_as_smoothed_as_the_losses(
        self, make_cfg, tmp_path
    ):
        losses = Losses()
        train(make_cfg("out", "SOLVER.MAX_ITER", 23), losses)
        lines = metrics(tmp_path / "out")
        assert [line["iteration"] for line in lines] == [19, 22]
        for line, window in zip(lines, (losses.seen[:20], losses.seen[3:]), strict=True):
            for name in ("look", "loss_cls", "total_loss"):
                median = statistics.median(own[name] for own in window)
                assert line[name] == pytest.approx(median, rel=1e-6)
            assert line["weight/look"] == WEIGHT
            assert line["raw/look"] * WEIGHT == pytest.approx(line["look"], rel=1e-5)
            assert {"lr", "time", "data_time"} <= line.keys()
            assert 1 < line["max_mem"] < 1e6

    def test_tensorboard_has_the_tags_of_all_hosts(self, make_cfg, tmp_path):
        train(make_cfg())
        events = EventAccumulator(str(tmp_path / "out"))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        expected = {f"loss/task/{name}" for name in ("cls", "box_reg", "rpn_cls", "rpn_loc")}
        expected |= {"loss/total", "loss/kd/look", "raw/look", "weight/look", "lr"}
        assert expected <= tags
        assert not [tag for tag in tags if tag.startswith("loss_") or tag == "look"]
        line = metrics(tmp_path / "out")[-1]
        (event,) = events.Scalars("loss/kd/look")
        assert (event.step, event.value) == (line["iteration"], pytest.approx(line["look"]))

    def test_a_plain_student_has_no_terms_in_its_metrics(self, make_cfg, tmp_path):
        train(make_cfg("out", "KD.ENABLED", False))
        names = metrics(tmp_path / "out")[-1].keys()
        assert "loss_cls" in names
        assert not [n for n in names if n.startswith(("raw/", "weight/", "share/")) or n == "look"]

    def test_numbers_are_read_from_the_device_once_for_each_line(self, monkeypatch):
        distiller = types.SimpleNamespace(metrics={})
        hook = RecordMetrics(distiller, torch.device("cpu"), period=5)
        reads, tolist = [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
        with EventStorage() as storage:
            hook.trainer = types.SimpleNamespace(storage=storage, max_iter=12)
            for iteration in range(12):
                hook.trainer.iter = storage.iter = iteration
                distiller.metrics = {"raw/a": torch.tensor(float(iteration), dtype=torch.float16)}
                if iteration % 4 == 0:
                    distiller.metrics["share/a"] = torch.tensor(iteration / 100)
                hook.after_step()
                assert len(reads) == (iteration + 1) // 5 + (iteration == 11)
            raw, share = (storage.history(name).values() for name in ("raw/a", "share/a"))
        assert raw == [(float(iteration), iteration) for iteration in range(12)]
        # The last of each line has the line's own iteration.
        assert share == [(pytest.approx(k / 100), at) for k, at in ((0, 0), (4, 4), (8, 9))]

    def test_a_resumed_run_goes_on_after_a_line_that_was_cut(self, make_cfg, tmp_path):
        cfg = make_cfg()
        with pytest.raises(Stop):
            train(cfg, Interrupt(after=3))
        path = tmp_path / "out" / "metrics.json"
        path.write_text(before := path.read_text()[:-20])
        train(cfg, resume=True)
        assert path.read_text().startswith(before + "\n")
        *cut, last = path.read_text().splitlines()
        assert len(cut) == before.count("\n") + 1
        assert json.loads(last)["iteration"] == 3


class TestPictures:
    @pytest.mark.parametrize(
        ("opts", "drawn"),
        [
            (["VIS_PERIOD", 3], True),
            (["VIS_PERIOD", 0], False),
            (["VIS_PERIOD", 3, "KD.ENABLED", False], False),
        ],
    )
    def test_their_hook_is_there_where_something_is_distilled(self, opts, drawn, make_cfg):
        hooks = trainer.Trainer(make_cfg("out", *opts), pictures=lambda *_: None)._hooks
        found = [k for k, hook in enumerate(hooks) if isinstance(hook, DrawPictures)]
        assert len(found) == drawn
        # Its images are in the storage before they are written.
        assert all(k < len(hooks) - 2 and hooks[k].cfg.VIS_PERIOD == 3 for k in found)


class TestRecord:
    def test_a_finished_run_says_what_it_was(self, make_cfg, tmp_path, data):
        train(make_cfg(terms={"hint": {"LOSS": "FitNet", "TAPS": ["c3"]}}))
        record = read_record(tmp_path / "out")
        assert (record["host"], record["status"], record["seed"]) == ("detectron2", "done", 7)
        assert record["starts"][0]["resumed"] is False
        assert record["teacher"]["bytes"] == data[1][1].stat().st_size
        saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
        # What the checkpoint holds besides parameters: statistics of norms and of pixels.
        buffers = ("running_mean", "running_var", "num_batches_tracked", "pixel_", "step")
        own = {k: v.numel() for k, v in saved.items() if not any(b in k for b in buffers)}
        adaptors = sum(n for k, n in own.items() if k.startswith("distiller."))
        counts = record["parameters"]
        assert counts["adaptors"] == adaptors > 0
        assert counts["student"] == sum(own.values()) - adaptors
        assert counts["teacher"] > counts["student"]

    def test_a_crash_is_recorded_and_a_resumed_run_ends_well(self, make_cfg, tmp_path):
        cfg = make_cfg()
        with pytest.raises(Stop):
            train(cfg, Interrupt(after=3))
        record = read_record(tmp_path / "out")
        assert record["status"] == "failed"
        assert "pulled the plug" in record["error"]
        train(cfg, resume=True)
        record = read_record(tmp_path / "out")
        assert record["status"] == "done"
        assert [start["resumed"] for start in record["starts"]] == [False, True]

    def test_a_drawn_seed_is_recorded_and_repeats_the_run(self, make_cfg, tmp_path):
        train(make_cfg("drawn", "SEED", -1))
        seed = read_record(tmp_path / "drawn")["seed"]
        assert seed >= 0
        train(make_cfg("again", "SEED", seed))
        ours, theirs = (
            torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
            for name in ("drawn", "again")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class Remember:
    """What a logger of Lightning is told."""

    def __init__(self):
        self.lines, self.status = [], None

    def log_metrics(self, values, step):
        self.lines.append((step, values))

    def finalize(self, status):
        self.status = status


class TestLoggers:
    def test_they_are_told_the_tagged_scalars_and_how_it_ended(
        self, make_cfg, monkeypatch, tmp_path
    ):
        logger = Remember()
        monkeypatch.setattr(trainer, "build_loggers", lambda cfg, output: [logger])
        train(make_cfg())
        assert logger.status == "success"
        told = {key: value for step, values in logger.lines for key, value in values.items()}
        line = metrics(tmp_path / "out")[-1]
        assert told["loss/kd/look"] == line["look"]
        assert told["loss/task/cls"] == line["loss_cls"]
        assert logger.lines[0][0] == 3
        broken = Remember()
        monkeypatch.setattr(trainer, "build_loggers", lambda cfg, output: [broken])
        with pytest.raises(Stop):
            train(make_cfg("broken"), Interrupt(after=3))
        assert broken.status == "failed"

    def test_an_unknown_one_is_refused_before_anything_is_written(
        self, make_cfg, tmp_path, refuses
    ):
        args = Start()
        with refuses("'wandbb'", "did you mean 'wandb'"):
            check_run(make_cfg("out", "LOGGERS", ["wandbb"]), args)
        assert not list((tmp_path / "out").iterdir())


class TestBar:
    @pytest.fixture
    def screen(self):
        return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)

    @pytest.fixture(autouse=True)
    def _always_drawn(self, monkeypatch):
        monkeypatch.setattr(progress, "_DRAW_PERIOD", -1.0)

    def test_it_shows_every_iteration_and_goes_on_where_a_run_was_cut(self, make_cfg, screen):
        with pytest.raises(Stop), ProgressBar(screen) as bar:
            train(make_cfg(), Interrupt(after=3), bar=bar)
        shown = screen.file.getvalue()
        assert [f"{done}/4" in shown for done in range(5)] == [True, True, True, True, False]
        assert re.search(r"^ *total +[0-9]", shown, re.MULTILINE)
        assert re.search(r"^ *task +cls [0-9.]+ .*rpn_loc [0-9.]+", shown, re.MULTILINE)
        assert re.search(r"^ *kd +look [0-9.]+", shown, re.MULTILINE)
        screen.file.truncate(0)
        with ProgressBar(screen) as bar:
            bar.finish(train(make_cfg(), resume=True, bar=bar))
        shown = screen.file.getvalue()
        assert [f"{done}/4" in shown for done in range(5)] == [False, False, True, True, True]
        assert "Done" in shown

    def test_evaluations_are_announced_and_their_ap_stays(
        self, make_cfg, screen, tmp_path, monkeypatch
    ):
        results = {"bbox": {"AP": 31.25, "AP-seven": 12.5}}
        monkeypatch.setattr(trainer.Trainer, "test", lambda *arguments: results)
        test = (f"{tmp_path.name}_digits_val",)
        cfg = make_cfg("out", "DATASETS.TEST", test, "TEST.EVAL_PERIOD", 2)
        with ProgressBar(screen) as bar:
            bar.finish(train(cfg, bar=bar))
        lines = [line.strip() for line in screen.file.getvalue().splitlines()]
        evaluating = [line for line in lines if "Evaluating" in line]
        assert any("2/4" in line for line in evaluating)
        assert any("4/4" in line for line in evaluating)
        assert not any("1/4" in line or "3/4" in line for line in evaluating)
        assert any("bbox AP 31.2" in line for line in lines)
        assert any(line.endswith("bbox: AP 31.25") for line in lines)

    @pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
    def test_it_is_there_on_a_terminal_only(self, terminal, wanted, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        with progress_bar(wanted) as bar:
            assert (bar is not None) == (terminal and wanted)


def test_every_test_set_keeps_its_predictions(make_cfg, tmp_path):
    """Detectron2 would write all of them into one file."""
    names = [f"{tmp_path.name}_digits_{split}" for split in ("train", "val")]
    train(make_cfg("out", "DATASETS.TEST", names, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))
    for name in names:
        path = tmp_path / "out" / "inference" / name / "coco_instances_results.json"
        images = {record["image_id"] for record in DatasetCatalog.get(name)}
        assert len(images) == (4 if name.endswith("train") else 2)
        found = {each["image_id"] for each in json.loads(path.read_text())}
        assert found == images


@pytest.mark.usefixtures("own_loggers")
@pytest.mark.parametrize("with_bar", [True, False])
def test_beside_the_bar_the_screen_has_warnings_only_and_the_log_has_all(
    with_bar, make_cfg, tmp_path, capsys
):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = ProgressBar(screen) if with_bar else None
    args = argparse.Namespace(config_file="", eval_only=False)
    setup_logging(make_cfg(), args, bar, "kd_det")
    for name in ("kd_det.here", "detectron2.there"):
        logging.getLogger(name).info("a detail of %s", name)
        logging.getLogger(name).warning("a warning of %s", name)
    log, printed = (tmp_path / "out" / "log.txt").read_text(), capsys.readouterr().out
    for name in ("kd_det.here", "detectron2.there"):
        assert log.count(f"a detail of {name}") == log.count(f"a warning of {name}") == 1
        assert printed.count(f"a detail of {name}") == (0 if with_bar else 1)
        assert printed.count(f"a warning of {name}") == (0 if with_bar else 1)
        assert screen.file.getvalue().count(f"a warning of {name}") == (1 if with_bar else 0)
    assert "Running with full config" in log
    assert (tmp_path / "out" / "config.yaml").is_file()
    assert ("Running with full config" in printed) != with_bar
