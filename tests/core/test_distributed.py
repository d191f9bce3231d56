"""Gathering rows over ranks: two gloo processes against one process with the whole batch."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_det.core.distributed import end_process_groups, gather_aligned, gather_rows
from kd_det.core.errors import KDError
from kd_det.losses import IRGLoss, IRGMovementLoss, MTKLoss

WORLD = 2
COUNTS = [(3, 5), (5, 3), (4, 4), (1, 1), (0, 4), (6, 0), (0, 0)]
LOSSES = {
    "IRG": (IRGLoss, {"lambda1": 0.5, "lambda2": 0.25}, slice(0, 3)),
    "IRG full gradient": (IRGLoss, {"lambda2": 1.0, "detach_max": False}, slice(0, 3)),
    "IRG mean": (IRGLoss, {"lambda2": 1.0, "reduction": "mean"}, slice(0, 3)),
    "IRG-t": (IRGMovementLoss, {"lambda3": 1.0}, slice(3, 5)),
    "MTK": (MTKLoss, {"edges": 2, "lambda2": 0.5, "lambda3": 0.25}, slice(0, 5)),
    "MTK of 5 nodes": (MTKLoss, {"edges": 2, "lambda2": 0.5, "max_nodes": 5}, slice(0, 5)),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Student(nn.Module):
    """Gives logits, two layers of edges (one of them a map) and one movement."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"logits": 4, "hidden": 3, "map": 2 * 3 * 2, "first": 5, "last": 5}
        self.layers = nn.ModuleDict({name: nn.Linear(6, width) for name, width in widths.items()})
        g = generator()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)

    def forward(self, x):
        outputs = {name: layer(x).tanh() for name, layer in self.layers.items()}
        outputs["map"] = outputs["map"].unflatten(1, (2, 3, 2))
        return list(outputs.values())


def batch():
    """Inputs and teacher tensors of 8 samples."""
    g = generator()
    inputs, logits, last, first, final = (
        torch.randn(8, width, generator=g, dtype=torch.float64) for width in (6, 4, 7, 3, 3)
    )
    return inputs, [logits, last, last, first, final]


def step(model, name, gather, rows=slice(None)):
    """Loss and parameter gradients of one backward pass over some rows of the batch."""
    loss_class, settings, taps = LOSSES[name]
    inputs, teacher = batch()
    # Layers taught by the same tensor must keep sharing it.
    teacher = [t[rows] for t in teacher]
    teacher[2] = teacher[1]
    model.zero_grad()
    loss = loss_class(**settings, gather=gather)(model(inputs[rows])[taps], teacher[taps])
    loss.backward()
    zeros = map(torch.zeros_like, model.parameters())
    gradients = [
        z if p.grad is None else p.grad for p, z in zip(model.parameters(), zeros, strict=True)
    ]
    return loss.detach(), gradients


def rows_of(rank, counts):
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def gathered(rank, counts):
    """What comes back, and the gradient of the sum over ranks of a loss that differs by rank."""
    whole = batch()[0][: sum(counts)]
    local = whole[rows_of(rank, counts)].clone().requires_grad_()
    rows = gather_rows(local)
    ((rank + 1) * rows.pow(3)).sum().backward()
    return rows.detach(), local.grad


def refused(rank):
    try:
        gather_rows(torch.zeros(2, 3, 4 + rank))
    except KDError as error:
        return str(error)
    return "accepted"


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        result = {"refused": refused(rank)}
        aligned = gather_aligned([torch.full((rank + 1, w), 10.0 * rank + w) for w in (1, 2)])
        result["aligned"] = aligned
        for counts in COUNTS:
            result[counts] = gathered(rank, counts)
        for name in LOSSES:
            for counts in ((3, 5), (0, 8)):
                model = DistributedDataParallel(Student(), find_unused_parameters=True)
                result[name, counts] = step(model, name, True, rows_of(rank, counts))
        local = step(Student(), "MTK", False, rows_of(rank, (3, 5)))
        result["local"] = local
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("gather")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_rank_receives_all_rows_in_rank_order(results, counts):
    for result in results:
        assert torch.equal(result[counts][0], batch()[0][: sum(counts)])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_gradient_of_a_row_is_the_sum_over_the_losses_of_all_ranks(results, counts):
    whole = batch()[0][: sum(counts)]
    for rank, result in enumerate(results):
        expected = (1 + 2) * 3 * whole[rows_of(rank, counts)] ** 2
        torch.testing.assert_close(result[counts][1], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("counts", [(3, 5), (0, 8)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_over_two_ranks_is_the_loss_of_one_process(results, name, counts):
    expected, _ = step(Student(), name, gather=False)
    assert expected > 0
    for result in results:
        torch.testing.assert_close(result[name, counts][0], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("counts", [(3, 5), (0, 8)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_ddp_averages_to_the_gradient_of_one_process(results, name, counts):
    _, expected = step(Student(), name, gather=False)
    assert any(gradient.any() for gradient in expected)
    for result in results:
        torch.testing.assert_close(result[name, counts][1], expected, rtol=1e-11, atol=1e-15)


def test_without_gathering_each_rank_has_a_graph_of_its_own(results):
    for rank, result in enumerate(results):
        expected = step(Student(), "MTK", False, rows_of(rank, (3, 5)))
        torch.testing.assert_close(result["local"], expected)
    assert results[0]["local"][0] != results[1]["local"][0]


def test_aligned_tensors_travel_together_and_keep_their_columns(results):
    for result in results:
        for width, rows in zip((1, 2), result["aligned"], strict=True):
            expected = torch.tensor([[width], [10 + width], [10 + width]]).expand(3, width)
            assert torch.equal(rows, expected.float())


def test_rows_of_different_shape_are_refused_on_every_rank(results):
    for result in results:
        assert "(2, 3, 4), (2, 3, 5)" in result["refused"]
        assert "pool maps to one vector" in result["refused"]


def test_one_process_gets_its_own_rows_back(randn):
    rows = randn(3, 2, grad=True)
    assert gather_rows(rows) is rows
    assert gather_aligned([rows, rows])[1] is rows


def test_a_group_of_one_rank_gets_its_own_rows_back(randn, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        rows = randn(3, 2)
        assert gather_rows(rows) is rows
    finally:
        dist.destroy_process_group()


def test_process_groups_end_once_and_where_there_are_none(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    for _ in range(2):
        end_process_groups()
        assert not dist.is_initialized()
