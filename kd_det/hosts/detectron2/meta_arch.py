"""Registered subclasses of the stock meta-architectures: stock forward, recorded.

Each is the stock model with three attributes beside it: ``distiller`` (trainable, in the
checkpoint under ``distiller.*``), ``teacher`` and ``student_taps`` (plain objects, in neither
checkpoint, optimiser nor DDP). Inference and every stock key are untouched.

Shapes: N images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from torch import Tensor, nn

from kd_det.balance import Balance, build_balance
from kd_det.core.adaptors import crop_to
from kd_det.core.class_map import ClassMap, map_logits, mapped_specs
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.numerics import zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.core.taps import Tap, TapRecorder
from kd_det.core.terms import Term, check_heads
from kd_det.hosts.detection.terms import check_detection_terms
from kd_det.hosts.detectron2 import taps as host_taps
from kd_det.hosts.detectron2 import teacher_pass
from kd_det.hosts.detectron2.classes import LOGITS, build_class_map
from kd_det.hosts.detectron2.fcos import ConfigurableFCOS
from kd_det.hosts.detectron2.teacher import Teacher, build_teacher
from kd_det.hosts.detectron2.uncertainty import anchor_values, roi_values
from kd_det.run.config import read_terms

CONTEXT = ("anchors", "gt_boxes")
HEADS = (*host_taps.BOX_TAPS, "mask_logits", "cls_logits")
_BACKGROUNDS = {name: int(name == "box_logits") for name in LOGITS}


@dataclass
class Distillation:
    """What turns a stock model into a distilled one.

    Attributes:
        teacher: the frozen teacher and its channel order.
        terms: the losses.
        input_format: the student's channel order (``INPUT.FORMAT``).
        report_period: see :class:`kd_det.Distiller`.
        task_weight: multiplies the student's own losses in training. 1 leaves them untouched; 0
            trains with the terms alone, and parameters that no term reaches get a zero gradient.
        values: in every training step, also leave in the model's ``image_values`` how uncertain
            the student is about each image; see :mod:`kd_det.hosts.detectron2.uncertainty`.
        class_map: how the teacher's logits become those of the student's classes; None if they
            are already.
        balance: adapts the weights of the terms; gradients are compared on the student's backbone.
            See :mod:`kd_det.balance`.

    Raises:
        KDError: ``task_weight`` is negative or not finite.
    """

    teacher: Teacher
    terms: Sequence[Term]
    input_format: str
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

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Distillation | None:
        """What ``cfg.KD`` describes; None if it is disabled.

        Raises:
            KDError: no terms, or anything :func:`read_terms`, :func:`build_class_map` and
                :func:`build_teacher` refuse.
        """
        if not cfg.KD.ENABLED:
            return None
        terms = read_terms(cfg)
        if not terms:
            fail(
                expected="KD.TERMS to name at least one loss",
                received="none",
                remedy="add a term, or set KD.ENABLED False for the plain student",
            )
        class_map = build_class_map(cfg)
        return cls(
            build_teacher(cfg),
            terms,
            cfg.INPUT.FORMAT,
            cfg.KD.REPORT_PERIOD,
            cfg.KD.TASK_WEIGHT,
            cfg.KD.KCD.ENABLED,
            class_map,
            build_balance(cfg, terms),
        )


class DistillMixin(nn.Module):
    """The training branch shared by all distilled meta-architectures.

    Attributes:
        image_values: after a training forward with ``Distillation.values``, the student's
            uncertainty about each image, ``[N]`` in 0..1.
    """

    distiller: Distiller | None
    num_classes: int  # of the dense detectors

    @configurable
    def __init__(self, *, distillation: Distillation | None = None, **kwargs: Any) -> None:
        """Build the stock model, then what distils it.

        Args:
            distillation: None for the plain student.
            **kwargs: arguments of the stock meta-architecture.
        """
        super().__init__(**kwargs)
        self._attach(distillation)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The stock arguments, and what :meth:`Distillation.from_config` makes of the config."""
        arguments = super().from_config(cfg)  # type: ignore[misc]
        return arguments | {"distillation": Distillation.from_config(cfg)}

    def _attach(self, distillation: Distillation | None) -> None:
        """Build taps and distiller once the stock model exists."""
        self.distiller = None
        self.teacher: Teacher | None = None
        self.image_values: Tensor | None = None
        self.class_map: ClassMap | None = None
        if distillation is None:
            return
        teacher = distillation.teacher.frozen.model
        teacher_pass.check_formats(distillation.input_format, distillation.teacher.input_format)
        terms = distillation.terms
        check_detection_terms(terms)
        check_heads(terms, host_taps.sigmoid_heads(self) | host_taps.sigmoid_heads(teacher))
        wanted_s = {s for term in terms for s, _ in term.taps}
        wanted_t = {t for term in terms for _, t in term.taps}
        features_s, specs_s = host_taps.feature_taps(self, wanted_s)
        features_t, specs_t = host_taps.feature_taps(teacher, wanted_t)
        heads_s, heads_t = host_taps.head_specs(self), host_taps.head_specs(teacher)
        self._independent = "box_logits" in host_taps.sigmoid_heads(self)
        if "box_logits" in wanted_t:
            _match_stages(heads_s, heads_t)
            teacher_pass.check_box_heads(self, teacher)
        self.class_map = distillation.class_map
        backgrounds = _BACKGROUNDS | {"box_logits": int(not self._independent)}
        heads_t = mapped_specs(heads_t, self.class_map, backgrounds)
        if "cls_logits" in wanted_t:
            teacher_pass.check_anchors(self, teacher)
        # The student's random stream must not depend on the adaptors' initialisation.
        with torch.random.fork_rng(devices=[]):
            self.distiller = Distiller(
                terms,
                specs_s | heads_s,
                specs_t | heads_t,
                CONTEXT,
                distillation.report_period,
                distillation.balance,
            )
        needs = {need for term in terms for need in LOSSES.get(term.loss).needs}
        self.teacher = distillation.teacher
        self._flip_channels = distillation.input_format != distillation.teacher.input_format
        self.task_weight = distillation.task_weight
        self._heads = wanted_s & set(HEADS)
        self._teacher_heads = wanted_t & set(HEADS)
        self._uncertain = _uncertain(heads_s) if distillation.values else set()
        recorded = self._heads | self._teacher_heads | needs | self._uncertain
        self.student_taps = TapRecorder(
            self,
            {"images": Tap("backbone", at="input")}
            | {name: tap for name, tap in features_s.items() if name in wanted_s}
            | host_taps.head_taps(self, recorded),
        )
        self.teacher_taps = TapRecorder(
            distillation.teacher.frozen,
            {name: tap for name, tap in features_t.items() if name in wanted_t},
        )
        # Maps of one stride begin at the same pixel and differ by padding only.
        self._crop = [
            (s, t)
            for term in terms
            for s, t in term.taps
            if s in specs_s and t in specs_t and specs_s[s].stride == specs_t[t].stride
        ]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """The stock forward; in training its losses plus one weighted loss per term."""
        if self.distiller is None or not self.training:
            return super().forward(batched_inputs)
        with self.student_taps.recording():
            losses = self._weighted(super().forward(batched_inputs))
        captures = self.student_taps.read()
        self.student_taps.release()
        if self._uncertain:
            self.image_values = self._image_values(captures)
        teacher = self._run_teacher(batched_inputs, captures)
        extra = self.distiller(
            self._student_values(captures),
            teacher,
            self._context(batched_inputs, captures),
            losses,
            [p for p in self.backbone.parameters() if p.requires_grad],
        )
        clash = losses.keys() & extra.keys()
        if clash:
            fail(
                expected="names of terms other than the student's own losses",
                received=", ".join(sorted(clash)),
                remedy="rename the term in KD.TERMS",
            )
        return losses | extra

    def _weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.task_weight == 1:
            return losses
        if self.task_weight == 0:
            # One zero of all parameters: nothing is propagated through the task losses, and DDP
            # still finds every parameter.
            zero = zero_in_graph(p for p in self.parameters() if p.requires_grad)
            return dict.fromkeys(losses, zero)
        return {name: loss * self.task_weight for name, loss in losses.items()}

    def _image_values(self, captures: Mapping[str, Any]) -> Tensor:
        boxes = self._staged_boxes(captures)
        logits = [captures[f"box_logits.{k}"] for k in range(len(boxes))]
        return roi_values(logits, boxes, "box_logits" in host_taps.sigmoid_heads(self))

    def _staged_boxes(self, captures: Mapping[str, Any]) -> Sequence[Sequence[Boxes]]:
        """Per stage, per image, the boxes that entered the student's pooler."""
        boxes = captures["boxes"]
        return boxes if host_taps.num_box_stages(self) > 1 else [boxes]

    def _student_values(self, captures: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(captures)
        if "box_logits" in self._heads:
            stages = [captures[f"box_logits.{k}"] for k in range(host_taps.num_box_stages(self))]
            trained = slice(-1) if self._independent else slice(None)
            values["box_logits"] = [logits[:, trained] for logits in stages]
        if "mask_logits" in self._heads:
            values["mask_logits"] = teacher_pass.own_class(
                captures["mask_logits"], captures["mask_instances"]
            )
        if "cls_logits" in self._heads:
            levels = captures["cls_logits"]
            values["cls_logits"] = teacher_pass.dense_rows(levels, self.num_classes, levels)
        return values

    def _run_teacher(
        self, batched_inputs: list[dict[str, Any]], captures: Mapping[str, Any]
    ) -> dict[str, Any]:
        images: Tensor = captures["images"]
        assert self.teacher is not None
        # Parameters decide the dtype: under autocast images are still float32.
        self.teacher.frozen.follow(next(self.backbone.parameters()))
        teacher: Any
        with self.teacher.frozen.inference() as teacher:
            padded = (images.shape[-2], images.shape[-1])
            pixels = teacher_pass.teacher_images(
                teacher, batched_inputs, self._flip_channels, padded
            )
            with self.teacher_taps.recording():
                features = teacher.backbone(pixels)
            values = self.teacher_taps.read()
            self.teacher_taps.release()
            for tap_s, tap_t in self._crop:
                values[tap_t] = crop_to(values[tap_t], captures[tap_s])
            wanted = self._teacher_heads
            if box_taps := wanted.intersection(host_taps.BOX_TAPS):
                boxes = self._staged_boxes(captures)
                values |= teacher_pass.box_values(
                    teacher, features, boxes, box_taps, self.class_map
                )
            if "mask_logits" in wanted:
                logits = teacher_pass.mask_logits(teacher, features, captures["mask_boxes"])
                values["mask_logits"] = teacher_pass.own_class(
                    logits, captures["mask_instances"], self.class_map
                )
            if "cls_logits" in wanted:
                logits = teacher.head([features[name] for name in teacher.head_in_features])[0]
                rows = teacher_pass.dense_rows(logits, teacher.num_classes, captures["cls_logits"])
                values["cls_logits"] = map_logits(rows, self.class_map)
        return values

    def _context(
        self, batched_inputs: list[dict[str, Any]], captures: Mapping[str, Any]
    ) -> dict[str, Any]:
        if "anchors" not in captures:
            return {}
        names = host_taps.anchor_levels(self)
        anchors = {n: b.tensor for n, b in zip(names, captures["anchors"], strict=True)}
        boxes = [x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs]
        return {"anchors": anchors, "gt_boxes": boxes}


def _uncertain(specs: host_taps.Specs) -> set[str]:
    """The logits whose entropy is measured."""
    names = [name for name in ("cls_logits", "box_logits") if name in specs]
    if not names:
        fail(
            expected="a student with box_logits or cls_logits for KD.KCD",
            received=f"one with {', '.join(specs) or 'neither'}",
            remedy="use an R-CNN on an FPN or a dense detector",
        )
    return set(names[:1])


def _match_stages(student: host_taps.Specs, teacher: host_taps.Specs) -> None:
    """Give the teacher one entry per student stage, as :func:`teacher_pass.box_logits` answers."""
    if "box_logits" not in student or "box_logits" not in teacher:
        return  # reported as an unknown tap, with the known ones
    s, t = student["box_logits"], teacher["box_logits"]
    teacher_stages = t if isinstance(t, list) else [t]
    stages = len(s) if isinstance(s, list) else 1
    teacher_pass.check_stages(stages, len(teacher_stages))
    if stages != len(teacher_stages):
        teacher["box_logits"] = [teacher_stages[0]] * stages


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistillMixin, GeneralizedRCNN):
    """Faster, Mask or Cascade R-CNN with a frozen teacher beside it."""


class DenseDistillMixin(DistillMixin):
    """The same for dense detectors, whose values need to know which anchors are positive."""

    max_detections_per_image: int

    def label_anchors(self, anchors: Any, gt_instances: Any) -> Any:
        """The stock labels, remembered for the step where values are wanted."""
        labels, boxes = super().label_anchors(anchors, gt_instances)  # type: ignore[misc]
        if self.distiller is not None and self._uncertain:
            self._labels = torch.stack(labels)
        return labels, boxes

    def _image_values(self, captures: Mapping[str, Any]) -> Tensor:
        levels = [permute_to_N_HWA_K(x, self.num_classes) for x in captures["cls_logits"]]
        # As many negatives as an image may have detections.
        return anchor_values(torch.cat(levels, dim=1), self._labels, self.max_detections_per_image)


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DenseDistillMixin, RetinaNet):
    """RetinaNet with a frozen teacher beside it."""


@META_ARCH_REGISTRY.register()
class DistilledFCOS(DenseDistillMixin, ConfigurableFCOS):
    """FCOS with a frozen teacher beside it; with ``KD.ENABLED False``, the stock FCOS."""
