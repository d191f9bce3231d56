"""KCD: a training set that shrinks to the points the student still learns from (Li et al.,
"Knowledge Condensation Distillation", ECCV 2022, https://arxiv.org/abs/2207.05409).

It is no loss: it wraps whatever terms a run has. After every period the points are ranked by the
ledger, the best stay, and the weakest of those are blended with the best of the dropped ones.

Shapes: N points of the whole training set, N_t of them in period t = 0, 1, ... Points are
identified by their index in the whole training set, always.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kd_det.core.distributed import collective_device, world_size
from kd_det.core.errors import check_at_least, check_choice, check_share, fail
from kd_det.procedures.kcd.ledger import SampleLedger, rank
from kd_det.procedures.kcd.selection import (
    EpsilonRule,
    Partition,
    Schedule,
    blend_ratios,
    kcd_cost,
    keep_counts,
    partition,
    period_lengths,
)

Pool = Literal["all", "active"]
Blend = Literal["convex", "add"]

logger = logging.getLogger(__name__)


class Condensation:
    """The resumable state of a KCD run: which points are active, which are blended, and when next.

    A loop calls :meth:`update` for every batch and :meth:`step` after every epoch (or iteration).
    In a distributed run every rank holds one and calls the same methods at the same times; all
    ranks then hold the same selection.

    Periods count epochs, or, with ``batch``, iterations *of a run on the whole training set*: a
    period that keeps 90 % of the points also takes 90 % of the iterations.

    Args:
        size: N, the number of points of the whole training set.
        rho: share of the points after the last condensation, in (0, 1]; the paper's 0.7.
        period: T, length of a period; 40 in the released commands (of 240 epochs).
        total: I, length of the run without condensation.
        alpha: exponent of the visit count in the score; 0.03 (paper).
        schedule: of :func:`kd_det.procedures.kcd.selection.keep_counts`.
        pool: ``"all"``: dropped points compete again (paper and code). ``"active"``: sets are
            nested.
        epsilon: largest share of the partner in a blend, 0 to 1; 0.3 (code). 0: no blending.
        blend: mode of :func:`kd_det.procedures.kcd.sampler.blend_images`.
        epsilon_rule: of :func:`kd_det.procedures.kcd.selection.blend_ratios`.
        min_per_class: points of each class that stay in any case, which needs ``labels``, ``[N]``.
        batch: images per iteration over all ranks where periods count iterations, else None.

    Attributes:
        active: indices of the points of this period, int64 ``[N_t]``.
        current_period: t, from 0.
        position: epochs or iterations done in this period.
        counts: the planned N_0, N_1, ...
        lengths: epochs or iterations of each period.
        partners: for each point the index of its partner, or -1, int64 ``[N]``.
        epsilons: for each point the partner's share, float64 ``[N]``. Both live in shared
            memory and change in place, so that loader processes that stay alive see it.

    Raises:
        KDError: an argument outside its range.
    """

    def __init__(
        self,
        size: int,
        rho: float,
        period: int,
        total: int,
        alpha: float = 0.03,
        schedule: Schedule = "exp",
        pool: Pool = "all",
        epsilon: float = 0.3,
        blend: Blend = "convex",
        epsilon_rule: EpsilonRule = "reference",
        min_per_class: int = 0,
        labels: Tensor | Sequence[int] | None = None,
        batch: int | None = None,
    ) -> None:
        check_choice("pool", pool, Pool)
        check_choice("blend", blend, Blend)
        check_choice("epsilon_rule", epsilon_rule, EpsilonRule)
        if not math.isfinite(alpha):
            fail(
                expected="KCD's alpha to be a finite number",
                received=str(alpha),
                remedy="use the paper's 0.03",
            )
        check_share("KCD's epsilon, a partner's share", epsilon, "use the code's 0.3", zero=True)
        check_at_least("KCD's min_per_class", min_per_class, 0)
        check_at_least(
            "KCD's batch",
            1 if batch is None else batch,
            1,
            "give the images per iteration, or None for epochs",
        )
        self.ledger = SampleLedger(size)
        self.rho, self.period, self.total = rho, period, total
        self.alpha, self.pool, self.epsilon = alpha, pool, epsilon
        self.blend, self.epsilon_rule = blend, epsilon_rule
        self.min_per_class, self.batch = min_per_class, batch
        self.labels = _check_labels(labels, size) if min_per_class else None
        self._full_lengths = period_lengths(period, total)
        self.counts = keep_counts(size, rho, total / period, schedule)
        self.lengths = self._full_lengths
        if batch is not None:
            planned = zip(self.lengths, self.counts, strict=False)
            self.lengths = [max(1, round(length * kept / size)) for length, kept in planned]
        self.active = torch.arange(size)
        self.current_period = 0
        self.position = 0
        self.partners = torch.full((size,), -1).share_memory_()
        self.epsilons = torch.zeros(size, dtype=torch.float64).share_memory_()
        if len(self.lengths) == 1:
            logger.warning(
                "KCD never condenses: its period %d is not shorter than the run, %d", period, total
            )

    def __len__(self) -> int:
        return len(self.ledger)

    @property
    def recipes(self) -> dict[int, tuple[int, float]]:
        """``{index: (partner, epsilon)}`` of the points that are blended in this period."""
        blended = (self.partners >= 0).nonzero().flatten()
        partners, epsilons = self.partners[blended].tolist(), self.epsilons[blended].tolist()
        recipes = zip(partners, epsilons, strict=True)
        return dict(zip(blended.tolist(), recipes, strict=True))

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Record the student's entropies ``[M]`` at the points ``[M]`` of a batch.

        Call it once for every sample that is trained on: the visits are also what
        :meth:`measured_cost` counts.
        """
        self.ledger.update(indices, values)

    def step(self) -> Partition | None:
        """One epoch or iteration is done; condenses if a period ends with it."""
        self.position += 1
        at_end = self.position == self.lengths[self.current_period]
        # After the last period there is nothing to do.
        return self.condense() if at_end and self.current_period + 1 < len(self.lengths) else None

    def condense(self) -> Partition:
        """Merge the ledger, rank, select, write the recipes, and begin the next period."""
        self.ledger.merge()
        among = self.active if self.pool == "active" else None
        order = _of_rank_0(rank(self.ledger.scores(self.alpha), among))
        keep = self.counts[self.current_period + 1]
        parts = partition(order, keep, len(self.active), self.min_per_class, self.labels)
        pairs = len(parts.tail) if self.epsilon > 0 else 0
        self.partners.fill_(-1)
        self.epsilons.zero_()
        self.partners[parts.tail[:pairs]] = parts.drop[:pairs]
        ratios = blend_ratios(len(parts.drop), self.epsilon, self.epsilon_rule)
        self.epsilons[parts.tail[:pairs]] = ratios[:pairs]
        self.active = parts.keep
        self.current_period += 1
        self.position = 0
        return parts

    def planned_steps(self) -> int:
        """Epochs or iterations of the whole run; the length of a learning-rate schedule."""
        return sum(self.lengths)

    def planned_step(self, step: int) -> int:
        """The epoch or iteration that corresponds to ``step`` of a run without condensation."""
        elapsed = 0
        for full, length in zip(self._full_lengths, self.lengths, strict=True):
            if step <= full:
                return elapsed + round(step * length / full)
            step -= full
            elapsed += length
        return elapsed + step

    @property
    def samples_seen(self) -> int:
        """Samples trained on so far, over all ranks, as of the last merge of the ledger."""
        return int(self.ledger.count.sum())

    def formula_cost(self) -> float:
        """:func:`kcd_cost` of this run, as published."""
        return kcd_cost(self.rho, self.total, self.period)

    def planned_cost(self) -> float:
        """The cost this run will have; ``min_per_class`` and padded epochs add a little.

        Unlike the formula's, its first period is full and its counts are integers.
        """
        if self.batch is not None:
            return self.planned_steps() / self.total
        samples = sum(n * kept for n, kept in zip(self.lengths, self.counts, strict=False))
        return samples / (self.total * len(self))

    def measured_cost(self) -> float:
        """Samples seen so far, as a share of those of a whole run without condensation."""
        return self.samples_seen / (self.total * (self.batch or len(self)))

    def state_dict(self) -> dict[str, Any]:
        """Everything the future selections depend on.

        Raises:
            KDError: the ledger holds unmerged visits; call ``ledger.merge()`` on every rank first.
        """
        numbers = ("current_period", "position", "counts", "lengths")
        return {
            "ledger": self.ledger.state_dict(),
            **{name: getattr(self, name).clone() for name in ("active", "partners", "epsilons")},
            **{name: copy.copy(getattr(self, name)) for name in numbers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved.

        Raises:
            KDError: it belongs to a training set of another length, or to another plan.
        """
        for name in ("counts", "lengths"):
            own, saved = getattr(self, name), list(state[name])
            # Another length of the data set changes the counts too; the ledger's message names it.
            if own != saved and len(state["ledger"]["count"]) == len(self):
                fail(
                    expected=f"KCD's state to have this run's period {name}, {own}",
                    received=f"{saved}",
                    remedy="resume with the same rho, period, schedule, batch and length of run",
                )
        self.ledger.load_state_dict(state["ledger"])
        self.active = state["active"].clone()
        self.partners.copy_(state["partners"])
        self.epsilons.copy_(state["epsilons"])
        # Versions before the periods had this name saved them as stages.
        period = state["current_period"] if "current_period" in state else state["stage"]
        self.current_period, self.position = int(period), int(state["position"])


def _of_rank_0(order: Tensor) -> Tensor:
    """Rank 0's order on every rank: libraries may differ in the last digit of a score."""
    if world_size() == 1:
        return order
    shared = order.to(collective_device())
    dist.broadcast(shared, src=0)
    return shared.cpu()


def _check_labels(labels: Tensor | Sequence[int] | None, size: int) -> Tensor:
    if labels is None or len(labels) != size:
        fail(
            expected=f"min_per_class to come with labels of all {size} points",
            received="no labels" if labels is None else f"{len(labels)} labels",
            remedy="pass the class of every point, or set min_per_class to 0",
        )
    return torch.as_tensor(labels, dtype=torch.int64)
