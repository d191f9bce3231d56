"""Gradient norms of several losses on shared parameters, and each loss's share of their sum.

The share of a loss ``x`` is ``||g_x|| / (||g_task|| + sum_t ||g_t||)``, where ``g`` are gradients
of the task and of the *weighted* terms on parameters that all of them train. Values of losses do
not show it: their scales differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_det.core.distributed import mean_over_ranks, world_size
from kd_det.core.errors import check_known, fail

TASK = "task"

# Under autocast to float16 the gradients of activations vanish below 6e-8 and overflow above 65504,
# which is why such training scales its loss. Each loss is differentiated at the first of these
# scales that leaves its gradient finite; powers of two change nothing else.
_SCALES = (2.0**10, 1.0, 2.0**-10)


@dataclass(frozen=True)
class GradientReport:
    """Gradients of several losses on the same parameters.

    ``norms`` are Euclidean, by name of the loss: float64 scalars, not finite where the gradient is
    not. ``cosines`` are those of the angle to the gradient of ``"task"``, by name of every other
    loss; 0 where one of the two is zero.
    """

    norms: dict[str, Tensor]
    cosines: dict[str, Tensor]


def gradient_norms(
    losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> GradientReport:
    """Norms of the losses' gradients, and cosines with that of the task.

    It costs one backward pass per loss, up to three where a gradient overflows in half precision,
    and leaves everything as it was: the graph stays for the step's own backward pass, nothing is
    written to ``.grad``, and the hooks of DDP do not fire. With several processes every process
    must call it; norms and cosines are then means over them, so that all see the same numbers.

    Args:
        losses: scalars by name. ``"task"`` is the sum of the task's losses, the others are terms.
            A loss without a graph, or one that does not reach the parameters, has a zero gradient.
        parameters: leaves that all losses reach, such as those of the student's backbone.

    Raises:
        KDError: no ``"task"``, or no parameters.
    """
    check_known("loss to compare with", TASK, losses)
    if not parameters:
        fail(
            expected="parameters that task and terms share, to compare their gradients on",
            received="none that is trained",
            remedy="train a part of the backbone, or set KD.BALANCE.NAME none",
        )
    task = _finite_gradient(losses[TASK], parameters)
    norms, cosines = [task.norm / task.scale], []
    terms = [name for name in losses if name != TASK]
    for name in terms:
        gradient = _finite_gradient(losses[name], parameters)
        norms.append(gradient.norm / gradient.scale)
        product = gradient.norm * task.norm
        cosine = _dot(gradient.parts, task.parts, parameters) / product
        cosines.append(torch.where(product == 0, torch.zeros_like(product), cosine))
    values = mean_over_ranks(torch.stack([*norms, *cosines])).unbind()
    return GradientReport(
        dict(zip([TASK, *terms], values, strict=False)),
        dict(zip(terms, values[len(norms) :], strict=True)),
    )


def shares(
    report: GradientReport, weights: Mapping[str, float | Tensor] | None = None
) -> dict[str, Tensor]:
    """Share of each loss in the sum of all gradient norms; 0 if all norms are.

    ``weights`` are those of terms that were measured without; 1 where none is given.
    """
    norms = {name: _weighted(n, (weights or {}).get(name, 1.0)) for name, n in report.norms.items()}
    total = torch.stack(list(norms.values())).sum()
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return {name: norm / total for name, norm in norms.items()}


def _weighted(norm: Tensor, weight: float | Tensor) -> Tensor:
    # A term that is off has no share, even if its gradient is not finite.
    off = not isinstance(weight, Tensor) and weight == 0
    return torch.zeros_like(norm) if off else (norm * weight).abs()


class _Gradient(NamedTuple):
    """A gradient per parameter, all of them larger by ``scale``; ``norm`` is that of the parts."""

    parts: tuple[Tensor | None, ...]
    norm: Tensor
    scale: float


def _finite_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> _Gradient:
    """The gradient at the largest scale at which it is finite in every process, or at the last."""
    for scale in _SCALES:
        parts = _gradient(loss, parameters, scale)
        found = _Gradient(parts, _dot(parts, parts, parameters).sqrt(), scale)
        # Together, as a backward pass may itself wait for the other processes (SyncBatchNorm).
        finite, possible = _in_every_process(
            torch.isfinite(found.norm), torch.isfinite(loss.detach()).to(found.norm.device)
        )
        if finite or not possible:
            break
    return found


def _gradient(
    loss: Tensor, parameters: Sequence[nn.Parameter], scale: float
) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(parameters)
    start = torch.full_like(loss, scale)
    return torch.autograd.grad(loss, parameters, start, retain_graph=True, allow_unused=True)


def _in_every_process(*flags: Tensor) -> list[bool]:
    """Of each flag whether it is set in all processes."""
    values = torch.stack(flags).int()
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return [bool(value) for value in values.tolist()]


def _dot(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Inner product of two gradients; None is zero. Summed in float64: norms differ widely."""
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            total = total + torch.sum(a.double() * b.double())
    return total
