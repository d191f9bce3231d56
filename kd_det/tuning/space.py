"""The values a search may try for one config key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from kd_det.core.errors import check_choice, fail

SAMPLERS = ("grid", "tpe", "random")


@dataclass(frozen=True)
class Space:
    """Values to try for one key, as :func:`make_space` checks and builds them.

    ``trials`` values from ``low`` to ``high``: by the sampler ``"tpe"`` or ``"random"``, drawn
    evenly in the logarithm with ``log``, or for ``"grid"`` exactly ``values``, in their order.
    """

    low: float
    high: float
    trials: int
    log: bool = False
    sampler: str = "grid"
    values: tuple[float, ...] = ()

    def make_sampler(self, seed: int) -> BaseSampler:
        """Optuna's sampler; unused by a grid, whose values are queued."""
        if self.sampler == "tpe":
            # Optuna draws its first 10 values at random: all there are in a short search.
            return TPESampler(seed=seed, n_startup_trials=min(10, max(1, self.trials // 2)))
        return RandomSampler(seed=seed)


def make_space(
    values: Sequence[float] = (),
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    trials: int = 10,
    sampler: str | None = None,
) -> Space:
    """A checked :class:`Space`, from a list of values or from a range.

    Args:
        values: try exactly these.
        low: smallest value of a range; ``high`` the largest.
        log: space a range evenly in the logarithm.
        trials: number of values from a range.
        sampler: ``"grid"`` (evenly spaced), ``"tpe"`` or ``"random"``. Default: grid for values,
            tpe for a range.

    Raises:
        KDError: both or neither of values and range, values that are not finite or repeat, an
            empty range, a logarithmic range that is not positive, or no trials.
    """
    sampler = sampler or ("grid" if values else "tpe")
    check_choice("sampler", sampler, SAMPLERS)
    if values:
        if low is not None or high is not None or log or sampler != "grid":
            fail(
                expected="either values, which are tried one by one, or a range with a sampler",
                received=f"values {_listed(values)} with a range, log or sampler {sampler}",
                remedy="leave out one of the two",
            )
        if not all(map(math.isfinite, values)) or len(set(values)) < len(values):
            expected = "finite values, each once"
            fail(expected=expected, received=_listed(values), remedy="correct the list")
        return Space(min(values), max(values), len(values), values=tuple(map(float, values)))
    if low is None or high is None:
        fail(
            expected="values to try, or a range with low and high",
            received=f"no values, low {low}, high {high}",
            remedy="for example --values 0.0005 0.005 0.05 0.5, or --low 0.0005 --high 0.5 --log",
        )
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        fail(
            expected="low < high, and above 0 where the range is logarithmic",
            received=f"low {low}, high {high}",
            remedy="correct the range",
        )
    if trials < (2 if sampler == "grid" else 1):
        expected = "at least one trial, of a grid two"
        fail(expected=expected, received=f"{trials}", remedy="give more trials")
    if sampler != "grid":
        return Space(low, high, trials, log, sampler)
    spaced = (np.geomspace if log else np.linspace)(low, high, trials)
    # geomspace gives 0.0049999999999999996 for 0.005.
    return make_space([float(f"{value:.6g}") for value in spaced])


def as_text(value: float) -> str:
    """A value in a command and in a path: short, and the same number when read back."""
    return str(int(value)) if value.is_integer() else repr(value)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
