"""What a balance is, and the one that only looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_det.checks import fail
from kd_det.losses.base import full_precision
from kd_det.shares import TASK, gradient_norms, shares
from kd_det.terms import Term


class Balance(nn.Module):
    """Constant weights, and what every scheme has.

    Args:
        terms: the terms of the run.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.configured = {term.name: term.weight for term in terms}

    def observe(
        self,
        raw: Mapping[str, Tensor],
        factors: Mapping[str, float],
        task: Mapping[str, Tensor] | None,
        shared: Sequence[nn.Parameter] | None,
        step: int,
    ) -> dict[str, Tensor]:
        """Look at one training step before its terms are weighted.

        Every process calls it in every step.

        Args:
            raw: unweighted losses by term name, in the graph.
            factors: what each term's schedule says in this step.
            task: the student's own losses by name.
            shared: parameters to compare gradients on.
            step: counts training steps from 0.

        Returns:
            The shares of ``"task"`` and of each term, with the weights of this step; nothing in
            steps without a measurement.
        """
        return {}

    def weight(self, name: str, factor: float) -> float | Tensor:
        """All that the loss of a term is multiplied by, without a graph."""
        return self.configured[name] * factor

    def weigh(self, name: str, raw: Tensor, factor: float) -> Tensor:
        """The loss of a term as it is trained."""
        return raw * self.weight(name, factor)


class MeasuredBalance(Balance):
    """Constant weights, and every ``period`` steps a measurement of all gradients.

    Args:
        terms: the terms of the run.
        period: steps between two measurements; the first is in step 0.

    Raises:
        KDError: a term called ``task``, or one that is clipped to the task.
    """

    def __init__(self, terms: Sequence[Term], period: int = 10) -> None:
        super().__init__(terms)
        self.period = period
        self.place = {term.name: i for i, term in enumerate(terms)}
        for term in terms:
            if term.name == TASK:
                fail(
                    expected="a term of another name: shares of the task's own losses are called "
                    f"'{TASK}'",
                    received=f"term '{TASK}'",
                    remedy="rename the entry in KD.TERMS",
                )
            if term.clip != "none":
                fail(
                    expected=f"KD.BALANCE.NAME none with term '{term.name}', whose gradient is "
                    "limited in another way",
                    received=f"CLIP {term.clip}",
                    remedy=f"set KD.TERMS.{term.name}.CLIP none, or KD.BALANCE.NAME none",
                )

    def observe(
        self,
        raw: Mapping[str, Tensor],
        factors: Mapping[str, float],
        task: Mapping[str, Tensor] | None,
        shared: Sequence[nn.Parameter] | None,
        step: int,
    ) -> dict[str, Tensor]:
        """Measure, adapt the weights, and say which shares they give.

        Raises:
            KDError: the caller of the distiller gives no task losses or shared parameters.
        """
        if step % self.period:
            return {}
        if task is None or shared is None:
            fail(
                expected="the task's losses and the shared parameters, for KD.BALANCE",
                received="a model that gives the distiller neither",
                remedy="pass task and shared to Distiller.forward, or set KD.BALANCE.NAME none",
            )
        losses = {TASK: _total(task, next(iter(raw.values()))), **raw}
        report = gradient_norms(losses, shared)
        with torch.no_grad():
            values = torch.stack([loss.detach().double() for loss in losses.values()])
            self.update(torch.stack(list(report.norms.values())), values, factors)
            weights = {name: self.weight(name, factors[name]) for name in raw}
            found = shares(report, weights)
        # Under a gradient scaler a step may overflow; it is skipped, and there is nothing to say.
        return found if all(torch.isfinite(share) for share in found.values()) else {}

    def update(self, norms: Tensor, losses: Tensor, factors: Mapping[str, float]) -> None:
        """Adapt the weights.

        Args:
            norms: gradient norms of the task and the unweighted terms, ``[1 + terms]``.
            losses: their values, likewise.
            factors: what each term's schedule says in this step.
        """


def check_signs(weights: Mapping[str, float], scheme: str) -> None:
    """Refuse negative weights, for schemes that learn a positive factor.

    Raises:
        KDError: naming the first of them.
    """
    for name, weight in weights.items():
        if weight < 0:
            fail(
                expected=f"no negative weights with KD.BALANCE.NAME {scheme}",
                received=f"KD.TERMS.{name}.WEIGHT {weight:g}",
                remedy=f"give a positive WEIGHT, or 0 to leave '{name}' off",
            )


def _total(losses: Mapping[str, Tensor], like: Tensor) -> Tensor:
    parts = [full_precision(loss) for loss in losses.values()]
    return torch.stack(parts).sum() if parts else torch.zeros_like(like, requires_grad=False)
