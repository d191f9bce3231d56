"""One value per image from the entropies of a detector's own answers, for KCD (ours).

The value is a mean over instances, divided by the largest value it can have, so that images with
few and with many instances compare: 0 is certain, 1 knows nothing.

Shapes: N images, R RoIs of the whole batch, A anchors per image, K foreground classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kd_det.core.numerics import binary_entropy, logit_entropy
from kd_det.hosts.torchvision_detection.taps import Detector

_BACKGROUND = -1  # what torchvision's matchers say of an anchor below every threshold


def roi_values(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean entropy of the softmax over the RoIs of each image, divided by ``log(K + 1)``.

    Args:
        logits: ``[R, K + 1]``, image by image.
        counts: number of RoIs of each image; they sum to R.

    Returns:
        ``[N]`` in 0..1, without a gradient; 0 for an image without RoIs.
    """
    sizes = torch.tensor(counts, device=logits.device)
    images = torch.repeat_interleave(sizes)
    return _means(logit_entropy(logits), images, len(counts)) / math.log(logits.shape[1])


def anchor_values(logits: Tensor, matches: Sequence[Tensor], negatives: int) -> Tensor:
    """Mean of the summed binary entropies over anchors that matter, divided by ``K log 2``.

    All anchors would not do: nearly all of them see background, and are sure of it.

    Args:
        logits: ``[N, A, K + 1]``; torchvision's dense heads have a background column at 0, which
            no anchor is trained to and which is left out here.
        matches: per image ``[A]``, at least 0 for a positive anchor, -1 for background.
        negatives: how many background anchors of each image join the positive ones: those with
            the highest score, which are about to become false detections.

    Returns:
        ``[N]`` in 0..1, without a gradient.
    """
    foreground = logits.detach()[..., 1:]
    matched = torch.stack(list(matches))
    background = matched == _BACKGROUND
    scores = foreground.amax(dim=2).masked_fill(~background, -torch.inf)
    top = scores.topk(min(negatives, scores.shape[1]), dim=1).indices
    chosen = torch.zeros_like(background).scatter_(1, top, True)
    # Where there are fewer background anchors, the top ones hold others.
    chosen = chosen & background | (matched >= 0)
    entropies = binary_entropy(foreground[chosen])
    images = chosen.nonzero()[:, 0]
    return _means(entropies, images, len(logits)) / (foreground.shape[2] * math.log(2))


@contextmanager
def recorded_matches(detector: Detector) -> Iterator[list[Tensor]]:
    """The matches of anchors to ground truth that a dense detector makes while the block runs.

    torchvision hands them to ``head.compute_loss``, which is no module and so has no hooks.
    """
    found: list[Tensor] = []
    head = detector.head
    stock = head.compute_loss

    def listen(targets: Any, outputs: Any, anchors: Any, matches: list[Tensor]) -> Any:
        found.extend(matches)
        return stock(targets, outputs, anchors, matches)

    head.compute_loss = listen
    try:
        yield found
    finally:
        # The attribute of the instance goes; the method of the class is there again.
        del head.compute_loss


def _means(values: Tensor, images: Tensor, count: int) -> Tensor:
    sums = values.new_zeros(count).index_add_(0, images, values)
    return sums / torch.bincount(images, minlength=count).clamp(min=1)
