"""The command, its exit status, its report, and what it leaves alone."""

from __future__ import annotations

import io
import json
import os
import re
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from kd_det.app.preflight import main
from kd_det.preflight import (
    Preflight,
    Section,
    Settings,
    budget,
    gate,
    preflight,
    require,
    run,
)
from kd_det.preflight.gate import FILES, prepare_folder, write_report
from kd_det.preflight.run import TITLES
from kd_det.preflight.terms import proposed_weight

QUICK = Settings(batches=1, images=4, seconds=600)


@pytest.fixture
def silent():
    return Console(file=io.StringIO())


def report_with(*levels):
    report = Preflight("a <run>", "some_host")
    section = Section("Terms")
    for level in levels:
        getattr(section, {"warning": "warn"}.get(level, level))(f"a {level} of <b>weight</b> & co")
    section.table("values <x>", ("loss", "raw"), [("review", "0.1"), ("<script>", "-")])
    section.data = {"review": {"norm": float("nan"), "share": 0.5}}
    report.sections.append(section)
    return report


@pytest.mark.parametrize(
    ("levels", "verdict", "ready"),
    [
        (("ok", "note"), "ready", True),
        (("warning", "ok"), "ready, 1 warning", True),
        (("warning", "warning"), "ready, 2 warnings", True),
        (("error", "warning"), "not ready: 1 error", False),
        (("error", "error"), "not ready: 2 errors", False),
    ],
)
def test_the_verdict_counts_errors_then_warnings(levels, verdict, ready):
    report = report_with(*levels)
    assert (report.verdict, report.ready) == (verdict, ready)


def test_the_page_holds_every_finding_and_cell_and_needs_nothing_else(tmp_path):
    report = report_with("error", "warning", "ok", "note")
    write_report(report, tmp_path)
    page = (tmp_path / "preflight.html").read_text()
    # Nothing is fetched, nothing of the run's own texts is markup.
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(", page)
    assert "<script>" not in page
    assert "<b>weight" not in page
    shown = unescape(page)
    for finding in report.sections[0].findings:
        assert finding.message in shown
    for cell in ("a <run>", "values <x>", "review", "0.1", report.verdict):
        assert cell in shown
    content = json.loads((tmp_path / "preflight.json").read_text())
    assert content["verdict"] == report.verdict
    assert content["sections"][0]["data"] == {"review": {"norm": "nan", "share": 0.5}}
    assert sorted(os.listdir(tmp_path)) == ["preflight.html", "preflight.json"]


def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(tmp_path, refuses):
    (tmp_path / "model_final.pth").write_text("precious")
    with refuses("holds model_final.pth", "--output"):
        prepare_folder(tmp_path)
    with refuses("written to", "--output"):
        prepare_folder(tmp_path / "model_final.pth" / "preflight")
    assert os.listdir(tmp_path) == ["model_final.pth"]
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in FILES:
        (earlier / name).write_text("old")
    prepare_folder(earlier)
    assert sorted(os.listdir(earlier)) == sorted(FILES)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_the_proposed_weight_solves_for_the_share(share):
    weight, unit, rest = 3.0, 0.7, 11.0
    proposal = proposed_weight(weight, weight * unit, weight * unit + rest, share)
    assert proposal * unit / (proposal * unit + rest) == pytest.approx(share)


def test_work_stops_where_another_piece_would_not_fit(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def worked(seconds, at_least=1):
        done = []
        for item in budget.within(range(10), seconds, at_least):
            done.append(item)
            clock[0] += 1  # what an item takes
        return done

    assert worked(3) == worked(3.9) == [0, 1, 2]
    assert worked(0) == [0]
    assert worked(0, at_least=2) == [0, 1]
    assert [budget.affordable(16, 1.0, s) for s in (100, 16, 5.5, 0.1)] == [16, 16, 5, 1]


def test_status_0_1_and_2_and_a_report_in_the_output_folder(world, tmp_path, capsys):
    config = str(world.student_file())
    options = ["--batches", "1", "--images", "4", "--output", str(tmp_path / "look")]
    before = sorted(world.root.rglob("*"))
    assert main(["--config-file", config, *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ready  \(\d+ seconds\)$", out, re.MULTILINE)
    for part in (*TITLES, "review", "box_logits"):
        assert part in out
    assert sorted(os.listdir(tmp_path / "look")) == sorted(FILES)
    assert "data:image/png;base64," in (tmp_path / "look" / "preflight.html").read_text()
    # The run's own folders are as they were.
    assert sorted(world.root.rglob("*")) == before

    assert main(["--config-file", config, *options, "KD.TEACHER.WEIGHTS", ""]) == 1
    out = capsys.readouterr().out
    assert "not ready: 1 error" in out
    assert "skipped: the run could not be built" in out
    # The picture of the run before would belong to nothing.
    assert sorted(os.listdir(tmp_path / "look")) == ["preflight.html", "preflight.json"]

    assert main(["--config-file", config, *options, "KD.TEECHER", "1"]) == 2
    assert main(["--config-file", config, *options[2:], "--batches", "0"]) == 2
    assert main(["--config-file", config, "--output", config]) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: expected") == 3
    assert "Traceback" not in errors


def test_a_run_that_requires_its_preflight_is_refused_with_its_error(world, tmp_path, refuses):
    cfg = world.student("KD.TERMS.review.TAPS", ["p2", "p9"], "OUTPUT_DIR", tmp_path / "run")
    with refuses("not ready: 1 error", "'p9'", "PREFLIGHT False"):
        require(cfg)
    left = sorted(os.listdir(tmp_path / "run" / "preflight"))
    assert left == ["preflight.html", "preflight.json"]


def test_the_plain_student_is_looked_at_too(world, tmp_path, silent):
    cfg = world.student("KD.ENABLED", False)
    report = preflight(cfg, tmp_path / "look", QUICK, silent)
    assert report.verdict == "ready"
    assert report.section("Cost").data["seconds"]["teacher"] == 0
    assert report.section("Teacher").findings[0].message == "the run has no frozen teacher"


def test_a_missing_data_set_is_an_error_that_names_it(world, tmp_path, silent):
    cfg = world.student("DATASETS.TRAIN", "('digits_trian',)")
    report = preflight(cfg, tmp_path, QUICK, silent)
    assert any("did you mean 'digits_train'" in finding.message for finding in report.errors)


def test_a_failure_that_nobody_expected_is_an_error_of_its_section(
    world, tmp_path, silent, monkeypatch
):
    def fail_inside(section, context):
        section.note("so far")
        raise AssertionError("Checkpoint x\nnot found!")

    monkeypatch.setitem(run._INSPECT, "Taps", fail_inside)
    report = preflight(world.student(), tmp_path, QUICK, silent)
    assert report.verdict == "not ready: 1 error"
    said = "could not be looked at: AssertionError: Checkpoint x not found!"
    assert [f.message for f in report.section("Taps").findings] == ["so far", said]
    assert report.section("Export").findings[0].level == "ok"
    assert said in unescape((tmp_path / "preflight.html").read_text())
    # Whoever is to mend it needs the place.
    sections = json.loads((tmp_path / "preflight.json").read_text())["sections"]
    (taps,) = [section for section in sections if section["title"] == "Taps"]
    assert "in fail_inside" in taps["data"]["traceback"]


@pytest.fixture
def looked_at(monkeypatch):
    """The configs and remarks that reach preflight, which then looks at nothing."""
    calls = []

    def look(cfg, settings, picture, begin, done, remark):
        calls.append((cfg, remark))
        return Preflight(str(cfg.OUTPUT_DIR), str(cfg.HOST))

    monkeypatch.setattr(gate, "run_preflight", look)
    return calls


def test_of_a_run_in_stages_the_first_is_looked_at_and_named(world, tmp_path, looked_at):
    stages = """
STAGES:
  - {NAME: hint, TERMS: [review], TASK: False, OVERRIDES: {SOLVER.BASE_LR: 0.125}}
  - {NAME: plain, TERMS: []}
"""
    config = tmp_path / "stages.yaml"
    config.write_text(world.student_file().read_text() + stages)
    assert main(["--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    ((cfg, remark),) = looked_at
    assert (cfg.KD.ACTIVE_TERMS, cfg.KD.TASK_WEIGHT, cfg.SOLVER.BASE_LR) == (["review"], 0, 0.125)
    assert cfg.OUTPUT_DIR == str(tmp_path / "run" / "stage_1_hint")
    assert remark.startswith("this is about 'hint', stage 1 of 2.")
    # Beside the folders of the stages, not in one of them.
    assert os.listdir(tmp_path / "run") == ["preflight"]


def test_a_remark_comes_first(world):
    report = run.run_preflight(world.student("KD.TEACHER.WEIGHTS", ""), QUICK, remark="about this")
    assert report.section("Build").findings[0].message == "about this"


@pytest.mark.usefixtures("looked_at")
def test_the_gpu_is_left_to_the_training_that_follows(world, tmp_path, silent, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        preflight(world.student(), tmp_path, QUICK, silent)
    assert emptied == [True]
