"""One training run of a search, with a script in the place of ``kd-det train``."""

from __future__ import annotations

import json
import os

import pytest

from kd_det.core.errors import KDError
from kd_det.tuning import runs
from kd_det.tuning.runs import RunError, TrainNet

FAKE = """
import json, os, sys, time
from pathlib import Path
opts = sys.argv[sys.argv.index("--num-gpus") + 2:]
resumed = opts[0] == "--resume"
opts = opts[resumed:]
opts = dict(zip(opts[::2], opts[1::2]))
output = Path(opts["OUTPUT_DIR"])
with (output / "calls.txt").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
weight = float(opts["W"])
if weight < 0:
    print("error: expected W >= 0; received less; remedy: more")
    sys.exit(2)
if weight > 100:
    raise FloatingPointError("the loss is infinite")
if weight == 50:
    (output / "asleep").write_text(str(os.getpid()))
    time.sleep(60)
if weight != 7:
    (output / "results.json").write_text(json.dumps({"bbox": {"AP": weight + int(opts["SEED"])}}))
"""


@pytest.fixture
def train_net(tmp_path, monkeypatch):
    script = tmp_path / "train_net.py"
    script.write_text(FAKE)
    monkeypatch.setattr(runs, "TRAIN", (str(script),))
    return TrainNet("x.yaml", ["SOLVER.MAX_ITER", "3"], "bbox/AP")


def calls(output):
    return [json.loads(line) for line in (output / "calls.txt").read_text().splitlines()]


def test_a_run_gets_the_overrides_then_the_values_then_its_seed_and_folder(train_net, tmp_path):
    assert train_net({"V": 0.25, "W": 3.0}, 2, tmp_path / "run") == 5.0
    (argv,) = calls(tmp_path / "run")
    assert argv[:4] == ["--config-file", "x.yaml", "--num-gpus", "1"]
    assert argv[4:] == [
        *("SOLVER.MAX_ITER", "3", "V", "0.25", "W", "3"),
        *("SEEDS", "[]", "SEED", "2", "OUTPUT_DIR", str(tmp_path / "run")),
    ]


def test_a_finished_run_is_only_read_and_an_unfinished_one_resumed(train_net, tmp_path):
    output = tmp_path / "run"
    assert train_net({"W": 3.0}, 1, output) == train_net({"W": 3.0}, 1, output) == 4.0
    assert len(calls(output)) == 1
    (output / "results.json").write_text('{"bbox": {"A')  # cut off while it was written
    assert train_net({"W": 3.0}, 1, output) == 4.0
    first, second = calls(output)
    assert "--resume" not in first
    assert "--resume" in second


def test_a_run_that_evaluates_nothing_says_where_to_name_data(train_net, tmp_path, refuses):
    with refuses("to hold 'bbox/AP'", "DATASETS.TEST"):
        train_net({"W": 7.0}, 1, tmp_path / "run")


def test_a_run_that_breaks_names_its_last_words_and_its_screen(train_net, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(RunError) as error:
        train_net({"W": 101.0}, 1, output)
    assert "FloatingPointError: the loss is infinite" in str(error.value)
    assert str(output / "screen.txt") in str(error.value)
    assert "Traceback" in (output / "screen.txt").read_text()


def test_a_run_that_is_refused_is_no_matter_of_the_value(train_net, tmp_path):
    with pytest.raises(KDError, match="error: expected W >= 0") as error:
        train_net({"W": -1.0}, 1, tmp_path / "run")
    assert not isinstance(error.value, RunError)


def test_a_metric_that_was_not_measured_lists_those_that_were(train_net, tmp_path, refuses):
    train_net.metric = "bbox/AP75"
    with refuses("'bbox/AP75'", "did you mean 'bbox/AP'?"):
        train_net({"W": 1.0}, 1, tmp_path / "run")


def test_a_metric_that_is_no_number_is_a_failure_of_the_value(train_net, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text('{"bbox": {"AP": NaN}}')
    with pytest.raises(RunError, match="finite bbox/AP; received nan"):
        train_net({"W": 1.0}, 1, tmp_path / "run")


def test_a_stop_ends_the_training(train_net, tmp_path):
    output = tmp_path / "run"
    train_net.stop = (output / "asleep").exists
    with pytest.raises(KeyboardInterrupt):
        train_net({"W": 50.0}, 1, output)
    with pytest.raises(ProcessLookupError):
        os.kill(int((output / "asleep").read_text()), 0)
