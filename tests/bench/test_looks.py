"""Looking at a run changes nothing in it, and says what a stock model would do otherwise."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from kd_det import Distiller
from kd_det.bench.looks import (
    evaluating,
    export_problems,
    load_learned,
    repeatable,
    training_losses,
)
from kd_det.core.distiller import tap_specs


class Net(nn.Module):
    """Statistics, random numbers and a distiller, as any student has them."""

    def __init__(self, terms=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.distiller = None
        if terms is not None:
            specs = tap_specs({"x": torch.zeros(2, 4)})
            self.distiller = Distiller(terms, specs, specs)

    def forward(self, x):
        out = self.body(x)
        losses = {"task": out.square().mean()}
        if self.distiller is not None:
            losses |= self.distiller({"x": out}, {"x": torch.ones_like(out)})
        return losses


TERMS = {"soft": {"LOSS": "KD", "TAPS": ["x"], "SCHEDULE": {"NAME": "linear_warmup", "ITERS": 10}}}


@pytest.fixture
def net():
    return Net(TERMS)


def test_training_losses_are_those_of_a_training_step_and_leave_no_trace(net, randn):
    x = randn(8, 3, dtype=torch.float32)
    net.eval()
    net.body[2].train()  # modes may be mixed
    modes = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    twin = copy.deepcopy(net).train()
    torch.manual_seed(3)
    found = training_losses(net, net.distiller, x)
    torch.manual_seed(3)
    expected = twin(x)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert not torch.equal(twin.body[1].running_mean, before["body.1.running_mean"])
    assert twin.distiller.step == 1
    assert [module.training for module in net.modules()] == modes
    assert net.distiller._step == 0
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_gradients_reach_the_models_own_parameters_however_many_looks_came_between(net, randn):
    x = randn(8, 3, dtype=torch.float32)
    twin = copy.deepcopy(net).train()
    torch.manual_seed(3)
    first = training_losses(net, net.distiller, x)
    training_losses(net, net.distiller, 2 * x)
    found = torch.autograd.grad(sum(first.values()), list(net.parameters()))
    torch.manual_seed(3)
    sum(twin(x).values()).backward()
    for gradient, parameter in zip(found, twin.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_evaluating_has_no_graph_and_gives_every_module_its_mode_back(net):
    net.train()
    net.body[1].eval()

    def fail_inside():
        with evaluating(net) as model:
            assert not any(module.training for module in model.modules())
            assert not model.body(torch.zeros(2, 3)).requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert [module.training for module in net.body] == [True, False, True]


def test_batches_repeat_whatever_is_drawn_between_them():
    def loader():
        for _ in range(3):
            yield random.random()

    first = list(repeatable(loader(), random.seed, 7))
    second = []
    for batch in repeatable(loader(), random.seed, 7):
        second.append(batch)
        random.seed(99)
    assert first == second == [random.Random(seed).random() for seed in (7, 8, 9)]


def run_export(net, reload):
    def outputs(model):
        with evaluating(model):
            return {"logits": model.body(torch.ones(2, 3))}

    return export_problems(net, net, reload, outputs)


def test_a_checkpoint_that_loads_and_computes_the_same_has_no_problem(net, tmp_path):
    seen = []

    def reload(checkpoint, folder):
        seen.append(checkpoint)
        stock = Net()
        state = torch.load(checkpoint)["model"]
        stock.load_state_dict({k: v for k, v in state.items() if "distiller" not in k})
        return stock

    assert run_export(net, reload) == []
    assert not seen[0].exists()


def test_problems_of_an_export_name_what_differs(net, refuses):
    (wrong,) = run_export(net, lambda checkpoint, folder: Net())
    assert "logits" in wrong
    assert "differs by up to" in wrong

    def refuse(checkpoint, folder):
        from kd_det.core.errors import fail

        fail(expected="keys", received="'extra'", remedy="none")

    (refused,) = run_export(net, refuse)
    assert "'extra'" in refused


def test_what_losses_have_learnt_is_taken_over_where_a_checkpoint_holds_it(tmp_path):
    specs = (tap_specs({"x": torch.zeros(1, 2, 4, 4)}), tap_specs({"x": torch.zeros(1, 3, 4, 4)}))
    one, other = (Distiller({"hint": {"LOSS": "FitNet", "TAPS": ["x"]}}, *specs) for _ in range(2))
    path = tmp_path / "model_final.pth"
    for prefix, equal in (("student.", False), ("distiller.", True)):
        torch.save({"model": {prefix + k: v for k, v in one.state_dict().items()}}, path)
        load_learned(other, str(path))
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == equal
