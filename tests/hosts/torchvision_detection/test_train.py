"""A whole run on six images: train, interrupt, resume, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_det.core.checkpoint import read_weights, strip_distiller
from kd_det.hosts.lightning import optim
from kd_det.hosts.torchvision_detection import lit
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.data import CocoDataset, StepSampler, collate
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.train import build_training_model, run
from kd_det.run.plan import Start
from kd_det.run.record import read_record
from tests.hosts.torchvision_detection.models import Stop, all_terms, student_model, tiny_cfg


def config(options, name="kd_mrcnn", teacher=True):
    cfg = load_config(f"configs/digits_torchvision/{name}.yaml", options)
    cfg.defrost()
    cfg.KD.TEACHER.CONFIG_FILE = "configs/digits_torchvision/teacher_mrcnn.yaml"
    cfg.KD.TEACHER.WEIGHTS, cfg.KD.TEACHER.ALLOW_RANDOM = "", teacher
    cfg.KD.TERMS.update(type(cfg)({"hint": {"LOSS": "FitNet", "TAPS": ["c3"], "WEIGHT": 0.1}}))
    return cfg


def test_a_run_resumes_to_the_same_weights_and_evaluates_to_the_same_ap(options, tmp_path):
    steps = []
    results = run(config(options), progress=lambda *step: steps.append(step))
    assert ("train", 4, 4) in steps
    assert steps[-1][0] == "evaluate"
    assert results.keys() == {"bbox", "segm"}
    out = tmp_path / "run"
    for name in ("config.yaml", "last.ckpt", "csv/version_0/metrics.csv", "model_final.pth"):
        assert (out / name).is_file(), name
    assert json.loads((out / "results.json").read_text()).keys() == results.keys()
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert lines[0]["iteration"] == 3
    assert {"total_loss", "lr", "time", "roi_logits", "hint", "loss_mask"} <= lines[0].keys()
    assert lines[-1]["bbox/AP"] == pytest.approx(results["bbox"]["AP"], nan_ok=True)

    # Every checkpoint is a student.
    whole = torch.load(out / "model_final.pth")["model"]
    assert any(k.startswith("distiller.terms.hint.") for k in whole)
    build_model(config(options)).load_state_dict(strip_distiller(whole), strict=True)
    assert read_weights(out / "last.ckpt").keys() == strip_distiller(whole).keys()
    # What its adaptors learned can be where those of the next run begin.
    carried = config([*options, "KD.WEIGHTS", str(out / "model_final.pth")])
    start = build_training_model(carried).distiller.state_dict()
    assert start.pop("step") == 0
    assert all(torch.equal(v, whole[f"distiller.{k}"]) for k, v in start.items())

    # Switched off after two iterations and started again, it ends in the same weights.
    again = [*options, "OUTPUT_DIR", str(tmp_path / "again")]
    with pytest.raises(ConnectionError):
        run(config(again), callbacks=[Stop(2)], progress=lambda *_: None)
    resumed = run(config(again), Start(resume=True), progress=lambda *_: None)
    assert same(resumed, results)
    theirs = torch.load(tmp_path / "again" / "model_final.pth")["model"]
    assert theirs.keys() == whole.keys()
    assert all(torch.equal(theirs[k], whole[k]) for k in whole)
    # Resuming what is finished trains nothing.
    assert same(run(config(again), Start(resume=True), progress=lambda *_: None), results)

    # Evaluation alone needs no teacher and writes nothing but its detections.
    found = out / "inference" / "coco_instances_results.json"
    written = found.read_text()
    found.unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p != found.parent}
    evaluated = config(options, teacher=False)
    assert same(run(evaluated, Start(eval_only=True), progress=lambda *_: None), results)
    assert found.read_text() == written
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p != found.parent} == before | {
        found: found.stat().st_mtime_ns
    }
    assert any(v > 0 for v in results["bbox"].values())


def same(ours, theirs):
    return json.dumps(ours) == json.dumps(theirs)


def test_disabled_it_is_the_plain_student_and_evaluates_on_the_way(options, tmp_path):
    cfg = config([*options, "TEST.EVAL_PERIOD", "2"], "baseline_mrcnn")
    cfg.MODEL.META_ARCHITECTURE = "FasterRCNN"
    cfg.SOLVER.AMP.ENABLED = True
    results = run(cfg, progress=lambda *_: None)
    assert results.keys() == {"bbox"}
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert [json.loads(x)["iteration"] for x in lines if "bbox/AP" in x] == [1, 3]
    state = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    build_model(cfg).load_state_dict(state, strict=True)


def test_two_processes_end_with_equal_weights(options, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch\n"
        "from lightning.pytorch import Callback\n"
        "from kd_det.hosts.torchvision_detection.train import run\n"
        "from tests.hosts.torchvision_detection.test_train import config\n"
        "class Save(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        state = module.state_dict(), module.procedures.state_dict()['procedures']\n"
        "        torch.save(state, f'{sys.argv[1]}/{trainer.global_rank}.pth')\n"
        "r = run(config(sys.argv[2:]), callbacks=[Save()], progress=lambda *_: None)\n"
        "open(f\"{sys.argv[1]}/{os.environ['RANK']}.txt\", 'w').write(str(r))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), str(tmp_path), *options]
    command += ["KD.KCD.ENABLED", "True", "KD.KCD.PERIOD", "2", "KD.PRE_STAGE.MAX_ITER", "2"]
    graph = {"LOSS": "MHGD", "TAPS": ["box_pooled", "box_features"], "GATHER": True}
    command += ["KD.TERMS.graph", repr({**graph, "REDUCTION": "mean", "MAX_NODES": 16})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1))
    (first, kcd), (second, other) = loaded
    kcd, other = kcd["KCD"], other["KCD"]
    network = {k for k in first if k.startswith("distiller.terms.graph.network.")}
    own = network | {k for k in first if "running_" not in k and "num_batches" not in k}
    assert any(k.startswith("distiller.terms.hint.") for k in own)
    assert network
    assert first["distiller.terms.graph.ready"]
    assert all(torch.equal(first[k], second[k]) for k in own)
    # Every process counts the images of both, and all select the same ones.
    assert int(kcd["ledger"]["count"].sum()) == 2 * sum(kcd["lengths"])
    assert kcd["current_period"] == 1
    for key in ("active", "partners", "epsilons"):
        assert torch.equal(kcd[key], other[key])
    assert (tmp_path / "run" / "pre_stage.pth").is_file()
    # The files of the run are those of one process, with what all of them found.
    found = json.loads((tmp_path / "run" / "inference/coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in found} == {1, 2, 3}
    assert read_record(tmp_path / "run")["status"] == "done"
    assert (tmp_path / "run" / "log.txt").read_text().count("run started") == 1
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


def test_the_order_of_samples_follows_from_the_seed_alone():
    whole = list(StepSampler(5, 2, 6, seed=3))
    assert len(whole) == 12
    assert sorted(whole[:5]) == sorted(whole[5:10]) == list(range(5))
    assert list(StepSampler(5, 2, 6, seed=3, start=4)) == whole[8:]
    ranks = [list(StepSampler(5, 2, 6, seed=3, rank=r, world=2)) for r in (0, 1)]
    assert [x for pair in zip(*ranks, strict=True) for x in pair] == whole
    assert list(StepSampler(5, 2, 6, seed=4)) != whole


def test_samples_are_what_torchvision_detectors_take(digits):
    data = CocoDataset(*digits["digits_train"], masks=True, training=True)
    assert data.class_names == list("0123456789")
    images, targets = collate([data[0], data[1]])
    for image, target in zip(images, targets, strict=True):
        assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, 96, 96))
        assert 0 <= image.min() < image.max() <= 1
        assert type(target["boxes"]) is torch.Tensor
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert max(abs(a - b) for a, b in zip(found, box, strict=True)) <= 1
        assert target["labels"].min() >= 1
    flipped = CocoDataset(*digits["digits_train"], masks=True, flip=True)
    torch.manual_seed(0)
    mirrored = [s for s in (flipped[0] for _ in range(8)) if not torch.equal(s[0], images[0])]
    assert 0 < len(mirrored) < 8
    assert torch.equal(mirrored[0][0], images[0].flip(-1))
    assert torch.equal(mirrored[0][1]["masks"], targets[0]["masks"].flip(-1))
    assert torch.equal(mirrored[0][1]["boxes"][:, 0], 96 - targets[0]["boxes"][:, 2])


def test_the_learning_rate_warms_up_and_drops():
    opts = ["SOLVER.WARMUP_ITERS", 50, "SOLVER.STEPS", (300, 370)]
    solver = tiny_cfg("FasterRCNN", opts).SOLVER
    factors = [optim.learning_rate_factor(solver, step) for step in (0, 25, 50, 299, 300, 370)]
    assert factors == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.01])


def test_norm_layers_have_their_own_weight_decay():
    model = student_model("FasterRCNN")
    plain, norm = optim.parameter_groups(model, 0.1, 0.0)
    assert (plain["weight_decay"], norm["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) + len(norm["params"]) == len(list(model.parameters()))
    bn = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norm["params"]) == 2 * len(bn) > 0


def test_bfloat16_leaves_boxes_in_full_precision():
    from kd_det.hosts.torchvision_detection.model import DistilledDetector
    from tests.hosts.torchvision_detection.models import batch, teacher_model

    model = DistilledDetector(
        student_model("MaskRCNN"), teacher_model("MaskRCNN"), all_terms("MaskRCNN")
    )
    lit.use_full_precision_levels(model)
    seen = []
    model.student.rpn.anchor_generator.register_forward_hook(lambda *a: seen.append(a[2][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert seen == [torch.float32]
    assert all(torch.isfinite(v) for v in losses.values())
