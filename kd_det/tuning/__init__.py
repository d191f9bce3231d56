"""Greedy search of loss weights: the best value of one config key, then of the next.

The order of IRG's supplement: first the weight of the logits, then, with that one fixed, the weight
of the edges, then that of the movements.
"""

from kd_det.tuning.search import Point, Sweep, greedy_search
from kd_det.tuning.space import Space, make_space
from kd_det.tuning.tune import tune

__all__ = ["Point", "Space", "Sweep", "greedy_search", "make_space", "tune"]
