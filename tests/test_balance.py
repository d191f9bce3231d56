"""Weights that follow the run: closed forms, noisy and drifting gradients, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn
from torch.multiprocessing import spawn

from kd_det import Distiller
from kd_det.balance import GradientShare, GradNorm, MeasuredBalance, Uncertainty, build_balance
from kd_det.config import add_kd_config
from kd_det.losses import TapSpec
from kd_det.terms import Term

ON = {"a": 1.0, "b": 1.0, "c": 1.0}


def terms(**weights):
    return [Term(name, "KD", (("x", "x"),), weight) for name, weight in weights.items()]


class Toy:
    """Losses whose gradients have the norms a test asks for."""

    def __init__(self, size=50, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def loss(self, norm, value=1.0):
        shape = self.parameter.shape
        direction = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return value + (self.parameter * direction / direction.norm() * norm).sum()

    def observe(self, balance, step, factors=None, task=1.0, values=None, **norms):
        """One step; task may be a number of losses of one norm each."""
        values = values or {}
        raw = {name: self.loss(norm, values.get(name, 1.0)) for name, norm in norms.items()}
        own = {"loss_cls": self.loss(task, values.get("task", 1.0))}
        factors = factors or dict.fromkeys(raw, 1.0)
        return balance.observe(raw, factors, own, [self.parameter], step)


# Shares


def test_the_first_measurement_gives_the_asked_shares_exactly():
    balance = GradientShare(terms(a=5.0, b=0.1, c=2.0), {"a": 0.3, "c": 0.1})
    found = Toy().observe(balance, 0, task=4.0, a=70.0, b=30.0, c=0.02)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"a": 0.3, "c": 0.1, "b": 0.6 * 3 / 7, "task": 0.6 * 4 / 7}, rel=1e-5
    )
    # The closed form, by hand: s_i / (1 - S) * (n_task + w_b n_b) / n_i.
    assert float(balance.weight("a", 1.0)) == pytest.approx(0.3 / 0.6 * 7 / 70)
    assert float(balance.weight("c", 1.0)) == pytest.approx(0.1 / 0.6 * 7 / 0.02)
    assert balance.weight("b", 0.5) == 0.05


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
        assert float(balance.weight("a", 1.0)) == pytest.approx(expected, rel=1e-5)


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
        weights.append(float(balance.weight("a", 1.0)))
    assert weights[:3] == pytest.approx([2, 4, 8])
    assert weights[-1] == pytest.approx(1e6, rel=0.2)


def test_what_was_not_measured_keeps_its_weight():
    balance, toy = GradientShare(terms(a=7.0, b=3.0), {"a": 0.2, "b": 0.2}), Toy()
    assert toy.observe(balance, 1, a=1.0, b=1.0) == {}
    toy.observe(balance, 0, a=0.0, b=1.0)
    assert (float(balance.weight("a", 1.0)), float(balance.weight("b", 1.0))) == pytest.approx(
        (7, 1 / 3)
    )
    assert toy.observe(balance, 10, a=1.0, b=math.inf) == {}
    assert float(balance.weight("b", 1.0)) == pytest.approx(1 / 3)
    assert float(balance.weight("a", 1.0)) == pytest.approx(1 / 3)
    state = copy.deepcopy(balance.state_dict())
    toy.observe(balance, 20, task=math.nan, a=0.0, b=0.0)
    assert all(torch.equal(v, state[k]) for k, v in balance.state_dict().items())


def test_a_schedule_multiplies_on_top():
    balance, toy = GradientShare(terms(a=1.0, b=1.0), {"a": 0.5}), Toy()
    found = toy.observe(balance, 0, {"a": 0.25, "b": 0.0}, a=10.0, b=math.nan)
    assert float(balance.weight("a", 0.25)) == pytest.approx(0.1 * 0.25)
    assert float(found["a"]) == pytest.approx(0.25 / 1.25)
    assert found["b"] == 0


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
        found = [float(balance.weight(name, 1.0)) for name in configured]
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
    assert float(balance.weight("a", 1.0)) == 1
    assert float(balance.weight("b", 1.0)) < 1
    before = balance.log_weights.clone()
    toy.observe(balance, 1, task=0.0, a=1.0, b=1.0)
    assert torch.equal(balance.log_weights, before)


# Uncertainty


def test_uncertainty_starts_at_the_configured_weight_and_rests_where_the_loss_is_one():
    balance = Uncertainty(terms(a=3.0, b=0.5))
    raw = {"a": torch.tensor(2.0), "b": torch.tensor(0.4)}
    assert balance.weigh("a", raw["a"], 1.0).item() == pytest.approx(6.0)
    assert balance.weigh("b", raw["b"], 0.5).item() == pytest.approx(0.1)
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        sum(balance.weigh(n, raw[n], 1.0) for n in raw).backward()
        optimizer.step()
    assert [float(balance.weight(n, 1.0) * raw[n]) for n in raw] == pytest.approx([1, 1], rel=1e-4)
    assert balance.log_variances.tolist() == pytest.approx([math.log(6.0), math.log(0.2)], rel=1e-3)


# In the distiller

SPECS = {"map": TapSpec(3), "logits": TapSpec(5)}
CONFIG = {
    "hint": {"LOSS": "FitNet", "TAPS": ["map"], "WEIGHT": 4.0},
    "soft": {"LOSS": "KD", "TAPS": ["logits"], "WEIGHT": 0.5},
}
SCHEMES = {
    "measure": {},
    "gradient_share": {"SHARES": {"hint": 0.3, "soft": 0.2}},
    "gradnorm": {},
    "uncertainty": {},
}


def config(name="none", config_terms=CONFIG, **keys):
    cfg = CfgNode()
    add_kd_config(cfg)
    cfg.KD.TERMS = CfgNode(config_terms)
    shares = keys.pop("SHARES", {})
    cfg.KD.BALANCE.SHARES.update(shares)
    cfg.KD.BALANCE.merge_from_list([x for pair in {"NAME": name, **keys}.items() for x in pair])
    return cfg


def run(name, steps, state=None, start=0, **keys):
    """Train a linear student with its distiller; returns both, the losses and the metrics."""
    torch.manual_seed(3)
    student = nn.Linear(4, 3 * 6 * 6 + 5)
    keys = {**SCHEMES.get(name, {}), "PERIOD": 2, **keys}
    built = Distiller(CONFIG, SPECS, SPECS)
    balance = build_balance(config(name, **keys), built.specs)
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=balance)
    distiller.terms.load_state_dict(built.terms.state_dict())
    both = nn.ModuleDict({"student": student, "distiller": distiller})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.01, momentum=0.9)
    if state is not None:
        both.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    seen, metrics = [], []
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator)
        taps = [split(student(x)), split(torch.randn(8, 113, generator=generator) * 0.3)]
        task = {"loss_cls": student(x)[:, :50].pow(2).mean()}
        losses = distiller(*taps, task=task, shared=list(student.parameters()))
        total = sum({**task, **losses}.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append({k: v.detach().clone() for k, v in losses.items()})
        metrics.append(distiller.metrics)
    return both, optimizer, seen, metrics


def split(outputs):
    return {"map": outputs[:, :108].reshape(-1, 3, 6, 6), "logits": outputs[:, 108:]}


@pytest.mark.parametrize("name", ["none", *SCHEMES])
def test_a_resumed_run_goes_on_as_it_would_have(name):
    whole, _, losses, _ = run(name, 12)
    half, optimizer, *_ = run(name, 5)
    state = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, _, rest, _ = run(name, 12, state, start=5)
    assert rest == losses[5:]
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    own = {k for k in ours if k.startswith("distiller.balance.")}
    assert bool(own) == (name in ("gradient_share", "gradnorm", "uncertainty"))


def test_measuring_changes_nothing_but_the_log():
    plain, _, losses, metrics = run("none", 6)
    watched, _, same, logged = run("measure", 6)
    assert losses == same
    state = plain.state_dict()
    assert state.keys() == watched.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in watched.state_dict().items())
    usual = {"raw/hint", "raw/soft", "weight/hint", "weight/soft"}
    shares = {"share/task", "share/hint", "share/soft"}
    assert [m.keys() for m in metrics] == [usual] * 6
    assert [m.keys() for m in logged] == [usual | shares, usual] * 3
    for step, loss in zip(metrics, losses, strict=True):
        for term in CONFIG:
            assert step[f"weight/{term}"] == CONFIG[term]["WEIGHT"]
            torch.testing.assert_close(step[f"raw/{term}"] * step[f"weight/{term}"], loss[term])
    assert not any(v.requires_grad for m in logged for v in m.values())
    assert all(float(sum(m[k] for k in shares)) == pytest.approx(1) for m in logged[::2])


def test_weights_that_were_found_are_the_ones_that_train():
    *_, losses, metrics = run("gradient_share", 5)
    assert float(metrics[0]["share/hint"]) == pytest.approx(0.3, rel=1e-4)
    for step, loss in zip(metrics, losses, strict=True):
        for term in CONFIG:
            assert step[f"weight/{term}"] != CONFIG[term]["WEIGHT"]
            torch.testing.assert_close(step[f"raw/{term}"] * step[f"weight/{term}"], loss[term])


def test_nothing_is_measured_in_evaluation_or_without_gradients(randn):
    taps = split(randn(2, 113, dtype=torch.float32))
    specs = terms(hint=4.0, soft=0.5)
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=MeasuredBalance(specs, 1))
    arguments = {"task": {}, "shared": list(distiller.parameters())}
    distiller.eval()(taps, taps, **arguments)
    assert not any(name.startswith("share/") for name in distiller.metrics)
    with torch.no_grad():
        distiller.train()(taps, taps, **arguments)
    assert not any(name.startswith("share/") for name in distiller.metrics)


def test_a_term_that_is_off_stays_off_and_is_reported(randn):
    config_terms = {**CONFIG, "off": {**CONFIG["hint"], "WEIGHT": 0.0}}
    specs = Distiller(config_terms, SPECS, SPECS).specs
    distiller = Distiller(config_terms, SPECS, SPECS, balance=Uncertainty(specs))
    student = split(randn(2, 113, grad=True, dtype=torch.float32))
    teacher = split(torch.full((2, 113), math.inf))
    teacher["logits"] = student["logits"].detach()
    shared = list(distiller.terms["hint"].parameters()) or [distiller.balance.log_variances]
    losses = distiller(student, teacher, task={}, shared=shared)
    assert losses["off"] == 0
    losses["off"].backward()
    assert not distiller.balance.log_variances.grad.any()
    assert distiller.metrics["weight/off"] == 0
    assert distiller.report_silent() == ["soft", "off"]


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


# What is refused


def build(name, config_terms=CONFIG, task_weight=1.0, **keys):
    cfg = config(name, config_terms, **keys)
    cfg.KD.TASK_WEIGHT = task_weight
    return build_balance(cfg, Distiller(config_terms, SPECS, SPECS).specs)


def test_the_default_is_no_balance():
    assert build("none") is None
    assert config().KD.BALANCE.NAME == "none"


def test_shares_that_cannot_be_are_refused(refuses):
    with refuses("sum to less than 1", "0.7 + 0.4 = 1.1"):
        build("gradient_share", SHARES={"hint": 0.7, "soft": 0.4})
    with refuses("sum to less than 1"):
        build("gradient_share", SHARES={"hint": 0.5, "soft": 0.5})
    for share in (0, -0.1, 1.0, math.nan, "half", True, [0.1]):
        with refuses("SHARES.hint", repr(share)):
            build("gradient_share", SHARES={"hint": share})
    with refuses("'reviev'", "did you mean 'review'"):
        build("gradient_share", {"review": CONFIG["hint"]}, SHARES={"reviev": 0.3})
    with refuses("SHARES to name a term", "none"):
        build("gradient_share")
    with refuses("WEIGHT above 0", "'hint'"):
        off = {"hint": {**CONFIG["hint"], "WEIGHT": 0.0}}
        build("gradient_share", off, SHARES={"hint": 0.3})


def test_shares_of_terms_that_a_stage_switches_off_are_left_out():
    cfg = config("gradient_share", SHARES={"hint": 0.3, "soft": 0.2})
    balance = build_balance(cfg, Distiller({"soft": CONFIG["soft"]}, SPECS, SPECS).specs)
    assert balance.chosen == {"soft": 0.2}


def test_schemes_that_cannot_work_are_refused(refuses):
    with refuses("KD.BALANCE.NAME", "'gradnrom'", "did you mean 'gradnorm'"):
        build("gradnrom")
    with refuses("PERIOD", "0"):
        build("measure", PERIOD=0)
    for name in ("gradient_share", "gradnorm"):
        with refuses("KD.TASK_WEIGHT 0", name):
            build(name, task_weight=0.0, **SCHEMES[name])
    assert build("measure", task_weight=0.0) is not None
    for name in SCHEMES:
        clipped = {**CONFIG, "hint": {**CONFIG["hint"], "CLIP": "task_norm"}}
        with refuses("'hint'", "CLIP task_norm"):
            build(name, clipped, **SCHEMES[name])
        with refuses("term 'task'"):
            build(name, {"task": CONFIG["hint"], **CONFIG}, **SCHEMES[name])
    for name in ("gradnorm", "uncertainty"):
        with refuses("hint.WEIGHT -1", name):
            build(name, {"hint": {**CONFIG["hint"], "WEIGHT": -1.0}})
    for key in ("ALPHA", "LR"):
        with refuses(f"KD.BALANCE.{key}", "-1"):
            build("gradnorm", **{key: -1.0})


def test_a_caller_that_gives_no_task_is_told_so(randn, refuses):
    taps = split(randn(2, 113, grad=True, dtype=torch.float32))
    distiller = Distiller(CONFIG, SPECS, SPECS, balance=MeasuredBalance(terms(hint=4.0, soft=0.5)))
    with refuses("task", "Distiller.forward"):
        distiller(taps, {name: value.detach() for name, value in taps.items()})
