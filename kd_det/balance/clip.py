"""Clipping the gradient of a term to that of the task (``CLIP: task_norm``; MHGD).

Per parameter tensor: ``g = g_task + clip(g_transfer, ||g_task|| * s)``, where ``s`` grows from 1/2
to 1 with the epochs since the transfer began. The clip is not linear; with several processes both
gradients must be averaged before it. One step of a loop:

    >>> extra = transfer_gradients(clipped_terms, parameters)
    >>> task_loss.backward()  # DDP averages this one
    >>> add_clipped_gradients(parameters, extra, clip_factor(epoch), unclipped=adaptors)
    >>> optimizer.step()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kd_det.core.distributed import mean_over_ranks, world_size


def clip_factor(epochs_since_start: float) -> float:
    """``1 / (1 + exp(-e))``: 0.5 in the first epoch, then 0.73, 0.88, 0.95, ..."""
    return 1.0 / (1.0 + math.exp(-epochs_since_start))


def transfer_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of ``loss``, averaged over processes; ``.grad`` and the graph stay as they are.

    They do not pass the hooks of DDP, which would take this for the step's only backward pass.
    Every process must call it, each with its loss, the sum of the terms to clip, and the same
    leaves of the graph. A parameter that no process has a gradient for gets None.
    """
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    if world_size() == 1:
        return list(gradients)
    return _average(gradients, parameters)


def add_clipped_gradients(
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    factor: float,
    unclipped: Iterable[nn.Parameter] = (),
) -> None:
    """Add each gradient to ``.grad``, shortened to ``factor`` times the norm found there.

    ``.grad`` must hold the task's gradient, averaged over processes and in true scale (after
    ``unscale_`` where a gradient scaler is used). Weight decay is not part of it: optimisers add
    it later.

    Args:
        parameters, gradients: argument and result of :func:`transfer_gradients`.
        factor: largest ratio of the two norms, see :func:`clip_factor`.
        unclipped: parameters that the task does not train, such as adaptors, where their ``.grad``
            may be an exact zero, as with DDP. They take the whole gradient, as does any parameter
            whose ``.grad`` is None.
    """
    free = {id(parameter) for parameter in unclipped}
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            elif id(parameter) in free:
                parameter.grad += gradient
            else:
                limit = factor * torch.linalg.vector_norm(parameter.grad)
                norm = torch.linalg.vector_norm(gradient)
                tiny = torch.finfo(norm.dtype).tiny
                parameter.grad += gradient * (limit / norm.clamp(min=tiny)).clamp(max=1.0)


def _average(
    gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    # One reduction for all. The flags behind the gradients count the processes that have each.
    present = [gradient is not None for gradient in gradients]
    flags = parameters[0].new_tensor(present)
    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    flat = mean_over_ranks(torch.cat([*parts, flags]))
    *parts, flags = flat.split([parameter.numel() for parameter in parameters] + [len(present)])
    return [
        part.view_as(parameter).to(parameter.dtype) if flag else None
        for part, parameter, flag in zip(parts, parameters, flags.tolist(), strict=True)
    ]
