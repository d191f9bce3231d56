"""Clipping the transfer's gradient to the task's, parameter tensor by parameter tensor."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from kd_det.balance.clip import add_clipped_gradients, clip_factor, transfer_gradients
from kd_det.core.numerics import zero_in_graph


def slow_norm(tensor):
    return math.sqrt(sum(value * value for value in tensor.flatten().tolist()))


def parameters_with(gradients):
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize(
    ("epochs", "factor"), [(0, 0.5), (1, 0.7311), (2, 0.8808), (3, 0.9526), (100, 1.0)]
)
def test_the_factor_grows_from_one_half_to_one(epochs, factor):
    assert clip_factor(epochs) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_matches_slow_loop(randn, factor):
    task = [randn(3, 2), 5 * randn(4), 0.1 * randn(2, 2, 2), randn(())]
    transfer = [randn(3, 2), randn(4), randn(2, 2, 2), 3 * randn(())]
    parameters = parameters_with(task)
    add_clipped_gradients(parameters, transfer, factor)
    ratios = []
    for parameter, g, extra in zip(parameters, task, transfer, strict=True):
        ratios.append(slow_norm(extra) / (factor * slow_norm(g)))
        expected = [
            a + b / max(ratios[-1], 1.0)
            for a, b in zip(g.flatten().tolist(), extra.flatten().tolist(), strict=True)
        ]
        assert parameter.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert min(ratios) < 1 < max(ratios)  # both cases occurred


def test_the_clip_bounds_the_norm_and_keeps_the_direction(randn):
    task, transfer = randn(5, 5), 100 * randn(5, 5)
    (parameter,) = parameters_with([task])
    add_clipped_gradients([parameter], [transfer], 0.5)
    added = parameter.grad - task
    assert added.norm().item() == pytest.approx(0.5 * task.norm().item(), rel=1e-12)
    torch.testing.assert_close(added / added.norm(), transfer / transfer.norm())


def test_a_zero_task_gradient_lets_nothing_through(randn):
    (parameter,) = parameters_with([torch.zeros(3)])
    add_clipped_gradients([parameter], [randn(3)], 0.5)
    assert parameter.grad.tolist() == [0.0] * 3


def test_a_zero_transfer_gradient_changes_nothing(randn):
    task = [randn(3), torch.zeros(3)]
    parameters = parameters_with(task)
    add_clipped_gradients(parameters, [torch.zeros(3), torch.zeros(3)], 0.5)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, task, strict=True))


def test_no_transfer_gradient_changes_nothing(randn):
    task = randn(3)
    (parameter,) = parameters_with([task])
    add_clipped_gradients([parameter], [None], 0.5)
    assert torch.equal(parameter.grad, task)


def test_parameters_without_a_task_gradient_take_the_transfer_whole(randn):
    unused, named = parameters_with([randn(3), 0 * randn(3)])
    unused.grad = None
    transfer = [randn(3), randn(3)]
    add_clipped_gradients([unused, named], transfer, 0.5, unclipped=[named])
    torch.testing.assert_close(unused.grad, transfer[0])
    torch.testing.assert_close(named.grad, transfer[1])
    unused.grad += 1
    assert not torch.equal(unused.grad, transfer[0])  # no memory shared


def test_transfer_gradients_leave_grad_alone_and_the_graph_alive(randn):
    used, unused = nn.Parameter(randn(3)), nn.Parameter(randn(2))
    hidden = used.square()
    gradients = transfer_gradients(hidden.sum(), [used, unused])
    torch.testing.assert_close(gradients[0], 2 * used.detach())
    assert gradients[1] is None
    assert used.grad is None
    (3 * hidden).sum().backward()
    torch.testing.assert_close(used.grad, 6 * used.detach())


# Two processes with halves of a batch, against one with the whole.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.adaptor = nn.Linear(3, 5)
        self.rare = nn.Parameter(torch.ones(3))  # not in every process's transfer
        self.idle = nn.Parameter(torch.ones(2))  # in nobody's transfer

    def forward(self, x, rare):
        hidden = self.body(x).tanh()
        task = self.head(hidden).square().mean() + (hidden.mean(dim=0) * self.rare).sum()
        task = task + self.idle.sum()
        transfer = self.adaptor(hidden).exp().sum(dim=1).mean()
        if rare:
            transfer = transfer + (hidden.mean(dim=0) * self.rare).square().sum()
        # DDP wants a task gradient for every parameter.
        return task + zero_in_graph(self.adaptor.parameters()), transfer


def step(net, model, x, rare):
    """Gradients after one clipped step."""
    parameters = list(net.parameters())
    task, transfer = model(x, rare)
    extra = transfer_gradients(transfer, parameters)
    task.backward()
    before = [p.grad.clone() for p in parameters]
    add_clipped_gradients(parameters, extra, 0.5, unclipped=net.adaptor.parameters())
    return {
        "extra": extra,
        "grad": [p.grad.clone() for p in parameters],
        "clipped": [
            e is not None and not torch.allclose(p.grad - b, e)
            for p, b, e in zip(parameters, before, extra, strict=True)
        ],
    }


def batch():
    torch.manual_seed(0)
    return Net().double(), torch.randn(6, 4, dtype=torch.float64)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    net, x = batch()
    model = DistributedDataParallel(net)
    part = x[:3] if rank == 0 else x[3:]
    results = []
    for rare in (True, rank == 0):  # the second iteration needs DDP's bookkeeping intact
        net.zero_grad()
        results.append(step(net, model, part, rare))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    spawn(process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_clip_as_one_with_the_whole_batch(ranks):
    net, x = batch()

    class Halves(nn.Module):
        """The mean of what both processes compute."""

        def forward(self, x, rare):
            first, second = net(x[:3], rare), net(x[3:], rare)
            return tuple((a + b) / 2 for a, b in zip(first, second, strict=True))

    whole = step(net, Halves(), x, rare=True)
    assert any(whole["clipped"])
    for rank in ranks:
        torch.testing.assert_close(rank[0], whole)


def test_both_processes_end_with_the_same_gradients(ranks):
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)


def test_a_parameter_missing_in_one_process_is_averaged_and_in_all_is_none(ranks):
    net, x = batch()
    names = [name for name, _ in net.named_parameters()]
    rare, idle = names.index("rare"), names.index("idle")
    _, transfer = net(x[:3], True)
    (alone,) = torch.autograd.grad(transfer, [net.rare])
    for rank in ranks:
        torch.testing.assert_close(rank[1]["extra"][rare], alone / 2)
        assert rank[1]["extra"][idle] is None
