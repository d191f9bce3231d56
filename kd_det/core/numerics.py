"""Precision, exact zeros, entropies and row order, for losses and procedures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def full_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 unchanged.

    fp16 overflows at 65504, which squared activations reach easily.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the precision on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def zero_in_graph(tensors: Iterable[Tensor]) -> Tensor:
    """An exact zero that still depends on ``tensors``.

    A detached zero would leave parameters without a gradient, for which DDP waits. A sum of no
    elements, unlike a product with 0, is exact where values are not finite.
    """
    total: Tensor | None = None
    for tensor in tensors:
        term = full_precision(tensor).flatten()[:0].sum()
        total = term if total is None else total + term
    assert total is not None
    return total


def logit_entropy(logits: Tensor) -> Tensor:
    r"""``-sum_c p_c log p_c`` of the softmax at temperature 1, in nats.

    ``[M, C]`` of any floating dtype to ``[M]``, from 0 to ``log C``, in at least float32 and
    without a gradient. Computed from log-probabilities: ``p * log(p)`` would be NaN for a saturated
    logit.
    """
    with no_autocast(logits):
        log_p = F.log_softmax(full_precision(logits.detach()), dim=-1)
        # A class that is masked out (-inf) counts 0 * (most negative number) = 0.
        return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)


def binary_entropy(logits: Tensor) -> Tensor:
    """Sum over classes of the entropy of each sigmoid, in nats: for heads of independent classes.

    ``[M, C]`` of any floating dtype to ``[M]``, from 0 to ``C log 2``, in at least float32 and
    without a gradient.
    """
    with no_autocast(logits):
        z = full_precision(logits.detach())
        z = z.clamp(torch.finfo(z.dtype).min, torch.finfo(z.dtype).max)
        positive = torch.sigmoid(z) * F.logsigmoid(z)
        negative = torch.sigmoid(-z) * F.logsigmoid(-z)
        return -(positive + negative).sum(dim=-1)


def evenly_spaced(rows: Tensor, most: int) -> Tensor:
    """At most ``most`` rows, evenly spaced over all of them; all of them where it is 0."""
    if not 0 < most < len(rows):
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]


def descending(scores: Tensor) -> Tensor:
    """Indices by descending score, int64 ``[N]``; equal scores keep the lower index first."""
    return torch.sort(scores, descending=True, stable=True).indices
