"""The curves of the quickstart: how AP grew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kd_det.run.folder import METRICS
from kd_det.run.json_lines import read_json_lines


def read_curve(metrics: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of one metric from ``metrics.json`` (one object per line)."""
    lines = read_json_lines(metrics)
    # A continued run repeats the iterations after its last checkpoint: the later value counts.
    points = {line["iteration"] + 1: line[key] for line in lines if key in line}
    return sorted(points), [points[x] for x in sorted(points)]


def draw_curves(runs: Mapping[str, Path], teacher_ap: float, path: Path) -> None:
    """Validation AP over training iterations of each student, with the teacher's as a line.

    Args:
        runs: label to ``OUTPUT_DIR``.
        teacher_ap: in percent.
        path: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (label, output), colour in zip(runs.items(), ("tab:gray", "tab:blue"), strict=False):
        x, y = read_curve(output / METRICS, "bbox/AP")
        axes.plot(x, y, marker="o", label=label, color=colour)
        axes.annotate(f"{y[-1]:.1f}", (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points")
    axes.axhline(teacher_ap, linestyle="--", color="tab:green", label=f"teacher ({teacher_ap:.1f})")
    axes.set(xlabel="training iteration", ylabel="box AP on validation images (%)")
    axes.set_title("The same student, alone and with a teacher")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
