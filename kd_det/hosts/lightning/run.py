"""One start of a run: everything that is checked and settled before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from kd_det.hosts.lightning.hardware import common_seed, hardware_arguments, quiet
from kd_det.hosts.lightning.log import RunLog
from kd_det.hosts.lightning.loggers import check_loggers
from kd_det.run.folder import (
    CHECKPOINT,
    FINAL,
    check_output_dir,
    check_same_run,
    check_writable,
    evaluated_weights,
)
from kd_det.run.plan import check_single_run


@dataclass(frozen=True)
class Run:
    """What a command asks for, checked.

    Attributes:
        cfg: the config of the host.
        output: ``OUTPUT_DIR``.
        seed: in use, also where ``SEED`` is negative.
        weights: the student's start, or what is evaluated.
        resume: go on from ``last.ckpt`` if it is there.
        eval_only: nothing is trained.
        hardware: Lightning's arguments for devices.
        log: of this start.
    """

    cfg: CfgNode
    output: Path
    seed: int
    weights: str
    resume: bool
    eval_only: bool
    hardware: dict[str, Any]
    log: RunLog

    @property
    def checkpoint(self) -> Path:
        """What a resumed run goes on from."""
        return self.output / CHECKPOINT

    @property
    def resumed(self) -> bool:
        """Whether this start goes on from a checkpoint."""
        return self.resume and not self.eval_only and self.checkpoint.is_file()


@contextmanager
def open_run(
    cfg: CfgNode, resume: bool, eval_only: bool, num_gpus: int, num_machines: int
) -> Iterator[Run]:
    """Check a command and collect what is logged from here on.

    Args:
        cfg: a config that its host has checked.
        resume: go on from ``last.ckpt`` in ``OUTPUT_DIR`` if it is there.
        eval_only: evaluate ``MODEL.WEIGHTS``, or else what ``OUTPUT_DIR`` holds.
        num_gpus: processes on this machine where ``MODEL.DEVICE`` is ``cuda``.
        num_machines: machines of the run.

    Raises:
        KDError: several runs in one config, devices or loggers that are not there, or a folder
            that holds another run or cannot be written. Nothing is written.
    """
    check_single_run(cfg)
    hardware = hardware_arguments(cfg, num_gpus, num_machines)
    output = Path(cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    if eval_only:
        weights = evaluated_weights(weights, output, (FINAL, CHECKPOINT))
        check_writable(output)
    else:
        check_output_dir(cfg.OUTPUT_DIR, resume)
        check_loggers(cfg)
        if (output / CHECKPOINT).is_file():
            check_same_run(output, cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else common_seed()
    quiet()
    with RunLog() as log:
        yield Run(cfg, output, seed, weights, resume, eval_only, hardware, log)
