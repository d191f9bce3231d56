"""Two CPU processes train one classifier: gathered graphs, clipped terms, a shared ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from kd_det.hosts.classification.data import ClassificationData
from kd_det.run.folder import PREDICTIONS

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.train import run

output = Path(sys.argv[1])


class Note(Callback):
    def __init__(self):
        self.without = set()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        trained = ((n, p) for n, p in module.named_parameters() if p.requires_grad)
        self.without |= {name for name, p in trained if p.grad is None}

    def on_train_end(self, trainer, module):
        state = {"model": module.state_dict(), "without": self.without}
        state["kcd"] = module.procedures.state_dict()["procedures"]["KCD"]
        torch.save(state, output / f"{trainer.global_rank}.pth")


run(load_config(sys.argv[2]), callbacks=[Note()])
"""

TERMS = {
    "soft": {"LOSS": "KD", "TAPS": ["logits"], "TEMPERATURE": 4.0},
    "hint": {"LOSS": "FitNet", "TAPS": ["stage2"]},
    "relations": {"LOSS": "IRG", "TAPS": ["logits", "stage3"], "GATHER": True},
    "graph": {
        "LOSS": "MHGD",
        "TAPS": ["stage1", "stage2"],
        "HEADS": 2,
        "GATHER": True,
        "CLIP": "task_norm",
    },
}


def test_two_processes_end_with_one_model_and_one_selection(config, tmp_path):
    cfg = config(
        KD={"TERMS": TERMS, "KCD": {"ENABLED": True, "PERIOD": 1}, "PRE_STAGE": {"MAX_ITER": 2}},
        SOLVER={"MAX_EPOCH": 2},
    )
    (tmp_path / "run.yaml").write_text(cfg.dump())
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["KD"]["TERMS"].keys() == TERMS.keys()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), str(tmp_path), str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{r}.pth", weights_only=False) for r in (0, 1))
    assert first["without"] == second["without"] == set()
    # Statistics of BatchNorm follow each process's own images.
    learned = [k for k in first["model"] if "running_" not in k]
    assert any(k.startswith("distiller.terms.graph.network.") for k in learned)
    assert any(k.startswith("distiller.terms.hint.adaptors.") for k in learned)
    for key in learned:
        assert torch.equal(first["model"][key], second["model"][key]), key
    for key in ("active", "partners", "epsilons"):
        assert torch.equal(first["kcd"][key], second["kcd"][key])
    assert first["kcd"]["current_period"] == 1
    predictions = json.loads((Path(cfg.OUTPUT_DIR) / PREDICTIONS).read_text())
    targets = ClassificationData(cfg, training=False).targets.tolist()
    assert [p["index"] for p in predictions] == list(range(len(targets)))
    assert [p["target"] for p in predictions] == targets
