"""Gradient norms, cosines and shares against gradients taken one by one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from kd_det.balance.shares import GradientReport, gradient_norms, shares
from kd_det.core.numerics import zero_in_graph


@pytest.fixture
def network(randn):
    """Two shared layers, a head that only one loss reaches, and three losses."""
    shared = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    head = nn.Linear(3, 2).double()
    x = shared(randn(6, 4))
    losses = {
        "task": head(x).pow(2).mean(),
        "hint": 30 * (x - randn(6, 3)).pow(2).sum(),
        "early": shared[0](randn(2, 4)).abs().mean(),
    }
    return shared, head, losses


def slow_gradient(loss, parameters):
    """The gradient as one vector, from a backward pass of its own."""
    for p in parameters:
        p.grad = None
    loss.backward(retain_graph=True)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    vector = torch.cat([part.flatten() for part in parts])
    for p in parameters:
        p.grad = None
    return vector


def test_norms_and_cosines_are_those_of_gradients_taken_one_by_one(network):
    shared, _, losses = network
    parameters = list(shared.parameters())
    vectors = {name: slow_gradient(loss, parameters) for name, loss in losses.items()}
    report = gradient_norms(losses, parameters)
    assert list(report.norms) == ["task", "hint", "early"]
    for name, vector in vectors.items():
        torch.testing.assert_close(report.norms[name], vector.norm())
    assert list(report.cosines) == ["hint", "early"]
    for name, cosine in report.cosines.items():
        task = vectors["task"]
        expected = (vectors[name] @ task) / (vectors[name].norm() * task.norm())
        torch.testing.assert_close(cosine, expected)
        assert cosine.abs() > 1e-3


def test_the_order_of_the_losses_does_not_matter(network):
    shared, _, losses = network
    parameters = list(shared.parameters())
    turned = gradient_norms(dict(reversed(losses.items())), parameters)
    assert turned.norms == gradient_norms(losses, parameters).norms


def test_shares_are_parts_of_the_sum_of_norms(network):
    shared, _, losses = network
    parameters = list(shared.parameters())
    weights = {"hint": 0.25, "early": torch.tensor(3.0, dtype=torch.float64)}
    weighted = {name: loss * weights.get(name, 1) for name, loss in losses.items()}
    norms = {name: slow_gradient(loss, parameters).norm() for name, loss in weighted.items()}
    expected = {name: norm / sum(norms.values()) for name, norm in norms.items()}
    for found in (
        shares(gradient_norms(weighted, parameters)),
        shares(gradient_norms(losses, parameters), weights),
    ):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_a_measurement_leaves_gradients_hooks_and_graph_alone(network):
    shared, head, losses = network
    everything = [*shared.parameters(), *head.parameters()]
    expected = torch.autograd.grad(sum(losses.values()), everything, retain_graph=True)
    fired = []
    for p in everything:
        p.register_post_accumulate_grad_hook(fired.append)
    gradient_norms(losses, list(shared.parameters()))
    assert fired == []
    assert all(p.grad is None for p in everything)
    sum(losses.values()).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(everything, expected, strict=True))


def test_losses_without_a_gradient_have_no_norm_and_no_share(network):
    shared, head, losses = network
    zeros = {
        "detached": torch.tensor(3.0),
        "exact zero": zero_in_graph(shared.parameters()),
        "elsewhere": head.weight.sum(),
    }
    report = gradient_norms({**zeros, "task": losses["task"]}, list(shared.parameters()))
    assert all(report.norms[name] == 0 == report.cosines[name] for name in zeros)
    assert {k: float(v) for k, v in shares(report).items()} == dict.fromkeys(zeros, 0) | {"task": 1}
    nothing = gradient_norms({"task": torch.tensor(0.0), **zeros}, list(shared.parameters()))
    assert all(share == 0 for share in shares(nothing).values())


def test_a_term_that_is_off_has_no_share_even_if_it_is_not_finite():
    report = GradientReport({"task": torch.tensor(2.0), "broken": torch.tensor(torch.nan)}, {})
    assert torch.isnan(shares(report)["broken"])
    assert shares(report, {"broken": 0.0}) == {"task": 1, "broken": 0}


def test_gradients_below_the_range_of_float16_are_seen():
    parameter = nn.Parameter(torch.ones(3))
    loss = (parameter.half().float() * 1e-8).sum()
    (unscaled,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    assert not unscaled.any()
    norm = gradient_norms({"task": loss}, [parameter]).norms["task"]
    assert float(norm) == pytest.approx(3**0.5 * 1e-8, rel=1e-2)


def test_gradients_above_the_range_of_float16_are_seen_beside_small_ones():
    parameter = nn.Parameter(torch.ones(3))
    x = parameter.half().float()
    # Times 2 ** 10 the first would overflow; without a scale the second would vanish.
    report = gradient_norms({"task": (x * 1e3).sum(), "small": -(x * 1e-8).sum()}, [parameter])
    assert float(report.norms["task"]) == pytest.approx(3**0.5 * 1e3, rel=1e-2)
    assert float(report.norms["small"]) == pytest.approx(3**0.5 * 1e-8, rel=1e-2)
    assert float(report.cosines["small"]) == pytest.approx(-1, rel=1e-2)


def test_a_gradient_that_no_scale_makes_finite_is_reported_as_it_is():
    parameter = nn.Parameter(torch.zeros(3))
    losses = {"task": parameter.sum(), "steep": parameter.sqrt().sum(), "nan": parameter.sum() / 0}
    report = gradient_norms(losses, [parameter])
    assert [bool(torch.isfinite(norm)) for norm in report.norms.values()] == [True, False, False]


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    parameter, passes = nn.Parameter(torch.ones(1)), []
    x = parameter.half().float()
    x.register_hook(passes.append)
    size = 1e3 if rank else 1.0  # only one of the two overflows
    report = gradient_norms({"task": x.sum(), "soft": (x * size).sum()}, [parameter])
    torch.save((report.norms["soft"], len(passes)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_repeat_a_backward_pass_that_overflows_in_one(tmp_path):
    """Otherwise a backward pass that waits for the others (SyncBatchNorm) would wait for ever."""
    spawn(process, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [(float(norm), passes) for norm, passes in found] == [((1e3 + 1) / 2, 3)] * 2


def test_what_cannot_be_compared_is_refused(network, refuses):
    shared, _, losses = network
    with refuses("task", "hint"):
        gradient_norms({"hint": losses["hint"]}, list(shared.parameters()))
    with refuses("parameters", "none that is trained"):
        gradient_norms(losses, [])
