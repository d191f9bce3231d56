"""What holds for every config that is shipped, whatever its host."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import kd_det.losses  # noqa: F401  registers them
from kd_det.core.registry import LOSSES
from kd_det.run.config import load_yaml

FOLDER = Path(__file__).resolve().parents[1] / "configs"
# What divides the sum of a loss, by the name of the argument.
REDUCTIONS = {"reduction", "mode", "normalizer"}


def arguments(name):
    return inspect.signature(LOSSES.get(name).__init__).parameters.keys()


def test_every_loss_names_its_reduction():
    assert [name for name, _ in LOSSES if not REDUCTIONS & arguments(name)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_weight_stands_beside_its_reduction(path):
    """Published weights mean nothing without it."""
    terms = load_yaml(str(path)).get("KD", {}).get("TERMS", {})
    for name, term in terms.items():
        if "LOSS" in term:
            named = REDUCTIONS & arguments(term["LOSS"])
            assert [key for key in named if key.upper() not in term] == [], name
