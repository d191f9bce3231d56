"""MHGD: graph distillation with a multi-head attention network (Lee and Song, "Graph-based
Knowledge Distillation by Multi-head Attention Network", BMVC 2019,
https://arxiv.org/abs/1907.02226).

Taps k = 0..M, of C_k channels, each squeezed to one unit vector per sample ``[B, C_k]``. Between
two consecutive taps, front and back, H heads of width ``d = (C_front + C_back) // 2`` read a graph
over the batch's B samples (images or boxes): ``[H, B, B]``, row i a back vector, column j a front
vector.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.adaptors import ConvAdaptor
from kd_det.core.distributed import gather_aligned, gather_rows
from kd_det.core.errors import (
    check_at_least,
    check_channels,
    check_choice,
    check_same_length,
    check_same_shape,
    fail,
)
from kd_det.core.loss import Arguments, Specs, channel_arguments
from kd_det.core.numerics import evenly_spaced, full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.losses.mhgd.pre_training import PreStageLoss
from kd_det.losses.mhgd.singular import student_vectors, teacher_vectors

Reduction = Literal["sum", "mean"]
_NORM_EPS = 1e-6
# A normal distribution cut at two standard deviations keeps this share of its deviation.
_TRUNCATED_STD = 0.87962566

logger = logging.getLogger(__name__)


def mhgd_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "sum") -> Tensor:
    r"""``KL(G_s || G_t)`` between graphs ``G = softmax_j(tanh S)`` of one pair of taps. Scalar.

    The student comes first, unlike in KD, as in the authors' code. Without samples the loss is an
    exact zero in the graph.

    Args:
        student: similarities ``S [H, B, B]``; any floating dtype, computed in at least float32.
        teacher: likewise; no gradient flows into it.
        reduction: ``"sum"`` over heads and rows (published; its weight 1 relies on the
            task-norm clip); ``"mean"`` divides by ``H * B`` (ours).

    Raises:
        KDError: shapes differ, or an unknown reduction.
    """
    check_same_shape("MHGD", student, teacher)
    check_choice("reduction", reduction, Reduction)
    if student.numel() == 0:
        return zero_in_graph([student])
    with no_autocast(student):
        log_s = F.log_softmax(full_precision(student).tanh(), dim=2)
        log_t = F.log_softmax(full_precision(teacher.detach()).tanh(), dim=2)
        total = (log_s.exp() * (log_s - log_t)).sum()
    return total if reduction == "sum" else total / (student.shape[0] * student.shape[1])


def head_drop(heads: int, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """A random mask of the heads of each row while the network learns, ``[H, B, 1]`` of 0 and 1.

    Each head draws a normal number per row and is kept if it exceeds the mean over heads, about
    half of them. A single head is always kept: it cannot exceed its own mean.
    """
    if heads == 1:
        return torch.ones(1, samples, 1)
    noise = torch.randn(heads, samples, 1, generator=generator)
    return (noise > noise.mean(dim=0)).float()


class AttentionModule(nn.Module):
    """The heads between two taps, and the estimator that is used in their training only.

    Matrices are stored ``[in, out]``; column ``dim * H + head`` belongs to ``head``. The argument
    ``batch_statistics``, not the mode of the module, selects the statistics of BatchNorm.
    """

    def __init__(self, front_channels: int, back_channels: int, heads: int) -> None:
        super().__init__()
        width = (front_channels + back_channels) // 2
        self.heads = heads
        self.w_key = _matrix(back_channels, width * heads)
        self.w_query = _matrix(front_channels, width * heads)
        self.bn_key = nn.BatchNorm1d(width * heads)
        self.bn_query = nn.BatchNorm1d(width * heads)
        self.w_value = _matrix(front_channels, width)
        self.bn_value = nn.BatchNorm1d(width)
        self.w_out = _matrix(width * heads, back_channels)
        self.b_out = nn.Parameter(torch.zeros(back_channels))

    def similarity(self, front: Tensor, back: Tensor, batch_statistics: bool = False) -> Tensor:
        """``S[h, i, j] = key_i . query_j`` of head h: unbounded, ``[H, B, B]``.

        Keys are linear in ``back [B, C_back]``, queries in ``front [B, C_front]``, both normalised
        by BatchNorm; ``batch_statistics`` uses this batch and updates the stored statistics.
        """
        key = _batch_norm(self.bn_key, back @ self.w_key, batch_statistics)
        query = _batch_norm(self.bn_query, front @ self.w_query, batch_statistics)
        shape = (front.shape[0], -1, self.heads)
        return torch.einsum("idh,jdh->hij", key.view(shape), query.view(shape))

    def estimate(self, front: Tensor, graph: Tensor) -> Tensor:
        """Back vectors estimated from the front ones: unit vectors ``[B, C_back]``.

        ``graph [H, B, B]`` weights the front vectors; dropped heads are zero. BatchNorm uses batch
        statistics.
        """
        value = F.relu(_batch_norm(self.bn_value, front @ self.w_value, batch_statistics=True))
        explained = torch.einsum("hij,jd->ihd", graph, value).flatten(1)
        return F.normalize(explained @ self.w_out + self.b_out, dim=1, eps=_NORM_EPS)

    def training_loss(self, front: Tensor, back: Tensor, kept: Tensor) -> Tensor:
        """``mean_i(1 - cosine)`` between estimated and true back vectors, all of unit length.

        ``kept`` is a mask from :func:`head_drop`.
        """
        graph = self.similarity(front, back, batch_statistics=True).softmax(dim=2) * kept
        return 1 - (self.estimate(front, graph) * back).sum(dim=1).mean()


class AttentionNetwork(nn.Module):
    """One :class:`AttentionModule` per pair of consecutive taps of the teacher's ``channels``."""

    draws: Tensor

    def __init__(self, channels: Sequence[int], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pairs: Any = nn.ModuleList(
            AttentionModule(front, back, heads) for front, back in pairwise(channels)
        )
        # Seeds the head drop: equal on every process, and continued by a resumed run.
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def similarities(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """``[H, B, B]`` per pair of taps, from one ``[B, C_k]`` per tap; stored statistics."""
        with no_autocast(vectors[0]):
            return [
                pair.similarity(front, back)
                for pair, front, back in zip(self.pairs, vectors[:-1], vectors[1:], strict=True)
            ]

    def training_loss(self, vectors: Sequence[Tensor]) -> Tensor:
        """Sum over pairs of :meth:`AttentionModule.training_loss`. Scalar."""
        generator = torch.Generator().manual_seed(int(self.draws))
        self.draws += 1
        losses = []
        with no_autocast(vectors[0]):
            for pair, front, back in zip(self.pairs, vectors[:-1], vectors[1:], strict=True):
                kept = head_drop(self.heads, len(front), generator).to(front)
                losses.append(pair.training_loss(front, back, kept))
        return torch.stack(losses).sum()


@LOSSES.register("MHGD")
class MHGDLoss(PreStageLoss):
    """:func:`mhgd_loss` between consecutive taps, summed over the pairs.

    The attention network learns from the teacher first (:mod:`kd_det.procedures.pre_stage`) and is
    frozen then. Where student and teacher differ in width, a 1x1 convolution with BatchNorm,
    trained with the student, brings the student's map to the teacher's (ours; the paper needs equal
    widths).

    Args:
        student_channels, teacher_channels: widths of the taps from front to back; at least two.
        heads: H (8 in the paper).
        vectors: number of the student's directions among which the one most like the teacher's is
            chosen (4 in the authors' code).
        reduction: see :func:`mhgd_loss`.
        gather: relate the samples of all processes in one graph.
        max_nodes: above 0, relate at most so many samples per process, evenly spaced: for boxes.
    """

    network: AttentionNetwork

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        heads: int = 8,
        vectors: int = 4,
        reduction: Reduction = "sum",
        gather: bool = False,
        max_nodes: int = 0,
    ) -> None:
        check_same_length("MHGD", student_channels, teacher_channels)
        check_choice("reduction", reduction, Reduction)
        remedy = "list taps from front to back: a pair is a front and a back one"
        check_at_least("MHGD to get a number of taps", len(teacher_channels), 2, remedy)
        check_at_least("MHGD to get heads", heads, 1)
        check_at_least("MHGD to get vectors", vectors, 1)
        check_at_least("MHGD to get max_nodes", max_nodes, 0)
        super().__init__(AttentionNetwork(teacher_channels, heads))
        self.student_channels = list(student_channels)
        self.teacher_channels = list(teacher_channels)
        self.heads = heads
        self.vectors = vectors
        self.reduction: Reduction = reduction
        self.gather = gather
        self.max_nodes = max_nodes
        self.adaptors = nn.ModuleList(
            nn.Identity() if c_s == c_t else ConvAdaptor(c_s, c_t, relu=False)
            for c_s, c_t in zip(student_channels, teacher_channels, strict=True)
        )
        self._warned = False

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Channel widths of both sides."""
        return channel_arguments(student, teacher)

    def fingerprint(self) -> dict[str, Any]:
        """The teacher's widths and the number of heads, which determine the network's shape."""
        return {"loss": "MHGD", "heads": self.heads, "teacher_channels": self.teacher_channels}

    def pre_stage_loss(self, teacher: list[Tensor]) -> Tensor:
        """The error of back vectors that the heads estimate from front ones. Scalar.

        With several processes the graph and BatchNorm always span all of them, so that every
        process has the same network in the end.
        """
        self._check_taps("teacher", teacher, self.teacher_channels)
        vectors = self._split(gather_rows(self._teacher_rows(teacher)))
        if len(vectors[0]) < 2:
            self._warn()
            return zero_in_graph([*vectors, *self.network.parameters()])
        return self.network.training_loss(vectors)

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Transfer loss, summed over pairs of taps. Scalar.

        Each tap is a map ``[B, C_k, H_k, W_k]`` or ``[B, C_k]``; sizes may differ between the two
        sides. For fewer than two samples, which have no relations, it is an exact zero with a
        gradient.
        """
        check_same_length("MHGD", student, teacher)
        self._check_taps("student", student, self.student_channels)
        self._check_taps("teacher", teacher, self.teacher_channels)
        if len(student[0]) != len(teacher[0]):
            fail(
                expected="MHGD to compare the same samples on both sides",
                received=f"{len(student[0])} of the student, {len(teacher[0])} of the teacher",
                remedy="run both models on the same images or boxes",
            )
        if len(student[0]) < 2 and not self.gather:
            self._warn()
            return zero_in_graph([*student, *self.adaptors.parameters()])
        targets = self._teacher_rows(teacher)
        rows = self._student_rows(student, targets)
        if self.gather:
            rows, targets = gather_aligned([rows, targets])
        if len(rows) < 2:
            self._warn()
            return zero_in_graph([rows])
        pairs = zip(
            self.network.similarities(self._split(rows)),
            self.network.similarities(self._split(targets.detach())),
            strict=True,
        )
        return torch.stack([mhgd_loss(s, t, self.reduction) for s, t in pairs]).sum()

    @torch.no_grad()
    def graphs(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The compared graphs ``[H, B, B]`` of student and teacher, one per pair of taps.

        Rows sum to 1. Adaptors in training mode update the statistics of their BatchNorm; use a
        copy where that matters.
        """
        targets = self._teacher_rows(teacher)
        own, others = (
            [s.tanh().softmax(dim=2) for s in self.network.similarities(self._split(rows))]
            for rows in (self._student_rows(student, targets), targets)
        )
        return own, others

    def _teacher_rows(self, teacher: Sequence[Tensor]) -> Tensor:
        """The teacher's vectors of all taps side by side, ``[B, sum C_k]``."""
        vectors = [teacher_vectors(evenly_spaced(t, self.max_nodes)) for t in teacher]
        return torch.cat(vectors, dim=1)

    def _student_rows(self, student: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Likewise for the student, adapted and aligned to the teacher's vectors."""
        if len(student[0]) == 0:
            return targets + zero_in_graph([*student, *self.adaptors.parameters()])
        aligned = []
        for s, adaptor, target in zip(student, self.adaptors, self._split(targets), strict=True):
            maps = evenly_spaced(s, self.max_nodes)
            if isinstance(adaptor, ConvAdaptor):
                maps = adaptor(full_precision(maps if maps.dim() == 4 else maps[:, :, None, None]))
            aligned.append(student_vectors(maps, target, self.vectors))
        return torch.cat(aligned, dim=1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.teacher_channels, dim=1)

    def _check_taps(self, side: str, maps: Sequence[Tensor], channels: Sequence[int]) -> None:
        check_channels("MHGD", side, maps, channels)
        if len({len(tensor) for tensor in maps}) > 1:
            fail(
                expected=f"MHGD to get the same samples at every {side} tap",
                received=f"{[len(m) for m in maps]} samples",
                remedy="tap one value per image at every tap, or one per box",
            )

    def _warn(self) -> None:
        if not self._warned:
            logger.warning("MHGD's loss is zero for fewer than two samples, which have no graph")
            self._warned = True


def _matrix(rows: int, columns: int) -> nn.Parameter:
    """He's initialisation by the outputs, normal and cut at two standard deviations."""
    std = math.sqrt(2 / columns) / _TRUNCATED_STD
    return nn.Parameter(
        nn.init.trunc_normal_(torch.empty(rows, columns), 0, std, -2 * std, 2 * std)
    )


def _batch_norm(bn: Any, x: Tensor, batch_statistics: bool) -> Tensor:
    stored = bn.running_mean, bn.running_var, bn.weight, bn.bias
    return F.batch_norm(x, *stored, batch_statistics, bn.momentum, bn.eps)
