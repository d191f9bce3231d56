"""A training that takes no time, and the config the tests of the search share."""

from __future__ import annotations

import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/digits_torchvision/reviewkd_kd_frcnn.yaml")
FIRST, SECOND = "KD.TERMS.review.WEIGHT", "KD.TERMS.roi_logits.WEIGHT"
DECADES = [0.01, 0.1, 1.0, 10.0]


class Toy:
    """A quadratic in the logarithms: of two weights ``a`` and ``b``, b's best depends on a's."""

    def __init__(self, noise=0.0):
        self.calls = []
        self.noise = noise

    def __call__(self, values, seed, folder):
        assert folder.name == f"seed_{seed}"
        self.calls.append((dict(values), seed))
        a = math.log10(values.get("a", values.get(FIRST, 100)))
        b = math.log10(values.get("b", values.get(SECOND, 100)))
        return 80 - (a + 1) ** 2 - (b - a) ** 2 / 100 + self.noise * seed


class Quiet:
    def __init__(self):
        self.begun, self.runs = [], 0

    def begin(self, key, done):
        self.begun.append((key, done))

    def finish(self, runs):
        self.runs += runs
