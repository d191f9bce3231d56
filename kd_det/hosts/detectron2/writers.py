"""Writers of a run's numbers: Detectron2's own, with the tags that all hosts share.

``metrics.json`` keeps the names a loss is logged under; TensorBoard and the services of ``LOGGERS``
show :class:`kd_det.run.curves.CurveTag` of them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from detectron2.engine import default_writers
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from kd_det.core.distiller import Distiller
from kd_det.run.curves import CurveTag
from kd_det.run.devices import peak_memory
from kd_det.run.folder import METRICS
from kd_det.run.json_lines import end_last_line

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

PERIOD = 20
"""Iterations between two lines of ``metrics.json``, and of their medians: Detectron2's own."""


def build_writers(
    output_dir: str, max_iter: int, tag: CurveTag, loggers: Sequence[Logger] = ()
) -> list[EventWriter]:
    """Detectron2's writers of log lines, ``metrics.json`` and TensorBoard, and one per logger."""
    end_last_line(os.path.join(output_dir, METRICS))
    stock = [
        TaggedWriter(output_dir, tag) if isinstance(writer, TensorboardXWriter) else writer
        for writer in default_writers(output_dir, max_iter)
    ]
    return [*stock, *(LoggerWriter(logger, max_iter, tag) for logger in loggers)]


class TaggedWriter(TensorboardXWriter):
    """Detectron2's TensorBoard writer, whose scalars have the tags of :mod:`kd_det.run.curves`."""

    def __init__(self, log_dir: str, tag: CurveTag) -> None:
        super().__init__(log_dir)
        self._tag = tag

    @cached_property
    def _writer(self) -> SummaryWriter:
        return _TaggedSummary(self._tag, **self._writer_args)


class _TaggedSummary(SummaryWriter):
    def __init__(self, tag: CurveTag, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tag = tag

    def add_scalar(self, tag: str, *arguments: Any, **keywords: Any) -> None:
        super().add_scalar(self._tag(tag), *arguments, **keywords)


class LoggerWriter(EventWriter):
    """Hands the scalars of a run, smoothed as Detectron2 does, to one of Lightning's loggers."""

    def __init__(self, logger: Logger, max_iter: int, tag: CurveTag) -> None:
        self.logger, self.max_iter, self.tag = logger, max_iter, tag
        self._last = -1

    def write(self) -> None:
        """Send what is new since the last call."""
        new: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(PERIOD)
        for name, (value, at) in latest.items():
            if at > self._last:
                new[at][self.tag(name)] = value
        for at in sorted(new):
            self.logger.log_metrics(new[at], step=at)
        self._last = max([self._last, *new])

    def close(self) -> None:
        """End the logger's run with whether the training came to its end."""
        ended = get_event_storage().iter >= self.max_iter
        self.logger.finalize("success" if ended else "failed")


class RecordMetrics(HookBase):
    """Puts the metrics of a distiller and the peak of memory into the storage.

    Must come before the hook that writes. Reading a number back from a GPU makes the host wait:
    that is done once before each writing, for all iterations since the last.
    """

    def __init__(
        self, distiller: Distiller | None, device: torch.device, period: int = PERIOD
    ) -> None:
        self._distiller, self._device, self._period = distiller, device, period
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []

    def after_step(self) -> None:
        if self._distiller is not None:
            self._waiting.append((self.trainer.iter, dict(self._distiller.metrics)))
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._put()

    def _put(self) -> None:
        storage = self.trainer.storage
        waiting, self._waiting = self._waiting, []
        if values := [value.float() for _, metrics in waiting for value in metrics.values()]:
            # As Detectron2 does with losses: what is logged is the mean over the processes.
            gathered = comm.gather(torch.stack(values).tolist())
            means = iter([sum(own) / len(own) for own in zip(*gathered, strict=True)])
            if comm.is_main_process():
                # Shares are not measured in every iteration; they join the line of the others.
                last = {name: at for at, metrics in waiting for name in metrics}
                for at, metrics in waiting:
                    for name in metrics:
                        shown = self.trainer.iter if at == last[name] else at
                        storage.put_scalar(name, next(means), cur_iter=shown)
        storage.put_scalar("max_mem", peak_memory(self._device), smoothing_hint=False)
