"""Bridges between the shapes of student and teacher, learnable or without parameters.

"Adaptor" covers what papers call connector, regressor, projector or guided layer. A transform
of a single paper, such as ReviewKD's ABF, is in the file of that paper's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.core.errors import fail

Size = tuple[int, int]


class ConvAdaptor(nn.Module):
    """Convolution -> BatchNorm -> optional ReLU from student to teacher width.

    The convolution follows FitNet's regressor as RepDistiller and mdistiller build it when both
    sizes are given, and is 1x1 otherwise (fully convolutional, for detectors):

    ======================  ===========================================================
    sizes                   layer
    ======================  ===========================================================
    student = 2 teacher     3x3, stride 2, padding 1
    2 student = teacher     transposed 4x4, stride 2, padding 1
    student >= teacher      valid, kernel ``(1 + H_s - H_t, 1 + W_s - W_t)``
    ======================  ===========================================================

    Both axes are checked; the references look at the height only and silently yield a wrong
    width.

    Sizes are ``(H, W)``. A final ReLU fits teachers' taps that follow one, but not FPN levels.

    Raises:
        KDError: sizes that no row of the table bridges.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        student_size: Size | None = None,
        teacher_size: Size | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = _bridge(student_channels, teacher_channels, student_size, teacher_size)
        self.bn = nn.BatchNorm2d(teacher_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_s, H, W] -> [N, C_t, H', W']``."""
        x = batch_norm(self.bn, self.conv(x))
        return F.relu(x) if self.relu else x


def _bridge(c_s: int, c_t: int, size_s: Size | None, size_t: Size | None) -> nn.Module:
    if size_s is None or size_t is None:
        return nn.Conv2d(c_s, c_t, 1)
    (h_s, w_s), (h_t, w_t) = size_s, size_t
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    if (2 * h_s, 2 * w_s) == (h_t, w_t):
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    if h_s >= h_t and w_s >= w_t:
        return nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
    fail(
        expected="a student map that is at least as large as the teacher's, or exactly half of it",
        received=f"student {h_s}x{w_s}, teacher {h_t}x{w_t}",
        remedy="tap layers of the same stride",
    )


def batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Apply ``bn`` to ``[N, C, H, W]``.

    Raises:
        KDError: training mode and one value per channel (a batch of 1 with a 1x1 map).
    """
    if bn.training and x.numel() == x.shape[1]:
        fail(
            expected="more than one value per channel, as BatchNorm needs in training",
            received=f"a map of shape {tuple(x.shape)}",
            remedy="use a batch of at least 2 (DROP_LAST), or leave out the 1x1 tap",
        )
    return bn(x)


def crop_to(tensor: Tensor, like: Tensor) -> Tensor:
    """Crop the last two axes to those of ``like``.

    Both maps begin at the same pixel and have the same stride, so that a larger padding divisor
    adds cells at the bottom and right only.
    """
    return tensor[..., : like.shape[-2], : like.shape[-1]]


def pool_to_common_size(first: Tensor, second: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Adaptively pool two maps ``[N, C, H, W]`` to the smaller height and the smaller width.

    ``pool`` is ``"max"`` or ``"avg"``. A map that has the size already is returned as it is.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    pooling = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    first, second = (x if x.shape[2:] == size else pooling(x, size) for x in (first, second))
    return first, second


def resize_nearest(x: Tensor, size: Size | torch.Size) -> Tensor:
    """Nearest-neighbour resize of ``[N, C, H, W]``; the input itself if the size already fits."""
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="nearest")
