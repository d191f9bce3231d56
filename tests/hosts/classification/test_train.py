"""Runs of the classification host from config to results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from kd_det.app import train as cli
from kd_det.hosts.classification.build import build_training_model
from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.export import export_student
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import train_loader
from kd_det.hosts.classification.models import build_classifier
from kd_det.hosts.classification.train import run
from kd_det.run import config as run_config
from kd_det.run.plan import Start, read_plan, run_plan

SOFT = {"soft": {"LOSS": "KD", "WEIGHT": 0.9, "TAPS": ["logits"], "TEMPERATURE": 4.0}}
FLOW = {
    "flow": {
        "LOSS": "FSP",
        "TAPS": ["stem", "stage1", "stage2", "stage3"],
        "ADAPT": True,
    }
}
GRAPH = {"graph": {"LOSS": "MHGD", "TAPS": ["stage1", "stage2"], "CLIP": "task_norm", "HEADS": 2}}


class Stop(Callback):
    """Kills a run in the middle of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *args, **kwargs):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def weights(cfg):
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupted(cfg, epoch):
    # Lightning turns a KeyboardInterrupt into an exit.
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(cfg, callbacks=[Stop(epoch)])
    return run(cfg, Start(resume=True))


def test_a_run_leaves_its_results_curves_and_student(config):
    cfg = config(KD={"TERMS": SOFT, "TASK_WEIGHT": 0.1})
    results = run(cfg)
    output = Path(cfg.OUTPUT_DIR)
    assert json.loads((output / "results.json").read_text()) == results
    accuracy = results["accuracy"]
    assert set(accuracy) == {"top1", "top5", "top1_best", "best_epoch"}
    assert accuracy["top1_best"] >= accuracy["top1"]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert lines[-1]["accuracy/top1"] == accuracy["top1"]
    assert (output / "config.yaml").is_file()
    assert run(cfg, Start(eval_only=True))["accuracy"]["top1"] == accuracy["top1"]


def test_disabled_distillation_is_the_plain_student(config):
    plain, disabled = config("a"), config("b", KD={"ENABLED": False, "TERMS": SOFT})
    run(plain)
    run(disabled)
    assert same(weights(plain), weights(disabled))


@pytest.mark.parametrize("terms", [SOFT, FLOW], ids=["KD", "FSP"])
def test_a_term_of_weight_zero_trains_the_plain_student(config, terms):
    zero = {name: {**term, "WEIGHT": 0.0} for name, term in terms.items()}
    plain, distilled = config("a"), config("b", KD={"TERMS": zero})
    run(plain)
    run(distilled)
    students = {k: v for k, v in weights(distilled).items() if not k.startswith("distiller.")}
    assert same(weights(plain), students)


def test_without_task_weight_the_classifier_stays_as_it_was(config):
    cfg = config(KD={"TERMS": FLOW, "TASK_WEIGHT": 0.0})
    torch.manual_seed(cfg.SEED)
    start = build_training_model(cfg).student.fc.weight.clone()
    run(cfg)
    trained = weights(cfg)
    assert trained["fc.weight"].shape == start.shape
    moved = build_classifier("resnet8_x0.25", 10).state_dict().keys()
    assert "layer3.0.conv1.weight" in moved
    # Nothing but the student's start decides it: neither a gradient nor weight decay.
    again = config("again", KD={"TERMS": FLOW, "TASK_WEIGHT": 0.0}, SOLVER={"BASE_LR": 1e-9})
    run(again)
    assert torch.equal(trained["fc.weight"], weights(again)["fc.weight"])
    assert not torch.equal(trained["conv1.weight"], weights(again)["conv1.weight"])


CASES = {
    "KD": {"TERMS": SOFT},
    "MHGD with its pre-stage": {"TERMS": GRAPH, "PRE_STAGE": {"MAX_ITER": 3}},
    "KCD": {"TERMS": SOFT, "KCD": {"ENABLED": True, "PERIOD": 1}},
    "UNIX": {"TERMS": SOFT, "UNIX": {"ENABLED": True}},
}


@pytest.mark.parametrize("node", CASES.values(), ids=CASES)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, node):
    epochs = {"MAX_EPOCH": 3}
    whole, broken = config("a", KD=node, SOLVER=epochs), config("b", KD=node, SOLVER=epochs)
    expected = run(whole)
    assert interrupted(broken, 1) == expected
    assert same(weights(whole), weights(broken))


def test_kcd_trains_on_fewer_points_and_selects_the_same_after_a_resume(config):
    node = {"TERMS": SOFT, "KCD": {"ENABLED": True, "PERIOD": 1, "RHO": 0.5}}
    epochs = {"MAX_EPOCH": 4}
    kept = []

    class Note(Callback):
        def on_train_epoch_start(self, trainer, module):
            (kcd,) = module.procedures
            kept.append(sorted(kcd.condensation.active.tolist()))

    whole, broken = config("a", KD=node, SOLVER=epochs), config("b", KD=node, SOLVER=epochs)
    results = run(whole, callbacks=[Note()])
    selected, kept[:] = list(kept), []
    assert [len(points) for points in selected] == [40, 34, 28, 24]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(broken, callbacks=[Note(), Stop(2)])
    run(broken, Start(resume=True), callbacks=[Note()])
    assert kept == [*selected[:3], *selected[2:]]
    assert results["cost"]["measured"] == pytest.approx(100 * (40 + 34 + 28 + 24) / 160)


def test_unix_sends_fewer_images_to_the_teacher(config):
    results = run(config(KD={"TERMS": SOFT, "UNIX": {"ENABLED": True}}))
    assert results["cost"]["measured"] == pytest.approx(results["cost"]["formula"])


def test_a_seed_decides_order_and_augmentation_alone(config):
    cfg = config()
    data = ClassificationData(cfg, training=True)
    loaders = [train_loader(cfg, data, seed, 0, 1) for seed in (1, 1, 2)]
    first, again, other = ([batch[0] for batch in loader] for loader in loaders)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_ranks_share_an_epoch_without_overlap(config):
    cfg = config()
    data = ClassificationData(cfg, training=True)
    halves = [[i for *_, idx in train_loader(cfg, data, 1, r, 2) for i in idx] for r in (0, 1)]
    assert sorted(int(i) for half in halves for i in half) == list(range(40))


def test_the_learning_rate_falls_at_the_given_epochs(config):
    cfg = config(SOLVER={"EPOCH_STEPS": [2, 3], "GAMMA": 0.1, "BASE_LR": 1.0})
    model = build_training_model(cfg)
    data = ClassificationData(cfg, training=False)
    made = LitClassifier(model, cfg, 1, None, data).configure_optimizers()
    rates = []
    for _ in range(4):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"].step()
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_an_exported_student_is_the_stock_classifier(config, tmp_path):
    cfg = config(KD={"TERMS": FLOW})
    run(cfg)
    path, text = export_student(cfg, Path(cfg.OUTPUT_DIR) / "model_final.pth", tmp_path / "out")
    stock = build_classifier("resnet8_x0.25", 10)
    stock.load_state_dict(torch.load(path, weights_only=True))
    assert "ENABLED: false" in text.read_text()


def test_a_given_pre_stage_is_reused_for_another_student(config):
    node = {"TERMS": GRAPH, "PRE_STAGE": {"MAX_ITER": 3}}
    first = config("a", KD=node)
    run(first)
    file = Path(first.OUTPUT_DIR) / "pre_stage.pth"
    reuse = {"TERMS": GRAPH, "PRE_STAGE": {"WEIGHTS": str(file)}}
    second = config("b", KD=reuse, MODEL={"NAME": "resnet14_x0.25"})
    run(second)
    networks = [
        {k: v for k, v in weights(cfg).items() if k.startswith("distiller.terms.graph.network")}
        for cfg in (first, second)
    ]
    assert networks[0]
    assert same(*networks)
    assert not (Path(second.OUTPUT_DIR) / "pre_stage.pth").exists()


STAGED = """
STAGES:
  - {NAME: flow, TERMS: [flow], TASK: False, OVERRIDES: {SOLVER.MAX_EPOCH: 2}}
  - {NAME: task, TERMS: [], OVERRIDES: {SOLVER.MAX_EPOCH: 3}}
"""


def staged(cfg, tmp_path, resume=False, stop=None):
    """A run with stages, killed in its second one if ``stop`` is given."""
    path = tmp_path / f"{Path(cfg.OUTPUT_DIR).name}.yaml"
    path.write_text(cfg.dump().replace("STAGES: []\n", STAGED))

    plan, start = read_plan(str(path)), Start(resume=resume)

    def run_stage(opts):
        own = load_config(plan.file, opts)
        second = own.OUTPUT_DIR.endswith("stage_2_task")
        return run(own, start, callbacks=[stop] if stop and second else [])

    return run_plan(run_stage, plan, start)


@pytest.mark.parametrize("stages", ["STAGES: []\n", STAGED], ids=["plain", "stages"])
def test_a_run_reads_its_config_file_once_and_parses_its_terms_once(
    config, stages, tmp_path, opened, monkeypatch
):
    calls = []
    monkeypatch.setattr(run_config, "_PARSED", {})
    parse = run_config.parse_terms
    monkeypatch.setattr(run_config, "parse_terms", lambda t: calls.append(t) or parse(t))
    path = tmp_path / "run.yaml"
    path.write_text(config(KD={"TERMS": FLOW}).dump().replace("STAGES: []\n", stages))
    opened.clear()
    assert cli.main(["--config-file", str(path)]) == 0
    assert opened.count(str(path)) == 1
    assert len([terms for terms in calls if terms]) == 1  # a teacher has none


def test_two_stages_killed_in_the_second_end_as_uninterrupted_ones(config, tmp_path):
    whole, broken = config("a", KD={"TERMS": FLOW}), config("b", KD={"TERMS": FLOW})
    expected = staged(whole, tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        staged(broken, tmp_path, stop=Stop(1))
    first = Path(broken.OUTPUT_DIR) / "stage_1_flow"
    before = (first / "metrics.json").read_text()
    assert staged(broken, tmp_path, resume=True) == expected
    assert (first / "metrics.json").read_text() == before
    assert same(weights(whole), weights(broken))
    # The second stage starts from the first one's student and has no teacher.
    assert not any(key.startswith("distiller.") for key in weights(whole))
    started = torch.load(first / "model_final.pth", weights_only=True)["model"]
    assert any(key.startswith("distiller.") for key in started)


def test_the_export_tool_serves_classifiers(config, tmp_path):
    cfg = config(KD={"TERMS": FLOW})
    run(cfg)
    output = Path(cfg.OUTPUT_DIR)
    command = [sys.executable, "tools/export_student.py"]
    command += ["--config-file", str(output / "config.yaml")]
    command += ["--weights", str(output / "model_final.pth"), "--output", str(tmp_path / "out")]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=200)
    stock = build_classifier("resnet8_x0.25", 10)
    stock.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True))
