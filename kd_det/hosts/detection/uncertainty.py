"""One value per image from the entropies of a detector's own outputs, for KCD (ours).

The value is a mean over instances, divided by the largest value it can have, so that images with
few and with many instances compare: 0 is certain, 1 knows nothing. Each host divides where it
always has, before the mean or after it (``mean_first``): the last bit of a value depends on it.

Shapes: N images, R RoIs of the batch, A anchors per image, K foreground classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.core.numerics import binary_entropy, logit_entropy


def roi_values(
    logits: Sequence[Tensor],
    counts: Sequence[Sequence[int]],
    sigmoid: bool = False,
    mean_first: bool = False,
) -> Tensor:
    """Mean entropy over the RoIs that were sampled for the box head in each image.

    Args:
        logits: per cascade stage ``[R, K + 1]``, image by image; ``[R, K]`` of independent
            classes. All stages count alike.
        counts: per cascade stage, the number of RoIs of each image.
        sigmoid: whether classes are independent. Their entropies are summed.

    Returns:
        ``[N]`` in 0..1, without a gradient; 0 for an image without RoIs.
    """
    rows = torch.cat(list(logits))
    images = torch.cat([torch.repeat_interleave(torch.tensor(own)) for own in counts])
    columns = rows.shape[1]
    entropies = binary_entropy(rows) if sigmoid else logit_entropy(rows)
    largest = columns * math.log(2) if sigmoid else math.log(columns)
    return _means(entropies, images.to(rows.device), len(counts[0]), largest, mean_first)


def anchor_values(
    logits: Tensor, positive: Tensor, background: Tensor, negatives: int, mean_first: bool = False
) -> Tensor:
    """Mean of the summed binary entropies over anchors that matter, divided by ``K log 2``.

    All anchors would not do: nearly all of them see background, and are sure of it.

    Args:
        logits: ``[N, A, K]`` of independent classes.
        positive: ``[N, A]``, the anchors of objects.
        background: ``[N, A]``; an anchor that is neither is ignored.
        negatives: how many background anchors of each image join the positive ones: those with
            the highest score, which are about to become false detections.

    Returns:
        ``[N]`` in 0..1, without a gradient; 0 for an image without any such anchor.
    """
    scores = logits.detach().amax(dim=2).masked_fill(~background, -torch.inf)
    top = scores.topk(min(negatives, scores.shape[1]), dim=1).indices
    chosen = torch.zeros_like(background).scatter_(1, top, True)
    # Where there are fewer background anchors, the top ones hold others.
    chosen = (chosen & background) | positive
    entropies = binary_entropy(logits[chosen])
    largest = logits.shape[2] * math.log(2)
    return _means(entropies, chosen.nonzero()[:, 0], len(logits), largest, mean_first)


def _means(values: Tensor, images: Tensor, count: int, largest: float, mean_first: bool) -> Tensor:
    if not mean_first:
        values = values / largest
    sums = values.new_zeros(count).index_add_(0, images, values)
    means = sums / torch.bincount(images, minlength=count).clamp(min=1)
    return means / largest if mean_first else means
