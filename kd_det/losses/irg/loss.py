"""IRG: instance relationship graph (Liu et al., "Knowledge Distillation via Instance Relationship
Graph", CVPR 2019,
https://openaccess.thecvf.com/content_CVPR_2019/html/Liu_Knowledge_Distillation_via_Instance_Relationship_Graph_CVPR_2019_paper.html).
The authors' Caffe layers and prototxt files are the reference; ``docs/methods/irg.md`` gives each
difference with its reason.

Samples are nodes; :mod:`kd_det.losses.irg.graph` defines them, their relations and all shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kd_det.core.distributed import gather_aligned
from kd_det.core.errors import check_at_least, check_choice, check_same_length, fail
from kd_det.core.loss import Arguments, DistillLoss, Specs, check_logits
from kd_det.core.numerics import evenly_spaced, zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.losses.irg.graph import (
    Bridge,
    Reduction,
    check_movement_widths,
    check_rows,
    edge_matrix,
    movement_loss,
    pool_nodes,
    squared_error,
    vertex_loss,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Layout:
    """The order of a loss's taps: first the logits, then the edges, then pairs of movements."""

    loss: str
    vertices: int
    edges: int | None  # None: all that follow the logits

    def __post_init__(self) -> None:
        if self.edges is not None:
            remedy = "give the number of taps after the logits whose edges are compared"
            check_at_least(f"{self.loss} to get EDGES", self.edges, 0, remedy)

    def split(self, taps: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Logits, edges and movements; refuses too few taps and a half of a movement."""
        first_edge = self.vertices
        first_movement = len(taps) if self.edges is None else first_edge + self.edges
        movements = taps[first_movement:]
        too_few = len(taps) <= first_edge if self.edges is None else len(movements) < 2
        if too_few or len(movements) % 2:
            fail(
                expected=f"{self.loss} to get TAPS for {self._wants()}",
                received=f"{len(taps)} tap(s)",
                remedy="pair taps as [student, teacher], in this order",
            )
        return taps[:first_edge], taps[first_edge:first_movement], movements

    def _wants(self) -> str:
        logits = ["the logits"] if self.vertices else []
        if self.edges is None:
            return " and ".join([*logits, "at least one layer of edges"])
        edges = [f"{self.edges} layer(s) of edges"] if self.edges else []
        movements = "pairs of taps, a first and a last layer per movement"
        return ", ".join([*logits, *edges, movements])


class _GraphLoss(DistillLoss):
    """The weighted sum of the losses of vertices, edges and movements that a layout has."""

    def __init__(
        self,
        layout: _Layout,
        weights: tuple[float, float, float],
        reduction: Reduction,
        detach_max: bool,
        bridge: Bridge,
        gather: bool,
        max_nodes: int,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        check_choice("bridge", bridge, Bridge)
        remedy = "use 0 to relate all rows, or for example 256 on detectors"
        check_at_least("MAX_NODES", max_nodes, 0, remedy)
        self.layout = layout
        self.weights = weights
        self.reduction: Reduction = reduction
        self.detach_max = detach_max
        self.bridge: Bridge = bridge
        self.gather = gather
        self.max_nodes = max_nodes
        self._warned = False

    @classmethod
    def _read_layout(cls, given: Arguments) -> _Layout:
        raise NotImplementedError

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Nothing to fill in; refuses taps that the loss cannot read."""
        layout = cls._read_layout(given)
        logits_s, _, movements_s = layout.split(student)
        logits_t, _, movements_t = layout.split(teacher)
        remedy = "use a teacher of the student's classes, or IRG with VERTICES: False"
        check_logits(f"{layout.loss} on its first tap", logits_s, logits_t, remedy)
        bridge = given.get("bridge", "error")
        for side, specs in (("the student", movements_s), ("the teacher", movements_t)):
            for first, last in zip(specs[::2], specs[1::2], strict=True):
                check_movement_widths(side, first.channels, last.channels, bridge)
        return {}

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Weighted sum of the terms. Scalar; see the class for the order of the taps."""
        check_same_length(self.layout.loss, student, teacher)
        terms = (self._vertices, self._edges, self._movements)
        split_s, split_t = self.layout.split(student), self.layout.split(teacher)
        values = [
            # A weight of 0 must not let a non-finite loss or gradient through.
            weight * term(s, t) if weight else zero_in_graph(s)
            for weight, term, s, t in zip(self.weights, terms, split_s, split_t, strict=True)
            if s
        ]
        return torch.stack(values).sum()

    def _vertices(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        s, t = self._nodes(student[0], teacher[0].detach())
        return vertex_loss(s, t, self.reduction)

    def _edges(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        # Student layers with the same teacher tensor share its edges and one exchange of nodes.
        groups: dict[int, list[int]] = {}
        for k, t in enumerate(teacher):
            groups.setdefault(id(t), []).append(k)
        losses = []
        for members in groups.values():
            t, *layers = self._nodes(
                teacher[members[0]].detach(), *(student[k] for k in members), smallest=3
            )
            if len(t) < 2:
                losses.append(zero_in_graph(layers))
                continue
            target = edge_matrix(t, detach_max=self.detach_max)
            for s in layers:
                edges = edge_matrix(s, detach_max=self.detach_max)
                losses.append(squared_error(edges, target, self.reduction, 2 * len(edges)))
        return torch.stack(losses).sum()

    def _movements(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for k in range(0, len(student), 2):
            pair_t = (t.detach() for t in teacher[k : k + 2])
            s_first, s_last, t_first, t_last = self._nodes(*student[k : k + 2], *pair_t, smallest=2)
            pairs = (s_first, s_last), (t_first, t_last)
            loss = movement_loss(*pairs, self.reduction, True, self.detach_max, self.bridge)
            losses.append(loss)
        return torch.stack(losses).sum()

    def _nodes(self, *features: Tensor, smallest: int = 0) -> list[Tensor]:
        """Pooled vectors of the same samples, after ``gather`` and ``max_nodes``."""
        check_rows(*features)
        nodes = [pool_nodes(feature) for feature in features]
        if self.gather:
            nodes = gather_aligned(nodes)
        nodes = [evenly_spaced(rows, self.max_nodes) for rows in nodes]
        if len(nodes[0]) < smallest and not self._warned:
            self._warned = True
            logger.warning(
                "%s relates samples to each other: %d in a batch leave nothing to learn from "
                "(one has no relation, and two have normalised edges of 1 in any network)",
                self.layout.loss,
                len(nodes[0]),
            )
        return nodes


@LOSSES.register("IRG")
class IRGLoss(_GraphLoss):
    """``lambda1 * vertices + lambda2 * edges``.

    Taps: the logits if ``vertices``, then one or more layers whose :func:`edge_loss` is summed.
    Pairing several student layers with the teacher's last one is the paper's one-to-many mode;
    the teacher's edges are computed once.

    Args:
        lambda1: weight of the :func:`vertex_loss`. No released file holds one: 0.1 is the value
            of a widely used PyTorch collection, for its mean reduction (unverified).
        lambda2: weight of each :func:`edge_loss`; 0.005 in the released ``IRG.prototxt``. Its
            layer back-propagates half of the gradient: 0.0025 reproduces its training.
        vertices: whether the first tap is the logits. The released file has none.
        reduction: ``"caffe"`` or ``"mean"``, see the functions. Published weights belong to
            ``"caffe"``.
        detach_max: see :func:`edge_matrix`.
        gather: relate the samples of all ranks, with gradients; the pooled vectors travel.
        max_nodes: above 0, relate at most so many rows, evenly spaced over the batch (after
            gathering): RoIs can be thousands, and edges grow with the square.
    """

    def __init__(
        self,
        lambda1: float = 0.1,
        lambda2: float = 0.005,
        vertices: bool = True,
        reduction: Reduction = "caffe",
        detach_max: bool = True,
        gather: bool = False,
        max_nodes: int = 0,
    ) -> None:
        layout = self._read_layout({"vertices": vertices})
        weights = (lambda1, lambda2, 0.0)
        super().__init__(layout, weights, reduction, detach_max, "error", gather, max_nodes)

    @classmethod
    def _read_layout(cls, given: dict[str, Any]) -> _Layout:
        return _Layout("IRG", int(given.get("vertices", True)), None)


@LOSSES.register("IRG-t")
class IRGMovementLoss(_GraphLoss):
    """``lambda3`` times the sum of :func:`movement_loss` over pairs of layers.

    Taps: first and last layer of the first movement, first and last of the second, and so on.
    Layers of one movement must have one width within each network, not across the two.

    Args:
        lambda3: weight of each pair; 0.005 in the released ``IRG_Transformation.prototxt``.
        bridge: for layers of different width, see :func:`movement`.
        reduction, detach_max, gather, max_nodes: see :class:`IRGLoss`.
    """

    def __init__(
        self,
        lambda3: float = 0.005,
        reduction: Reduction = "caffe",
        detach_max: bool = True,
        bridge: Bridge = "error",
        gather: bool = False,
        max_nodes: int = 0,
    ) -> None:
        layout, weights = self._read_layout({}), (0.0, 0.0, lambda3)
        super().__init__(layout, weights, reduction, detach_max, bridge, gather, max_nodes)

    @classmethod
    def _read_layout(cls, given: dict[str, Any]) -> _Layout:
        return _Layout("IRG-t", 0, 0)


@LOSSES.register("MTK")
class MTKLoss(_GraphLoss):
    """``lambda1 * vertices + lambda2 * edges + lambda3 * movements``: the paper's whole method.

    Taps: the logits, then ``edges`` layers, then pairs of first and last layers as in
    :class:`IRGMovementLoss`. The task loss, part of the paper's sum, is the host's.

    ``edges`` is the number of taps after the logits whose edges are compared; lambda3 and bridge
    are those of :class:`IRGMovementLoss`, all other arguments those of :class:`IRGLoss`.
    """

    def __init__(
        self,
        lambda1: float = 0.1,
        lambda2: float = 0.005,
        lambda3: float = 0.005,
        edges: int = 1,
        reduction: Reduction = "caffe",
        detach_max: bool = True,
        bridge: Bridge = "error",
        gather: bool = False,
        max_nodes: int = 0,
    ) -> None:
        layout, weights = self._read_layout({"edges": edges}), (lambda1, lambda2, lambda3)
        super().__init__(layout, weights, reduction, detach_max, bridge, gather, max_nodes)

    @classmethod
    def _read_layout(cls, given: dict[str, Any]) -> _Layout:
        return _Layout("MTK", 1, given.get("edges", 1))
