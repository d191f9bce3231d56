"""Drawings of a report: every seed as a dot, and curves as small multiples."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from kd_det.document.blocks import Picture
from kd_det.report.groups import BASELINE, TEACHER, Group

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, NullFormatter

# Okabe and Ito's palette: distinct also without colour vision, on light and on dark.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f6fc9", "#a6761d")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
_POINTS = 200  # of a curve
_COLUMNS = 4
_WIDTH = 11.0  # inches of every figure, so that text has the same size in all
_LEGEND_LETTERS = 125  # of one line of a legend
_LOGARITHMIC = ("time", "data_time")  # single values far above all others

Panel = Mapping[int, float]

# Colours of light pages and those of dark ones in their place. None is a colour of the palette.
_TEXT, _GRID, _BASELINE, _TEACHER = "#333a45", "#d9dde3", "#6b7280", "#111827"
_DARK = {_TEXT: "#c9d1d9", _GRID: "#3a424d", _BASELINE: "#9aa4b1", _TEACHER: "#f0f3f6"}


def dots(groups: Sequence[Group], metric: str, axis: str, name: str) -> Picture:
    """Every seed of every group as a dot of the score ``metric``, its mean as a bar.

    The groups stand from top to bottom; the baseline's mean and the teacher's are lines.
    """
    shown = [group for group in groups if group.values(metric)]

    def draw() -> Figure:
        figure, axes = plt.subplots(figsize=(_WIDTH, 0.36 * len(shown) + 0.75))
        styles = _styles(groups)
        for height, group in enumerate(shown):
            values = group.values(metric)
            colour, _ = styles[group.label]
            mean = statistics.mean(values)
            if group.role in (BASELINE, TEACHER):
                axes.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.plot(mean, height, "|", color=colour, markersize=17, markeredgewidth=2.5)
            axes.plot(values, [height] * len(values), "o", color=colour, markersize=6.5, alpha=0.55)
        axes.set_yticks(range(len(shown)), [group.label for group in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel(axis)
        axes.margins(x=0.04)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        return figure

    return _picture(draw, name, f"{axis} of every run")


def panels(
    groups: Sequence[Group],
    names: Sequence[str],
    name: str,
    text: str,
    smooth: bool = True,
    stage: str = "",
) -> Picture | None:
    """One panel per curve: seeds thin, the mean over the seeds of a group on top of them.

    Args:
        groups: whose curves are drawn where they have them.
        names: the curves, as :meth:`kd_det.report.runs.Run.tagged` names them.
        name: of the file; ``text`` describes it.
        smooth: average neighbouring points of long curves.
        stage: folder name of an earlier stage, whose curves are drawn; by default the last.

    Returns:
        None if there is no such curve of more than one point.
    """
    curves = {
        (group.label, tag): [c for run in group.runs if (c := run.tagged(stage).get(tag))]
        for group in groups
        for tag in names
    }
    # A single evaluation at the end of a run does not make a curve.
    long = {tag for (_, tag), seeds in curves.items() if any(len(c) > 1 for c in seeds)}
    shown = [tag for tag in names if tag in long]
    drawn = [group for group in groups if any(curves[group.label, tag] for tag in shown)]
    if not shown:
        return None

    def draw() -> Figure:
        rows = math.ceil(len(shown) / _COLUMNS)
        size = (_WIDTH, 2.0 * rows + 0.5)
        figure, grid = plt.subplots(rows, _COLUMNS, figsize=size, squeeze=False)
        styles = _styles(groups)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, tag in zip(grid.flat, shown, strict=False):
            for group in drawn:
                _curve(axes, curves[group.label, tag], *styles[group.label], smooth)
            axes.set_title(tag, fontsize=9.5, loc="left")
            axes.grid()
            axes.margins(x=0.02)
            axes.locator_params(axis="x", nbins=4)
            if tag in _LOGARITHMIC:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.locator_params(axis="y", nbins=5)
        labels = [group.label for group in drawn]
        kinds = [styles[label] for label in labels]
        lines = [Line2D([], [], color=c, linestyle=dash, linewidth=2) for c, dash in kinds]
        # As many columns as fit side by side: a line before each, and as wide as the longest.
        columns = max(1, min(len(labels), _LEGEND_LETTERS // (max(map(len, labels)) + 6)))
        figure.legend(
            lines, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6
        )
        return figure

    return _picture(draw, name, text)


def thinned(points: Panel, most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points of a curve, each the mean of as many neighbours."""
    x = np.fromiter(points.keys(), dtype=float)
    y = np.fromiter(points.values(), dtype=float)
    parts = min(most, len(x))
    return tuple(  # type: ignore[return-value]
        np.array([part.mean() for part in np.array_split(values, parts)]) for values in (x, y)
    )


def _curve(axes: Axes, seeds: Sequence[Panel], colour: str, dash: Any, smooth: bool) -> None:
    if not seeds:
        return
    shared = set(seeds[0]).intersection(*seeds[1:])
    mean = {at: statistics.mean(seed[at] for seed in seeds) for at in sorted(shared)}
    thin: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.4}
    lines = [(seed, thin) for seed in seeds] if len(seeds) > 1 else []
    lines += [(mean, {"linewidth": 1.5})] if mean else []
    for points, style in lines:
        x, y = thinned(points) if smooth else thinned(points, len(points))
        style = {**style, "marker": "o" if len(x) <= 12 else "", "markersize": 3}
        axes.plot(x, y, color=colour, linestyle=dash, **style)


def _styles(groups: Sequence[Group]) -> dict[str, tuple[str, Any]]:
    fixed = {BASELINE: (_BASELINE, "-"), TEACHER: (_TEACHER, (0, (4, 2)))}
    styles: dict[str, tuple[str, Any]] = {}
    number = 0
    for group in groups:
        if group.role in fixed:
            styles[group.label] = fixed[group.role]
        else:
            cycle, at = divmod(number, len(_PALETTE))
            styles[group.label] = (_PALETTE[at], _DASHES[cycle % len(_DASHES)])
            number += 1
    return styles


def _picture(draw: Callable[[], Figure], name: str, text: str) -> Picture:
    colours = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {  # typed by rc_context as literals
        **dict.fromkeys(colours, _TEXT),
        "figure.constrained_layout.use": True,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        # Reproducible ids.
        "svg.hashsalt": "kd_det",
    }
    with plt.rc_context(settings):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    light = dark = buffer.getvalue()
    for old, new in _DARK.items():
        dark = dark.replace(old.encode(), new.encode())
    return Picture(f"{name}.svg", light, text, dark)
