"""The rules of KCD (Li et al., "Knowledge Condensation Distillation", ECCV 2022,
https://arxiv.org/abs/2207.05409) as functions: how many points stay, which, and what it costs.

Shapes: N points of the whole training set, N_t of them in period t = 0, 1, ..., A that compete.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kd_det.core.errors import check_at_least, check_choice, check_share, fail

Schedule = Literal["exp", "linear"]
EpsilonRule = Literal["reference", "paper"]


class Partition(NamedTuple):
    """What one condensation decided. All are int64 indices, best rank first."""

    order: Tensor  #: every point that competed
    keep: Tensor  #: K1, the next active set
    drop: Tensor  #: K0, the ranks just below ``keep``, as many as this condensation removes
    #: K1L, the last of ``keep``, as many as ``drop`` where there are enough; they are blended with
    #: the first of ``drop``, one by one.
    tail: Tensor


def period_lengths(period: int, total: int) -> list[int]:
    """Length of each period of a run of ``total``; the last may be shorter than ``period``."""
    remedy = "set KD.KCD.PERIOD, for example to a sixth of the run"
    check_at_least("KCD's period", period, 1, remedy)
    check_at_least("the length of a run with KCD", total, 1, remedy)
    return [min(period, total - start) for start in range(0, total, period)]


def keep_counts(total: int, rho: float, periods: float, schedule: Schedule = "exp") -> list[int]:
    """N_0 = N, N_1, ..., N_n: how many points each of n periods trains on.

    The last is what a condensation after the last period would leave; no period trains on it.

    Args:
        total: N.
        rho: share of the points in N_n, in (0, 1].
        periods: I / T, length of the run over that of a period; n is this, rounded up.
        schedule: ``"exp"``: ``N_t = round(N * rho^(t/periods))``, the paper's. ``"linear"``:
            ``floor(N * (1-rho) / periods)`` fewer per period, not below ``floor(rho * N)``, the
            released code's (which fixes 6 periods), in its floating-point arithmetic.

    Returns:
        ``n + 1`` counts, none below 1, nor below the share ``rho``.
    """
    _check_rho(rho)
    check_choice("schedule", schedule, Schedule)
    last = math.ceil(periods)
    if schedule == "exp":
        shares = (rho ** min(1.0, t / periods) for t in range(last + 1))
        return [max(1, round(total * share)) for share in shares]
    fewer, least = int(total * (1 - rho) / periods), max(1, int(rho * total))
    return [max(least, total - t * fewer) for t in range(last + 1)]


def partition(
    order: Tensor,
    keep: int,
    previous: int,
    min_per_class: int = 0,
    labels: Tensor | None = None,
) -> Partition:
    """Divide ranked points into those kept, dropped and blended.

    Args:
        order: indices of the competing points, best first, ``[A]`` int64.
        keep: N_t, how many stay.
        previous: N_(t-1), how many were active until now; ranks from ``keep`` up to this one
            are dropped now. Points below were dropped before.
        min_per_class: how many of each class stay in any case, as far as it has competing
            points; a class-balanced data set needs none (0, as in the paper). Ours.
        labels: class of every point, ``[N]`` integers; ``min_per_class`` needs it.
    """
    place = torch.arange(len(order))
    stays = place < keep
    if min_per_class:
        if labels is None:
            fail(
                expected="labels with min_per_class",
                received=f"min_per_class {min_per_class} and no labels",
                remedy="pass the class of every point, or set min_per_class to 0",
            )
        # The best of a class stay: its place within the class is counted from its first entry
        # among the points sorted by class, in rank order.
        grouped = torch.sort(labels[order], stable=True)
        first = torch.searchsorted(grouped.values, grouped.values)
        within = torch.empty_like(place).scatter_(0, grouped.indices, place - first)
        stays |= within < min_per_class
    kept = order[stays]
    dropped = order[~stays & (place < previous)]
    return Partition(order, kept, dropped, kept[max(0, len(kept) - len(dropped)) :])


def blend_ratios(pairs: int, maximum: float = 0.3, rule: EpsilonRule = "reference") -> Tensor:
    """Shares of the partner in each blend, for pairs in rank order.

    Args:
        pairs: L.
        maximum: the largest share; 0.3 in the released code.
        rule: ``"reference"``: ``maximum * j / L`` for j = 0..L-1, so the first is unblended.
            ``"paper"``: ``maximum * (j+1) / L``.

    Returns:
        ``[L]`` float64.
    """
    check_choice("epsilon_rule", rule, EpsilonRule)
    offset = 0 if rule == "reference" else 1
    return maximum * (torch.arange(pairs, dtype=torch.float64) + offset) / max(1, pairs)


def kcd_cost(
    rho: float,
    total: int,
    period: int,
    first_period: Literal["condensed", "full"] = "condensed",
    schedule: Schedule = "exp",
) -> float:
    """Samples processed, as a share of those of a run on the whole training set.

    The published value is that of the defaults: 81.6 % for rho 0.7, 240 epochs, period 40, with a
    first period that is already condensed. A first period on the full set, which the procedure
    has, gives 86.6 %, and with the released code's linear schedule 87.5 %.

    Args:
        rho: share of the points after the last condensation.
        total: length of the run.
        period: length of a period, in the same unit; the last may be shorter.
        first_period: ``"condensed"`` counts periods t = 1, 2, ...; ``"full"`` t = 0, 1, ...
        schedule: share of period t: ``rho^(t T / I)`` or ``1 - (1-rho) t T / I``, at least ``rho``.
    """
    _check_rho(rho)
    check_choice("first_period", first_period, ("condensed", "full"))
    check_choice("schedule", schedule, Schedule)
    lengths = period_lengths(period, total)
    offset = 1 if first_period == "condensed" else 0
    if offset and schedule == "exp" and rho < 1:
        # The closed form of the paper, which is the sum below where the periods are of one length.
        ratio = rho ** (period / total)
        return ratio * (1 - rho) / (1 - ratio) * period / total
    cost = 0.0
    for t, length in enumerate(lengths):
        done = min(1.0, (t + offset) * period / total)
        cost += length * (rho**done if schedule == "exp" else 1 - (1 - rho) * done)
    return cost / total


def _check_rho(rho: float) -> None:
    remedy = "use the paper's 0.7, or 1 to keep all points"
    check_share("KCD's rho, the share of points that are kept", rho, remedy)
