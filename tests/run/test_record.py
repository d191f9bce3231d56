"""``run.json`` says what a run was, through interruptions too."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from kd_det.core.teacher import FrozenTeacher
from kd_det.run import record
from kd_det.run.config import add_kd_config
from kd_det.run.record import (
    begin_record,
    finish_record,
    parameter_counts,
    read_record,
    recorded_run,
)


def config(**teacher):
    cfg = CfgNode()
    add_kd_config(cfg)
    cfg.KD.TEACHER.update(CfgNode(teacher))
    return cfg


def git(folder, *arguments):
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *own, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The package seems to lie in this repository of one commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "code.py").write_text("a = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    monkeypatch.setattr(record.kd_det, "__file__", str(folder / "__init__.py"))
    return folder


def test_a_run_is_running_until_it_ends_and_keeps_every_fact(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py", "--config-file", "a.yaml"])
    begin_record(tmp_path / "deep" / "run", config(), 7, False, parameters={"student": 3})
    began = read_record(tmp_path / "deep" / "run")
    assert began["status"] == "running"
    assert (began["name"], began["host"], began["seed"]) == ("run", "detectron2", 7)
    assert began["command"] == ["tools/train_net.py", "--config-file", "a.yaml"]
    assert began["versions"]["torch"] == torch.__version__
    assert {"kd_det", "python", "fvcore"} <= began["versions"].keys()
    assert began["machine"]["cpus"] >= 1
    assert began["teacher"] is None
    assert began["parameters"] == {"student": 3}
    assert "finished" not in began
    finish_record(tmp_path / "deep" / "run", "done", best=1.5)
    ended = read_record(tmp_path / "deep" / "run")
    assert ended == began | {"status": "done", "best": 1.5, "finished": ended["finished"]}
    assert [p.name for p in (tmp_path / "deep" / "run").iterdir()] == ["run.json"]


def test_the_teacher_is_known_by_the_bytes_of_its_weights(tmp_path):
    content = b"weights" * 400_000
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(content)
    cfg = config(CONFIG_FILE="teacher.yaml", WEIGHTS=str(weights))
    begin_record(tmp_path, cfg, 0, False)
    assert read_record(tmp_path)["teacher"] == {
        "config": "teacher.yaml",
        "weights": str(weights),
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    # An address whose file lies elsewhere.
    address = config(CONFIG_FILE="teacher.yaml", WEIGHTS="zoo://teacher")
    begin_record(tmp_path, address, 0, False, teacher_file=weights)
    found = read_record(tmp_path)["teacher"]
    assert found["weights"] == "zoo://teacher"
    assert found["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("weights", ["", "IMAGENET1K_V1"])
def test_a_teacher_without_a_file_has_no_fingerprint(tmp_path, weights):
    begin_record(tmp_path, config(CONFIG_FILE="teacher.yaml", WEIGHTS=weights), 0, False)
    teacher = read_record(tmp_path)["teacher"]
    assert teacher == {"config": "teacher.yaml", "weights": weights, "sha256": None, "bytes": None}


def test_a_baseline_has_no_teacher_whatever_its_config_names(tmp_path):
    cfg = config(CONFIG_FILE="teacher.yaml", WEIGHTS="t.pth")
    cfg.KD.ENABLED = False
    begin_record(tmp_path, cfg, 0, False)
    assert read_record(tmp_path)["teacher"] is None


def test_a_resumed_run_adds_a_start_and_keeps_what_was_there(tmp_path):
    begin_record(tmp_path, config(), 7, False, parameters={"student": 3})
    finish_record(tmp_path, "failed", error="KeyboardInterrupt")
    first = read_record(tmp_path)
    begin_record(tmp_path, config(), 7, True, parameters={"student": 3})
    second = read_record(tmp_path)
    assert second["status"] == "running"
    assert "error" not in second
    assert "finished" not in second
    assert second["starts"][0] == first["starts"][0]
    assert [start["resumed"] for start in second["starts"]] == [False, True]
    assert "changed" not in second["starts"][1]
    assert second["versions"] == first["versions"]


def test_a_start_on_other_software_says_what_has_changed(tmp_path, monkeypatch):
    begin_record(tmp_path, config(), 7, False)
    first = read_record(tmp_path)
    monkeypatch.setattr(record.kd_det, "__version__", "99.0")
    begin_record(tmp_path, config(), 7, True)
    second = read_record(tmp_path)
    assert second["versions"] == first["versions"]
    assert second["starts"][1]["changed"].keys() == {"versions"}
    assert second["starts"][1]["changed"]["versions"]["kd_det"] == "99.0"


def test_a_fresh_start_describes_itself_and_remembers_that_there_was_another(tmp_path):
    begin_record(tmp_path, config(), 7, False, note="old")
    begin_record(tmp_path, config(), 8, False)
    found = read_record(tmp_path)
    assert found["seed"] == 8
    assert "note" not in found
    assert len(found["starts"]) == 2


def test_the_commit_is_that_of_the_code_and_a_change_makes_it_dirty(tmp_path, repository):
    begin_record(tmp_path / "a", config(), 0, False)
    commit = git(repository, "rev-parse", "HEAD")
    assert read_record(tmp_path / "a")["git"] == {"commit": commit, "dirty": False}
    (repository / "code.py").write_text("a = 2\n")
    begin_record(tmp_path / "b", config(), 0, False)
    assert read_record(tmp_path / "b")["git"] == {"commit": commit, "dirty": True}


def test_without_git_the_commit_is_null(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begin_record(tmp_path / "a", config(), 0, False)
    assert read_record(tmp_path / "a")["git"] is None


def test_outside_any_repository_the_commit_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(record.kd_det, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    begin_record(tmp_path / "a", config(), 0, False)
    assert read_record(tmp_path / "a")["git"] is None


@pytest.mark.parametrize(
    ("error", "text"),
    [(RuntimeError("no memory"), "RuntimeError: no memory"), (KeyboardInterrupt(), "Keyb")],
)
def test_an_exception_ends_a_run_as_failed_and_goes_on(tmp_path, error, text):
    def fails():
        with recorded_run(tmp_path, config(), 0, False):
            assert read_record(tmp_path)["status"] == "running"
            raise error

    with pytest.raises(type(error)):
        fails()
    found = read_record(tmp_path)
    assert found["status"] == "failed"
    assert found["error"].startswith(text)


def test_an_interruption_that_became_an_exit_is_recorded_as_what_it_was(tmp_path):
    def interrupted():
        with recorded_run(tmp_path, config(), 0, False):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

    with pytest.raises(SystemExit):
        interrupted()
    assert read_record(tmp_path)["error"] == "KeyboardInterrupt"


def test_other_processes_write_nothing(tmp_path):
    with recorded_run(tmp_path / "run", config(), 0, False, main_process=False):
        pass
    assert not (tmp_path / "run").exists()
    with recorded_run(tmp_path / "run", config(), 0, False):
        pass
    assert read_record(tmp_path / "run")["status"] == "done"


def test_a_damaged_record_does_not_stop_a_run(tmp_path, caplog):
    (tmp_path / "run.json").write_text('{"status": "runn')
    assert read_record(tmp_path) is None
    begin_record(tmp_path, config(), 0, True)
    assert "run.json" in caplog.text
    assert read_record(tmp_path)["status"] == "running"


def test_parameters_are_counted_per_part():
    student, adaptors = nn.Linear(2, 3), nn.Linear(3, 4, bias=False)
    teacher = FrozenTeacher(nn.Linear(5, 6))
    counts = parameter_counts(student, adaptors, teacher)
    assert counts == {"student": 9, "adaptors": 12, "teacher": 36}
    assert parameter_counts(student, None, None) == {"student": 9, "adaptors": 0, "teacher": 0}
