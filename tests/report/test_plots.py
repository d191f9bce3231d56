"""Curves that can be told apart."""

from __future__ import annotations

import pytest

from kd_det.document.blocks import Figure
from kd_det.report import plots, sections
from kd_det.report.groups import DISTILLED, Group, collect
from kd_det.report.runs import Run
from tests.report.made_up import config, metric_lines, problems, report, write_run, write_truth


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from now on."""
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    return drawn


@pytest.mark.parametrize("ending", ["", "_frcnn_r50_r101", "_" + 60 * "x"])
def test_every_configuration_is_named_inside_the_picture(tmp_path, figures, ending):
    groups = []
    for number in range(10):
        run = Run(tmp_path, tmp_path, curves={"total_loss": {0: 1.0, 20: 1.0 + number}})
        groups.append(Group(DISTILLED, [run], f"run{number}{ending}"))
    plots.panels(groups, ["loss/total"], "curves", "", smooth=True)
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [group.label for group in groups]
    inside = figure.bbox
    for text in legend.get_texts():
        extent = text.get_window_extent()
        assert inside.x0 < extent.x0 < extent.x1 < inside.x1
        assert inside.y0 < extent.y0 < extent.y1 < inside.y1


@pytest.fixture
def staged(tmp_path):
    """A baseline in one piece, and a run whose only term belongs to the first of its stages."""
    truth = write_truth(tmp_path / "data")
    results = {"bbox": {"AP": 1.0}}
    write_run(tmp_path / "baseline", config(truth), results=results, lines=metric_lines())
    keys = {"KD__ENABLED": True, "KD__TERMS": {"flow": {"LOSS": "FSP"}, "hint": {"LOSS": "FitNet"}}}
    for number, (name, terms) in enumerate(
        {"flow": ["flow"], "hint": ["hint"], "task": []}.items()
    ):
        lines = metric_lines(terms=terms, end=40)
        stage = tmp_path / "fsp" / f"stage_{number + 1}_{name}"
        write_run(stage, config(truth, **keys), results=results, lines=lines)
    return tmp_path


def test_the_curves_of_every_stage_are_shown_by_its_name(staged, figures):
    blocks = sections.curves(collect([str(staged / "fsp")], [str(staged / "baseline")]))
    shown = [block for block in blocks if isinstance(block, Figure)]
    titles = {
        block.title: [axes.get_title(loc="left") for axes in figure.axes if axes.lines]
        for block, figure in zip(shown, figures, strict=True)
    }
    assert list(titles) == ["Task losses", "Loop", "Stage 1: flow", "Stage 2: hint"]
    assert titles["Stage 1: flow"] == [
        *("loss/total", "loss/task/cls", "loss/kd/flow", "raw/flow", "weight/flow"),
    ]
    assert "loss/kd/hint" in titles["Stage 2: hint"]
    assert "loss/kd/flow" not in titles["Stage 2: hint"]
    # The baseline has no stages: its legend is not that of a stage.
    by_title = dict(zip(titles, figures, strict=True))
    labels = {k: [t.get_text() for t in f.legends[0].get_texts()] for k, f in by_title.items()}
    assert labels["Stage 1: flow"] == ["fsp"]
    assert labels["Task losses"] == ["baseline", "fsp"]


@pytest.mark.usefixtures("undrawn")
def test_a_broken_file_of_an_earlier_stage_is_named_with_it(staged):
    path = staged / "fsp" / "stage_1_flow" / "metrics.json"
    path.write_text(path.read_text()[:-20])
    page = report(staged, ["fsp"], ["baseline"], [])
    assert "stage_1_flow/metrics.json: line 2 cut or not JSON, skipped" in problems(page)
