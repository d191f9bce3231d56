"""IRG's edges and the graphs of MHGD's heads as matrices.

Shapes: B nodes (images, or RoIs of a detector), H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kd_det.visualize.canvas import SIDES, Grid, common_scale, new_figure

# The share of all nodes below which a group has no name, because names would overlap.
_SMALLEST_NAMED = 0.035


@dataclass(frozen=True)
class Nodes:
    """How to order and name the nodes of a graph.

    Attributes:
        kind: ``"images"`` or ``"RoIs"``.
        groups: ``[B]`` integers; nodes of one group are drawn side by side.
        names: by group; a group may have none.
        by: what the groups are, such as ``"true class"``.
    """

    kind: str
    groups: Tensor
    names: dict[int, str]
    by: str

    def thinned(self, index: Tensor) -> Nodes:
        """The nodes of some indices."""
        return Nodes(self.kind, self.groups[index.cpu()], self.names, self.by)

    @property
    def extents(self) -> list[tuple[int, int, int]]:
        """Group, first index and end of the groups that occur, in the order they are drawn."""
        groups, counts = (x.tolist() for x in self.groups.unique(return_counts=True))
        ends = list(itertools.accumulate(counts))
        return list(zip(groups, [0, *ends[:-1]], ends, strict=True))


def edge_grid(layers: Sequence[tuple[str, Tensor, Tensor]], nodes: Nodes, name: str) -> Figure:
    """IRG's edges: student, teacher and difference, a row per layer.

    Args:
        layers: tap, student's and teacher's edges ``[B, B]``.
        nodes: of all layers.
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
        pairs: taps, student's and teacher's graphs ``[H, B, B]``, whose rows sum to 1.
        nodes: of all graphs.
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
    order = nodes.groups.argsort(stable=True)
    return matrix.detach().float().cpu()[..., order, :][..., order]


def _show_matrix(axes: Axes, matrix: Tensor, nodes: Nodes, **style: Any) -> Any:
    drawn = axes.imshow(matrix.numpy(), interpolation="nearest", **style)
    for _, _, end in nodes.extents[:-1]:
        axes.axhline(end - 0.5, color="grey", linewidth=0.3)
        axes.axvline(end - 0.5, color="grey", linewidth=0.3)
    return drawn


def _name_groups(row: Sequence[Axes], nodes: Nodes) -> None:
    """Write names below every matrix of a row and left of the first."""
    named = [
        (group, start, end)
        for group, start, end in nodes.extents
        if group in nodes.names and end - start >= _SMALLEST_NAMED * len(nodes.groups)
    ]
    centres = [(start + end) / 2 - 0.5 for _, start, end in named]
    names = [nodes.names[group] for group, _, _ in named]
    long = any(len(name) > 2 for name in names)
    for axes in row:
        axes.set_xticks(centres, names, fontsize=6, rotation=90 if long else 0)
        axes.tick_params(length=0)
    row[0].set_yticks(centres, names, fontsize=6)
