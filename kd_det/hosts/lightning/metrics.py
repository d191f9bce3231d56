"""The run's numbers: as JSON lines, in its log, and as curves for every logger."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from kd_det.run.curves import GROUPS, CurveTag
from kd_det.run.devices import peak_memory
from kd_det.run.json_lines import end_last_line

logger = logging.getLogger(__name__)

LOG_PERIOD = 20
"""Iterations between two lines of metrics, as in Detectron2."""


class DataClock(Profiler):
    """Counts the seconds in which training waits for its next batch."""

    _ACTION = ".train_dataloader_next"

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._began = 0.0

    def start(self, action_name: str) -> None:
        """Lightning's call at the beginning of anything it does."""
        if action_name.endswith(self._ACTION):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Lightning's call at its end."""
        if action_name.endswith(self._ACTION):
            self.seconds += time.perf_counter() - self._began


class MetricsWriter(Callback):
    """Append metrics to ``metrics.json``, one object per line, as Detectron2's writer does.

    Beside the losses a line has ``lr``; ``time``, the seconds of an iteration; ``data_time``, those
    of them that went into waiting for data; and ``max_mem``, see
    :func:`kd_det.run.devices.peak_memory`. The trainer's loggers get the same numbers,
    each under the tag of its curve. ``clock`` is the trainer's profiler; ``period`` are the
    iterations between two lines.
    """

    def __init__(
        self, path: str | Path, tag: CurveTag, clock: DataClock, period: int = LOG_PERIOD
    ) -> None:
        self.path, self.tag, self.clock, self.period = Path(path), tag, clock, period
        self._since = (0, 0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            end_last_line(self.path)
        self._reset(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.period and step != trainer.max_steps):
            return
        first, then, waited = self._since
        self._reset(trainer)
        steps, (_, now, waiting) = max(1, step - first), self._since
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        values["time"] = (now - then) / steps
        values["data_time"] = (waiting - waited) / steps
        values["max_mem"] = peak_memory(pl_module.device)
        self._write(trainer, step - 1, values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            results: dict[str, dict[str, float]] = pl_module.results  # type: ignore[assignment]
            flat = {
                f"{kind}/{k}": v for kind, metrics in results.items() for k, v in metrics.items()
            }
            self._write(trainer, trainer.global_step - 1, flat)
        # What a validation takes is not the time of an iteration.
        self._reset(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        costs: Any = pl_module.costs
        shares = {f"cost/{name}": share for name, share in costs().items()}
        if shares and trainer.is_global_zero:
            self._write(trainer, trainer.global_step - 1, shares)

    def _reset(self, trainer: Trainer) -> None:
        self._since = (trainer.global_step, time.perf_counter(), self.clock.seconds)

    def _write(self, trainer: Trainer, iteration: int, values: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}, sort_keys=True) + "\n")
        curves = {self.tag(name): value for name, value in values.items()}
        for each in trainer.loggers:
            each.log_metrics(curves, step=iteration)
        shown = (f"{k} {v:.4g}" for k, v in values.items() if k.partition("/")[0] not in GROUPS)
        logger.info("iteration %d: %s", iteration, ", ".join(shown))
