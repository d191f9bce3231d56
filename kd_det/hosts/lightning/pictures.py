"""Pictures of what is distilled in the TensorBoard of a Lightning run."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from kd_det.hosts.base import MakePictures, Pictures


class DrawPictures(Callback):
    """Draws every ``VIS_PERIOD`` iterations, on the main process of a run with distillation."""

    def __init__(self, cfg: CfgNode, make: MakePictures) -> None:
        self.cfg, self.make = cfg, make
        self._pictures: Pictures | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        if trainer.is_global_zero and getattr(model, "distiller", None) is not None:
            self._pictures = self.make(self.cfg, model)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._pictures is not None:
            self._pictures.begin(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._pictures is None:
            return
        for tag, image in self._pictures.end().items():
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(tag, image, trainer.global_step - 1)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._pictures is not None:
            self._pictures.stop()
