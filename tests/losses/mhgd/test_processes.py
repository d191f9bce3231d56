"""MHGD over two processes with parts of a batch, against one with the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from tests.losses.mhgd.cases import CHANNELS, SIZES, build

COUNTS = {"unequal": (3, 5), "one without samples": (0, 6), "one sample each": (1, 1)}


def step(part, counts):
    """Loss and gradients of one transfer and one pre-stage step on a slice of the batch."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    loss = build(gather=True)
    inputs, teacher = (
        [
            torch.randn(sum(counts), c, *size, generator=generator, dtype=torch.float64)[part]
            for c, size in zip(CHANNELS, SIZES, strict=True)
        ]
        for _ in range(2)
    )
    scale = [
        torch.randn(c, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
        for c in CHANNELS
    ]
    value = loss([s * x for s, x in zip(scale, inputs, strict=True)], teacher)
    value.backward()
    loss.start_pre_stage()
    training = loss.pre_stage_loss(teacher)
    training.backward()
    return {
        "loss": value.detach(),
        "gradients": [s.grad for s in scale],
        "pre_stage": training.detach(),
        "network_gradients": [p.grad for p in loss.network.parameters()],
        "state": loss.pre_stage_state(),
    }


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for case, (first, second) in COUNTS.items():
        part = slice(first) if rank == 0 else slice(first, None)
        results[case] = step(part, (first, second))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one_with_the_whole_batch(tmp_path):
    spawn(process, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, counts in COUNTS.items():
        whole = step(slice(None), counts)
        assert whole["loss"] > 1e-3
        for part in parts:
            for key in ("loss", "pre_stage", "network_gradients", "state"):
                torch.testing.assert_close(part[case][key], whole[key])
        gradients = zip(*(part[case]["gradients"] for part in parts), strict=True)
        averaged = [(a + b) / 2 for a, b in gradients]
        torch.testing.assert_close(averaged, whole["gradients"])
