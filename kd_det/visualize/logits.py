"""Pictures of logits: predictions of both sides for RoIs and for whole images.

Shapes: R RoIs of all images of the batch, J logits (background among them), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import nms

from kd_det.core.numerics import full_precision
from kd_det.losses.kd import kd_loss
from kd_det.visualize.canvas import COLOURS, SIDES, new_figure, show_picture
from kd_det.visualize.watch import Pictures

ROIS = 10  # per image: more would hide each other, and so many colours can be told apart
_OVERLAP = 0.5  # IoU above which the more disputed of two RoIs stands for both
_CLASSES = 5
_GREY = 7  # of the colours: too faint on an image
_SHIFTS = (0.2, -0.2)  # of a row's two bars, in the order of SIDES


@dataclass(frozen=True)
class Head:
    """Names of the J logits of a head, and the temperature and activation of their term."""

    labels: Sequence[str]
    temperature: float = 1.0
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[R, J]`` softened probabilities."""
        softened = full_precision(logits.detach()).cpu() / self.temperature
        return softened.softmax(dim=1) if self.activation == "softmax" else softened.sigmoid()

    def divergences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KD's loss of each row alone, ``[R]``."""
        rows = zip(student.detach().cpu(), teacher.detach().cpu(), strict=True)
        losses = [
            kd_loss(s[None], t[None], self.temperature, activation=self.activation) for s, t in rows
        ]
        return torch.stack(losses).float() if losses else torch.zeros(0)

    @property
    def softened(self) -> str:
        """The temperature for a title; empty where it is 1."""
        return "" if self.temperature == 1 else f", temperature {self.temperature:g}"


def head_labels(
    names: Sequence[str] | None, width: int, background: Literal["first", "last"]
) -> list[str]:
    """Names of J = ``width`` logits: of the classes, and of the background if there is one more.

    Numbers where the names of the classes are None or do not fit the number of logits.
    """
    known = list(names or [])
    if len(known) == width:
        return known
    if len(known) != width - 1:
        return [str(k) for k in range(width)]
    return ["background", *known] if background == "first" else [*known, "background"]


def disputed_rois(boxes: Tensor, divergences: Tensor, most: int = ROIS) -> Tensor:
    """Indices of the ``most`` RoIs ``[R, 4]`` with the largest ``[R]`` divergences, none twice."""
    return nms(boxes.float().cpu(), divergences, _OVERLAP)[:most]


def roi_grid(
    pictures: Pictures,
    boxes: Sequence[Tensor],
    student: Tensor,
    teacher: Tensor,
    head: Head,
    name: str,
) -> Figure:
    """The most disputed RoIs of each image and the top class of both sides for each.

    Args:
        pictures: N images.
        boxes: of every image of the batch ``[R_i, 4]``, at least N.
        student, teacher: logits ``[R, J]``, rows in the order of the boxes.
        head: how to read the logits.
        name: of the term.
    """
    figure = new_figure(8.6, 2.7 * len(pictures) + 0.6)
    grid = figure.subplots(len(pictures), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.35]})
    counts = [len(b) for b in boxes]
    colours = [colormaps["tab10"](i) if i != _GREY else "black" for i in range(ROIS)]
    rows = zip(student.split(counts), teacher.split(counts), strict=True)
    for k, (axes, (s, t)) in enumerate(zip(grid, rows, strict=False)):
        losses = head.divergences(s, t)
        chosen = disputed_rois(boxes[k], losses)
        show_picture(axes[0], pictures.images[k])
        axes[0].set(xticks=[], yticks=[])
        axes[0].set_xlabel(f"{len(chosen)} of {len(losses)} RoIs", fontsize=8)
        _number_boxes(axes[0], boxes[k].cpu()[chosen], colours)
        own, other = (head.probabilities(x)[chosen] for x in (s, t))
        _top_classes(axes[1], own, other, losses[chosen], head.labels, colours)
    grid[0][1].set_title("most probable class of each side", fontsize=9)
    title = f"{name}: RoIs on which teacher and student differ most{head.softened}"
    return _finished(figure, grid, title)


def class_grid(
    pictures: Pictures,
    student: Tensor,
    teacher: Tensor,
    head: Head,
    name: str,
    truth: Tensor | None = None,
) -> Figure:
    """The teacher's five most probable classes of each image, with the student's probabilities.

    Args:
        pictures: N images.
        student, teacher: logits ``[M, K]``.
        head: how to read the logits.
        name: of the term.
        truth: true classes ``[M]``.
    """
    figure = new_figure(5.6, 1.7 * len(pictures) + 0.7)
    grid = figure.subplots(len(pictures), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.9]})
    for k, axes in enumerate(grid):
        show_picture(axes[0], pictures.images[k])
        axes[0].set(xticks=[], yticks=[])
        if truth is not None:
            axes[0].set_xlabel(f"true: {head.labels[int(truth[k])]}", fontsize=8)
        s, t = (head.probabilities(x[k : k + 1])[0] for x in (student, teacher))
        top = t.topk(min(_CLASSES, len(t))).indices
        _bar_axes(axes[1], len(top))
        _paired_bars(axes[1], s[top], t[top])
        axes[1].set_yticks(range(len(top)), [head.labels[int(i)] for i in top], fontsize=8)
    return _finished(figure, grid, f"{name}: the teacher's top classes{head.softened}")


def _number_boxes(axes: Axes, boxes: Tensor, colours: Sequence[Any]) -> None:
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        style: Any = {"fill": False, "edgecolor": colours[k], "linewidth": 1.4}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
        axes.text(
            x0, y0, str(k + 1), fontsize=6.5, color="white", va="center", ha="center",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": colours[k], "linewidth": 0},
            clip_on=True,
        )  # fmt: skip


def _top_classes(
    axes: Axes,
    student: Tensor,
    teacher: Tensor,
    losses: Tensor,
    labels: Sequence[str],
    colours: Sequence[Any],
) -> None:
    _bar_axes(axes, ROIS)
    axes.set_xlim(0, 1.45)
    axes.set_xticks([0, 0.5, 1])
    axes.spines["bottom"].set_bounds(0, 1)
    axes.set_yticks(range(len(losses)), [str(i + 1) for i in range(len(losses))])
    for tick, colour in zip(axes.get_yticklabels(), colours, strict=False):
        tick.set(color=colour, fontweight="bold")
    if not len(losses):
        axes.text(0.5, ROIS / 2, "no RoIs", ha="center", fontsize=9)
        return
    tops = [x.max(dim=1) for x in (student, teacher)]
    _paired_bars(axes, tops[0].values, tops[1].values)
    for side, (values, classes), shift in zip(SIDES, tops, _SHIFTS, strict=True):
        for k, (value, label) in enumerate(zip(values.tolist(), classes.tolist(), strict=True)):
            axes.text(
                value + 0.01, k + shift, f"{labels[label]} ({value:.2f})", fontsize=5.8,
                color=COLOURS[side], va="center",
            )  # fmt: skip
    axes.text(1.45, -0.75, "KD", fontsize=6.5, va="bottom", ha="right")
    for k, loss in enumerate(losses.tolist()):
        axes.text(1.45, k, f"{loss:.2f}", fontsize=6.5, va="center", ha="right")


def _bar_axes(axes: Axes, rows: int) -> None:
    """Axes for probabilities, the first row at the top."""
    axes.set(xlim=(0, 1), ylim=(rows - 0.5, -0.6))
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _paired_bars(axes: Axes, student: Tensor, teacher: Tensor) -> None:
    """The teacher's bars above the student's, one pair per row."""
    for side, values, shift in zip(SIDES, (student, teacher), _SHIFTS, strict=True):
        places = [k + shift for k in range(len(values))]
        axes.barh(places, values.tolist(), 0.38, color=COLOURS[side])


def _finished(figure: Figure, grid: Any, title: str) -> Figure:
    """The figure with its title, a legend of the two sides, and a label below the bars."""
    grid[-1][1].set_xlabel("probability", fontsize=8)
    sides = SIDES[::-1]
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[side]) for side in sides]
    figure.legend(handles, sides, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
