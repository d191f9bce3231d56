"""The little that the quickstart asks of a host: train, predict, count."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fvcore.common.config import CfgNode

from kd_det.bench.workbench import Workbench, open_workbench
from kd_det.run.folder import CONFIG, FINAL, LOG, RESULTS

Progress = Callable[[str, int, int], None]
Results = dict[str, dict[str, float]]


class Host(Protocol):
    """A host as the quickstart needs it."""

    configs: str
    """Folder below ``configs/`` with ``teacher_frcnn.yaml`` and its students."""

    def train(self, config: Path, opts: Sequence[str], output: Path, progress: Progress) -> Results:
        """Train a config, or go on from an interrupted run's last checkpoint, if it has one.

        Results are in percent.
        """
        ...

    def load(self, output: Path) -> Workbench:
        """The trained plain student of a finished run, ready to predict."""
        ...


def finished(output: Path) -> Results | None:
    """Results of a run that is done; None if it must be run or continued."""
    path = output / RESULTS
    return json.loads(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def log_to(path: Path, *loggers: str) -> Iterator[None]:
    """Send what libraries print and log to a file, so that the screen shows progress only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, contextlib.redirect_stdout(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        for name in ("py.warnings", "kd_det", *loggers):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.handlers = [handler]
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)


class TorchvisionHost:
    """The embedded host: everything it needs is on the package index."""

    configs = "digits_torchvision"

    def train(self, config: Path, opts: Sequence[str], output: Path, progress: Progress) -> Results:
        """See :class:`Host`."""
        from kd_det.hosts.torchvision_detection.config import load_config
        from kd_det.hosts.torchvision_detection.train import run

        cfg = load_config(str(config), [*opts, "OUTPUT_DIR", str(output)])
        with log_to(output / LOG, "lightning", "lightning.pytorch"):
            return run(cfg, resume=True, progress=progress)

    def load(self, output: Path) -> Workbench:
        """See :class:`Host`."""
        from kd_det.hosts.torchvision_detection.config import load_config

        return _open(load_config(str(output / CONFIG)), output)


class Detectron2Host:
    """The same run through Detectron2."""

    configs = "digits"

    def train(self, config: Path, opts: Sequence[str], output: Path, progress: Progress) -> Results:
        """See :class:`Host`."""
        from detectron2.engine.hooks import HookBase
        from detectron2.utils.env import seed_all_rng

        from kd_det.hosts.detectron2.train import load_cfg, run

        class Report(HookBase):
            def after_step(self) -> None:
                progress("train", self.trainer.iter + 1, self.trainer.max_iter)

        cfg = load_cfg(str(config), [*opts, "OUTPUT_DIR", str(output)])
        with log_to(output / LOG, "detectron2", "fvcore"):
            (output / CONFIG).write_text(cfg.dump())
            seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
            results: dict[str, Any] = run(cfg, resume=True, extra_hooks=[Report()])
        (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        return results

    def load(self, output: Path) -> Workbench:
        """See :class:`Host`."""
        from kd_det.hosts.detectron2.train import load_cfg

        return _open(load_cfg(str(output / CONFIG)), output)


def _open(cfg: CfgNode, output: Path) -> Workbench:
    return open_workbench(cfg, str(output / FINAL), distilled=False)


HOSTS: dict[str, type[Host]] = {
    "torchvision_detection": TorchvisionHost,
    "detectron2": Detectron2Host,
}
