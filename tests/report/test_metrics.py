"""The curves of a metrics file survive what a killed run does to it."""

from __future__ import annotations

import json

from kd_det.report.runs import read_metrics


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_the_later_value_of_an_iteration_counts(tmp_path):
    path = write(
        tmp_path / "metrics.json",
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 39, "bbox/AP": 10.0},
        {"iteration": 19, "total_loss": 2.5},
    )
    curves, problems = read_metrics(path)
    assert curves == {"bbox/AP": {40: 10.0}, "total_loss": {20: 2.5, 40: 2.0}}
    assert list(curves["total_loss"]) == [20, 40]
    assert problems == []


def test_a_line_cut_in_the_middle_is_skipped_and_named(tmp_path):
    path = write(
        tmp_path / "metrics.json",
        {"iteration": 19, "lr": 0.1},
        '{"iteration": 39, "lr": 0.',
        {"iteration": 59, "lr": 0.3},
    )
    curves, problems = read_metrics(path)
    assert curves["lr"] == {20: 0.1, 60: 0.3}
    assert problems == ["metrics.json: line 2 cut or not JSON, skipped"]


def test_lines_that_are_no_metrics_are_named_together(tmp_path):
    path = write(tmp_path / "metrics.json", "[1]", "7", '{"lr": 1}', '{"iteration": null}', "", "x")
    curves, problems = read_metrics(path)
    assert curves == {}
    assert problems == ["metrics.json: lines 1, 2, 3, 4, 6 cut or not JSON, skipped"]


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_bytes(b'{"iteration": 0, "lr": 1}\n\xff\xfe\x00\n')
    curves, problems = read_metrics(path)
    assert curves == {"lr": {1: 1.0}}
    assert len(problems) == 1


def test_values_that_are_no_numbers_leave_no_point(tmp_path):
    path = write(tmp_path / "metrics.json", '{"iteration": 9, "bbox/APl": NaN, "note": "x"}')
    assert read_metrics(path) == ({}, [])
