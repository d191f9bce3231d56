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

from kd_det.balance.build import SCHEMES, build_balance
from kd_det.balance.gradient_share import GradientShare
from kd_det.balance.gradnorm import GradNorm
from kd_det.balance.measured import MeasuredBalance
from kd_det.balance.uncertainty import Uncertainty
from kd_det.core.balance import Balance

__all__ = [
    "SCHEMES",
    "Balance",
    "GradNorm",
    "GradientShare",
    "MeasuredBalance",
    "Uncertainty",
    "build_balance",
]
