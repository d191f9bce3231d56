"""Pictures of relations: IRG's edges and the graphs of MHGD's heads, as matrices.

Shapes: B nodes (images, or RoIs on detectors), H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kd_det.visualize.canvas import SIDES, Grid, common_scale, new_figure

_SMALLEST_NAMED = 0.035  # of all nodes: names of smaller groups would overlap


@dataclass(frozen=True)
class Nodes:
    """How to order and name the nodes of a graph.

    Attributes:
        kind: what a node is, ``"images"`` or ``"RoIs"``.
        groups: ``[B]`` integers; nodes of one group stand side by side.
        names: of each group that occurs; groups without one stay unnamed.
        by: what the groups are, ``"true class"``.
    """

    kind: str
    groups: Tensor
    names: dict[int, str]
    by: str

    def thinned(self, index: Tensor) -> Nodes:
        """Only these nodes."""
        return Nodes(self.kind, self.groups[index.cpu()], self.names, self.by)

    @property
    def order(self) -> Tensor:
        """Indices ``[B]`` that put groups side by side."""
        return self.groups.argsort(stable=True)

    @property
    def extents(self) -> tuple[Tensor, Tensor]:
        """The groups that occur, in this order, and where each ends."""
        found, counts = self.groups.unique(sorted=True, return_counts=True)
        return found, counts.cumsum(0)


def edge_grid(layers: Sequence[tuple[str, Tensor, Tensor]], nodes: Nodes, name: str) -> Figure:
    """IRG's edges: student, teacher and difference, a row per layer.

    Args:
        layers: tap, student's and teacher's edges ``[B, B]``.
        nodes: the B nodes.
        name: of the term.
    """
    figure = new_figure(9.6, 3.3 * len(layers) + 1.2)
    grid = Grid(figure, len(layers), [*SIDES, "teacher − student"])
    values = [(_ordered(s, nodes), _ordered(t, nodes)) for _, s, t in layers]
    scale = common_scale(*(x for pair in values for x in pair))
    signed = common_scale(*(t - s for s, t in values), around=0)
    for axes, (tap, _, _), (s, t) in zip(grid.axes, layers, values, strict=True):
        for cell, side in zip(axes, (s, t), strict=False):
            drawn = _show_matrix(cell, side, nodes, norm=scale, cmap="viridis")
        lacking = _show_matrix(axes[2], t - s, nodes, norm=signed, cmap="RdBu_r")
        _name_groups(axes, nodes)
        axes[0].set_ylabel(tap, fontsize=9)
    grid.colour_bar(drawn, 0, 1, "one scale for both sides")
    grid.colour_bar(lacking, 2, 2, "difference")
    figure.suptitle(
        f"{name}: IRG's edges between {len(nodes.groups)} {nodes.kind}, ordered by {nodes.by}; "
        "squared distances over their maximum",
        fontsize=10,
    )
    return figure


def head_grid(pairs: Sequence[tuple[str, Tensor, Tensor]], nodes: Nodes, name: str) -> Figure:
    """Graphs of MHGD's heads: per pair of taps a row of the student and one of the teacher.

    Args:
        pairs: taps, student's and teacher's graphs ``[H, B, B]``, rows summing to 1.
        nodes: the B nodes.
        name: of the term.
    """
    heads = pairs[0][1].shape[0]
    figure = new_figure(1.45 * heads + 0.4, 3.1 * len(pairs) + 1.2)
    grid = Grid(figure, 2 * len(pairs), [f"head {h + 1}" for h in range(heads)])
    count = len(nodes.groups)
    values = [[count * _ordered(x, nodes) for x in sides] for _, *sides in pairs]
    scale = common_scale(*(x for sides in values for x in sides), around=1)
    for k, (tap, *_) in enumerate(pairs):
        for side, graphs, axes in zip(SIDES, values[k], grid.axes[2 * k : 2 * k + 2], strict=True):
            axes[0].set_ylabel(f"{tap}\n{side}", fontsize=9)
            for cell, graph in zip(axes, graphs, strict=True):
                drawn = _show_matrix(cell, graph, nodes, norm=scale, cmap="RdBu_r")
    grid.colour_bar(drawn, 0, heads - 1, "edge over the mean edge, one scale for all")
    figure.suptitle(
        f"{name}: MHGD's graphs of {count} {nodes.kind}, ordered by {nodes.by}; rows are back, "
        "columns front vectors",
        fontsize=10,
    )
    return figure


def _ordered(matrix: Tensor, nodes: Nodes) -> Tensor:
    order = nodes.order
    return matrix.detach().float().cpu()[..., order, :][..., order]


def _show_matrix(axes: Axes, matrix: Tensor, nodes: Nodes, **style: Any) -> Any:
    drawn = axes.imshow(matrix.numpy(), interpolation="nearest", **style)
    _, ends = nodes.extents
    for end in ends[:-1].tolist():
        axes.axhline(end - 0.5, color="grey", linewidth=0.3)
        axes.axvline(end - 0.5, color="grey", linewidth=0.3)
    return drawn


def _name_groups(row: Sequence[Axes], nodes: Nodes) -> None:
    """Names below every matrix of a row and left of its first."""
    groups, ends = nodes.extents
    starts = ends - ends.diff(prepend=ends.new_zeros(1))
    places = [
        ((start + end) / 2 - 0.5, nodes.names[group])
        for group, start, end in zip(groups.tolist(), starts.tolist(), ends.tolist(), strict=True)
        if group in nodes.names and end - start >= _SMALLEST_NAMED * len(nodes.groups)
    ]
    centres, names = [place for place, _ in places], [name for _, name in places]
    long = any(len(name) > 2 for name in names)
    for axes in row:
        axes.set_xticks(centres, names, fontsize=6, rotation=90 if long else 0)
        axes.tick_params(length=0)
    row[0].set_yticks(centres, names, fontsize=6)
