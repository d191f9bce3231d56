"""The table says how sure a best value is."""

from __future__ import annotations

import pytest

from kd_det.tuning import Point, Sweep
from kd_det.tuning.report import _panel, plt, table, verdict


def sweep(*points):
    return Sweep("KEY", tuple(Point(value, scores) for value, scores in points))


@pytest.mark.parametrize(
    ("points", "part"),
    [
        ([(1.0, (70.0, 71.0)), (2.0, (70.2, 70.9))], "0.05 ahead of 1: **within seed noise**"),
        ([(1.0, (70.0, 70.2)), (2.0, (75.0, 75.2))], "5.00 ahead of 1, more than the sd of 0.14"),
        ([(1.0, (70.0, 70.0)), (2.0, (70.1, 76.1))], "**within seed noise** (sd 4.24)"),
        ([(1.0, (70.0,)), (2.0, (75.0,))], "One seed does not tell the noise"),
        ([(2.0, (70.0,))], "the only finished value"),
        (
            [(1.0, (0.7, 0.71)), (2.0, (0.75, 0.76))],
            "0.0500 ahead of 1, more than the sd of 0.0071",
        ),
    ],
)
def test_the_table_says_whether_the_best_exceeds_the_noise(points, part):
    assert part in verdict(sweep(*points))
    assert verdict(sweep(*points)) in table([sweep(*points)], "m", [1, 2])


def test_failures_stand_in_the_table_with_their_reason():
    failed = Sweep("KEY", (Point(1.0, (70.0,)), Point(9.0, failure="it diverged")))
    text = table([failed], "bbox/AP", [1])
    assert "| 9 | failed |" in text
    assert "9 failed: it diverged" in text


def test_a_failed_value_at_the_edge_is_inside_the_plot():
    points = (Point(0.1, (1.0, 2.0)), Point(1.0, (3.0, 2.5)), Point(10.0, failure="diverged"))
    figure, axes = plt.subplots()
    _panel(axes, Sweep("k", points))
    low, high = axes.get_xlim()
    assert low <= 0.1
    assert high >= 10
    assert [text.get_text() for text in axes.texts] == ["failed"]
    plt.close(figure)
