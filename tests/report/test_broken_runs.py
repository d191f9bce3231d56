"""Whatever is broken is named in the report and costs nothing else."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.report.made_up import (
    config,
    detections,
    metric_lines,
    problems,
    report,
    rows,
    write_run,
    write_study,
    write_truth,
)


def break_predictions(folder):
    (folder / "inference" / "coco_instances_results.json").write_text('[{"image_id": 1, "ca')


def break_metrics(folder):
    path = folder / "metrics.json"
    path.write_text(path.read_text()[:-20])


def forget_the_config(folder):
    (folder / "config.yaml").unlink()


def break_the_record(folder):
    (folder / "run.json").write_text('{"versions": "old", "starts": [1]}')


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lose_the_data_set(folder):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("made_up", "lost").replace("truth", "moved"))


def disagree(folder):
    (folder / "results.json").write_text(json.dumps({"bbox": {"AP": 1.0}}))


def stop(folder):
    (folder / "model_final.pth").unlink()


def lose_the_predictions(folder):
    shutil.rmtree(folder / "inference")
    (folder / "results.json").write_text(json.dumps({"bbox": {"AP": 50.0}}))


def overflow(folder):
    (folder / "metrics.json").write_text('{"iteration": 1e999, "lr": 1}\n{"iteration": 9, "lr": 2}')


DAMAGES = {
    break_predictions: "saved predictions are not used: expected",
    break_metrics: "metrics.json: line 3 cut or not JSON, skipped",
    forget_the_config: "no config.yaml",
    break_the_record: "run.json cannot be read, or not all of it",
    empty: "no run: it holds none of config.yaml",
    lose_the_data_set: "COCO annotations of 'lost'",
    disagree: "they are of different evaluations; the former are shown",
    stop: "not finished, 60 of 60 iterations",
    overflow: "metrics.json: line 1 cut or not JSON, skipped",
}


@pytest.fixture(scope="module")
def damaged(study, tmp_path_factory):
    """One report about runs of which each is broken in another way, an image too."""
    root = tmp_path_factory.mktemp("damaged")
    truth = write_study(root, masks=True)
    for number, damage in enumerate([*DAMAGES, lose_the_predictions]):
        content = config(truth, KD__ENABLED=True, KD__NUMBER=number)
        found = detections(truth, 0.5, number)
        folder = root / damage.__name__
        damage(write_run(folder, content, found, lines=metric_lines(number), record={}))
    break_predictions(root / "baseline_seed2")
    empty(root / "teacher")
    first = re.search(r"(\d+\.png): \d against", (study / "report" / "report.md").read_text())[1]
    (root / "data" / "images" / first).write_bytes(b"no image")
    names = [damage.__name__ for damage in DAMAGES]
    report(root, ["review_seed*", *names, "lose_the_predictions", "never_started"])
    return root, first


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_run_is_named_with_the_reason(damaged, damage):
    told = problems(damaged[0] / "report" / "report.html").splitlines()
    assert any(damage.__name__ in line and DAMAGES[damage] in line for line in told), told


def test_a_broken_run_costs_no_other_and_no_section(damaged):
    page = damaged[0] / "report" / "report.html"
    table = rows(page, "model", "verdict")
    assert table["review"]["seeds"] == "3"
    assert table["baseline"]["seeds"] == "2"
    assert {"disagree", "break_metrics", "break_the_record", "stop"} <= set(table)
    assert "teacher" not in table
    assert "could not be made" not in page.read_text()
    told = problems(page)
    assert re.search("teacher, .*empty: no run", told)
    assert re.search("baseline_seed2, .*: its saved predictions are not used", told)
    assert "never_started: no such folder" in told


def test_scores_without_saved_predictions_are_marked(damaged):
    page = damaged[0] / "report" / "report.html"
    table = rows(page, "model", "verdict")
    assert table["lose_the_predictions †"]["AP"].startswith("50.00")
    assert "† Not from saved predictions" in page.read_text()


def test_an_image_that_cannot_be_decoded_is_skipped_and_named(damaged, study):
    root, first = damaged
    page = root / "report" / "report.md"
    assert f"{first} cannot be decoded" in problems(page.with_suffix(".html"))
    assert f"* {first}: " in (study / "report" / "report.md").read_text()
    assert f"* {first}: " not in page.read_text()


def test_an_unfinished_study_gives_a_report_of_what_there_is(tmp_path, undrawn):
    truth = write_truth(tmp_path / "data")
    for name, keys in (("baseline", {}), ("review", {"KD__ENABLED": True})):
        lines = metric_lines(end=20)
        write_run(tmp_path / name, config(truth, **keys), lines=lines, weights=None)
    page = report(tmp_path, ["review"], ["baseline"], [])
    text = page.read_text()
    assert "Nothing can be compared" in text
    assert "not finished, 20 of 60 iterations" in problems(page)
    assert "No run left any scores." in text
    assert "could not be made" not in text


def test_a_section_that_fails_costs_no_other(copy, undrawn, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("kd_det.report.sections.training_table", fail)
    page = report(copy)
    assert "This section could not be made" in page.read_text()
    assert "Cost: ZeroDivisionError: planted" in problems(page)
    assert "review" in rows(page, "model", "verdict")
