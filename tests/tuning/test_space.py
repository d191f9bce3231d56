"""What may be tried for a key."""

from __future__ import annotations

import math

import pytest

from kd_det.tuning.space import as_text, make_space


def test_a_grid_over_a_range_is_evenly_spaced():
    assert make_space(low=0, high=3, trials=4, sampler="grid").values == (0, 1, 2, 3)
    space = make_space(low=0.0005, high=0.5, log=True, trials=4, sampler="grid")
    assert space.values == (0.0005, 0.005, 0.05, 0.5)  # exactly: they name folders


@pytest.mark.parametrize(
    ("values", "options", "part"),
    [
        ([], {}, "--values 0.0005"),
        ([1.0], {"low": 1}, "either values"),
        ([1.0], {"sampler": "tpe"}, "either values"),
        ([1.0, 1.0], {}, "each once"),
        ([math.nan], {}, "finite values"),
        ([], {"low": 2, "high": 1}, "low < high"),
        ([], {"low": 0, "high": 1, "log": True}, "above 0"),
        ([], {"low": 1, "high": 2, "trials": 0}, "at least one trial"),
        ([], {"low": 1, "high": 2, "sampler": "gird"}, "did you mean 'grid'?"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(refuses, values, options, part):
    with refuses(part):
        make_space(values, **options)


@pytest.mark.parametrize("value", [1.0, 0.0005, 5e-05, 0.1 + 0.2, -3.0])
def test_a_value_as_text_reads_back_the_same(value):
    assert float(as_text(value)) == value
