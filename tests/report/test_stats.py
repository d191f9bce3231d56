"""A gain is one when it exceeds the noise of the seed, and never otherwise."""

from __future__ import annotations

import math

import pytest

from kd_det.report.stats import gain, recovered, spread


@pytest.mark.parametrize(
    ("numbers", "baseline", "difference", "verdict"),
    [
        # Sample deviations 1 and 0: the larger of them is the noise.
        ([31.0, 32.0, 33.0], [30.0, 30.0], 2.0, "within noise"),
        ([31.1, 32.1, 33.1], [30.0, 30.0], 2.1, "more than 2 sd"),
        ([27.0, 28.0, 29.0], [30.1, 30.1], -2.1, "lost, more than 2 sd"),
        ([31.0], [30.0, 30.0], 1.0, "noise unknown"),
        ([31.0, 31.0], [30.0], 1.0, "noise unknown"),
        ([30.0, 30.0], [30.0, 30.0], 0.0, "within noise"),
    ],
)
def test_a_gain_counts_beyond_two_of_the_larger_deviations(numbers, baseline, difference, verdict):
    found = gain(numbers, baseline)
    assert math.isclose(found.difference, difference)
    assert found.verdict == verdict
    assert found.counts == ("2 sd" in verdict)


def test_how_many_deviations_count_is_a_choice():
    assert gain([31.1, 32.1, 33.1], [30.0, 30.0], deviations=3).verdict == "within noise"


def test_nothing_is_gained_over_nothing():
    assert gain([], [30.0]) is None
    assert gain([30.0], []) is None


@pytest.mark.parametrize(
    ("numbers", "share"), [([25.0], 0.5), ([20.0], 0.0), ([30.0, 34.0], 1.2), ([], None)]
)
def test_the_share_of_the_gap_goes_from_baseline_to_teacher(numbers, share):
    assert recovered(numbers, [20.0], [30.0]) == share


def test_a_teacher_below_the_baseline_leaves_no_gap():
    assert recovered([25.0], [30.0], [20.0]) is None


def test_the_spread_is_the_sample_deviation():
    assert spread([1.0, 3.0]) == f"2.00 ± {math.sqrt(2):.2f}"
    assert spread([1.0]) == "1.00"
    assert spread([]) == "-"
