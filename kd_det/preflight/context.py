"""Settings of preflight, and the state that its sections share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det.bench.workbench import Side, Workbench
from kd_det.preflight.answers import Answer, Example
from kd_det.preflight.steps import Steps


@dataclass(frozen=True)
class Settings:
    """The extent of preflight.

    Attributes:
        batches: training batches on which terms are measured.
        images: training images for predictions, and validation images for evaluation.
        seconds: fewer images and batches are taken where they would need longer than about this
            in all, without the time to build the models.
        share: of the gradient that a proposed weight gives a term.
    """

    batches: int = 4
    images: int = 16
    seconds: float = 90.0
    share: float = 0.2


@dataclass
class Context:
    """A run, and the results of earlier sections.

    Attributes:
        cfg: the run's config as it is; that of ``bench`` loads data in this process.
        picture: file for the picture of the teacher's predictions; None draws none.
        indices: per class of the student the teacher's index of it, -1 where it has none; None
            before the teacher's section.
        answers: the teacher's predictions for ``examples``, under the input with the best ones.
        seconds_per_image: of an evaluation, by side.
    """

    cfg: CfgNode
    bench: Workbench
    settings: Settings
    picture: Path | None = None
    indices: list[int] | None = None
    examples: list[Example] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    seconds_per_image: dict[Side, float] = field(default_factory=dict)
    steps: Steps | None = None
    steps_failed: bool = False

    @property
    def shares_classes(self) -> bool:
        """Whether the teacher may have any of the student's classes."""
        return self.indices is None or any(index >= 0 for index in self.indices)

    @property
    def device(self) -> str:
        return str(self.cfg.MODEL.DEVICE)
