"""Automatic weights of the terms on this host: measured, resumed, in several processes, in bf16."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from kd_det.balance import GradientShare, MeasuredBalance, Uncertainty
from kd_det.core.terms import parse_terms
from kd_det.hosts.lightning.optim import parameter_groups
from kd_det.hosts.torchvision_detection import lit
from kd_det.hosts.torchvision_detection.train import run
from kd_det.run.plan import Start
from tests.hosts.torchvision_detection.models import (
    ARCHITECTURES,
    Stop,
    all_terms,
    batch,
    distilled,
)

ASKED = {"review": 0.3, "attention": 0.1}


def balanced(name, only=None):
    terms = [term for term in parse_terms(all_terms(name)) if not only or term.name in only]
    return distilled(name, terms=terms, balance=GradientShare(terms, ASKED, period=1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_backbone_gets_the_asked_shares_from_the_first_step(name):
    model = balanced(name)
    losses = model(*batch())
    metrics = model.distiller.metrics
    for term, share in ASKED.items():
        assert float(metrics[f"share/{term}"]) == pytest.approx(share, rel=1e-4)
    # Against one backward pass per loss, with the weights as they train.
    parameters = [p for p in model.student.backbone.parameters() if p.requires_grad]
    norms = {}
    terms = set(model.distiller.terms)
    parts = {term: losses[term] for term in terms}
    parts["task"] = sum(loss for key, loss in losses.items() if key not in terms)
    for key, loss in parts.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = [g.flatten() for g in gradients if g is not None]
        norms[key] = torch.cat(found).norm() if found else torch.tensor(0.0)
    for key, norm in norms.items():
        share = norm / sum(norms.values())
        torch.testing.assert_close(metrics[f"share/{key}"].float(), share, atol=1e-5, rtol=1e-3)


def test_measuring_leaves_losses_gradients_and_statistics_alone():
    terms = parse_terms(all_terms("FasterRCNN"))
    plain = distilled("FasterRCNN", terms=terms)
    watched = distilled("FasterRCNN", terms=terms, balance=MeasuredBalance(terms, 1))
    for model in (plain, watched):
        torch.manual_seed(3)
        sum(model(*batch()).values()).backward()
    ours, theirs = watched.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("name", "iterations"), [("gradient_share", 14), ("gradnorm", 6), ("uncertainty", 6)]
)
def test_a_run_interrupted_in_the_middle_ends_in_the_same_weights(
    digits_config, tmp_path, name, iterations
):
    keys = ["SOLVER.MAX_ITER", iterations, "KD.BALANCE.NAME", name, "KD.BALANCE.PERIOD", 4]
    keys += ["DATASETS.TEST", "()"]
    keys += [x for k, v in {"review": 0.3, "roi_logits": 0.1}.items() for x in (f"SHARES.{k}", v)]
    keys = [f"KD.BALANCE.{k}" if str(k).startswith("SHARES") else k for k in keys]
    run(digits_config("reviewkd_kd_frcnn", *keys), progress=lambda *_: None)
    cfg = digits_config("reviewkd_kd_frcnn", *keys, output="again")
    with pytest.raises(ConnectionError):
        run(cfg, callbacks=[Stop(iterations // 2 - 2)], progress=lambda *_: None)
    run(copy.deepcopy(cfg), Start(resume=True), progress=lambda *_: None)
    whole, again = (
        torch.load(tmp_path / folder / "model_final.pth")["model"] for folder in ("run", "again")
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    logged = {"share/task", "share/review", "share/roi_logits", "weight/review", "raw/review"}
    assert logged <= json.loads(lines[-1]).keys()
    state = [v for k, v in whole.items() if k.startswith("distiller.balance.")]
    assert state
    assert all(v.any() for v in state)


def test_the_optimiser_trains_the_log_variances():
    terms = parse_terms(all_terms("FasterRCNN"))
    model = distilled("FasterRCNN", terms=terms, balance=Uncertainty(terms))
    groups = parameter_groups(model, 0.1, 0.0)
    learned = {id(p) for group in groups for p in group["params"]}
    assert id(model.distiller.balance.log_variances) in learned
    sum(model(*batch()).values()).backward()
    assert model.distiller.balance.log_variances.grad.all()


def test_bfloat16_is_measured_in_full_precision():
    model = balanced("FasterRCNN")
    lit.use_full_precision_levels(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    sum(losses.values()).backward()
    metrics = model.distiller.metrics
    shares = [v for k, v in metrics.items() if k.startswith("share/")]
    assert float(sum(shares)) == pytest.approx(1)
    for term, share in ASKED.items():
        assert float(metrics[f"share/{term}"]) == pytest.approx(share, rel=1e-4)
        assert metrics[f"weight/{term}"].dtype == torch.float32


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = balanced("FasterRCNN", only=[*ASKED, "logits"])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for step in range(3):
        # The second process has no boxes in its second step.
        losses = wrapped(*batch(10 * rank + step, empty=rank == 1 and step == 1))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    metrics = {k: v for k, v in model.distiller.metrics.items() if not k.startswith("raw/")}
    torch.save((parameters, model.distiller.balance.state_dict(), metrics), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_on_weights_shares_and_parameters(tmp_path):
    spawn(process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert all(torch.isfinite(v).all() for v in ours.values())
    assert float(first[1]["mass"].min()) > 0


def test_a_balance_that_cannot_work_is_refused_with_the_config(digits_config, refuses):
    share = ["KD.BALANCE.NAME", "gradient_share", "KD.BALANCE.SHARES.review"]
    with refuses("SHARES to sum to less than 1"):
        digits_config("reviewkd_kd_frcnn", *share, 0.9, "KD.BALANCE.SHARES.roi_logits", 0.2)
    with refuses("KD.TASK_WEIGHT 0"):
        digits_config("reviewkd_kd_frcnn", *share, 0.3, "KD.TASK_WEIGHT", 0)
