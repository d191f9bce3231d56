"""The shipped configs of the relational and the older methods: each trains and exports."""

from __future__ import annotations

import json

import pytest
import torch

from kd_det.app import train as cli
from kd_det.core.checkpoint import strip_distiller
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.export import export_student
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.train import run

QUICK = ["SOLVER.MAX_ITER", "2", "KD.PRE_STAGE.MAX_ITER", "2", "DATASETS.TEST", "()"]


@pytest.mark.parametrize("method", ["at", "fsp", "irg", "mhgd", "kcd"])
def test_a_config_trains_checkpoints_and_exports_the_stock_student(method, digits_config, tmp_path):
    cfg = digits_config(f"{method}_frcnn", *QUICK)
    seen = {}
    run(cfg, progress=lambda *_: None)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    for line in lines:
        seen |= json.loads(line)
    for term in cfg.KD.TERMS:
        assert seen[term] > 0, term
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=False)
    assert ("KCD" in checkpoint["procedures"]) == (method == "kcd")
    build_model(cfg).load_state_dict(strip_distiller(checkpoint["state_dict"]), strict=True)
    weights, config = export_student(
        cfg, tmp_path / "run" / "model_final.pth", tmp_path / "student"
    )
    stock = build_model(load_config(str(config)))
    stock.load_state_dict(torch.load(weights), strict=True)


def test_the_flow_is_trained_alone_and_then_the_task(options, tmp_path, opened):
    file = "configs/digits_torchvision/fsp_frcnn.yaml"
    stages = load_config(file).STAGES
    for stage in stages:
        stage["OVERRIDES"] = {**stage.get("OVERRIDES", {}), "SOLVER.MAX_ITER": 2}
    opts = [*options, "DATASETS.TEST", "()", "KD.TEACHER.WEIGHTS", ""]
    opts += ["KD.TEACHER.ALLOW_RANDOM", "True", "STAGES", repr([dict(s) for s in stages])]
    opened.clear()
    assert cli.main(["--config-file", file, *opts]) == 0
    assert opened.count(file) == 1
    first, second = (
        [json.loads(line) for line in (tmp_path / "run" / name / "metrics.json").open()]
        for name in ("stage_1_flow", "stage_2_task")
    )
    assert all(line["flow"] > 0 and line["loss_classifier"] == 0 for line in first)
    assert all(line["total_loss"] == pytest.approx(line["flow"]) for line in first)
    assert all("flow" not in line and line["loss_classifier"] > 0 for line in second)
    final = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    build_model(load_config(file, options)).load_state_dict(final, strict=True)
