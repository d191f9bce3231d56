"""Procedures on this host: a new one enters by one object and one config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kd_det.core.errors import KDError
from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.train import run
from kd_det.procedures import PROCEDURES
from kd_det.run.plan import Start
from tests.hosts.classification.test_train import SOFT, interrupted, same, weights
from tests.procedures.toy import Halve


def test_a_new_procedure_takes_one_object_and_one_config(config, tmp_path, monkeypatch):
    plain = config("plain", KD={"TERMS": SOFT})
    monkeypatch.setitem(PROCEDURES, "HALVE", Halve)
    base = config(KD={"TERMS": SOFT})
    (tmp_path / "base.yaml").write_text(base.dump())
    (tmp_path / "halve.yaml").write_text("_BASE_: base.yaml\nKD: {HALVE: {ENABLED: True}}\n")
    cfg = load_config(str(tmp_path / "halve.yaml"))

    results = run(cfg)
    output = Path(cfg.OUTPUT_DIR)
    assert results["cost"] == {"formula": 50.0, "measured": 50.0}
    assert json.loads((output / "results.json").read_text()) == results
    lines = (output / "metrics.json").read_text().splitlines()
    metrics = {name: value for line in lines for name, value in json.loads(line).items()}
    assert (metrics["cost/formula"], metrics["cost/measured"]) == (50.0, 50.0)
    state = torch.load(output / "last.ckpt", weights_only=False)["procedures"]["HALVE"]
    assert state == {"loaded": 80, "trained": 40, "steps": 6}
    run(plain)
    assert not same(weights(cfg), weights(plain))

    again = load_config(str(tmp_path / "halve.yaml"), ["OUTPUT_DIR", str(tmp_path / "again")])
    assert interrupted(again, 1) == results
    assert same(weights(cfg), weights(again))
    without = load_config(str(tmp_path / "base.yaml"), ["OUTPUT_DIR", str(output)])
    with pytest.raises(KDError, match=r"KD\.HALVE\.ENABLED as it began; received False now, True"):
        run(without, Start(resume=True))


@pytest.mark.parametrize(("node", "old"), [("KCD", "condensation"), ("UNIX", "unix")])
def test_a_checkpoint_of_a_former_version_is_resumed(config, node, old):
    kd = {"TERMS": SOFT, node: {"ENABLED": True}}
    first, more = {"MAX_EPOCH": 2}, {"MAX_EPOCH": 3}
    if node == "KCD":
        # Its plan belongs to the length of the run.
        kd[node]["PERIOD"] = 1
        first = more
    whole = config("whole", KD=kd, SOLVER=more)
    expected = run(whole)
    cfg = config("old", KD=kd, SOLVER=first)
    run(cfg)
    path = Path(cfg.OUTPUT_DIR) / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    state = checkpoint.pop("procedures")[node]
    if node == "KCD":
        state["stage"] = state.pop("current_period")
    checkpoint[old] = state
    torch.save(checkpoint, path)
    resumed = config("old", KD=kd, SOLVER=more)
    assert run(resumed, Start(resume=True)) == expected
    assert same(weights(whole), weights(resumed))
