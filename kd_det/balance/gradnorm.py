"""GradNorm: weights that make all losses train at similar rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_det.balance.measured import MeasuredBalance, check_signs
from kd_det.core.distributed import mean_over_ranks
from kd_det.core.errors import fail
from kd_det.core.terms import Term


class GradNorm(MeasuredBalance):
    """GradNorm (Chen et al. 2018, https://arxiv.org/abs/1711.02257): similar training rates.

    With ``G_i`` the gradient norm of weighted loss ``i``, ``L_i`` its value and ``r_i`` the ratio
    ``L_i(t) / L_i(0)`` divided by the mean of these ratios, the paper's weights descend
    ``sum_i |G_i - mean(G) r_i ** alpha|`` with the targets held constant. The task, the sum of
    its losses, and each term are the losses; the paper's initial weight of 1 is the configured
    ``WEIGHT``.

    Differences from the paper: a weight steps by the sign of that derivative in its logarithm, so
    that it stays positive and the scale of a loss does not matter (the paper uses an optimiser on
    the weights themselves and leaves its choice open); the weights are divided by that of the
    task, which stays 1, instead of being renormalised to their number; gradients are compared on
    the whole backbone instead of its last layer, and every ``period`` steps instead of in all.

    Args:
        period: steps between two measurements. 1 is the paper's.
        alpha: strength of the force towards equal rates; 0 equalises the norms. The paper uses
            1.5 where losses differ much and 0.12 where they are alike.
        lr: relative step of a weight, 0.025 in the paper.

    Raises:
        KDError: a negative weight, alpha or step.
    """

    def __init__(
        self, terms: Sequence[Term], period: int = 10, alpha: float = 1.5, lr: float = 0.025
    ) -> None:
        super().__init__(terms, period)
        check_signs(terms, "gradnorm")
        for key, value in (("ALPHA", alpha), ("LR", lr)):
            if not (math.isfinite(value) and value >= 0):
                fail(
                    expected=f"KD.BALANCE.{key} to be a finite number of at least 0",
                    received=str(value),
                    remedy="use the paper's ALPHA 1.5 and LR 0.025",
                )
        self.alpha, self.lr = alpha, lr
        # Logarithms of the terms' weights relative to the configured ones; and the first losses,
        # the task's in front, 0 before a first.
        self.log_weights: Tensor
        self.first: Tensor
        self.register_buffer("log_weights", torch.zeros(len(terms)))
        self.register_buffer("first", torch.zeros(1 + len(terms)))

    def weight(self, term: Term, factor: float) -> float | Tensor:
        """The learned weight."""
        return self.log_weights[self.place[term.name]].exp() * term.weight * factor

    def update(self, norms: Tensor, losses: Tensor, factors: Mapping[str, float]) -> None:
        """One step of the weights."""
        losses = mean_over_ranks(losses)
        configured = norms.new_tensor([1.0, *(term.weight for term in self.terms.values())])
        learned = torch.cat([self.log_weights.new_zeros(1), self.log_weights]).exp()
        norms = norms * configured * learned
        usable = torch.isfinite(norms) & (norms > 0) & torch.isfinite(losses) & (losses > 0)
        new = usable & (self.first == 0)
        self.first.copy_(torch.where(new, losses.to(self.first), self.first))
        rates = torch.where(usable, losses / self.first, torch.zeros_like(losses))
        norms = torch.where(usable, norms, torch.zeros_like(norms))
        count = usable.sum().clamp(min=1)
        relative = rates / (rates.sum() / count)
        steps = torch.sign(norms - norms.sum() / count * relative**self.alpha)
        moved = self.log_weights - self.lr * (steps[1:] - steps[0]).to(self.log_weights)
        self.log_weights.copy_(torch.where(usable[1:] & usable[0], moved, self.log_weights))
