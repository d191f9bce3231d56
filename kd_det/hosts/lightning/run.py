"""One start of a run: everything that is checked and settled before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from kd_det.hosts.lightning import hardware
from kd_det.hosts.lightning.log import RunLog
from kd_det.hosts.lightning.loggers import check_loggers
from kd_det.run.devices import check_devices
from kd_det.run.folder import (
    CHECKPOINT,
    FINAL,
    check_output_dir,
    check_same_run,
    check_writable,
    evaluated_weights,
)
from kd_det.run.plan import Start, check_single_run


@dataclass(frozen=True)
class Run:
    """One start of a run, checked."""

    cfg: CfgNode
    start: Start
    output: Path  #: OUTPUT_DIR
    seed: int  #: in use, also where SEED is negative
    weights: str  #: the student's start, or what is evaluated
    hardware: dict[str, Any]  #: Lightning's arguments for devices
    log: RunLog

    @property
    def checkpoint(self) -> Path:
        """The file that a resumed run goes on from."""
        return self.output / CHECKPOINT

    @property
    def resumed(self) -> bool:
        """Whether this start goes on from a checkpoint."""
        return self.start.resume and not self.start.eval_only and self.checkpoint.is_file()


def check_run(cfg: CfgNode, start: Start) -> None:
    """Refuse a run that cannot be carried out here and now. Nothing is written.

    Raises:
        KDError: several runs in one config, devices or loggers that are not there, nothing to
            evaluate, or a folder that holds another run or cannot be written.
    """
    check_single_run(cfg)
    check_devices(cfg.MODEL.DEVICE, start.num_gpus)
    output = Path(cfg.OUTPUT_DIR)
    if start.eval_only:
        evaluated_weights(cfg.MODEL.WEIGHTS, output, (FINAL, CHECKPOINT))
        check_writable(output)
        return
    check_output_dir(cfg.OUTPUT_DIR, start.resume)
    check_loggers(cfg)
    if (output / CHECKPOINT).is_file():
        check_same_run(output, cfg)


@contextmanager
def open_run(cfg: CfgNode, start: Start) -> Iterator[Run]:
    """Check a run whose config its host has checked, and collect what is logged from here on."""
    check_run(cfg, start)
    hardware.announce_rendezvous(start)
    output, weights = Path(cfg.OUTPUT_DIR), cfg.MODEL.WEIGHTS
    if start.eval_only:
        weights = evaluated_weights(weights, output, (FINAL, CHECKPOINT))
    seed = cfg.SEED if cfg.SEED >= 0 else hardware.common_seed()
    hardware.quiet()
    with RunLog() as log:
        yield Run(cfg, start, output, seed, weights, hardware.hardware_arguments(cfg, start), log)
