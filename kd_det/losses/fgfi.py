"""FGFI: fine-grained feature imitation (Wang et al., "Distilling Object Detectors with
Fine-grained Feature Imitation", CVPR 2019, https://arxiv.org/abs/1906.03609).

Shapes: N images, L levels, A anchors per cell, G ground-truth boxes in the whole batch; boxes
are absolute ``(x1, y1, x2, y2)`` pixels of the padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.errors import (
    check_channels,
    check_choice,
    check_same_length,
    check_same_shape,
    fail,
)
from kd_det.core.loss import Arguments, DistillLoss, Specs, channel_arguments
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

Assign = Literal["roi", "anchor", "all"]
Normalizer = Literal["global", "level_mean", "level_sum"]
_CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4  # FPN paper: a 224-pixel box belongs to p4


@torch.no_grad()
def fgfi_mask(
    anchors: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int] | None = None,
    threshold: float = 0.5,
    assign: Assign = "roi",
    inclusive: bool = False,
) -> list[Tensor]:
    """Cells near objects: per level a bool mask ``[N, H, W]``.

    A cell is marked if the IoU of any of its anchors with a box is above ``threshold`` times the
    largest IoU that this box has on that level. Boxes that overlap no anchor mark no cell.

    Args:
        anchors: per level ``[H * W * A, 4]``, ordered y, x, anchor; neither clipped nor filtered.
        gt_boxes: per image ``[G_i, 4]``; ``G_i`` may be 0.
        sizes: ``(H, W)`` per level.
        strides: input pixels per cell, per level; ``assign="roi"`` needs them for several levels.
        threshold: psi, 0.5 in the paper.
        assign: the boxes that count on a level. ``"roi"``: those that FPN's RoI rule assigns to it
            (DeFeat; the only rule with a published positive result); ``"anchor"``: those whose
            best anchor is there, ties to the lowest level; ``"all"``: every box.
        inclusive: IoU of inclusive pixel boxes (+1) as in the reference code, unlike in Detectron2
            and torchvision.

    Raises:
        KDError: list lengths or anchor counts that do not fit, or an unknown ``assign``.
    """
    check_choice("assign", assign, Assign)
    check_same_length("FGFI", anchors, sizes)
    for level, (rows, (h, w)) in enumerate(zip(anchors, sizes, strict=True)):
        if rows.dim() != 2 or rows.shape[1] != 4 or h * w == 0 or len(rows) % (h * w):
            fail(
                expected=f"FGFI anchors of level {level} to be [{h} * {w} * A, 4]",
                received=str(tuple(rows.shape)),
                remedy="pass the anchors of the same map as the features",
            )
    # The area of a large box overflows in half precision.
    anchors = [full_precision(rows) for rows in anchors]
    boxes = torch.cat([b.reshape(-1, 4) for b in gt_boxes]) if gt_boxes else anchors[0][:0]
    boxes = full_precision(boxes)
    counts = torch.tensor([len(b) for b in gt_boxes], dtype=torch.long, device=boxes.device)
    image = torch.repeat_interleave(counts)

    levels = _roi_levels(boxes, strides, len(sizes)) if assign == "roi" else None
    marked: list[Tensor] = []
    best: list[Tensor] = []
    for level, (rows, (h, w)) in enumerate(zip(anchors, sizes, strict=True)):
        on_level = slice(None) if levels is None else (levels == level).nonzero().flatten()
        cells, top = _mark_cells(rows, boxes[on_level], h * w, threshold, inclusive)
        marked.append(_or_by_image(cells, image[on_level], len(gt_boxes), h, w))
        best.append(top)
        if assign == "anchor":
            marked[-1] = cells  # the level of each box is known after the last level
    if assign == "anchor":
        best_level = torch.stack(best).argmax(dim=0)
        for level, (h, w) in enumerate(sizes):
            on_level = (best_level == level).nonzero().flatten()
            cells = marked[level][:, on_level]
            marked[level] = _or_by_image(cells, image[on_level], len(gt_boxes), h, w)
    return marked


def _roi_levels(boxes: Tensor, strides: Sequence[int] | None, count: int) -> Tensor:
    if count == 1:
        return boxes.new_zeros(len(boxes), dtype=torch.long)
    if strides is None or len(strides) != count:
        fail(
            expected=f"strides of the {count} levels for assign 'roi'",
            received=str(strides),
            remedy="pass strides=(4, 8, 16, ...)",
        )
    lowest = int(math.log2(strides[0]))
    side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=0).sqrt()
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(side / _CANONICAL_SIZE + 1e-8)) - lowest
    return level.clamp(0, count - 1).long()


def _mark_cells(
    anchors: Tensor, boxes: Tensor, cells: int, threshold: float, inclusive: bool
) -> tuple[Tensor, Tensor]:
    """``[cells, G]`` marks of one level and the best IoU per box ``[G]``."""
    iou = _pairwise_iou(anchors, boxes, inclusive)
    best = iou.amax(dim=0)
    marks = (iou > threshold * best) & (best > 0)
    return marks.view(cells, len(anchors) // cells, len(boxes)).any(dim=1), best


def _or_by_image(cells: Tensor, image: Tensor, images: int, h: int, w: int) -> Tensor:
    counts = torch.zeros(images, h * w, dtype=torch.int32, device=cells.device)
    counts.index_add_(0, image, cells.t().to(torch.int32))
    return (counts > 0).view(images, h, w)


def _pairwise_iou(anchors: Tensor, boxes: Tensor, inclusive: bool) -> Tensor:
    one = 1.0 if inclusive else 0.0
    a, b = anchors[:, None], boxes[None]
    extent = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + one
    overlap = extent.clamp(min=0).prod(dim=-1)
    area_a = (anchors[:, 2:] - anchors[:, :2] + one).prod(dim=1)
    area_b = (boxes[:, 2:] - boxes[:, :2] + one).prod(dim=1)
    union = area_a[:, None] + area_b[None] - overlap
    return torch.where(overlap > 0, overlap / union, torch.zeros_like(overlap))


def imitation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    normalizer: Normalizer = "global",
) -> Tensor:
    """Squared error at marked cells: ``1 / (2 N_p) * sum_cells sum_channels (s - t)^2``. Scalar.

    Channels are *summed*: with 256 of them a weight of 0.01 is 1.28 times their mean. Without
    marked cells the loss is an exact zero in the graph.

    Args:
        student: adapted maps, per level ``[N, C, H, W]``.
        teacher: likewise; no gradient flows into them.
        masks: bool ``[N, H, W]`` per level.
        normalizer: ``"global"``: N_p counts the marked cells of all levels and images (the formula
            read literally); ``"level_mean"``: of each level, and levels are averaged, empty ones
            included (DeFeat); ``"level_sum"``: likewise, levels are summed. N_p is at least 1.
    """
    check_choice("normalizer", normalizer, Normalizer)
    check_same_length("FGFI", student, teacher)
    check_same_length("FGFI", student, masks)
    sums, positives = [], []
    for s, t, mask in zip(student, teacher, masks, strict=True):
        check_same_shape("FGFI", s, t)
        cells = (s.shape[0], *s.shape[2:])
        if mask.shape != cells:  # that of one image would be broadcast over the batch
            fail(
                expected=f"an FGFI mask of shape {cells}",
                received=str(tuple(mask.shape)),
                remedy="pass the boxes of every image, an empty tensor where it has none",
            )
        with no_autocast(s):
            error = (full_precision(s) - full_precision(t.detach())).square().sum(dim=1)
            sums.append((error * mask).sum())
            positives.append(mask.sum())
    if normalizer == "global":
        return torch.stack(sums).sum() / (2 * torch.stack(positives).sum().clamp(min=1))
    per_level = torch.stack(sums) / (2 * torch.stack(positives).clamp(min=1))
    return per_level.mean() if normalizer == "level_mean" else per_level.sum()


@LOSSES.register("FGFI")
class FGFILoss(DistillLoss):
    """Imitation of the teacher near objects, through one 3x3 convolution per level.

    The adaptor exists even at equal width. It starts at almost zero (std 1e-4, truncated at
    two deviations, zero bias), as in the reference, so little gradient reaches the student at
    first.

    Args:
        student_channels, teacher_channels: channels per level.
        strides, threshold, assign: see :func:`fgfi_mask`.
        normalizer: see :func:`imitation_loss`.
        relu: end the adaptor in a ReLU, as the single-level reference on VGG; FPN levels are
            signed and need False.
    """

    needs: ClassVar[tuple[str, ...]] = ("anchors", "gt_boxes")

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        strides: Sequence[int] | None = None,
        threshold: float = 0.5,
        assign: Assign = "roi",
        normalizer: Normalizer = "global",
        relu: bool = False,
    ) -> None:
        super().__init__()
        check_same_length("FGFI", student_channels, teacher_channels)
        check_choice("assign", assign, Assign)
        check_choice("normalizer", normalizer, Normalizer)
        if not 0 < threshold < 1:
            fail(
                expected="FGFI threshold between 0 and 1",
                received=str(threshold),
                remedy="use the paper's 0.5",
            )
        self.student_channels = list(student_channels)
        self.strides = None if strides is None else list(strides)
        self.threshold = threshold
        self.assign: Assign = assign
        self.normalizer: Normalizer = normalizer
        self.relu = relu
        self.adaptors = nn.ModuleList(
            nn.Conv2d(c_s, c_t, 3, padding=1)
            for c_s, c_t in zip(student_channels, teacher_channels, strict=True)
        )
        for conv in self.adaptors:
            nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Widths and strides; strides must agree, since cells are compared one to one."""
        strides = [spec.stride for spec in student]
        if strides != [spec.stride for spec in teacher] or None in strides:
            fail(
                expected="FGFI taps of known, equal strides on both sides",
                received=f"student {strides}, teacher {[spec.stride for spec in teacher]}",
                remedy="tap the same FPN levels of both models",
            )
        return {**channel_arguments(student, teacher), "strides": strides}

    def forward(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        *,
        anchors: Sequence[Tensor] | None = None,
        gt_boxes: Sequence[Tensor] | None = None,
        **context: Any,
    ) -> Tensor:
        """Maps ``[N, C, H, W]`` per level; anchors and boxes as :func:`fgfi_mask` takes. Scalar."""
        check_same_length("FGFI", student, teacher)
        if anchors is None or gt_boxes is None:
            fail(
                expected="FGFI to get anchors and gt_boxes",
                received="none",
                remedy="pass them as context, or use a detection host",
            )
        check_channels("FGFI", "student", student, self.student_channels)
        if any(x.numel() == 0 for x in student):
            return zero_in_graph([*student, *self.parameters()])
        masks = fgfi_mask(
            anchors,
            gt_boxes,
            [(x.shape[2], x.shape[3]) for x in student],
            self.strides,
            self.threshold,
            self.assign,
        )
        adapted = [conv(full_precision(x)) for conv, x in zip(self.adaptors, student, strict=True)]
        if self.relu:
            adapted = [F.relu(x) for x in adapted]
        return imitation_loss(adapted, teacher, masks, self.normalizer)
