"""How the weight of a term changes over training steps; not learning rates.

A schedule is a callable ``factor(step) -> float`` that multiplies the term's ``WEIGHT``.
``step`` counts training forwards from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kd_det.core.errors import fail
from kd_det.core.registry import SCHEDULES

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
    return _one


@SCHEDULES.register()
def linear_warmup(iters: int, every: int = 1) -> Schedule:
    """``min(1, step / iters)``, counted from 0, so step 0 has none.

    Args:
        iters: steps until the full weight.
        every: the weight rises once in so many steps. ReviewKD's on CIFAR rises once per epoch, and
            the first epoch has none.
    """
    _check_iters("linear_warmup", iters)
    if every < 1:
        fail(
            expected="schedule linear_warmup to get EVERY >= 1",
            received=f"EVERY {every}",
            remedy="give the iterations of an epoch, or leave it out",
        )
    return partial(_rise, iters=iters, every=every)


@SCHEDULES.register()
def delay(iters: int) -> Schedule:
    """0 for the first ``iters`` steps, then 1: FGFI is off for its first 400 iterations."""
    _check_iters("delay", iters)
    return partial(_switch, iters=iters)


@SCHEDULES.register()
def linear_decay(iters: int) -> Schedule:
    """``max(0, 1 - step / iters)``: from full weight to none."""
    _check_iters("linear_decay", iters)
    return partial(_fall, iters=iters)


# Module-level functions rather than closures, so that a model with its distiller can be pickled.


def _one(step: int) -> float:
    return 1.0


def _rise(step: int, iters: int, every: int = 1) -> float:
    return min(1.0, step // every * every / iters)


def _switch(step: int, iters: int) -> float:
    return float(step >= iters)


def _fall(step: int, iters: int) -> float:
    return max(0.0, 1.0 - step / iters)
