"""A procedure in one object, as a project would add it: every second image is enough."""

from __future__ import annotations

from typing import ClassVar

from kd_det.procedures import Procedure


class Halve(Procedure):
    """Trains on every ``STEP``-th image of each batch."""

    name = "HALVE"
    defaults: ClassVar = {"ENABLED": False, "STEP": 2}

    def __init__(self, cfg, training_set):
        self.step = cfg.KD.HALVE.STEP
        self.places = list(range(training_set.images))
        self.loaded = self.trained = self.steps = self.epochs = 0

    def on_batch(self, batch, loop):
        kept = loop.select(batch, range(0, loop.size(batch), self.step))
        assert set(loop.indices(kept).tolist()) <= set(self.places)
        self.loaded += loop.size(batch)
        self.trained += loop.size(kept)
        self.batch = kept
        return kept

    def on_step(self, batch, loop):
        assert batch is self.batch
        self.steps += 1

    def scalars(self):
        return {"halve/trained": float(self.trained)}

    def cost(self, loop):
        return 1 / self.step, self.trained / self.loaded

    def state_dict(self):
        return {"loaded": self.loaded, "trained": self.trained, "steps": self.steps}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)
