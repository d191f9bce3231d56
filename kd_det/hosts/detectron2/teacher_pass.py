"""What to run on the teacher: its backbone on the same pixels, its heads on the student's boxes.

The teacher's proposal generator never runs, and ``roi_heads`` is never called as a whole: it
would sample or post-process boxes, while the two sides must describe the *same* boxes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.adaptors import crop_to
from kd_det.core.class_map import ClassMap, map_labels, map_logits
from kd_det.core.errors import fail
from kd_det.hosts.detectron2.taps import StockModel, box_branches, sigmoid_heads


def check_formats(student: str, teacher: str) -> None:
    """Refuse channel orders that cannot be converted into each other without loss."""
    if student != teacher and {student, teacher} != {"RGB", "BGR"}:
        fail(
            expected="INPUT.FORMAT of student and teacher to be equal, or RGB and BGR",
            received=f"student {student}, teacher {teacher}",
            remedy="train both on RGB or BGR images",
        )


def teacher_images(
    teacher: StockModel,
    batched_inputs: Sequence[Mapping[str, Any]],
    flip_channels: bool,
    padded_size: tuple[int, int],
) -> Tensor:
    """The batch as the teacher's own config wants it.

    Channels are reordered *before* the teacher's mean and standard deviation are applied, then
    the batch is padded to the teacher's divisor and to at least the student's padded size, so
    that every student cell has a teacher cell.

    Args:
        teacher: a Detectron2 meta-architecture.
        batched_inputs: raw images ``[C, H, W]`` in the student's channel order.
        flip_channels: whether the teacher's order is the reverse.
        padded_size: ``(H, W)`` of the student's padded batch.

    Returns:
        ``[N, C, H', W']`` with ``H' >= H`` and ``W' >= W``.
    """
    tensor = teacher.preprocess_image(reordered(batched_inputs, flip_channels)).tensor
    divisor = max(teacher.backbone.size_divisibility, 1)
    extra = [
        max(math.ceil(want / divisor) * divisor - have, 0)
        for want, have in zip(padded_size, tensor.shape[-2:], strict=True)
    ]
    return F.pad(tensor, (0, extra[1], 0, extra[0])) if any(extra) else tensor


def reordered(
    batched_inputs: Sequence[Mapping[str, Any]], flip_channels: bool
) -> list[dict[str, Any]]:
    """The raw images alone, in the teacher's channel order."""
    return [{"image": x["image"].flip(0) if flip_channels else x["image"]} for x in batched_inputs]


def box_values(
    teacher: StockModel,
    features: Mapping[str, Tensor],
    boxes: Sequence[Sequence[Boxes]],
    wanted: Collection[str],
    class_map: ClassMap | None = None,
) -> dict[str, Any]:
    """The teacher's answers for the student's boxes, from one pass through its box branch.

    Args:
        teacher: an R-CNN with standard or cascade heads.
        features: the teacher's backbone output.
        boxes: per student stage, per image, the boxes that entered the student's pooler.
        wanted: which of ``box_pooled``, ``box_features`` and ``box_logits``.
        class_map: from the teacher's classes to the student's, where they differ.

    Returns:
        ``box_logits``: per student stage ``[R, K + 1]``, for the student's classes; ``[R, K]`` of
        heads with independent classes (``USE_SIGMOID_CE``), which do not train the last column.
        A cascade teacher of a one-stage student answers with the logits of its stages' mean
        probability, which is what it scores by at inference. ``box_pooled`` ``[R, C, h, w]`` and
        ``box_features`` ``[R, D]``: of the first stage on both sides.

    Raises:
        KDError: logits are wanted of cascades of different length.
    """
    roi_heads = teacher.roi_heads
    levels = [features[name] for name in roi_heads.box_in_features]
    branches = box_branches(teacher)
    with_logits = "box_logits" in wanted
    exclusive = "box_logits" not in sigmoid_heads(teacher)
    if with_logits:
        check_stages(len(boxes), len(branches))
    values: dict[str, Any] = {}
    logits = []
    for stage, stage_boxes in enumerate(boxes if with_logits else boxes[:1]):
        pooled = roi_heads.box_pooler(levels, list(stage_boxes))
        same_stages = len(branches) == len(boxes) or not with_logits
        heads = branches[stage : stage + 1] if same_stages else branches
        outputs = [head(pooled) for head, _ in heads]
        if stage == 0:
            values = {"box_pooled": pooled, "box_features": outputs[0]}
        if with_logits:
            scores = [p(output)[0] for (_, p), output in zip(heads, outputs, strict=True)]
            if exclusive:
                answer = scores[0] if same_stages else _mean_log_probability(scores)
                logits.append(map_logits(answer, class_map, "last"))
            else:
                scores = [score[:, :-1] for score in scores]
                answer = scores[0] if same_stages else _logit_of_mean(scores)
                logits.append(map_logits(answer, class_map, exclusive=False))
    values["box_logits"] = logits
    return {name: values[name] for name in wanted}


def _mean_log_probability(scores: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(scores)).float().softmax(dim=-1).mean(dim=0).log()


def _logit_of_mean(scores: Sequence[Tensor]) -> Tensor:
    # Beyond eps float32 cannot tell a mean from 0 or 1.
    return torch.stack(list(scores)).float().sigmoid().mean(dim=0).logit(eps=1e-6)


def check_box_heads(student: StockModel, teacher: StockModel) -> None:
    """Refuse RoI heads whose logits mean different things: softmax and sigmoid scores."""
    kinds = [
        "independent classes (USE_SIGMOID_CE)"
        if "box_logits" in sigmoid_heads(model)
        else "classes that exclude each other"
        for model in (student, teacher)
    ]
    if kinds[0] != kinds[1]:
        fail(
            expected="box heads of one kind on both sides for box_logits",
            received=f"a student with {kinds[0]}, a teacher with {kinds[1]}",
            remedy="set MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE alike, or distil features",
        )


def check_stages(student: int, teacher: int) -> None:
    """Refuse cascades of different length; one stage goes with any number."""
    if student != teacher and 1 not in (student, teacher):
        fail(
            expected="cascades of the same number of stages, or one side with a single stage",
            received=f"student {student}, teacher {teacher}",
            remedy="choose a teacher with as many stages",
        )


def check_anchors(student: StockModel, teacher: StockModel) -> None:
    """Refuse dense heads whose predictions do not correspond one to one."""
    layouts = []
    for model in (student, teacher):
        names = getattr(model, "head_in_features", None)
        generator = getattr(model, "anchor_generator", None)
        layouts.append((names and list(names), generator and list(generator.num_anchors)))
    if layouts[0] != layouts[1]:
        fail(
            expected="dense heads with the same levels and anchors per cell",
            received=f"student {layouts[0]}, teacher {layouts[1]}",
            remedy="use a teacher of the same architecture, or distil features",
        )


def mask_logits(
    teacher: StockModel, features: Mapping[str, Tensor], boxes: Sequence[Boxes]
) -> Tensor:
    """The teacher's mask logits ``[R, K or 1, M, M]`` of the student's foreground boxes."""
    roi_heads = teacher.roi_heads
    levels = [features[name] for name in roi_heads.mask_in_features]
    return roi_heads.mask_head.layers(roi_heads.mask_pooler(levels, list(boxes)))


def own_class(
    logits: Tensor, instances: Sequence[Instances], class_map: ClassMap | None = None
) -> Tensor:
    """``[R, K, M, M] -> [R, M, M]``: each box's map for its ground-truth class.

    The other classes' maps are never trained and hold noise.

    Args:
        logits: of all classes; ``[R, 1, M, M]`` of a head that tells none apart.
        instances: per image, the boxes with the student's ``gt_classes``.
        class_map: from the student's classes to those of ``logits``, for the teacher's.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    classes = map_labels(torch.cat([x.gt_classes for x in instances]), class_map)
    return logits[torch.arange(len(classes), device=logits.device), classes]


def dense_rows(logits: Sequence[Tensor], num_classes: int, like: Sequence[Tensor]) -> Tensor:
    """Per-level logits ``[N, A * K, H, W]`` to rows ``[sum(N * H * W * A), K]``.

    Args:
        logits: one tensor per level.
        num_classes: K.
        like: per level, a map whose ``(H, W)`` to crop to.
    """
    rows = []
    for level, reference in zip(logits, like, strict=True):
        level = crop_to(level, reference)
        n, _, h, w = level.shape
        rows.append(level.view(n, -1, num_classes, h, w).permute(0, 3, 4, 1, 2))
    return torch.cat([r.reshape(-1, num_classes) for r in rows])
