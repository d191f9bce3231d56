"""Pictures of maps: features, AT's attention and FGFI's masks.

Shapes: the first N images of a batch of M are drawn. A student's maps are ``[M, C_s, h, w]``, the
teacher's ``[M, C_t, h', w']``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.numerics import full_precision
from kd_det.losses.at import attention_map
from kd_det.visualize.canvas import (
    SIDES,
    Grid,
    common_scale,
    new_figure,
    shape_of,
    show_map,
    show_picture,
)
from kd_det.visualize.watch import Pictures

_CELL = 2.0  # inches
_MASK_RGBA = (1.0, 0.35, 0.0, 0.55)


def feature_grid(pictures: Pictures, student: Tensor, teacher: Tensor, tap: str) -> Figure:
    """Mean activation, ``mean_c |F_c|``, of both sides on one colour scale, beside the image.

    Args:
        pictures: N images.
        student, teacher: their maps at the tap.
        tap: its name, for the title.
    """
    maps = [
        full_precision(x[: len(pictures)].detach()).abs().mean(dim=1).cpu()
        for x in (student, teacher)
    ]
    columns = [f"{side}, {shape_of(x)}" for side, x in zip(SIDES, (student, teacher), strict=True)]
    grid = _map_grid(pictures, columns)
    scale = common_scale(*maps)
    for row, axes in enumerate(grid.axes):
        show_picture(axes[0], pictures.images[row])
        for cell, side in zip(axes[1:], maps, strict=True):
            drawn = show_map(cell, side[row], pictures, row, norm=scale, cmap="viridis")
    grid.colour_bar(drawn, 1, 2, "one scale for both sides")
    grid.figure.suptitle(f"Features at {tap}: mean of |activation| over channels", fontsize=10)
    return grid.figure


def attention_grid(
    pictures: Pictures, student: Tensor, teacher: Tensor, tap: str, p: float = 2
) -> Figure:
    """AT's attention maps over the image, at the smaller height and width, and their difference.

    Args:
        pictures: N images.
        student, teacher: their maps at the tap.
        tap: its name, for the title.
        p: the exponent; see :func:`kd_det.losses.at.attention_map`.
    """
    sides = [full_precision(x[: len(pictures)].detach()) for x in (student, teacher)]
    size = (min(x.shape[2] for x in sides), min(x.shape[3] for x in sides))
    s, t = (
        attention_map(F.adaptive_avg_pool2d(x, size), p).unflatten(1, size).cpu() for x in sides
    )
    grid = _map_grid(pictures, [*SIDES, "teacher − student"])
    scale, signed = common_scale(s, t), common_scale(t - s, around=0)
    layers = ((s, scale, "inferno"), (t, scale, "inferno"), (t - s, signed, "RdBu_r"))
    for row, axes in enumerate(grid.axes):
        show_picture(axes[0], pictures.images[row])
        drawn = []
        for cell, (maps, norm, cmap) in zip(axes[1:], layers, strict=True):
            show_picture(cell, pictures.images[row], grey=True)
            drawn.append(show_map(cell, maps[row], pictures, row, norm=norm, cmap=cmap, alpha=0.65))
    grid.colour_bar(drawn[0], 1, 2, "one scale for both sides")
    grid.colour_bar(drawn[2], 3, 3, "difference")
    grid.figure.suptitle(
        f"Attention at {tap}: mean of |activation|$^{{{p:g}}}$ over channels, "
        f"length 1 per image, {size[0]} × {size[1]}",
        fontsize=10,
    )
    return grid.figure


def mask_grid(
    pictures: Pictures, masks: Mapping[str, Tensor], boxes: Sequence[Tensor], name: str
) -> Figure:
    """FGFI's cells over the image, level by level, with the ground truth.

    Args:
        pictures: N images.
        masks: bool ``[M, h, w]`` by tap.
        boxes: per image ``[G, 4]`` pixels of the padded batch.
        name: of the term.
    """
    titles = [f"{tap}, {shape_of(mask)}" for tap, mask in masks.items()]
    grid = _map_grid(pictures, titles)
    for row, axes in enumerate(grid.axes):
        show_picture(axes[0], pictures.images[row])
        for cell, mask in zip(axes[1:], masks.values(), strict=True):
            cells = mask[row].cpu()
            show_picture(cell, pictures.images[row], grey=True)
            show_map(cell, cells[:, :, None] * torch.tensor(_MASK_RGBA), pictures, row)
            cell.set_xlabel(f"{int(cells.sum())} cells", fontsize=8)
        for cell in axes:
            for x0, y0, x1, y1 in boxes[row].tolist():
                box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="deepskyblue")
                cell.add_patch(box)
    grid.figure.suptitle(f"{name}: cells where FGFI imitates; ground truth in blue", fontsize=10)
    return grid.figure


def _map_grid(pictures: Pictures, columns: Sequence[str]) -> Grid:
    h, w = pictures.images[0].shape[1:]
    height = _CELL * min(max(h / w, 0.5), 2) * len(pictures) + 1.0
    figure = new_figure(_CELL * (len(columns) + 1), height)
    return Grid(figure, len(pictures), ["image", *columns])
