"""What the sections of preflight share while they work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fvcore.common.config import CfgNode

from kd_det.bench.workbench import Side, Workbench
from kd_det.preflight.answers import Answer, Example
from kd_det.preflight.steps import Steps


@dataclass(frozen=True)
class Settings:
    """How far preflight looks.

    Attributes:
        batches: training batches on which terms are measured.
        images: images on which models are asked and evaluated.
        seconds: fewer images and batches are taken where they would need longer than about this
            in all, beside what building the models takes.
        share: of the gradient that a proposed weight gives a term.
    """

    batches: int = 4
    images: int = 16
    seconds: float = 90.0
    share: float = 0.2


@dataclass
class Context:
    """A run, and what earlier sections have found out about it.

    Attributes:
        cfg: the run's config as it is; that of ``bench`` loads data in this process.
        bench: the run.
        settings: how far to look.
        picture: where the teacher's picture goes; None draws none.
        indices: per class of the student the teacher's index of it, -1 where it has none; None
            before the teacher was asked.
        examples: training images that were shown to the teacher.
        answers: what it said, under the input that suits it best.
        seconds_per_image: of an evaluation, by side.
        steps: measured training steps.
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

    @property
    def shares_classes(self) -> bool:
        """Whether the teacher has any of the student's classes, as far as that is known."""
        return self.indices is None or any(index >= 0 for index in self.indices)

    def num_classes(self, side: Side) -> int:
        """Classes of a side's head without a background, whether or not they have names."""
        count: Callable[[CfgNode | None], int] = importlib.import_module(
            f"kd_det.hosts.{self.cfg.HOST}.classes"
        ).num_classes
        return count(self.bench.cfg if side == "student" else self.bench.teacher_cfg)

    @property
    def device(self) -> str:
        """``MODEL.DEVICE``."""
        return str(self.cfg.MODEL.DEVICE)
