"""KCD as a procedure: its config node, what a run calls, and how ``SOLVER`` follows it.

Classifiers count its periods in epochs. Detectors count them in iterations, and ``SOLVER``
describes the run on the whole training set: a period with 90 % of the images takes 90 % of its
iterations, so the run becomes shorter, and its learning-rate steps move with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils.data import Sampler

from kd_det.core.errors import fail
from kd_det.procedures.base import LABELS, Procedure, TrainingLoop, TrainingSet, register
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.sampler import (
    Blends,
    GroupedSampler,
    InfiniteSubsetSampler,
    SubsetSampler,
)
from kd_det.procedures.kcd.selection import kcd_cost

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

# Boxes are labels of the kept image alone. A partner that shows more than this would put objects
# into it that have none.
_MAX_EPSILON = 0.3

logger = logging.getLogger(__name__)


@register
class KCD(Procedure):
    """A training set that shrinks; its state is ``condensation``."""

    name = "KCD"
    defaults: ClassVar[Mapping[str, Any]] = {
        "ENABLED": False,
        "RHO": 0.7,  # share of the points that the last period keeps
        # Epochs between two condensations on classifiers, iterations on detectors.
        "PERIOD": 40,
        "ALPHA": 0.03,  # exponent of the visit count in the score
        "SCHEDULE": "exp",  # or linear
        "POOL": "all",  # or active: dropped points never return
        "EPSILON": 0.3,  # largest share of a blended partner; 0: no blending
        "BLEND": "convex",  # or add
        "EPSILON_RULE": "reference",  # eps * j / L; paper: eps * (j + 1) / L
        "MIN_PER_CLASS": 0,  # images of each class that every period keeps; classifiers only
    }
    chooses_images = True
    reads_uncertainties = True
    old_names = ("kcd", "condensation")

    def __init__(self, cfg: CfgNode, training_set: TrainingSet) -> None:
        arguments = {key.lower(): cfg.KD.KCD[key] for key in self.defaults if key != "ENABLED"}
        epochs, batch = cfg.SOLVER.get("MAX_EPOCH"), cfg.SOLVER.IMS_PER_BATCH
        self.condensation = Condensation(
            training_set.images,
            total=epochs or cfg.SOLVER.MAX_ITER,
            batch=None if epochs else batch,
            labels=training_set.labels,
            **arguments,
        )

    @classmethod
    def check(cls, cfg: CfgNode, offers: frozenset[str]) -> None:
        node, solver = cfg.KD.KCD, cfg.SOLVER
        if LABELS not in offers and node.MIN_PER_CLASS:
            fail(
                expected="KD.KCD.MIN_PER_CLASS 0 on a detector: an image has boxes of many classes",
                received=str(node.MIN_PER_CLASS),
                remedy="set it to 0",
            )
        if LABELS not in offers and node.EPSILON > _MAX_EPSILON:
            fail(
                expected=f"KD.KCD.EPSILON of at most {_MAX_EPSILON} on a detector, whose boxes are "
                "those of the kept image",
                received=str(node.EPSILON),
                remedy=f"use {_MAX_EPSILON}, or 0 for no blending",
            )
        sampler = cfg.DATALOADER.get("SAMPLER_TRAIN", "TrainingSampler")
        if sampler != "TrainingSampler":
            fail(
                expected="DATALOADER.SAMPLER_TRAIN TrainingSampler with KD.KCD, which samples "
                "itself",
                received=sampler,
                remedy="set it to TrainingSampler, or KD.KCD.ENABLED False",
            )
        total = solver.get("MAX_EPOCH") or solver.MAX_ITER
        kcd_cost(node.RHO, total, node.PERIOD, schedule=node.SCHEDULE)

    def planned_config(self, cfg: CfgNode) -> CfgNode:
        state = self.condensation
        if state.batch is None:
            return cfg
        planned = cfg.clone()
        planned.defrost()
        solver = planned.SOLVER
        solver.MAX_ITER = state.planned_steps()
        steps = [state.planned_step(step) for step in solver.STEPS]
        # Detectron2 refuses a step at the end, where rounding can bring the last one.
        solver.STEPS = tuple(step for step in steps if step < solver.MAX_ITER)
        solver.WARMUP_ITERS = state.planned_step(solver.WARMUP_ITERS)
        planned.freeze()
        logger.info(
            "KCD: periods of %s images in %s iterations; %d in all, learning-rate steps at %s",
            state.counts[: len(state.lengths)],
            state.lengths,
            solver.MAX_ITER,
            solver.STEPS,
        )
        return planned

    def periods(self, length: int, images: int) -> list[tuple[int, int]]:
        # The last count is what a condensation after the run would leave.
        return list(zip(self.condensation.lengths, self.condensation.counts, strict=False))

    @property
    def current_period(self) -> int:
        return self.condensation.current_period

    def sampler(
        self, seed: int, rank: int, world: int, groups: Tensor | None = None
    ) -> Sampler[int]:
        state = self.condensation
        if state.batch is not None and groups is not None:
            return GroupedSampler(state, seed, groups, rank, world)
        kind = SubsetSampler if state.batch is None else InfiniteSubsetSampler
        return kind(state, seed, rank, world)

    def image_change(self) -> Blends:
        return Blends(self.condensation)

    def on_step(self, batch: Any, loop: TrainingLoop) -> None:
        self.condensation.update(loop.indices(batch), loop.uncertainties())
        if self.condensation.batch is not None:
            self._step()

    def on_epoch_end(self) -> None:
        if self.condensation.batch is None:
            self.synchronize()
            self._step()

    def _step(self) -> None:
        if (parts := self.condensation.step()) is not None:
            logger.info(
                "KCD period %d: %d images stay, %d were dropped now, %d are blended",
                self.condensation.current_period,
                len(parts.keep),
                len(parts.drop),
                len(self.condensation.recipes),
            )

    def synchronize(self) -> None:
        self.condensation.ledger.merge()

    def state_dict(self) -> dict[str, Any]:
        return self.condensation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.condensation.load_state_dict(state)

    def scalars(self) -> dict[str, float]:
        return {"kcd/images": float(len(self.condensation.active))}

    def cost(self, loop: TrainingLoop) -> tuple[float, float]:
        # The formula counts a first period that is already condensed, which no run has.
        return self.condensation.formula_cost(), self.condensation.measured_cost()
