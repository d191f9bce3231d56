"""What to run on the teacher for one batch of the student, and nothing more.

The teacher's backbone runs once. Its proposal network and its ``roi_heads`` as a whole never run:
they would choose other boxes, and logits of different boxes cannot be compared. Its box and mask
branches run on the boxes the student has just sampled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.adaptors import crop_to
from kd_det.core.class_map import ClassMap, map_labels, map_logits
from kd_det.core.taps import TapRecorder
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.torchvision_detection.taps import (
    BOX_TAPS,
    BOXES,
    HEAD_TAPS,
    IMAGES,
    MASK_BOXES,
    MASK_CLASSES,
    TRANSFORMED,
    Detector,
    TapTable,
)


@dataclass(frozen=True)
class TeacherPass:
    """Runs the parts of a teacher that a set of taps needs.

    Args:
        teacher: a frozen stock torchvision detector.
        table: its taps.
        wanted: the teacher's tap names that terms use.
        class_map: from the teacher's classes to the student's, where they differ.
    """

    teacher: FrozenTeacher
    table: TapTable
    wanted: Collection[str]
    class_map: ClassMap | None = None

    def __call__(
        self, student: Detector, images: Sequence[Tensor], recorded: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Teacher tensors by tap name, aligned with the student's.

        Args:
            student: the stock student; its resize geometry and padding are followed.
            images: per image ``[3, H, W]`` RGB in 0..1, as the student got them.
            recorded: what was recorded in the student's forward.

        Returns:
            The ``wanted`` taps, without a gradient graph.
        """
        if not self.wanted:
            return {}
        with self.teacher.inference() as model:
            x = teacher_input(model, student, images, recorded)
            maps = [name for name in self.wanted if name not in HEAD_TAPS]
            recorder = TapRecorder(model, {name: self.table.taps[name] for name in maps})
            with recorder.recording():
                features = model.backbone(x)
            padded = recorded[IMAGES].shape[-2:]
            values = {
                name: _crop(value, padded, self.table.specs[name].stride or 1)
                for name, value in recorder.read().items()
            }
            recorder.release()
            values |= self._heads(model, features, x, recorded)
        return values

    def _heads(
        self, model: Detector, features: dict[str, Tensor], x: Tensor, recorded: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        # The pooler reads off the scale of its levels from these sizes: those of the padded
        # batch are exact where the teacher pads more than the student.
        sizes = [(x.shape[-2], x.shape[-1])] * len(x)
        if any(name in BOX_TAPS for name in self.wanted):
            pooled = model.roi_heads.box_roi_pool(features, recorded[BOXES], sizes)
            values |= self._box_branch(model.roi_heads, pooled)
        if "mask_logits" in self.wanted:
            heads = model.roi_heads
            pooled = heads.mask_roi_pool(features, recorded[MASK_BOXES], sizes)
            masks = heads.mask_predictor(heads.mask_head(pooled))
            labels = map_labels(recorded[MASK_CLASSES], self.class_map, first=1)
            values["mask_logits"] = select_class(masks, labels)
        if "cls_logits" in self.wanted:
            padded = recorded[IMAGES].shape[-2:]
            levels = [
                _crop(features[key], padded, self.table.specs[name].stride or 1)
                for name, key in self.table.levels.items()
            ]
            rows = model.head.classification_head(levels).flatten(0, 1)
            # Independent classes, of which the first is never any anchor's.
            values["cls_logits"] = map_logits(rows, self.class_map, "first", exclusive=False)
        return values

    def _box_branch(self, heads: Detector, pooled: Tensor) -> dict[str, Tensor]:
        """The branch once, and only as far as the wanted taps need it."""
        values = {"box_pooled": pooled}
        if "box_features" in self.wanted or "box_logits" in self.wanted:
            values["box_features"] = heads.box_head(pooled)
        if "box_logits" in self.wanted:
            logits = heads.box_predictor(values["box_features"])[0]
            values["box_logits"] = map_logits(logits, self.class_map, "first")
        return {name: value for name, value in values.items() if name in self.wanted}


def teacher_input(
    teacher: Detector, student: Detector, images: Sequence[Tensor], recorded: Mapping[str, Any]
) -> Tensor:
    """The batch as the teacher would have prepared it, at the student's image sizes.

    Args:
        teacher: the teacher; its own mean, standard deviation and padding divisor are used.
        student: the student.
        images: the images before either model's normalisation.
        recorded: the student's recorded forward.

    Returns:
        ``[N, 3, H, W]``, padded to at least the student's padded size.
    """
    own: Tensor = recorded[IMAGES]
    height, width = (
        math.ceil(side / teacher.transform.size_divisible) * teacher.transform.size_divisible
        for side in own.shape[-2:]
    )
    mine, theirs = teacher.transform, student.transform
    if (list(mine.image_mean), list(mine.image_std)) == (
        list(theirs.image_mean),
        list(theirs.image_std),
    ):
        batch = own
    else:
        batch = own.new_zeros(own.shape)
        sizes = recorded[TRANSFORMED][0].image_sizes
        for row, image, (h, w) in zip(batch, images, sizes, strict=True):
            image = mine.normalize(image)
            if image.shape[-2:] != (h, w):
                image = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)[0]
            row[:, :h, :w] = image
    return F.pad(batch, (0, width - batch.shape[-1], 0, height - batch.shape[-2]))


@torch.no_grad()
def true_classes(student: Detector, recorded: Mapping[str, Any]) -> Tensor:
    """Labels of the ground truth that positive RoIs were matched to, by torchvision's own rule.

    Args:
        student: the detector with ``roi_heads`` that chose the RoIs.
        recorded: what was recorded in its forward.

    Returns:
        ``[R']``, in the order of the mask logits.
    """
    boxes, targets = recorded[MASK_BOXES], recorded[TRANSFORMED][1]
    _, labels = student.roi_heads.assign_targets_to_proposals(
        boxes,
        [t["boxes"].to(b.dtype) for t, b in zip(targets, boxes, strict=True)],
        [t["labels"] for t in targets],
    )
    return torch.cat(labels)


def select_class(masks: Tensor, labels: Tensor) -> Tensor:
    """``[R', K + 1, M, M] -> [R', M, M]``: of every positive RoI the channel of its true class.

    The other channels are not trained, so they say nothing.
    """
    return masks[torch.arange(len(masks), device=masks.device), labels]


def _crop(value: Tensor, padded: torch.Size, stride: int) -> Tensor:
    """Cut what only the teacher's padding added."""
    size = [math.ceil(side / stride) for side in padded]
    return crop_to(value, torch.empty(size, device="meta"))
