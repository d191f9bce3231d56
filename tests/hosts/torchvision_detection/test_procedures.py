"""Procedures on this host: a new one enters by one object and one config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kd_det.core.errors import KDError
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.train import run
from kd_det.procedures import PROCEDURES
from kd_det.run.plan import Start
from tests.hosts.torchvision_detection.models import Stop
from tests.hosts.torchvision_detection.test_kcd import KCD
from tests.procedures.toy import Halve


def test_a_new_procedure_takes_one_object_and_one_config(options, tmp_path, monkeypatch):
    monkeypatch.setitem(PROCEDURES, "HALVE", Halve)
    path = tmp_path / "halve.yaml"
    base = Path("configs/digits_torchvision/kd_frcnn.yaml").resolve()
    path.write_text(f"_BASE_: {base}\nKD: {{HALVE: {{ENABLED: True}}}}\n")
    random = ["KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]

    def cfg(folder):
        output = ["OUTPUT_DIR", str(tmp_path / folder), "DATASETS.TEST", "()"]
        return load_config(str(path), [*options, *random, *output])

    results = run(cfg("whole"), progress=lambda *_: None)
    assert results == {"cost": {"formula": 50.0, "measured": 50.0}}
    lines = (tmp_path / "whole" / "metrics.json").read_text().splitlines()
    metrics = {name: value for line in lines for name, value in json.loads(line).items()}
    assert (metrics["cost/formula"], metrics["cost/measured"]) == (50.0, 50.0)
    assert metrics["halve/trained"] == 4  # one of two images in each of four iterations
    whole = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=False)
    assert whole["procedures"] == {"HALVE": {"loaded": 8, "trained": 4, "steps": 4}}
    with pytest.raises(ConnectionError):
        run(cfg("again"), callbacks=[Stop(2)], progress=lambda *_: None)
    assert run(cfg("again"), Start(resume=True), progress=lambda *_: None) == results
    again = torch.load(tmp_path / "again" / "last.ckpt", weights_only=False)
    for key, value in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][key], value), key


def test_a_checkpoint_of_a_former_version_is_resumed(digits_config, tmp_path):
    cfg = digits_config("kcd_frcnn", *KCD, "DATASETS.TEST", "()")
    with pytest.raises(ConnectionError):
        run(cfg, callbacks=[Stop(3)], progress=lambda *_: None)
    path = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["kcd"] = checkpoint.pop("procedures")["KCD"]
    checkpoint["kcd"]["stage"] = checkpoint["kcd"].pop("current_period")
    torch.save(checkpoint, path)
    results = run(cfg, Start(resume=True), progress=lambda *_: None)
    whole = digits_config("kcd_frcnn", *KCD, "DATASETS.TEST", "()", output="whole")
    assert run(whole, progress=lambda *_: None) == results


def test_a_procedure_of_another_host_is_refused(digits_config):
    with pytest.raises(KDError, match=r"KD\.UNIX.*mixed_batches.*classification"):
        digits_config("kd_frcnn", "KD.UNIX.ENABLED", "True")
