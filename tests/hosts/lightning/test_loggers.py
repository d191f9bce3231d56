"""``LOGGERS`` by name: refused before training, or told everything."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from kd_det.hosts.lightning import loggers
from kd_det.hosts.lightning.loggers import build_loggers, check_loggers
from kd_det.run.config import add_kd_config


def config(*names):
    cfg = CfgNode()
    add_kd_config(cfg)
    cfg.LOGGERS = list(names)
    return cfg


def test_an_unknown_logger_is_refused_with_the_nearest_name(refuses):
    with refuses("'wandbb'", "did you mean 'wandb'?"):
        check_loggers(config("wandbb"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_is_refused_with_the_command_that_gets_it(
    refuses, monkeypatch, name
):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    with refuses(f"LOGGERS {name}", f"pip install {name}"):
        check_loggers(config(name))
    with refuses(f"pip install {name}"):
        build_loggers(config(name), "run")


def test_without_names_there_are_no_loggers(tmp_path):
    assert build_loggers(config(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


OFFLINE = """
import sys
from pathlib import Path
from fvcore.common.config import CfgNode
from kd_det.run.config import add_kd_config
from kd_det.hosts.lightning.loggers import build_loggers

cfg = CfgNode()
add_kd_config(cfg)
cfg.LOGGERS = [sys.argv[1]]
(logger,) = build_loggers(cfg, Path(sys.argv[2]))
logger.log_metrics({"loss/kd/review": 0.5}, step=3)
logger.finalize("success")
"""


@pytest.mark.parametrize(("name", "folder"), [("wandb", "wandb"), ("mlflow", "mlruns")])
def test_a_service_works_offline_into_the_run_folder(tmp_path, name, folder):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    root = str(Path(__file__).resolve().parents[3])
    environment = {"WANDB_MODE": "offline", "PYTHONPATH": root, "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", OFFLINE, name, str(tmp_path / "runs" / "one")],
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert list((tmp_path / "runs" / "one" / folder).iterdir())


class Remember:
    def __init__(self, output, name):
        self.output, self.name = output, name

    def log_hyperparams(self, parameters):
        self.parameters = parameters


def test_each_is_told_the_folder_the_name_and_the_config_of_its_run(monkeypatch, tmp_path):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(loggers, "_BUILD", dict.fromkeys(("wandb", "mlflow"), Remember))
    built = build_loggers(config("mlflow", "wandb"), tmp_path / "reviewkd" / "seed_1")
    assert len(built) == 2
    for logger in built:
        assert logger.output == tmp_path / "reviewkd" / "seed_1"
        assert logger.name == "reviewkd/seed_1"
        assert type(logger.parameters["KD"]) is dict
        assert logger.parameters["KD"]["TASK_WEIGHT"] == 1.0
