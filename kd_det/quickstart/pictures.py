"""The two pictures of the quickstart: how AP grew, and what each model sees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from kd_det.quickstart.hosts import Detections

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

_SCALE = 3  # labels on a 160-pixel canvas are legible only when it is enlarged
_MIN_SCORE = 0.5


def read_curve(metrics: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of one metric from ``metrics.json`` (one object per line)."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
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
        x, y = read_curve(output / "metrics.json", "bbox/AP")
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


def draw_detections(
    images: Sequence[Tensor], columns: Mapping[str, Sequence[Detections]], path: Path
) -> None:
    """One row per image, one column per model, boxes labelled with the class.

    Args:
        images: uint8 ``[3, H, W]``.
        columns: title to detections per image; those below a score of 0.5 are left out.
        path: the PNG to write.
    """
    figure, grid = plt.subplots(
        len(images),
        len(columns),
        figsize=(2.6 * len(columns), 2.6 * len(images) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (title, detections) in enumerate(columns.items()):
        grid[0][column].set_title(title, fontsize=12)
        for row, (image, found) in enumerate(zip(images, detections, strict=True)):
            grid[row][column].imshow(_annotated(image, found).permute(1, 2, 0).numpy())
    figure.suptitle(f"Detections with a score of at least {_MIN_SCORE}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _annotated(image: Tensor, found: Detections) -> Tensor:
    large = torch.nn.functional.interpolate(
        image[None].float(), scale_factor=_SCALE, mode="nearest"
    )
    large = large[0].to(torch.uint8)
    keep = found.scores >= _MIN_SCORE
    if not keep.any():
        return large
    palette = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    colours = [tuple(int(255 * c) for c in palette[int(k) % 10]) for k in found.classes[keep]]
    return draw_bounding_boxes(
        large,
        found.boxes[keep] * _SCALE,
        labels=[str(int(k)) for k in found.classes[keep]],
        colors=colours,
        width=3,
        font=font_manager.findfont("DejaVu Sans"),  # comes with matplotlib
        font_size=26,
        label_colors="white",
        fill_labels=True,
    )
