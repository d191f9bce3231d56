"""Lightning callbacks: the run's numbers as JSON lines, and progress for whoever wants it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

Progress = Callable[[str, int, int], None]


class JSONLines(Callback):
    """Append metrics to ``metrics.json``, one object per line, as Detectron2's writer does.

    Args:
        path: the file.
        period: iterations between two lines.
    """

    def __init__(self, path: str | Path, period: int = 20) -> None:
        self.path = Path(path)
        self.period = period
        self._since = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.period and step != trainer.max_steps):
            return
        first, then = self._since
        self._since = (step, now := time.perf_counter())
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        values["time"] = (now - then) / max(1, step - first)
        self._write({"iteration": step - 1, **values})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            results: dict[str, dict[str, float]] = pl_module.results  # type: ignore[assignment]
            flat = {f"{kind}/{k}": v for kind, of in results.items() for k, v in of.items()}
            self._write({"iteration": trainer.global_step - 1, **flat})
        # What a validation takes is not the time of an iteration.
        self._since = (trainer.global_step, time.perf_counter())

    def _write(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values, sort_keys=True) + "\n")


class StepProgressBar(RichProgressBar):
    """Lightning's bar; a run is one pass of ``MAX_ITER`` iterations, so epochs say nothing."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class EpochProgressBar(RichProgressBar):
    """Lightning's bar of an epoch, named with the time left for the whole run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = (trainer.current_epoch, time.monotonic())
        super().on_train_start(trainer, pl_module)

    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        first, then = self._began
        epochs = self.trainer.max_epochs or 0
        if current_epoch > first and epochs > 0:
            left = (time.monotonic() - then) / (current_epoch - first) * (epochs - current_epoch)
            text += f" ({timedelta(seconds=round(left))} left)"
        return text


class ReportProgress(Callback):
    """Tell a function about every batch, in place of a progress bar.

    Args:
        report: called with ``"train"`` or ``"evaluate"``, the batches done and those in all.
    """

    def __init__(self, report: Progress) -> None:
        self.report = report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report("train", trainer.global_step, trainer.max_steps)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.report("train", trainer.global_step, trainer.max_steps)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.report("evaluate", batch_idx + 1, int(sum(trainer.num_val_batches)))
