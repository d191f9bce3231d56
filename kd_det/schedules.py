"""How the weight of a term changes over training steps; not learning rates.

A schedule is a callable ``factor(step) -> float`` that multiplies the term's ``WEIGHT``.
``step`` counts training forwards from 0.
"""

from __future__ import annotations

from collections.abc import Callable

from kd_det.checks import fail
from kd_det.registry import SCHEDULES

Schedule = Callable[[int], float]


def _check_iters(name: str, iters: int) -> None:
    if iters < 1:
        fail(
            expected=f"schedule {name} to get ITERS >= 1",
            received=f"ITERS {iters}",
            remedy="give the number of iterations, or use NAME: constant",
        )


@SCHEDULES.register()
def constant() -> Schedule:
    """Factor 1 at every step (the default)."""
    return lambda step: 1.0


@SCHEDULES.register()
def linear_warmup(iters: int) -> Schedule:
    """``min(1, step / iters)``: ReviewKD's warm-up on CIFAR counts from 0, so step 0 has none."""
    _check_iters("linear_warmup", iters)
    return lambda step: min(1.0, step / iters)


@SCHEDULES.register()
def delay(iters: int) -> Schedule:
    """0 for the first ``iters`` steps, then 1: FGFI is off for its first 400 iterations."""
    _check_iters("delay", iters)
    return lambda step: float(step >= iters)


@SCHEDULES.register()
def linear_decay(iters: int) -> Schedule:
    """``max(0, 1 - step / iters)``: from full weight to none."""
    _check_iters("linear_decay", iters)
    return lambda step: max(0.0, 1.0 - step / iters)
