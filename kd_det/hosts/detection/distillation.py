"""The training branch of a distilled detector, the same on every detection host.

The teacher's proposal network and its RoI heads as a whole never run: they would choose other
boxes, and logits of different boxes cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_det.balance import build_balance
from kd_det.core.balance import Balance
from kd_det.core.class_map import ClassMap, mapped_specs
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.numerics import zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.core.taps import Tap, TapRecorder
from kd_det.core.teacher import FrozenTeacher
from kd_det.core.terms import Term, check_heads
from kd_det.hosts.detection.family import IMAGES, Family, crop_to_cells
from kd_det.hosts.detection.heads import Call, Detector, Step, recorded_calls
from kd_det.hosts.detection.terms import check_detection_terms, check_pairs, refuse_name
from kd_det.procedures.base import reads_uncertainties

CONTEXT = ("anchors", "gt_boxes")


@dataclass
class DistillationPlan:
    """What a distilled detector learns from its teacher.

    Attributes:
        task_weight: multiplies the student's own losses in training. 1 leaves them untouched; 0
            trains with the terms alone, and parameters that no term reaches get a zero gradient.
        values: in every training step, also leave in the model's ``image_values`` how uncertain
            the student is about each image; see :mod:`kd_det.hosts.detection.uncertainty`.
        class_map: how the teacher's logits become those of the student's classes; None if they
            are already.
        balance: adapts the weights of the terms; gradients are compared on the student's backbone.

    Raises:
        KDError: the task weight is negative or not finite.
    """

    teacher: FrozenTeacher
    terms: Sequence[Term]
    report_period: int = 1000
    task_weight: float = 1.0
    values: bool = False
    class_map: ClassMap | None = None
    balance: Balance | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.task_weight) and self.task_weight >= 0):
            fail(
                expected="KD.TASK_WEIGHT to be a finite number of at least 0",
                received=str(self.task_weight),
                remedy="use 1 for the student's own losses as they are, 0 to train without them",
            )


def plan_options(cfg: CfgNode, terms: Sequence[Term]) -> dict[str, Any]:
    """The options of :class:`DistillationPlan` that depend on nothing but a config."""
    return {
        "report_period": cfg.KD.REPORT_PERIOD,
        "task_weight": cfg.KD.TASK_WEIGHT,
        "values": reads_uncertainties(cfg),
        "balance": build_balance(cfg, terms),
    }


class DistillationBranch(nn.Module):
    """What makes a module around, or below, a stock detector a distilled one.

    Attributes:
        distiller: the losses; None in a plain student.
        image_values: after a training step with ``DistillationPlan.values``, how uncertain the
            student is about each image, ``[N]`` in 0..1.
    """

    family: ClassVar[Family]
    distiller: Distiller | None

    @property
    def stock(self) -> Detector:
        """The stock detector that learns."""
        return self

    def teacher_pixels(self, teacher: Detector, batch: Any, recorded: dict[str, Any]) -> Tensor:
        """The batch as ``teacher`` would have prepared it, at the student's image sizes.

        Returns:
            ``[N, 3, H, W]``, padded to at least the student's padded size.
        """
        raise NotImplementedError

    def attach(self, plan: DistillationPlan | None) -> None:
        """Check and build what distils the student, once its modules exist.

        Raises:
            KDError: no terms, an unknown tap, a term named like a task loss, taps whose rows do not
                correspond, class counts or anchors that differ where logits are compared, softmax
                KD on a sigmoid head, or a clipped term.
        """
        self.distiller = None
        self.image_values: Tensor | None = None
        self.class_map: ClassMap | None = None
        if plan is None:
            return
        family, student, teacher = self.family, self.stock, plan.teacher.model
        terms, self.class_map, self.task_weight = plan.terms, plan.class_map, plan.task_weight
        check_detection_terms(terms, family)
        wanted_s = list(dict.fromkeys(s for term in terms for s, _ in term.taps))
        wanted_t = list(dict.fromkeys(t for term in terms for _, t in term.taps))
        table_s, table_t = family.tap_table(student, wanted_s), family.tap_table(teacher, wanted_t)
        heads = [*table_s.heads.items(), *table_t.heads.items()]
        check_heads(terms, {name for name, tap in heads if tap.activation == "sigmoid"})
        specs = dict(table_t.specs)
        for head, names in family.heads_of(wanted_t):
            specs |= head.teacher_specs(table_s, table_t, names)
        classes = {name: tap for name, tap in table_t.heads.items() if tap.classes}
        backgrounds = {name: int(tap.background is not None) for name, tap in classes.items()}
        specs = mapped_specs(specs, self.class_map, backgrounds)
        check_pairs(terms, table_s, replace(table_t, specs=specs))
        # The student's random stream must not depend on the adaptors' initialisation.
        with torch.random.fork_rng(devices=[]):
            self.distiller = Distiller(
                terms, table_s.specs, specs, CONTEXT, plan.report_period, plan.balance
            )
        self.distiller.to(next(student.parameters()).device)

        self._frozen = plan.teacher
        self._needs = {need for term in terms for need in LOSSES.get(term.loss).needs}
        self._student_heads = family.heads_of(wanted_s)
        self._teacher_heads = family.heads_of(wanted_t)
        self._strides = {n: specs[n].stride or 1 for n in wanted_t if n in table_t.taps}
        self._levels = table_s.levels
        self._maps = [name for name in wanted_s if name in table_s.taps]
        self._uncertain = family.uncertain_head(table_s.specs) if plan.values else None
        places: dict[str, Tap | Call] = {IMAGES: Tap("backbone", at="input")}
        places |= family.context_taps(student, self._needs)
        places |= {name: table_s.taps[name] for name in self._maps}
        own = [name for name in dict.fromkeys([*wanted_s, *wanted_t]) if name in table_s.specs]
        for head, names in family.heads_of(own):
            places |= head.places(student, names)
        if self._uncertain is not None:
            places |= self._uncertain.uncertainty_places(student)
        self._calls = {n: place for n, place in places.items() if isinstance(place, Call)}
        hooked = {n: place for n, place in places.items() if isinstance(place, Tap)}
        self.student_taps = TapRecorder(student, hooked)
        self.teacher_taps = TapRecorder(plan.teacher, {n: table_t.taps[n] for n in self._strides})

    def distilled_losses(
        self, forward: Callable[[], dict[str, Tensor]], batch: Any
    ) -> dict[str, Tensor]:
        """The student's own losses, multiplied by the task weight, and one for each term.

        ``forward`` is the stock forward of the student in training, on ``batch``.

        Raises:
            KDError: a term has the name of one of the student's losses.
        """
        assert self.distiller is not None
        student = self.stock
        with self.student_taps.recording(), recorded_calls(student, self._calls) as calls:
            losses = self._weighted(forward())
        step = Step(student, self.student_taps.read() | calls, batch, self._levels)
        self.student_taps.release()
        values = {name: step.recorded[name] for name in self._maps}
        for head, names in self._student_heads:
            values |= head.student_values(step, names)
        if self._uncertain is not None:
            self.image_values = self._uncertain.image_values(step)
        context = {need: getattr(self.family, need)(step) for need in self._needs}
        shared = [p for p in student.backbone.parameters() if p.requires_grad]
        extra = self.distiller(values, self.teacher_values(step), context, losses, shared)
        if clash := losses.keys() & extra.keys():
            refuse_name(", ".join(sorted(clash)))
        return losses | extra

    def teacher_values(self, step: Step) -> dict[str, Any]:
        """The teacher's tensors by tap name, aligned with the student's, without a graph."""
        # Parameters decide the dtype: under autocast images are still float32.
        self._frozen.follow(next(step.student.backbone.parameters()))
        teacher: Detector
        with self._frozen.inference() as teacher:
            pixels = self.teacher_pixels(teacher, step.batch, step.recorded)
            with self.teacher_taps.recording():
                features = teacher.backbone(pixels)
            maps = self.teacher_taps.read()
            self.teacher_taps.release()
            padded = step.recorded[IMAGES].shape[-2:]
            values = {n: crop_to_cells(maps[n], padded, s) for n, s in self._strides.items()}
            step = replace(
                step, teacher=teacher, features=features, pixels=pixels, class_map=self.class_map
            )
            for head, names in self._teacher_heads:
                values |= head.teacher_values(step, names)
        return values

    def _weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.task_weight == 1:
            return losses
        if self.task_weight == 0:
            # One zero of all parameters: nothing is propagated through the task losses, and DDP
            # still finds every parameter.
            zero = zero_in_graph(p for p in self.stock.parameters() if p.requires_grad)
            return dict.fromkeys(losses, zero)
        return {name: loss * self.task_weight for name, loss in losses.items()}
