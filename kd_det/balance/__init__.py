"""Adaptive weights of terms (``KD.BALANCE``); published methods keep them constant.

* ``none``: the configured weights.
* ``measure``: likewise, and the gradient shares of :mod:`kd_det.balance.shares` are logged.
* ``gradient_share``: weights that give each named term a chosen share of the gradient.
* ``gradnorm``: weights learned so that all losses train at similar rates.
* ``uncertainty``: weights learned as the homoscedastic uncertainty of each term.

In all of them the task's losses stay the stock ones, the ``SCHEDULE`` of a term multiplies on top,
and a term whose ``WEIGHT`` is 0 stays off. The state of a scheme is in buffers and parameters,
``distiller.balance.*`` of a checkpoint, so that a resumed run continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kd_det.balance.gradient_share import GradientShare, check_shares
from kd_det.balance.gradnorm import GradNorm
from kd_det.balance.measured import MeasuredBalance
from kd_det.balance.uncertainty import Uncertainty
from kd_det.core.balance import Balance
from kd_det.core.errors import check_at_least, check_known, fail
from kd_det.core.terms import Term

__all__ = [
    "SCHEMES",
    "Balance",
    "GradNorm",
    "GradientShare",
    "MeasuredBalance",
    "Uncertainty",
    "build_balance",
]

SCHEMES: dict[str, Callable[[Any, Sequence[Term]], Balance | None]] = {
    "none": lambda node, terms: None,
    "measure": lambda node, terms: MeasuredBalance(terms, node.PERIOD),
    "gradient_share": lambda node, terms: GradientShare(
        terms, {t.name: node.SHARES[t.name] for t in terms if t.name in node.SHARES}, node.PERIOD
    ),
    "gradnorm": lambda node, terms: GradNorm(terms, node.PERIOD, node.ALPHA, node.LR),
    "uncertainty": lambda node, terms: Uncertainty(terms, node.PERIOD),
}
"""Every scheme by the name a config uses (``KD.BALANCE.NAME``)."""

# Schemes that set terms against the task.
_NEED_TASK = ("gradient_share", "gradnorm")


def build_balance(cfg: Any, terms: Sequence[Term]) -> Balance | None:
    """The scheme that ``cfg.KD.BALANCE`` names; None for constant weights.

    Shares of terms that are not among ``terms``, the active ones, are left out, so that stages may
    switch terms off.

    Raises:
        KDError: an unknown scheme or term, a period below 1, shares that are not between 0 and 1 or
            leave none to the task, a scheme that ``KD.TASK_WEIGHT`` 0 excludes, a clipped term, or
            a weight that the scheme cannot adapt.
    """
    node = cfg.KD.BALANCE
    check_known("KD.BALANCE.NAME", node.NAME, SCHEMES)
    remedy = "give the number of iterations between two measurements"
    check_at_least("KD.BALANCE.PERIOD", node.PERIOD, 1, remedy)
    if node.NAME in _NEED_TASK and not cfg.KD.TASK_WEIGHT:
        fail(
            expected=f"a task loss for KD.BALANCE.NAME {node.NAME}, which sets terms against it",
            received="KD.TASK_WEIGHT 0",
            remedy="set KD.BALANCE.NAME none where the terms train alone",
        )
    if node.NAME == "gradient_share":
        for name in node.SHARES:
            check_known("term in KD.BALANCE.SHARES", name, cfg.KD.TERMS)
        check_shares(node.SHARES)
        if not node.SHARES:
            fail(
                expected="KD.BALANCE.SHARES to name a term, for gradient_share",
                received="none",
                remedy="write for example SHARES: {review: 0.3}, or NAME: measure to see them",
            )
    return SCHEMES[node.NAME](node, terms)
