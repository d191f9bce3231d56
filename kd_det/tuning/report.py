"""The result of a search as a Markdown table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from kd_det.tuning.search import Sweep

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLUMNS = 3
_LOG_RATIO = 8.0  # of largest and smallest value, from which an axis is logarithmic
_MOST_TICKS = 8


def table(sweeps: Sequence[Sweep], metric: str, seeds: Sequence[int]) -> str:
    """One Markdown table per key, each with the :func:`verdict` on its best value."""
    over = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [
        f"# Greedy search for the highest {metric}",
        "",
        f"Mean and sample standard deviation (sd) over {over}. Each key was searched with the best",
        "values of the keys before it.",
    ]
    for number, sweep in enumerate(sweeps, start=1):
        lines += ["", f"## {number}. {sweep.key}", "", *_rows(sweep, seeds), "", verdict(sweep)]
        lines += [
            f"\n{point.value:g} failed: {point.failure}" for point in sweep.points if point.failure
        ]
    return "\n".join(lines) + "\n"


def _rows(sweep: Sweep, seeds: Sequence[int]) -> list[str]:
    rows = [
        "| value | mean | sd | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "| ---: | ---: | ---: |" + " ---: |" * len(seeds),
    ]
    digits = _digits(sweep)
    for point in sweep.points:
        if not point.scores:
            cells = ["failed", "", *[""] * len(seeds)]
        else:
            spread = "" if point.deviation is None else f"{point.deviation:.{digits}f}"
            scores = [f"{score:.{digits}f}" for score in point.scores]
            cells = [f"{point.mean:.{digits}f}", spread, *scores]
        value = f"{point.value:g}"
        if point == sweep.best:
            value, cells[0] = f"**{value} (best)**", f"**{cells[0]}**"
        rows.append(f"| {value} | " + " | ".join(cells) + " |")
    return rows


def verdict(sweep: Sweep) -> str:
    """The lead of the best value over the second best, compared with the noise of the seeds."""
    best, *others = sweep.finished
    text = f"Best: {best.value:g}"
    if not others:
        return f"{text}, the only finished value."
    digits = _digits(sweep)
    margin = best.mean - others[0].mean
    text += f", {margin:.{digits}f} ahead of {others[0].value:g}"
    spreads = [p.deviation for p in (best, others[0]) if p.deviation is not None]
    if not spreads:
        return f"{text}. One seed does not tell the noise; search with `--seeds 1 2 3`."
    # The larger of the two, so that a lucky small deviation does not decide.
    noise = max(spreads)
    if margin < noise:
        return f"{text}: **within seed noise** (sd {noise:.{digits}f})."
    return f"{text}, more than the sd of {noise:.{digits}f}."


def draw(sweeps: Sequence[Sweep], metric: str, path: Path) -> None:
    """Write a PNG with one panel per key: metric against value, bars of one standard deviation."""
    columns = min(_COLUMNS, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    size = (4.4 * columns + 0.6, 3.6 * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(sweeps) :]:
        axes.set_axis_off()
    for number, (axes, sweep) in enumerate(zip(grid.flat, sweeps, strict=False), start=1):
        _panel(axes, sweep)
        best, digits = sweep.best, _digits(sweep)
        spread = "" if best.deviation is None else f" ± {best.deviation:.{digits}f}"
        title = f"{number}. {sweep.key}\nbest {best.value:.4g}: {best.mean:.{digits}f}{spread}"
        axes.set_title(title, fontsize=10)
    for row in grid:
        row[0].set_ylabel(metric)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: Axes, sweep: Sweep) -> None:
    points = sorted(sweep.finished, key=lambda point: point.value)
    x, y = [point.value for point in points], [point.mean for point in points]
    deviations = [point.deviation or 0.0 for point in points]
    axes.margins(x=0.1, y=0.1)
    axes.errorbar(x, y, yerr=deviations, marker="o", color="tab:blue", capsize=3)
    axes.plot(sweep.best.value, sweep.best.mean, "*", color="tab:orange", markersize=15, zorder=3)
    bottom = axes.get_xaxis_transform()
    for failed in [point.value for point in sweep.points if point.failure]:
        style = {"color": "tab:red", "rotation": "vertical", "ha": "center"}
        axes.text(failed, 0.03, "failed", style, transform=bottom)
    values = [point.value for point in sweep.points]
    _scale(axes, values)
    if len(values) <= _MOST_TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if min(values) < 0 or not positive or max(positive) < _LOG_RATIO * min(positive):
        return
    if min(values) == 0:
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.set_xscale("log")


def _digits(sweep: Sweep) -> int:
    """Decimals: two for percent, four for a share."""
    return 2 if max(abs(point.mean) for point in sweep.finished) > 1 else 4
