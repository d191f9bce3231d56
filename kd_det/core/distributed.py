"""The process group of a run: its size, this rank, and values of all ranks.

Shapes: rank r holds ``N_r`` rows; every rank receives all ``N = N_0 + N_1 + ...`` of them.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.core.errors import fail


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process in the process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def collective_device() -> torch.device:
    """The device of tensors that ranks exchange: NCCL accepts only those of the GPU."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


def end_process_groups() -> None:
    """End the threads of the process groups; register it with ``atexit``.

    A thread that still releases tensors while the interpreter ends can abort a process whose work
    is done. Threads end with the last reference to their group, such as that of a model in DDP.
    """
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def mean_over_ranks(values: Tensor) -> Tensor:
    """``values`` averaged over all ranks; ``values`` itself with one rank. All ranks must call it.

    No gradient passes the average.
    """
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def gather_objects(own: Any) -> list[Any]:
    """``own`` of every rank, in rank order; all ranks must call it."""
    if world_size() == 1:
        return [own]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order.

    The backward pass sums over the ranks: each gives its rows the gradient of the losses of *all*
    ranks. If every rank computes the same loss of the gathered rows, DDP's average over ranks is
    therefore the gradient of one process with the whole batch.

    Every rank must make the same calls in the same order, forward and backward. Rows of any
    floating dtype ``[N_r, ...]``, where ``N_r`` may be 0, give ``[N, ...]``, the same on every
    rank; with one rank they are returned as they are.

    Raises:
        KDError: the ranks' rows differ in shape beyond their number; raised on every rank.
    """
    if world_size() == 1:
        return rows
    shapes = _all_gather(torch.tensor(rows.shape, device=rows.device))
    counts, *rest = torch.stack(shapes, dim=1).tolist()
    if any(len(set(sizes)) > 1 for sizes in rest):
        fail(
            expected="rows of one shape on every rank, to gather them",
            received=", ".join(str(tuple(shape.tolist())) for shape in shapes),
            remedy="pool maps to one vector per sample before gathering",
        )
    return _GatherRows.apply(rows, counts, rank())


def gather_aligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`gather_rows` of several ``[N_r, C_i]`` of the same samples, in one exchange.

    They travel in the widest of their dtypes and come back in it.
    """
    if world_size() == 1:
        return list(tensors)
    widths = [tensor.shape[1] for tensor in tensors]
    return list(gather_rows(torch.cat(list(tensors), dim=1)).split(widths, dim=1))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        # Collectives want equal sizes: pad to the longest, trim what came back.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = _all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # A copy: the reduction works in place, and the gradient may be shared or expanded.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, ctx.start, ctx.count), None, None


def _all_gather(tensor: Tensor) -> list[Tensor]:
    received = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(received, tensor)
    return received
