"""Progress of a run: one bar with its losses at a glance, or calls of a function."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from kd_det.hosts.base import Progress
from kd_det.hosts.lightning.loss_table import loss_table
from kd_det.run.curves import CurveTag

_SECONDS = 0.5  # between two readings of the losses, each of which makes a GPU wait
_REFRESH_RATE = 5
_BAR_WIDTH = 30


def progress_callback(tag: CurveTag, progress: Progress | None, title: str = "") -> Callback:
    """A progress bar, or calls of ``progress`` in its place.

    ``title`` names what is trained, where that is not the run itself; ``progress`` is called with
    it in lower case.
    """
    if progress is None:
        return RunProgressBar(tag, title)
    return ReportProgress(progress, title.lower() or "train")


class RunProgressBar(RichProgressBar):
    """Lightning's bar over an epoch, with the time left of the whole run and the losses below it.

    One line per group: ``total``, the ``task`` losses, the terms (``kd``) and the last evaluation.
    Without a title it is ``Training`` or, where epochs are counted, ``Epoch 3/240``.
    """

    def __init__(self, tag: CurveTag, title: str = "") -> None:
        super().__init__(refresh_rate=_REFRESH_RATE)
        self.tag, self.title = tag, title
        self._column = _RunColumn(self)
        self._began = (0, 0.0)
        self._read_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = (trainer.global_step, time.monotonic())
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_at = 0.0
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_at = 0.0
        super().on_validation_end(trainer, pl_module)

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """A single column: losses need the whole width, below the bar."""
        return [self._column]

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing for Lightning's own column, which is narrow and does not group."""
        return {}

    def seconds_left(self, done: float) -> float | None:
        """Of the whole run, ``done`` iterations into its epoch, by their mean time so far."""
        trainer = self.trainer
        first, then = self._began
        steps = trainer.global_step - first
        left = [trainer.max_steps - trainer.global_step] if trainer.max_steps > 0 else []
        if trainer.max_epochs and trainer.max_epochs > 0:
            epochs = trainer.max_epochs - trainer.current_epoch
            left.append(int(epochs * trainer.num_training_batches - done))
        if steps < 1 or not left:
            return None
        return max(0, min(left)) * (time.monotonic() - then) / steps

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or 0
        counted = f"Epoch {current_epoch + 1}/{epochs}" if epochs > 0 else "Training"
        return self.title or counted

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.monotonic()
        if not self.is_enabled or now - self._read_at < _SECONDS:
            return
        self._read_at = now
        values = {self.tag(k): float(v) for k, v in trainer.callback_metrics.items()}
        results: Mapping[str, Any] = getattr(pl_module, "results", {})
        firsts = (
            (kind, next(iter(metrics.items()))) for kind, metrics in results.items() if metrics
        )
        values |= {f"eval/{kind} {name}": value for kind, (name, value) in firsts}
        self._column.show(values)


class _RunColumn(ProgressColumn):
    """A bar and, of the training, its losses."""

    def __init__(self, bar: RunProgressBar) -> None:
        super().__init__()
        self.bar = bar
        name = TextColumn("{task.description:<10}")
        self._columns = (name, BarColumn(_BAR_WIDTH), MofNCompleteColumn())
        self._losses: RenderableType | None = None

    def show(self, values: Mapping[str, float]) -> None:
        """Draw these losses from now on; called between iterations, not by the drawing thread."""
        self._losses = loss_table(values)

    def render(self, task: Task) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        cells = [column(task) for column in self._columns]
        if task.id != self.bar.train_progress_bar_id:
            head.add_row(*cells)
            return head
        seconds = self.bar.seconds_left(task.completed)
        left = "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
        head.add_row(*cells, Text(f"{left} left", style="cyan"))
        return Group(head, self._losses) if self._losses is not None else head


class ReportProgress(Callback):
    """Calls a function after every batch, in place of a progress bar.

    It is called with ``training`` or ``"evaluate"``, the batches done, and their whole number.
    """

    def __init__(self, report: Progress, training: str = "train") -> None:
        self.report, self.training = report, training

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.report(self.training, trainer.global_step, trainer.max_steps)

    on_train_batch_end = on_train_start

    def on_validation_batch_end(
        self, trainer: Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.report("evaluate", batch_idx + 1, int(sum(trainer.num_val_batches)))
