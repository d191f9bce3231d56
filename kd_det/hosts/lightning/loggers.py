"""The services in ``LOGGERS``, which receive a run's metrics beside its own files.

They are Lightning's loggers on every host. Each service's own environment variables
(``WANDB_PROJECT``, ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ...) configure it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from fvcore.common.config import CfgNode

from kd_det.core.errors import check_known, fail

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

PROJECT = "kd_det"
"""The project (wandb) or experiment (MLflow) of a run, unless the environment names another."""


def check_loggers(cfg: CfgNode) -> None:
    """Refuse an unknown name in ``LOGGERS``, or one whose package is not installed."""
    for name in cfg.LOGGERS:
        check_known("logger in LOGGERS", name, _BUILD)
        if importlib.util.find_spec(name) is None:
            fail(
                expected=f"the package {name} for LOGGERS {name}",
                received="no installed package of that name",
                remedy=f"pip install {name}, or leave it out of LOGGERS",
            )


def build_loggers(cfg: CfgNode, output_dir: str | Path) -> list[Logger]:
    """Loggers for one start of a run, with its config as hyper-parameters.

    A resumed run is another run of the service, with the name of the first: the last two parts of
    ``output_dir``, where local files of a service go. Only the main process sends data.
    """
    check_loggers(cfg)
    output = Path(output_dir).resolve()
    loggers = [_BUILD[name](output, "/".join(output.parts[-2:])) for name in cfg.LOGGERS]
    for logger in loggers:
        logger.log_hyperparams(yaml.safe_load(cfg.dump()))
    return loggers


# Lightning is imported late: it takes seconds, and a run of Detectron2 needs its loggers only.


def _wandb(output: Path, name: str) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    # Seeds and stages are several runs of one process, and the logger would continue an open run.
    if wandb.run is not None:
        wandb.finish()
    return WandbLogger(name, save_dir=output, project=os.getenv("WANDB_PROJECT", PROJECT))


def _mlflow(output: Path, name: str) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    # Newer versions refuse plain files, which need no server and no database, without this.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger(
        os.getenv("MLFLOW_EXPERIMENT_NAME", PROJECT), name, save_dir=str(output / "mlruns")
    )


_BUILD: dict[str, Callable[[Path, str], Logger]] = {"wandb": _wandb, "mlflow": _mlflow}
