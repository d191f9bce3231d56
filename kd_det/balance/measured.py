"""The balance that measures gradients and keeps the configured weights; base of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_det.balance.shares import TASK, GradientReport, gradient_norms, shares
from kd_det.core.balance import Balance
from kd_det.core.errors import fail
from kd_det.core.numerics import full_precision
from kd_det.core.terms import Term

logger = logging.getLogger(__name__)

_PATIENCE = 10  # measurements after which a term that none of them could measure is reported


class MeasuredBalance(Balance):
    """Configured weights, and every ``period`` steps a measurement of all gradients.

    The first measurement is in step 0.

    Raises:
        KDError: a term called ``task``, or one that is clipped to the task.
    """

    def __init__(self, terms: Sequence[Term], period: int = 10) -> None:
        super().__init__()
        self.period = period
        self.terms = {term.name: term for term in terms}
        self.place = {term.name: i for i, term in enumerate(terms)}
        self._measurements = 0
        self._unmeasured = {term.name for term in terms if term.weight}
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
        """Measure, adapt the weights, and return the shares that they give.

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
        report = self._measure(losses, shared)
        self._report_unmeasured(report.norms)
        with torch.no_grad():
            values = torch.stack([loss.detach().double() for loss in losses.values()])
            self.update(torch.stack(list(report.norms.values())), values, factors)
            weights = {n: self.weight(term, factors[n]) for n, term in self.terms.items()}
            found = shares(report, weights)
        # Under a gradient scaler a step may overflow; the scaler then skips it.
        return found if all(torch.isfinite(share) for share in found.values()) else {}

    def update(self, norms: Tensor, losses: Tensor, factors: Mapping[str, float]) -> None:
        """Adapt the weights.

        ``norms`` are those of the gradients of the task and the unweighted terms, ``losses`` their
        values, ``[1 + terms]``; ``factors`` are given by term name.
        """

    def _measure(
        self, losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter]
    ) -> GradientReport:
        """Norms of unweighted losses, computed from weighted ones, which suit half precision.

        The gradient of a raw loss may overflow or vanish: it can be thousands of times larger or
        smaller than the trained one.
        """
        scales: dict[str, float | Tensor] = {TASK: 1.0}
        scales |= {name: self._scale(term) for name, term in self.terms.items()}
        report = gradient_norms({n: loss * scales[n] for n, loss in losses.items()}, shared)
        norms = {name: (norm / scales[name]).abs() for name, norm in report.norms.items()}
        return GradientReport(norms, report.cosines)

    def _scale(self, term: Term) -> float | Tensor:
        """The weight of a term at full schedule, or 1 where that is 0: norms are divided by it."""
        weight = self.weight(term, 1.0)
        if isinstance(weight, Tensor):
            weight = weight.detach()
            return torch.where(weight == 0, torch.ones_like(weight), weight)
        return weight or 1.0

    def _report_unmeasured(self, norms: Mapping[str, Tensor]) -> None:
        """Warn once of terms whose gradient no early measurement found positive and finite."""
        self._measurements += 1
        if not self._unmeasured or self._measurements > _PATIENCE:
            return
        found = zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)
        self._unmeasured -= {name for name, norm in found if math.isfinite(norm) and norm > 0}
        if self._measurements == _PATIENCE:
            for name in sorted(self._unmeasured):
                logger.warning(
                    "KD.BALANCE could not measure term '%s' in any of its first %d measurements: "
                    "its gradient on the shared parameters is zero or not finite. As long as that "
                    "holds, no balance of gradients moves its weight",
                    name,
                    _PATIENCE,
                )


def check_signs(terms: Sequence[Term], scheme: str) -> None:
    """Refuse negative weights, for schemes that learn a positive factor."""
    for term in terms:
        if term.weight < 0:
            fail(
                expected=f"no negative weights with KD.BALANCE.NAME {scheme}",
                received=f"KD.TERMS.{term.name}.WEIGHT {term.weight:g}",
                remedy=f"give a positive WEIGHT, or 0 to leave '{term.name}' off",
            )


def _total(losses: Mapping[str, Tensor], like: Tensor) -> Tensor:
    parts = [full_precision(loss) for loss in losses.values()]
    return torch.stack(parts).sum() if parts else torch.zeros_like(like, requires_grad=False)
