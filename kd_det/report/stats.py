"""Statistics over seeds, and the rule by which a gain counts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

DEVIATIONS = 2


@dataclass(frozen=True)
class Gain:
    """The difference between the means of two samples of runs.

    ``noise`` is the larger of the two sample standard deviations, None where a sample has one run;
    a gain counts beyond ``deviations`` times the noise.
    """

    difference: float
    noise: float | None
    deviations: int = DEVIATIONS

    @property
    def counts(self) -> bool:
        """Whether the difference, up or down, is more than noise."""
        return self.noise is not None and abs(self.difference) > self.deviations * self.noise

    @property
    def is_better(self) -> bool:
        return self.counts and self.difference > 0

    @property
    def verdict(self) -> str:
        """``more than 2 sd``, ``lost, more than 2 sd``, ``within noise`` or ``noise unknown``."""
        if self.noise is None:
            return "noise unknown"
        if not self.counts:
            return "within noise"
        return f"{'more than' if self.difference > 0 else 'lost, more than'} {self.deviations} sd"


def gain(
    numbers: Sequence[float], baseline: Sequence[float], deviations: int = DEVIATIONS
) -> Gain | None:
    """The gain of one sample over another, a number per seed each; None where one is empty."""
    if not numbers or not baseline:
        return None
    noise = None
    if len(numbers) > 1 and len(baseline) > 1:
        noise = max(statistics.stdev(numbers), statistics.stdev(baseline))
    difference = statistics.mean(numbers) - statistics.mean(baseline)
    return Gain(difference, noise, deviations)


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """``mean ± sample standard deviation``; of one number the mean, of none ``-``."""
    if not numbers:
        return "-"
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def recovered(
    numbers: Sequence[float], baseline: Sequence[float], teacher: Sequence[float]
) -> float | None:
    """Share of the gap between baseline and teacher that is closed, 1 for all of it.

    None where a sample is empty or the teacher is not better than the baseline.
    """
    if not numbers or not baseline or not teacher:
        return None
    low, high = statistics.mean(baseline), statistics.mean(teacher)
    return (statistics.mean(numbers) - low) / (high - low) if high > low else None
