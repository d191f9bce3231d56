"""How the weight of a term changes over training steps; not learning rates.

A schedule is a callable ``factor(step) -> float`` that multiplies the term's ``WEIGHT``;
``step`` counts training forwards from 0. The registry holds what makes one from the keys of
``SCHEDULE``: a class, as here, or a function that returns a callable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kd_det.core.errors import check_at_least
from kd_det.core.registry import SCHEDULES

Schedule = Callable[[int], float]


def _check_iters(name: str, iters: int) -> None:
    remedy = "give the number of iterations, or use NAME: constant"
    check_at_least(f"schedule {name} to get ITERS", iters, 1, remedy)


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant:
    """Factor 1 at every step (the default)."""

    def __call__(self, step: int) -> float:
        return 1.0


@SCHEDULES.register("linear_warmup")
@dataclass(frozen=True)
class LinearWarmup:
    """``min(1, step / iters)``, which is 0 in step 0, rising once in ``every`` steps.

    ReviewKD's weight on CIFAR rises once per epoch and is 0 in the first.
    """

    iters: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_iters("linear_warmup", self.iters)
        remedy = "give the iterations of an epoch, or leave it out"
        check_at_least("schedule linear_warmup to get EVERY", self.every, 1, remedy)

    def __call__(self, step: int) -> float:
        return min(1.0, step // self.every * self.every / self.iters)


@SCHEDULES.register("delay")
@dataclass(frozen=True)
class Delay:
    """0 for the first ``iters`` steps, then 1: FGFI is off for its first 400 iterations."""

    iters: int

    def __post_init__(self) -> None:
        _check_iters("delay", self.iters)

    def __call__(self, step: int) -> float:
        return float(step >= self.iters)


@SCHEDULES.register("linear_decay")
@dataclass(frozen=True)
class LinearDecay:
    """``max(0, 1 - step / iters)``: from the full weight to 0."""

    iters: int

    def __post_init__(self) -> None:
        _check_iters("linear_decay", self.iters)

    def __call__(self, step: int) -> float:
        return max(0.0, 1.0 - step / self.iters)
