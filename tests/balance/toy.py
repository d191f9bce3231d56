"""Losses whose gradients a test chooses, for the balances of gradients."""

from __future__ import annotations

import torch
from torch import nn

from kd_det.core.terms import Term


def terms(**weights):
    return [Term(name, "KD", (("x", "x"),), weight) for name, weight in weights.items()]


class Toy:
    """Losses whose gradients have the norms a test asks for."""

    def __init__(self, size=50, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def loss(self, norm, value=1.0):
        shape = self.parameter.shape
        direction = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return value + (self.parameter * direction / direction.norm() * norm).sum()

    def observe(self, balance, step, factors=None, task=1.0, values=None, **norms):
        """One step; task may be a number of losses of one norm each."""
        values = values or {}
        raw = {name: self.loss(norm, values.get(name, 1.0)) for name, norm in norms.items()}
        own = {"loss_cls": self.loss(task, values.get("task", 1.0))}
        factors = factors or dict.fromkeys(raw, 1.0)
        return balance.observe(raw, factors, own, [self.parameter], step)
