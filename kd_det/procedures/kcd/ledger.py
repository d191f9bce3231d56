"""The ledger of a training set: how uncertain the student has been on each of its points.

KCD (Li et al., "Knowledge Condensation Distillation", ECCV 2022, https://arxiv.org/abs/2207.05409)
ranks a training set by these values; see :mod:`kd_det.procedures.kcd.condensation`.

Shapes: N points of the training set, M rows of logits, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_det.core.distributed import collective_device, world_size
from kd_det.core.errors import fail
from kd_det.core.numerics import descending

_NAMED = 5  # points that an error lists by index
_WAITING = 100  # batches on a GPU that are copied together; every copy makes the host wait


def rank(scores: Tensor, among: Tensor | None = None) -> Tensor:
    """The order of the points that compete, by :func:`descending` score.

    Args:
        scores: ``[N]``, ``inf`` allowed.
        among: indices that compete, ``[A]`` int64; all by default.

    Returns:
        ``[N]`` or ``[A]`` int64.

    Raises:
        KDError: a score is NaN; it would make the order arbitrary.
    """
    _refuse(scores.isnan(), scores, "scores that are numbers")
    order = descending(scores)
    if among is None:
        return order
    competes = torch.zeros_like(scores, dtype=torch.bool)
    competes[among] = True
    return order[competes[order]]


class SampleLedger:
    """The sum of the values seen at each point of a training set, and how often it was visited.

    In a distributed run a rank's values are held back until :meth:`merge`. Without a process
    group they count at once. ``size`` is N.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            fail(
                expected="a training set with at least one point",
                received=f"{size} points",
                remedy="check the data set",
            )
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._count = torch.zeros(size, dtype=torch.int64)
        self._new_sum = torch.zeros_like(self._sum)
        self._new_count = torch.zeros_like(self._count)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._count)

    @property
    def sum(self) -> Tensor:
        """Sum of the values of each point, float64 ``[N]``, on the CPU."""
        self._record()
        return self._sum

    @property
    def count(self) -> Tensor:
        """Number of visits of each point, int64 ``[N]``, on the CPU."""
        self._record()
        return self._count

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Record one visit per entry; a point may occur more than once.

        Values on a GPU are collected over some batches before they are copied and checked.

        Args:
            indices: ``[M]`` integers, positions in the whole training set.
            values: ``[M]``, finite, on any device.

        Raises:
            KDError: lengths differ, an index is outside the training set, or a value is not
                finite. One NaN would make the whole selection arbitrary.
        """
        if indices.shape != values.shape or indices.dim() != 1:
            fail(
                expected="the ledger to get one value per index",
                received=f"indices {tuple(indices.shape)}, values {tuple(values.shape)}",
                remedy="give two vectors of one length",
            )
        self._waiting.append((indices.detach(), values.detach()))
        if values.device.type == "cpu" or len(self._waiting) >= _WAITING:
            self._record()

    def _record(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        indices = torch.cat([i.to("cpu", torch.int64) for i, _ in waiting])
        values = torch.cat([v.to("cpu", torch.float64) for _, v in waiting])
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            fail(
                expected=f"indices of a ledger of {len(self)} points",
                received=f"index {int(indices[outside][0])}",
                remedy="give positions in the whole training set, not in the active part",
            )
        _refuse(~values.isfinite(), values, "finite values for the ledger", indices)
        alone = world_size() == 1
        total, count = (self._sum, self._count) if alone else (self._new_sum, self._new_count)
        total.index_add_(0, indices, values)
        count.index_add_(0, indices, torch.ones_like(indices))

    def merge(self) -> None:
        """Add what every rank has recorded since the last merge. All ranks must call it."""
        self._record()
        if world_size() == 1:
            return
        device = collective_device()
        for total, new in ((self._sum, self._new_sum), (self._count, self._new_count)):
            shared = new.to(device, copy=True)
            dist.all_reduce(shared)
            total += shared.cpu()
            new.zero_()

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add visits that were recorded elsewhere: ``[N]`` sums of values and ``[N]`` counts."""
        self._sum += sums.to(self._sum)
        self._count += counts.to(self._count)

    def means(self) -> Tensor:
        """Mean value of each point over all its visits, float64 ``[N]``; 0 where unvisited."""
        return self.sum / self.count.clamp(min=1)

    def scores(self, alpha: float = 0.03) -> Tensor:
        """``mean * count^alpha``, float64 ``[N]``; ``inf`` where unvisited, so it is kept."""
        scores = self.means() * self.count.to(torch.float64) ** alpha
        return scores.masked_fill(self.count == 0, torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the merged sums and counts; KDError for visits that were not merged."""
        self._record()
        if self._new_count.any():
            fail(
                expected="a merged ledger when it is saved",
                received=f"{int(self._new_count.sum())} visits known to one rank only",
                remedy="call merge() on every rank first",
            )
        return {"sum": self._sum.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved sums and counts; KDError for those of another training set."""
        if len(state["count"]) != len(self):
            fail(
                expected=f"a ledger of {len(self)} points, as this training set has",
                received=f"one of {len(state['count'])} points",
                remedy="resume with the data set the run began with, or start afresh",
            )
        self._waiting = []
        self._sum.copy_(state["sum"])
        self._count.copy_(state["count"])
        self._new_sum.zero_()
        self._new_count.zero_()


def _refuse(bad: Tensor, values: Tensor, expected: str, indices: Tensor | None = None) -> None:
    where = bad.nonzero().flatten()
    if len(where) == 0:
        return
    points = where if indices is None else indices[where]
    named = ", ".join(
        f"{value} at point {point}"
        for point, value in zip(
            points[:_NAMED].tolist(), values[where][:_NAMED].tolist(), strict=True
        )
    )
    more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
    fail(
        expected=expected,
        received=f"{named}{more}",
        remedy="look for what made the student's logits overflow: learning rate, half precision",
    )
