"""A whole search: what is refused, what is written, and the command line."""

from __future__ import annotations

import fcntl
import math
import subprocess
import sys

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from kd_det.app import tune as cli
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.tuning import tune
from kd_det.tuning.plan import TunedConfig
from kd_det.tuning.space import make_space
from tests.tuning.toy import CONFIG, DECADES, FIRST, ROOT, SECOND, Toy


def test_a_search_writes_table_plot_and_the_best_config(tmp_path):
    output = tmp_path / "out"
    spaces = {FIRST: make_space(DECADES), SECOND: make_space([0.0, 0.1, 1.0])}

    def run(values, seed, folder):
        second = values.get(SECOND, 1.0)
        return 30 - abs(math.log10(values[FIRST]) + 1) - abs(second - 0.1) + seed / 10

    sweeps = tune(CONFIG, spaces, output, seeds=[1, 2], overrides=["SOLVER.MAX_ITER", "7"], run=run)
    assert [sweep.best.value for sweep in sweeps] == [0.1, 0.1]
    text = (output / "table.md").read_text()
    assert f"## 1. {FIRST}" in text
    assert f"## 2. {SECOND}" in text
    assert "| **0.1 (best)** | **30.15** | 0.07 | 30.10 | 30.20 |" in text
    assert "| 1 | 29.25 | 0.07 | 29.20 | 29.30 |" in text
    with Image.open(output / "search.png") as image:
        assert image.size[0] > 1200
        assert image.size[1] > 400
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert set(best) == {"_BASE_", "SOLVER", "KD"}
    cfg = TunedConfig(str(output / "best.yaml")).load()
    assert cfg.KD.TERMS.review.WEIGHT == cfg.KD.TERMS.roi_logits.WEIGHT == 0.1
    assert cfg.SOLVER.MAX_ITER == 7
    expected = TunedConfig(CONFIG, ["SOLVER.MAX_ITER", "7"]).load({FIRST: 0.1, SECOND: 0.1})
    assert cfg == expected


def test_the_studies_can_be_opened_with_optuna(tmp_path):
    tune(CONFIG, {FIRST: make_space(DECADES)}, tmp_path, seeds=[1], run=Toy())
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "search.journal")))
    study = optuna.load_study(study_name=FIRST, storage=storage)
    assert study.best_params == {FIRST: 0.1}
    assert study.user_attrs["settings"]["metric"] == "bbox/AP"
    assert study.user_attrs["settings"][SECOND] == 1.0


@pytest.mark.parametrize(
    ("keys", "options", "parts"),
    [
        (["KD.TERMS.reviw.WEIGHT"], {}, ["'reviw'", "did you mean 'review'?"]),
        (["KD.TERMS.review.WAIT"], {}, ["received 'wait'"]),
        (["KD.TERMS.roi_logits.TEMPERATUR"], {}, ["did you mean 'temperature'?"]),
        (["KD.TERMS.roi_logits.REDUCTION"], {}, ["REDUCTION"]),
        (["SOLVER.BASE_RL"], {}, ["'SOLVER.BASE_RL'", "did you mean 'SOLVER.BASE_LR'?"]),
        (["SOLVER.MAX_ITER"], {}, ["Type mismatch"]),
        (["SEED"], {}, ["does not set itself", "--seeds"]),
        ([], {}, ["keys to tune"]),
        ([FIRST], {"overrides": [FIRST, "1"]}, ["either to be tuned or to be given"]),
        ([FIRST], {"overrides": ["OUTPUT_DIR", "x"]}, ["OUTPUT_DIR"]),
        ([FIRST], {"overrides": ["SOLVER.BASE_RL", "1"]}, ["SOLVER.BASE_LR"]),
        ([FIRST], {"overrides": ["KD.ENABLED", "False"]}, ["KD.ENABLED True"]),
        ([FIRST], {"metric": "box/AP"}, ["'box/AP'", "bbox/AP"]),
        ([FIRST], {"metric": "bbox"}, ["'bbox'"]),
        ([FIRST], {"seeds": [1, 1]}, ["[1, 1]"]),
        ([FIRST], {"jobs": 2, "num_gpus": 2}, ["2 jobs of 2 processes"]),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, refuses, keys, options, parts):
    def run(values, seed, folder):
        raise AssertionError("it ran")

    spaces = {key: make_space([0.5, 1.5]) for key in keys}
    with refuses(*parts):
        tune(CONFIG, spaces, tmp_path / "out", run=run, **options)
    assert not (tmp_path / "out").exists()


def test_a_second_search_in_a_folder_is_refused(tmp_path, refuses):
    def run(values, seed, folder):
        with refuses(f"no other search in {tmp_path}"):
            tune(CONFIG, {FIRST: make_space([1.0])}, tmp_path, run=run)
        return 1.0

    tune(CONFIG, {FIRST: make_space([1.0])}, tmp_path, run=run)


def test_a_training_that_outlives_its_killed_search_keeps_the_folder(tmp_path, refuses):
    with (tmp_path / "search.lock").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[file.fileno()]
        )
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        with refuses("a training of one that was killed"):
            tune(CONFIG, {FIRST: make_space([1.0])}, tmp_path, run=Toy())
    finally:
        process.kill()
        process.wait()


def spaces(*arguments):
    common = ["--config-file", "x.yaml", "--output", "out"]
    return cli.read_spaces(cli.parse_arguments([*arguments, *common]))


def test_the_command_reads_keys_in_their_order_and_values_of_their_own():
    found = spaces("--keys", "A", "B=1,5", "C", "--values", "0.1", "1")
    assert list(found) == ["A", "B", "C"]
    assert [space.values for space in found.values()] == [(0.1, 1.0), (1.0, 5.0), (0.1, 1.0)]


def test_the_command_reads_a_range_and_overrides():
    arguments = "--config-file x --keys A --low 1 --high 9 --log --trials 4 --output out K V"
    args = cli.parse_arguments(arguments.split())
    assert args.opts == ["K", "V"]
    (space,) = cli.read_spaces(args).values()
    assert (space.low, space.high, space.log, space.trials, space.sampler) == (1, 9, True, 4, "tpe")


@pytest.mark.parametrize("tail", ["--output out", "--seeds 1 2", "--values 0.1 1"])
def test_overrides_may_follow_any_option(tail):
    common = "--config-file x --keys A --output out --seeds 1 2 --values 0.1 1"
    args = cli.parse_arguments([*common.split(), *tail.split(), "SOLVER.STEPS", "(1, 2)", "K", "3"])
    assert args.opts == ["SOLVER.STEPS", "(1, 2)", "K", "3"]
    assert (args.seeds, args.values) == ([1, 2], [0.1, 1.0])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--keys", "A", "A", "--values", "1"], "A twice"),
        (["--keys", "A=1,x"], "numbers for A"),
        (["--keys", "A"], "values to try"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(refuses, arguments, part):
    with refuses(part):
        spaces(*arguments)


def test_the_command_ends_with_status_2_and_one_sentence(tmp_path, capsys):
    argv = ["--config-file", CONFIG, "--keys", "NO.KEY", "--values", "1", "--output"]
    assert cli.main([*argv, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: expected a known config key; received 'NO.KEY'")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Overrides for the smallest training there is: one iteration, a random teacher."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = DigitsSpec(train_images=4, val_images=2)
    opts = ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
    for name, (json_file, images) in write_digits(tmp_path / "digits", spec).items():
        opts += [f"DATASETS.COCO_JSON.small_{name}", repr([str(json_file), str(images)])]
        opts += [f"DATASETS.{'TEST' if 'val' in name else 'TRAIN'}", f"('small_{name}',)"]
    teacher = str(ROOT / "configs/digits_torchvision/teacher_frcnn.yaml")
    return [
        *opts,
        "KD.TEACHER.CONFIG_FILE",
        teacher,
        "KD.TEACHER.WEIGHTS",
        "",
        "KD.TEACHER.ALLOW_RANDOM",
        "True",
    ]


def test_real_trainings_are_searched_and_not_repeated(small, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["--config-file", CONFIG, "--keys", f"{FIRST}=0.5", "--output", str(output), *small]
    assert cli.main(argv) == 0, capsys.readouterr().err
    folder = output / "runs" / FIRST / "0.5" / "seed_1"
    assert yaml.safe_load((folder / "config.yaml").read_text())["KD"]["TERMS"]["review"] == {
        **dict(TunedConfig(CONFIG).load().KD.TERMS.review),
        "WEIGHT": 0.5,
    }
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cli.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert "the only finished value" in capsys.readouterr().out
