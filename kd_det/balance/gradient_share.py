"""Weights that keep the gradient shares of terms near chosen ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_det.balance.measured import MeasuredBalance
from kd_det.core.errors import check_known, fail
from kd_det.core.terms import Term

# Norms are averaged over these iterations or measurements, whichever is longer. A batch's norm is
# off by tens of percent, and early in a run norms change tenfold within some hundred iterations:
# a longer memory would lag behind them.
_MEMORY, _MIN_MEASUREMENTS = 30, 3
# The largest change of a weight at one measurement, except the first.
_MAX_CHANGE = 2.0


class GradientShare(MeasuredBalance):
    r"""Weights from chosen gradient shares.

    With smoothed norms ``n`` of the unweighted gradients, ``S`` the sum of all chosen shares and
    ``U`` the sum of ``w_u n_u`` over the other terms, which keep their weights,

    .. math:: w_i = \frac{s_i}{1 - S} \cdot \frac{n_{task} + U}{n_i}

    gives ``w_i n_i = s_i (n_task + U + sum_j w_j n_j)``; the task and the other terms have the
    rest of 1. The norms' logarithms are averaged with exponentially decaying weights, over 30
    iterations or 3 measurements, and a weight changes at most by a factor of 2 at once.

    A chosen term has its configured ``WEIGHT`` until its first measurement, which is in step 0
    unless its gradient, or the task's, is zero or not finite. Such measurements are skipped.

    Args:
        chosen: the share of each balanced term; positive, and less than 1 in sum.
        period: steps between two measurements.

    Raises:
        KDError: an unknown term, one that is off or has a negative weight, or shares out of range.
    """

    def __init__(
        self, terms: Sequence[Term], chosen: Mapping[str, float], period: int = 10
    ) -> None:
        super().__init__(terms, period)
        check_shares(chosen)
        for name in chosen:
            check_known("term in KD.BALANCE.SHARES", name, self.terms)
            if self.terms[name].weight <= 0:
                fail(
                    expected=f"a WEIGHT above 0 for term '{name}', which has a share",
                    received=f"{self.terms[name].weight:g}",
                    remedy=f"set KD.TERMS.{name}.WEIGHT 1, or drop it from KD.BALANCE.SHARES",
                )
        self.chosen = {name: float(share) for name, share in chosen.items()}
        self._keep = math.exp(-period / max(_MEMORY, _MIN_MEASUREMENTS * period))
        # Of the task and every term: averages of log norms, and the total weight of each average,
        # by which it is divided, so that the first measurements count in full.
        self.level: Tensor
        self.mass: Tensor
        self.weights: Tensor
        self.register_buffer("level", torch.zeros(1 + len(terms)))
        self.register_buffer("mass", torch.zeros(1 + len(terms)))
        self.register_buffer("weights", torch.tensor([term.weight for term in terms]))

    def weight(self, term: Term, factor: float) -> float | Tensor:
        """The adapted weight of a chosen term, the configured one of another."""
        if term.name not in self.chosen:
            return super().weight(term, factor)
        return self.weights[self.place[term.name]] * factor

    def update(self, norms: Tensor, losses: Tensor, factors: Mapping[str, float]) -> None:
        """Smooth the norms and solve for the weights."""
        before = self.mass.clone()
        usable = torch.isfinite(norms) & (norms > 0)
        log = torch.where(usable, norms, torch.ones_like(norms)).log().to(self.level)
        for average, value in ((self.level, log), (self.mass, torch.ones_like(log))):
            average.copy_(torch.where(usable, average.lerp(value, 1 - self._keep), average))
        known = self.mass > 0
        smooth = torch.where(known, (self.level / self.mass.clamp(min=1e-9)).exp(), 0.0)
        rest = smooth[0].clone()
        for name, term in self.terms.items():
            if name not in self.chosen:
                rest += smooth[1 + self.place[name]] * abs(term.weight * factors[name])
        free = 1 - sum(self.chosen.values())
        for name, share in self.chosen.items():
            place = self.place[name]
            old = self.weights[place].clone()
            new = share / free * rest / smooth[1 + place]
            bounded = new.clamp(old / _MAX_CHANGE, old * _MAX_CHANGE)
            new = torch.where((before[0] > 0) & (before[1 + place] > 0), bounded, new)
            self.weights[place] = torch.where(known[0] & known[1 + place], new, old)


def check_shares(chosen: Mapping[str, float]) -> None:
    """Refuse shares that are not between 0 and 1, or that leave the task none."""
    for name, share in chosen.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and 0 < share < 1):
            fail(
                expected=f"KD.BALANCE.SHARES.{name} to be a number between 0 and 1",
                received=repr(share),
                remedy="give the part of the gradient that this term shall have, such as 0.3",
            )
    total = sum(chosen.values())
    if total >= 1:
        fail(
            expected="KD.BALANCE.SHARES to sum to less than 1: the rest is the task's",
            received=f"{' + '.join(f'{share:g}' for share in chosen.values())} = {total:g}",
            remedy="lower them, for example to 0.5 in all",
        )
