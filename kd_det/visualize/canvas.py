"""What all pictures share: grids of axes, one colour scale for both sides, and their look.

Figures are made without ``pyplot``, which would choose a backend and keep every figure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from kd_det.visualize.watch import Pictures

SIDES = ("student", "teacher")
COLOURS = {"student": "tab:blue", "teacher": "tab:green"}
# The share of values inside a scale; larger ones have its last colour, so that a single cell cannot
# darken all others.
_COVERED = 0.995
DPI = 130
_BAR_HEIGHT = 0.12  # inches


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with automatic layout; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class Grid:
    """Axes without ticks, row by row, with titles over the columns and room for colour bars."""

    def __init__(self, figure: Figure, rows: int, columns: Sequence[str]) -> None:
        height = figure.get_size_inches()[1] / rows
        self._spec = figure.add_gridspec(
            rows + 1, len(columns), height_ratios=[*[1.0] * rows, _BAR_HEIGHT / height]
        )
        self.figure = figure
        self.axes = [
            [figure.add_subplot(self._spec[row, column]) for column in range(len(columns))]
            for row in range(rows)
        ]
        for axes in itertools.chain(*self.axes):
            axes.set(xticks=[], yticks=[])
        for axes, title in zip(self.axes[0], columns, strict=True):
            axes.set_title(title, fontsize=9)

    def colour_bar(self, drawn: Any, first: int, last: int, label: str) -> None:
        """A colour bar below some columns; a pointed end means that values exceed the scale."""
        place = self.figure.add_subplot(self._spec[-1, first : last + 1])
        ends: Any = "max" if drawn.norm.vmin == 0 else "both"
        bar = self.figure.colorbar(
            drawn, cax=place, orientation="horizontal", extend=ends, extendfrac=0.03
        )
        bar.ax.tick_params(labelsize=7)
        bar.set_label(label, fontsize=8)


def show_picture(axes: Axes, image: Tensor, grey: bool = False) -> None:
    """Draw an image ``[3, h, w]``; the axes count its pixels."""
    h, w = image.shape[1:]
    values = image.float().mean(dim=0) if grey else image.permute(1, 2, 0)
    style: Any = {"cmap": "gray", "vmin": 0, "vmax": 255} if grey else {}
    axes.imshow(values.numpy(), extent=(0, w, h, 0), interpolation="nearest", **style)


def show_map(axes: Axes, cells: Tensor, pictures: Pictures, row: int, **style: Any) -> Any:
    """Draw a map where its cells lie on an image, without the cells of the padding.

    Args:
        axes: where to draw.
        cells: numbers ``[h, w]``, or RGBA colours ``[h, w, 4]``.
        pictures: the batch.
        row: index of the image.
        **style: of ``imshow``.

    Returns:
        The drawn image, for a colour bar.
    """
    height, width = (_covered(cells.shape[d], side) for d, side in enumerate(pictures.size))
    drawn = axes.imshow(
        cells.numpy(), extent=(0.0, width, height, 0.0), interpolation="nearest", **style
    )
    h, w = pictures.images[row].shape[1:]
    axes.set(xlim=(0, w), ylim=(h, 0))
    return drawn


def _covered(cells: int, pixels: int) -> float:
    """Pixels that a row of cells covers; the last cell may reach beyond the edge."""
    stride = 2 ** round(math.log2(max(pixels / cells, 1)))
    return float(cells * stride if 0 <= cells * stride - pixels < stride else pixels)


def common_scale(*values: Tensor, around: float | None = None) -> Normalize:
    """One colour scale for everything given.

    Args:
        *values: any shapes; non-finite numbers do not count.
        around: the middle of the scale; None begins it at 0.
    """
    middle = around or 0.0
    distances = torch.cat([(v.detach().float().cpu() - middle).abs().flatten() for v in values])
    distances = distances[distances.isfinite()]
    top = 0.0
    if len(distances):
        # Not torch.quantile, which refuses more than 16 million numbers.
        k = max(1, math.ceil(_COVERED * len(distances)))
        top = float(distances.kthvalue(k).values) or float(distances.max())
    top = top or 1.0
    return Normalize(0.0 if around is None else middle - top, middle + top)


def shape_of(tensor: Tensor) -> str:
    """``64 × 20 × 20``: the shape without the batch."""
    return " × ".join(str(n) for n in tensor.shape[1:])


def to_pixels(figure: Figure) -> Tensor:
    """The drawn figure as uint8 RGB ``[3, H, W]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return rgba.view(height, width, 4)[:, :, :3].permute(2, 0, 1)
