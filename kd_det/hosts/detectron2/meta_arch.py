"""Registered subclasses of the stock meta-architectures: stock forward, recorded.

Each is the stock model with some attributes beside it: ``distiller`` (trainable, in the checkpoint
under ``distiller.*``), ``teacher`` and the recorders of taps (plain objects, in neither checkpoint,
optimiser nor DDP). Inference and every stock key are untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
    build_backbone,
)
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import Tensor

from kd_det.core.errors import fail
from kd_det.hosts.base import Teacher
from kd_det.hosts.detection.distillation import (
    DistillationBranch,
    DistillationPlan,
    plan_options,
)
from kd_det.hosts.detection.family import IMAGES, padded_to_divisor
from kd_det.hosts.detection.heads import Detector
from kd_det.hosts.detectron2.classes import build_class_map
from kd_det.hosts.detectron2.family import FAMILY
from kd_det.hosts.detectron2.teacher import build_teacher
from kd_det.run.config import read_terms


@dataclass
class Distillation(DistillationPlan):
    """What turns a stock model into a distilled one.

    Attributes:
        input_format: channel order of the student's images (``INPUT.FORMAT``).
        teacher_cfg: None where the teacher's images have the student's order.

    Raises:
        KDError: orders that cannot be converted into each other without loss.
    """

    input_format: str = "BGR"
    teacher_cfg: CfgNode | None = None

    @property
    def teacher_format(self) -> str:
        """Channel order of the teacher's images."""
        return self.teacher_cfg.INPUT.FORMAT if self.teacher_cfg else self.input_format

    def __post_init__(self) -> None:
        super().__post_init__()
        formats = {self.input_format, self.teacher_format}
        if len(formats) > 1 and formats != {"RGB", "BGR"}:
            fail(
                expected="INPUT.FORMAT of student and teacher to be equal, or RGB and BGR",
                received=f"student {self.input_format}, teacher {self.teacher_format}",
                remedy="train both on RGB or BGR images",
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Distillation | None:
        """What ``cfg.KD`` describes; None if it is disabled."""
        if not cfg.KD.ENABLED:
            return None
        terms = read_terms(cfg)
        class_map = build_class_map(cfg)
        teacher = build_teacher(cfg)
        own = {"input_format": cfg.INPUT.FORMAT, "teacher_cfg": teacher.cfg}
        options = plan_options(cfg, terms)
        return cls(teacher.frozen, terms, class_map=class_map, **options, **own)


class DistillMixin(DistillationBranch):
    """The training branch shared by all distilled meta-architectures."""

    family = FAMILY

    @configurable
    def __init__(self, *, distillation: Distillation | None = None, **kwargs: Any) -> None:
        """Build the stock model, then what distils it; None for the plain student."""
        super().__init__(**kwargs)
        self.teacher: Teacher | None = None
        if distillation is not None:
            self.teacher = Teacher(distillation.teacher, distillation.teacher_cfg)
            self._flip_channels = distillation.input_format != distillation.teacher_format
        self.attach(distillation)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The stock arguments, and what :meth:`Distillation.from_config` makes of the config."""
        arguments = super().from_config(cfg)  # type: ignore[misc]
        return arguments | {"distillation": Distillation.from_config(cfg)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """The stock forward; in training its losses plus one weighted loss per term."""
        stock = super().forward
        if self.distiller is None or not self.training:
            return stock(batched_inputs)
        return self.distilled_losses(lambda: stock(batched_inputs), batched_inputs)

    def teacher_pixels(self, teacher: Detector, batch: Any, recorded: dict[str, Any]) -> Tensor:
        """The batch as the teacher's own config wants it.

        Channels are reordered *before* the teacher's mean and standard deviation are applied.
        """
        pixels = teacher.preprocess_image(reordered(batch, self._flip_channels)).tensor
        divisor = max(teacher.backbone.size_divisibility, 1)
        return padded_to_divisor(pixels, recorded[IMAGES], divisor)


def reordered(
    batched_inputs: Sequence[Mapping[str, Any]], flip_channels: bool
) -> list[dict[str, Any]]:
    """The raw images alone, in the teacher's channel order."""
    return [{"image": x["image"].flip(0) if flip_channels else x["image"]} for x in batched_inputs]


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistillMixin, GeneralizedRCNN):
    """Faster, Mask or Cascade R-CNN with a frozen teacher beside it."""


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DistillMixin, RetinaNet):
    """RetinaNet with a frozen teacher beside it."""


class ConfigurableFCOS(FCOS):
    """The stock FCOS, described by ``cfg.MODEL.FCOS``: Detectron2 describes it in Python only."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of ``FCOS`` from a config."""
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
        head = FCOSHead(
            input_shape=shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


@META_ARCH_REGISTRY.register()
class DistilledFCOS(DistillMixin, ConfigurableFCOS):
    """FCOS with a frozen teacher beside it; with ``KD.ENABLED False``, the stock FCOS."""
