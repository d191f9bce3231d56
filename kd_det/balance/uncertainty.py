"""Uncertainty weighting: weights learned as homoscedastic uncertainties of the terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_det.balance.measured import MeasuredBalance, check_signs
from kd_det.core.terms import Term


class Uncertainty(MeasuredBalance):
    """Uncertainty weighting (Kendall et al. 2018, https://arxiv.org/abs/1705.07115).

    A term becomes ``exp(-s) * WEIGHT * loss + s`` with a learned log variance ``s`` that starts
    at 0; its fixed point is a weighted loss of 1. The task stays at weight 1, so that terms are
    weighed against it and not its own losses against each other, and the factor 1/2 that the
    paper has for regression is left to ``WEIGHT``. The log variances belong to the optimiser of
    the student, weight decay included. The logged loss of a term contains ``s``.

    Where a loss is exactly zero, as without positives, ``s`` gets no gradient: nothing but the
    penalty would act on it, and the weight of such a term would grow without bound.

    Shares are measured every ``period`` steps for the log only. Negative weights are refused.
    """

    def __init__(self, terms: Sequence[Term], period: int = 10) -> None:
        super().__init__(terms, period)
        check_signs(terms, "uncertainty")
        self.log_variances = nn.Parameter(torch.zeros(len(terms)))

    def weight(self, term: Term, factor: float) -> float | Tensor:
        """The learned weight."""
        precision = torch.exp(-self.log_variances[self.place[term.name]].detach())
        return precision * term.weight * factor

    def weigh(self, term: Term, raw: Tensor, factor: float) -> Tensor:
        """The weighted loss with the penalty of its log variance."""
        log_variance = self.log_variances[self.place[term.name]]
        precision = torch.exp(-log_variance) * term.weight
        penalty = torch.where(raw.detach() != 0, log_variance, log_variance.detach())
        return (raw * precision + penalty) * factor
