"""Curves that can be told apart."""

from __future__ import annotations

import pytest

from kd_det.report import plots
from kd_det.report.groups import DISTILLED, Group
from kd_det.report.runs import Run


@pytest.mark.parametrize("ending", ["", "_frcnn_r50_r101", "_" + 60 * "x"])
def test_every_configuration_is_named_inside_the_picture(tmp_path, monkeypatch, ending):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
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
