"""``DistilledClassifier``: any classifier, trained alone, under a teacher, or with a booster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.balance import Balance
from kd_det.bench.looks import evaluating
from kd_det.core.checkpoint import name_keys_as_student
from kd_det.core.class_map import ClassMap, map_logits
from kd_det.core.distiller import Distiller, tap_specs
from kd_det.core.errors import fail
from kd_det.core.numerics import zero_in_graph
from kd_det.core.taps import TapRecorder
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import Term, parse_terms
from kd_det.hosts.classification.taps import LOGITS, resolve_taps
from kd_det.procedures.joint import Booster
from kd_det.procedures.unix import MixedBatch, unix_task_loss

CONTEXT = ("targets",)
TASK_LOSS, BOOSTER_LOSS = "loss_cls", "loss_booster"
_BOOSTER = "booster"


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel, of RGB images in 0..1, that a model expects."""

    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in 0..1 as the model expects them."""
        mean = images.new_tensor(list(self.mean)).view(-1, 1, 1)
        std = images.new_tensor(list(self.std)).view(-1, 1, 1)
        return (images - mean) / std


@dataclass(frozen=True)
class Distillation:
    """What turns a classifier's training into a distillation."""

    terms: Sequence[Term] | Mapping[str, Mapping[str, Any]]
    teacher: FrozenTeacher | None = None  #: None beside a booster
    teacher_statistics: Statistics | None = None  #: by default the student's
    booster: Booster | None = None  #: trains jointly and takes the teacher's place (Rocket)
    task_weight: float = 1.0  #: of the cross-entropy beside the terms; 0 leaves it out
    report_period: int = 1000
    class_map: ClassMap | None = None  #: of the teacher's ``logits``, if they need one
    balance: Balance | None = None  #: compares gradients on the whole student


class DistilledClassifier(nn.Module):
    """A stock classifier and what trains it.

    The stock forward runs unchanged under hooks. Without ``distillation`` this is plain training
    with cross-entropy. ``state_dict()`` has the student's own keys and, under ``distiller.``,
    what the losses learn and a booster.

    Args:
        student: returns logits ``[N, K]``.
        statistics: what it expects of its pixels.
        size: height and width of the images, to learn the shapes of the taps.
        distillation: None for the plain student.

    Attributes:
        logits: the student's, of the last training step, detached ``[N, K]``.
    """

    def __init__(
        self,
        student: nn.Module,
        statistics: Statistics,
        size: int,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.statistics = statistics
        self.distiller: Distiller | None = None
        self.teacher: FrozenTeacher | None = None
        self.logits: Tensor | None = None
        self.class_map: ClassMap | None = None
        name_keys_as_student(self)
        if distillation is not None:
            self._attach(distillation, size)

    def _attach(self, plan: Distillation, size: int) -> None:
        terms = list(parse_terms(plan.terms) if isinstance(plan.terms, Mapping) else plan.terms)
        _check(terms, plan)
        self.teacher = plan.teacher
        self.class_map = plan.class_map
        self._task_weight = plan.task_weight
        other = _net_beside(plan)
        self._taps = resolve_taps(self.student, (s for term in terms for s, _ in term.taps))
        self._other_taps = resolve_taps(other, (t for term in terms for _, t in term.taps))
        self._teacher_statistics = plan.teacher_statistics or self.statistics
        example = torch.zeros(2, len(self.statistics.mean), size, size)
        with torch.random.fork_rng(devices=[]):
            # The booster is no submodule yet.
            with evaluating(self), evaluating(plan.booster or self):
                _, student, teacher, _ = self._record(example, example, plan.booster)
            mine, others = tap_specs(student), tap_specs(teacher)
            self.distiller = Distiller(
                terms, mine, others, CONTEXT, plan.report_period, plan.balance
            )
        self._clipped = {term.name for term in terms if term.clip == "task_norm"}
        if plan.booster is not None:
            # In the checkpoint beside the adaptors, and stripped with them.
            self.distiller.add_module(_BOOSTER, plan.booster)

    def forward(self, images: Tensor, targets: Tensor | MixedBatch | None = None) -> Any:
        """As a classifier, or one training step.

        Args:
            images: ``[N, 3, H, W]`` RGB in 0..1.
            targets: classes ``[N]``, or a batch that UNIX has mixed.

        Returns:
            Logits ``[N, K]`` in evaluation, the losses by name in training.
        """
        x = self.statistics.normalize(images)
        if not self.training:
            return self.student(x)
        assert targets is not None
        if self.distiller is None:
            logits = self.student(x)
            self.logits = logits.detach()
            return {TASK_LOSS: _task_loss(logits, targets)}
        return self._distil(images, x, targets)

    @property
    def clipped_terms(self) -> set[str]:
        """Names of terms whose gradient is clipped to the task's."""
        return self._clipped if self.distiller is not None else set()

    def teacher_captures(self, images: Tensor) -> dict[str, Any]:
        """The teacher's tapped tensors of images in 0..1, without a gradient graph.

        Its ``logits`` are those of the student's classes.
        """
        assert self.teacher is not None
        self.teacher.follow(images)
        recorder = TapRecorder(self.teacher, self._other_taps)
        with recorder.recording():
            self.teacher(self._teacher_statistics.normalize(images))
        captures = recorder.read()
        recorder.release()
        if LOGITS in captures:
            captures[LOGITS] = map_logits(captures[LOGITS], self.class_map)
        return captures

    def _distil(self, images: Tensor, x: Tensor, targets: Tensor | MixedBatch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        assert self.distiller is not None
        booster = self.distiller._modules.get(_BOOSTER)
        logits, student, teacher, boosted = self._record(images, x, booster)
        self.logits = logits.detach()
        if self._task_weight:
            loss = _task_loss(logits, targets)
            losses[TASK_LOSS] = loss if self._task_weight == 1 else loss * self._task_weight
        if boosted is not None:
            losses[BOOSTER_LOSS] = _task_loss(boosted, targets)
        hard = targets.target_a if isinstance(targets, MixedBatch) else targets
        shared = [p for p in self.student.parameters() if p.requires_grad]
        losses |= self.distiller(student, teacher, {"targets": hard}, losses, shared)
        if self._clipped:
            # Adaptors that only a clipped term trains still take part in the other backward.
            losses[TASK_LOSS] = losses[TASK_LOSS] + zero_in_graph(self.distiller.parameters())
        return losses

    def _record(
        self, images: Tensor, x: Tensor, booster: Any
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any], Tensor | None]:
        """Student's logits, both sides' taps, and the booster's logits if there is one."""
        # Made anew in each forward, so that a deep copy records its own student.
        recorder = TapRecorder(self.student, self._taps)
        if booster is None:
            with recorder.recording():
                logits = self.student(x)
            student = recorder.read()
            recorder.release()
            return logits, student, self.teacher_captures(images), None
        other = TapRecorder(booster.net, self._other_taps)
        with booster.recording(self.student), recorder.recording(), other.recording():
            logits = self.student(x)
            boosted = booster(x)
        student, teacher = recorder.read(), other.read()
        recorder.release()
        other.release()
        return logits, student, teacher, boosted


def _task_loss(logits: Tensor, targets: Tensor | MixedBatch) -> Tensor:
    if isinstance(targets, MixedBatch):
        return unix_task_loss(logits, targets.target_a, targets.target_b, targets.mu)
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets)


def _net_beside(plan: Distillation) -> nn.Module:
    """What the student learns from."""
    if plan.booster is not None:
        return plan.booster.net
    if plan.teacher is None:
        fail(
            expected="a distillation with a teacher or a booster",
            received="neither",
            remedy="give one of them",
        )
    return plan.teacher.model


def _check(terms: Sequence[Term], plan: Distillation) -> None:
    if not terms:
        fail(
            expected="KD.TERMS to name at least one loss",
            received="none",
            remedy="add a term, or set KD.ENABLED False to train the plain student",
        )
    for term in terms:
        if term.name in (TASK_LOSS, BOOSTER_LOSS):
            fail(
                expected="a term to have a name of its own",
                received=f"'{term.name}', the name of a task loss",
                remedy="rename the entry in KD.TERMS",
            )
        if term.clip == "task_norm" and not plan.task_weight:
            fail(
                expected=f"a task loss for CLIP task_norm of term '{term.name}'",
                received="KD.TASK_WEIGHT 0",
                remedy="set CLIP: none where the terms train alone",
            )
