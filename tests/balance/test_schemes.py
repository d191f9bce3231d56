"""Weights that follow the run: closed forms, noisy and drifting gradients, several processes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from kd_det.balance import GradientShare, GradNorm, Uncertainty
from tests.balance.toy import Toy, terms

ON = {"a": 1.0, "b": 1.0, "c": 1.0}


def weight(balance, name, factor=1.0):
    return balance.weight(balance.terms[name], factor)


# Shares


def test_the_first_measurement_gives_the_asked_shares_exactly():
    balance = GradientShare(terms(a=5.0, b=0.1, c=2.0), {"a": 0.3, "c": 0.1})
    found = Toy().observe(balance, 0, task=4.0, a=70.0, b=30.0, c=0.02)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"a": 0.3, "c": 0.1, "b": 0.6 * 3 / 7, "task": 0.6 * 4 / 7}, rel=1e-5
    )
    # The closed form, by hand: s_i / (1 - S) * (n_task + w_b n_b) / n_i.
    assert float(weight(balance, "a")) == pytest.approx(0.3 / 0.6 * 7 / 70)
    assert float(weight(balance, "c")) == pytest.approx(0.1 / 0.6 * 7 / 0.02)
    assert weight(balance, "b", 0.5) == 0.05


def test_norms_are_averaged_as_logarithms_that_forget_within_30_iterations():
    balance, toy = GradientShare(terms(a=1.0), {"a": 0.2}, period=5), Toy()
    task, term = [1.0, 1.1, 0.9, 1.3, 1.0], [2.0, 1.6, 2.3, 2.2, 1.9]
    for k in range(5):
        toy.observe(balance, 5 * k, task=task[k], a=term[k])
        ages = [math.exp(-5 * (k - j) / 30) for j in range(k + 1)]
        smooth = [
            math.exp(sum(w * math.log(n) for w, n in zip(ages, norms, strict=False)) / sum(ages))
            for norms in (task, term)
        ]
        expected = 0.2 / 0.8 * smooth[0] / smooth[1]
        assert float(weight(balance, "a")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("period", [1, 10, 40])
def test_asked_shares_are_kept_while_noisy_norms_drift_over_decades(period):
    asked = {"a": 0.3, "b": 0.1}
    balance, toy = GradientShare(terms(a=1.0, b=1.0, c=0.5), asked, period), Toy()
    noise = torch.Generator().manual_seed(1)
    steps, found = 60 * max(period, 10), []
    for step in range(0, steps, period):
        spread = torch.randn(4, generator=noise).mul(0.4).exp().tolist()
        drift = step / steps
        measured = toy.observe(
            balance,
            step,
            task=2.0 * 0.3**drift * spread[0],
            a=50.0 * 0.02**drift * spread[1],
            b=1e-3 * 10**drift * spread[2],
            c=0.2 * spread[3],
        )
        found.append({k: float(v) for k, v in measured.items()})
    sixth = len(found) // 6
    for part in (found[sixth : 2 * sixth], found[-sixth:]):
        for name, share in asked.items():
            mean = sum(x[name] for x in part) / len(part)
            assert share * 2 / 3 < mean < share * 4 / 3, (name, mean)


def test_a_weight_changes_at_most_twofold_at_once():
    balance, toy = GradientShare(terms(a=1.0), {"a": 0.5}), Toy()
    toy.observe(balance, 0, a=1.0)
    weights = []
    for step in range(10, 300, 10):
        toy.observe(balance, step, a=1e-6)
        weights.append(float(weight(balance, "a")))
    assert weights[:3] == pytest.approx([2, 4, 8])
    assert weights[-1] == pytest.approx(1e6, rel=0.2)


def test_what_was_not_measured_keeps_its_weight():
    balance, toy = GradientShare(terms(a=7.0, b=3.0), {"a": 0.2, "b": 0.2}), Toy()
    assert toy.observe(balance, 1, a=1.0, b=1.0) == {}
    toy.observe(balance, 0, a=0.0, b=1.0)
    assert (
        float(weight(balance, "a")),
        float(weight(balance, "b")),
    ) == pytest.approx((7, 1 / 3))
    assert toy.observe(balance, 10, a=1.0, b=math.inf) == {}
    assert float(weight(balance, "b")) == pytest.approx(1 / 3)
    assert float(weight(balance, "a")) == pytest.approx(1 / 3)
    state = copy.deepcopy(balance.state_dict())
    toy.observe(balance, 20, task=math.nan, a=0.0, b=0.0)
    assert all(torch.equal(v, state[k]) for k, v in balance.state_dict().items())


def test_a_schedule_multiplies_on_top():
    balance, toy = GradientShare(terms(a=1.0, b=1.0), {"a": 0.5}), Toy()
    found = toy.observe(balance, 0, {"a": 0.25, "b": 0.0}, a=10.0, b=math.nan)
    assert float(weight(balance, "a", 0.25)) == pytest.approx(0.1 * 0.25)
    assert float(found["a"]) == pytest.approx(0.25 / 1.25)
    assert found["b"] == 0


def test_weights_are_found_in_half_precision_however_far_raw_losses_are_from_the_trained_ones():
    parameter = torch.nn.Parameter(torch.ones(4))
    x = parameter.half().float()
    slopes, weights = {"huge": 1e6, "tiny": 1e-10}, {"huge": 1e-3, "tiny": 1e3}
    balance = GradientShare(terms(**weights), {"huge": 0.25, "tiny": 0.25})
    raw = {name: (x * slope).sum() for name, slope in slopes.items()}
    found = balance.observe(raw, dict.fromkeys(raw, 1.0), {"loss": x.sum()}, [parameter], 0)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"task": 0.5, "huge": 0.25, "tiny": 0.25}, rel=0.01
    )
    for name, slope in slopes.items():
        assert float(weight(balance, name)) == pytest.approx(0.5 / slope, rel=0.01)


def test_a_term_that_can_never_be_measured_is_reported_once(caplog):
    balance, toy = GradientShare(terms(a=1.0, b=1.0, off=0.0), {"a": 0.3}), Toy()
    for step in range(0, 300, 10):
        toy.observe(balance, step, a=0.0, b=math.nan if step < 50 else 1.0, off=0.0)
    (record,) = caplog.records
    assert "could not measure term 'a' in any of its first 10 measurements" in record.getMessage()


# GradNorm


def slow_gradnorm(weights, first, norms, losses, alpha, lr):
    """One step from the definition, with the task in front, whose weight is then divided out."""
    count = len(norms)
    pulls = [w * n for w, n in zip(weights, norms, strict=True)]
    mean = sum(pulls) / count
    rates = [now / then for now, then in zip(losses, first, strict=True)]
    for i, pull in enumerate(pulls):
        target = mean * (rates[i] / (sum(rates) / count)) ** alpha
        weights[i] *= math.exp(-lr * ((pull > target) - (pull < target)))
    return [w / weights[0] for w in weights]


def test_gradnorm_steps_as_defined():
    configured = {"a": 4.0, "b": 0.5}
    balance, toy = GradNorm(terms(**configured), period=1, alpha=1.5, lr=0.1), Toy()
    weights, first = [1.0, 4.0, 0.5], None
    for step in range(12):
        values = [2.0 - 0.1 * step, 5.0 * 0.8**step, 3.0 + 0.05 * step]
        norms = [1.0 + 0.05 * step, 2.0, 0.7]
        first = first or values
        weights = slow_gradnorm(weights, first, norms, values, 1.5, 0.1)
        named = dict(zip(("task", "a", "b"), values, strict=True))
        toy.observe(balance, step, task=norms[0], values=named, a=norms[1], b=norms[2])
        found = [float(weight(balance, name)) for name in configured]
        assert found == pytest.approx(weights[1:], rel=1e-5)
    assert abs(weights[1] - 4.0) > 0.5


def test_gradnorm_without_force_equalises_the_norms():
    balance, toy = GradNorm(terms(a=1.0, b=1.0, c=0.0), period=1, alpha=0.0), Toy()
    for step in range(400):
        found = toy.observe(balance, step, task=3.0, a=100.0, b=0.05, c=1.0)
    assert [float(found[n]) for n in ("task", "a", "b")] == pytest.approx([1 / 3] * 3, rel=0.1)
    assert found["c"] == 0


def test_gradnorm_pulls_harder_at_what_falls_more_slowly():
    balance, toy = GradNorm(terms(a=1.0, b=1.0), period=1), Toy()
    for step in range(300):
        values = {"task": 0.8, "a": 1.0, "b": 0.6} if step else None
        found = toy.observe(balance, step, values=values, a=1.0, b=1.0)
    assert found["a"] > found["task"] > found["b"]


def test_gradnorm_skips_what_it_cannot_measure():
    balance, toy = GradNorm(terms(a=1.0, b=1.0), period=1), Toy()
    toy.observe(balance, 0, a=0.0, b=5.0)
    assert float(weight(balance, "a")) == 1
    assert float(weight(balance, "b")) < 1
    before = balance.log_weights.clone()
    toy.observe(balance, 1, task=0.0, a=1.0, b=1.0)
    assert torch.equal(balance.log_weights, before)


# Uncertainty


def test_uncertainty_starts_at_the_configured_weight_and_rests_where_the_loss_is_one():
    balance = Uncertainty(terms(a=3.0, b=0.5))
    raw = {"a": torch.tensor(2.0), "b": torch.tensor(0.4)}
    assert balance.weigh(balance.terms["a"], raw["a"], 1.0).item() == pytest.approx(6.0)
    assert balance.weigh(balance.terms["b"], raw["b"], 0.5).item() == pytest.approx(0.1)
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        sum(balance.weigh(balance.terms[n], raw[n], 1.0) for n in raw).backward()
        optimizer.step()
    assert [float(weight(balance, n) * raw[n]) for n in raw] == pytest.approx([1, 1], rel=1e-4)
    assert balance.log_variances.tolist() == pytest.approx([math.log(6.0), math.log(0.2)], rel=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_weight_of_a_term_rests_while_the_term_is_exactly_zero(optimizer):
    balance = Uncertainty(terms(a=3.0))
    logits = torch.ones(2, requires_grad=True)
    steps = optimizer(balance.parameters(), lr=0.5)
    for _ in range(500):
        steps.zero_grad()
        balance.weigh(balance.terms["a"], (logits * 0).sum(), 1.0).backward()
        steps.step()
    assert balance.log_variances.item() == 0
    assert balance.log_variances.grad is not None  # DDP waits for every parameter
    balance.weigh(balance.terms["a"], logits.sum(), 1.0).backward()
    assert balance.log_variances.grad.item() == pytest.approx(1 - 3 * 2)


# Processes


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    states = {}
    for name, cls in (("share", GradientShare), ("norm", GradNorm)):
        extra = ({"a": 0.25},) if cls is GradientShare else ()
        balance, toy = cls(terms(a=1.0), *extra, 1), Toy(seed=rank)
        for step in range(3):
            own = 1.0 + rank + step
            found = toy.observe(balance, step, task=own, values={"a": own}, a=3.0 + 2 * rank)
        states[name] = (balance.state_dict(), found)
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_take_the_same_decision_from_the_mean_of_their_norms(tmp_path):
    spawn(process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name in first:
        for ours, theirs in zip(first[name], second[name], strict=True):
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    alone, toy = GradientShare(terms(a=1.0), {"a": 0.25}, 1), Toy()
    for step in range(3):
        toy.observe(alone, step, task=1.5 + step, a=4.0)
    torch.testing.assert_close(first["share"][0]["weights"], alone.weights)
