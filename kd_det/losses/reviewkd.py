"""ReviewKD: knowledge review (Chen et al., "Distilling Knowledge via Knowledge Review",
CVPR 2021, https://arxiv.org/abs/2104.09044).

Levels run from shallow (0, largest map) to deep (L - 1). Shapes per level i:
student ``[N, C_s,i, H_i, W_i]``, teacher ``[N, C_t,i, H'_i, W'_i]``, mid width M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.adaptors import batch_norm, resize_nearest
from kd_det.core.errors import (
    check_at_least,
    check_channels,
    check_choice,
    check_same_length,
    check_same_shape,
    fail,
)
from kd_det.core.loss import Arguments, DistillLoss, Specs, channel_arguments, check_strides
from kd_det.core.numerics import full_precision, no_autocast, zero_in_graph
from kd_det.core.registry import LOSSES

_POOL_SIZES = (4, 2, 1)


def hcl_loss(student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor) -> Tensor:
    """Hierarchical context loss: squared error at several resolutions, summed over levels. Scalar.

    Each level averages the full-resolution error (weight 1) with the errors after adaptive
    average pooling to 4x4, 2x2 and 1x1 (weights 1/2, 1/4, 1/8), skipping sizes not below the
    map's *height*; the weight is halved only for sizes that are used. An empty
    level counts as an exact zero in the graph.

    Args:
        student: fused student maps, of the teacher's shapes; or a single map.
        teacher: the teacher's maps; no gradient flows into them.

    Raises:
        KDError: lists of different length or maps of different shape.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    check_same_length("ReviewKD", students, teachers)
    levels = [_hcl_level(s, t) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(levels).sum()


def _hcl_level(student: Tensor, teacher: Tensor) -> Tensor:
    check_same_shape("ReviewKD", student, teacher)
    if student.numel() == 0:
        return zero_in_graph([student])
    with no_autocast(student):
        # Pooling is linear: the difference is formed once and then pooled.
        difference = full_precision(student) - full_precision(teacher.detach())
        total = difference.square().mean()
        weight, weights = 1.0, 1.0
        for size in _POOL_SIZES:
            if size < difference.shape[2]:
                weight /= 2
                weights += weight
                total = total + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
        return total / weights


class ABF(nn.Module):
    """Attention-based fusion of one level with the fused map of the next deeper one, if any.

    Maps are fused in ``mid_channels``, M; the deepest level (``fuse`` False) has no attention.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        squeeze = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        # No final ReLU: FPN levels are signed.
        expand = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_uniform_(squeeze.weight, a=1)
        nn.init.kaiming_uniform_(expand.weight, a=1)
        self.conv1: Any = nn.Sequential(squeeze, nn.BatchNorm2d(mid_channels))
        self.conv2: Any = nn.Sequential(expand, nn.BatchNorm2d(out_channels))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1)) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Fuse ``x [N, C_s, H, W]`` with the deeper level's fused map ``[N, M, h, w]``; project.

        Returns:
            The map to compare with the teacher ``[N, C_t, H', W']``, whose ``(H', W')`` is
            ``size``, and the fused map handed to the next shallower level ``[N, M, H', W']``.
        """
        x = batch_norm(self.conv1[1], self.conv1[0](x))
        if self.att_conv is not None and deeper is not None:
            deeper = resize_nearest(deeper, x.shape[-2:])
            attention = torch.sigmoid(self.att_conv(torch.cat([x, deeper], dim=1)))
            x = x * attention[:, :1] + deeper * attention[:, 1:]
        x = resize_nearest(x, size)
        return batch_norm(self.conv2[1], self.conv2[0](x)), x


@LOSSES.register("ReviewKD")
class ReviewKDLoss(DistillLoss):
    """ABF over the student's levels from deep to shallow, then :func:`hcl_loss`.

    Args:
        in_channels, out_channels: widths of student and teacher, shallow to deep.
        mid_channels: M. Default ``min(512, deepest student width)``, the CIFAR rule, which gives
            256 on a stock FPN; the released detection code uses 256.
        reduction: ``"mean"`` over samples, channels and positions, levels summed; the only choice,
            named because a weight belongs to it.

    State keys follow the released code: ``abfs.0`` is the *deepest* level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int | None = None,
        reduction: Literal["mean"] = "mean",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean",))
        check_same_length("ReviewKD", in_channels, out_channels)
        mid = min(512, in_channels[-1]) if mid_channels is None else mid_channels
        remedy = "use 256 on FPN levels, or leave it out"
        check_at_least("ReviewKD to get mid_channels", mid, 1, remedy)
        self.in_channels = list(in_channels)
        deepest = len(in_channels) - 1
        self.abfs = nn.ModuleList(
            ABF(in_channels[i], mid, out_channels[i], fuse=i < deepest)
            for i in reversed(range(len(in_channels)))
        )

    @classmethod
    def tap_arguments(cls, student: Specs, teacher: Specs, given: Arguments) -> Arguments:
        """Channel widths of both sides; the order of the levels is checked."""
        # Pooled vectors have none.
        strides = [spec.stride for spec in student if spec.stride]
        if strides != sorted(strides):
            fail(
                expected="ReviewKD TAPS from shallow to deep",
                received=f"strides {strides}",
                remedy="list the levels in order, for example [p2, p3, p4, p5, p6]",
            )
        check_strides("ReviewKD", student, teacher, "tap the same FPN levels of both models")
        own, others = channel_arguments(student, teacher).values()
        return {"in_channels": own, "out_channels": others}

    def fuse(self, student: list[Tensor], sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Fused student maps, shallow to deep, at the teacher's ``sizes``."""
        outputs: list[Tensor] = []
        deeper: Tensor | None = None
        for abf, x, size in zip(self.abfs, student[::-1], sizes[::-1], strict=True):
            out, deeper = abf(full_precision(x), deeper, size)
            outputs.append(out)
        return outputs[::-1]

    def forward(self, student: list[Tensor], teacher: list[Tensor], **context: Any) -> Tensor:
        """Levels shallow to deep on both sides; ``[N, C]`` is a level of one position. Scalar."""
        student, teacher = [_as_map(x) for x in student], [_as_map(x) for x in teacher]
        check_same_length("ReviewKD", student, teacher)
        check_channels("ReviewKD", "student", student, self.in_channels)
        if any(x.numel() == 0 for x in student):
            return zero_in_graph([*student, *self.parameters()])
        return hcl_loss(self.fuse(student, [t.shape[-2:] for t in teacher]), teacher)


def _as_map(feature: Tensor) -> Tensor:
    return feature[:, :, None, None] if feature.dim() == 2 else feature
