"""KCD on detectors: a training set that shrinks, with periods counted in iterations.

``SOLVER`` describes the run on the whole training set. A stage with 90 % of the images takes 90 %
of its iterations, so the run becomes shorter, and its learning-rate steps move with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from fvcore.common.config import CfgNode

from kd_det.core.errors import fail
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.run.config import condensation_arguments, is_condensed

# Boxes are labels of the kept image alone. A partner that shows more than this would put objects
# into it that have none.
_MAX_EPSILON = 0.3

logger = logging.getLogger(__name__)


def check_kcd(cfg: CfgNode) -> None:
    """Refuse what KCD cannot do on detectors.

    Raises:
        KDError: classes of images, or partners that show too much.
    """
    if not is_condensed(cfg):
        return
    node = cfg.KD.KCD
    if node.MIN_PER_CLASS:
        fail(
            expected="KD.KCD.MIN_PER_CLASS 0 on a detector: an image has boxes of many classes",
            received=str(node.MIN_PER_CLASS),
            remedy="set it to 0",
        )
    if node.EPSILON > _MAX_EPSILON:
        fail(
            expected=f"KD.KCD.EPSILON of at most {_MAX_EPSILON} on a detector, whose boxes are "
            "those of the kept image",
            received=str(node.EPSILON),
            remedy=f"use {_MAX_EPSILON}, or 0 for no blending",
        )


def build_condensation(cfg: CfgNode, images: int) -> Condensation | None:
    """The condensation ``KD.KCD`` describes for a training set of so many images, or None.

    Raises:
        KDError: an argument outside its range.
    """
    if not is_condensed(cfg):
        return None
    solver = cfg.SOLVER
    described = condensation_arguments(cfg)
    return Condensation(images, total=solver.MAX_ITER, batch=solver.IMS_PER_BATCH, **described)


def planned_config(cfg: CfgNode, condensation: Condensation) -> CfgNode:
    """The config whose ``SOLVER`` counts the iterations that a condensed run really takes."""
    planned = cfg.clone()
    planned.defrost()
    solver = planned.SOLVER
    solver.MAX_ITER = condensation.planned_steps()
    steps = [condensation.planned_step(step) for step in solver.STEPS]
    # Rounding can bring the last one to the end, where it changes nothing; Detectron2 refuses it.
    solver.STEPS = tuple(step for step in steps if step < solver.MAX_ITER)
    solver.WARMUP_ITERS = condensation.planned_step(solver.WARMUP_ITERS)
    planned.freeze()
    logger.info(
        "KCD: stages of %s images in %s iterations; %d in all, learning-rate steps at %s",
        condensation.counts[: len(condensation.lengths)],
        condensation.lengths,
        solver.MAX_ITER,
        solver.STEPS,
    )
    return planned


class StageLoader:
    """Batches of a whole run, from a new iterator of ``loader`` in every stage.

    Loader processes fetch ahead; their iterator would still hold batches of the stage before.

    Args:
        loader: endless, reading the active images of the condensation.
        condensation: stepped by the training loop after every batch.
    """

    def __init__(self, loader: Iterable[Any], condensation: Condensation) -> None:
        self.loader = loader
        self.condensation = condensation

    def __len__(self) -> int:
        return self.condensation.planned_steps()

    def __iter__(self) -> Iterator[Any]:
        while True:
            stage = self.condensation.stage
            for batch in self.loader:
                yield batch
                if self.condensation.stage != stage:
                    break


def costs(condensation: Condensation) -> dict[str, float]:
    """``cost_formula`` (published) and ``cost_measured`` so far, in percent of a whole run.

    The formula counts a first stage that is already condensed, which the procedure does not have.
    Every process must call it.
    """
    condensation.ledger.merge()
    return {
        "cost_formula": 100 * condensation.formula_cost(),
        "cost_measured": 100 * condensation.measured_cost(),
    }


def report_costs(condensation: Condensation) -> dict[str, float]:
    """:func:`costs` of a run that has ended, logged."""
    found = costs(condensation)
    logger.info(
        "KCD: the run took %(cost_measured).2f %% of the images of one on the whole training set "
        "(%(cost_formula).2f %% by the published formula, whose first stage is already condensed)",
        found,
    )
    return found
