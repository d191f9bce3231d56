"""One value per image from the entropies of the student's own answers, for KCD (ours).

The value is a mean over instances, divided by the largest value it can have, so that images with
few and with many instances compare: 0 is certain, 1 knows nothing.

Shapes: N images, R sampled RoIs of the batch, A anchors per image, K foreground classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.structures import Boxes
from torch import Tensor

from kd_det.core.numerics import binary_entropy, logit_entropy


def roi_values(
    logits: Sequence[Tensor], boxes: Sequence[Sequence[Boxes]], sigmoid: bool = False
) -> Tensor:
    """Mean entropy over the RoIs that were sampled for the box head in each image.

    Args:
        logits: per stage ``[R, K + 1]``, image by image; a cascade's stages count alike.
        boxes: per stage, per image, the RoIs.
        sigmoid: whether the head has independent classes. Their entropies are summed, without the
            last column, which such a head does not train.

    Returns:
        ``[N]`` in 0..1, without a gradient; 0 for an image without RoIs.
    """
    rows = torch.cat(list(logits))
    images = torch.cat([_images(stage).to(rows.device) for stage in boxes])
    if sigmoid:
        entropies = binary_entropy(rows[:, :-1]) / ((rows.shape[1] - 1) * math.log(2))
    else:
        entropies = logit_entropy(rows) / math.log(rows.shape[1])
    return _means(entropies, images, len(boxes[0]))


def anchor_values(logits: Tensor, labels: Tensor, negatives: int) -> Tensor:
    """Mean of the summed binary entropies over anchors that matter, divided by ``K log 2``.

    All anchors would not do: nearly all of them see background, and are sure of it.

    Args:
        logits: ``[N, A, K]``.
        labels: ``[N, A]``: a class, K for background, -1 for an anchor to ignore.
        negatives: how many background anchors of each image join the positive ones: those with
            the highest score, which are about to become false detections.

    Returns:
        ``[N]`` in 0..1, without a gradient; 0 for an image without any such anchor.
    """
    classes = logits.shape[2]
    background = labels == classes
    scores = logits.detach().amax(dim=2).masked_fill(~background, -torch.inf)
    top = scores.topk(min(negatives, scores.shape[1]), dim=1).indices
    chosen = torch.zeros_like(background).scatter_(1, top, True)
    # Where there are fewer background anchors, the top ones hold others.
    chosen = (chosen & background) | ((labels >= 0) & ~background)
    entropies = binary_entropy(logits[chosen]) / (classes * math.log(2))
    return _means(entropies, chosen.nonzero()[:, 0], len(logits))


def _images(boxes: Sequence[Boxes]) -> Tensor:
    """The image of each RoI, ``[R]``."""
    return torch.repeat_interleave(torch.tensor([len(own) for own in boxes]))


def _means(values: Tensor, images: Tensor, count: int) -> Tensor:
    sums = values.new_zeros(count).index_add_(0, images, values)
    return sums / torch.bincount(images, minlength=count).clamp(min=1)
