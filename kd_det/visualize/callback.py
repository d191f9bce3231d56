"""Pictures of what is distilled in the TensorBoard of a Lightning run."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from kd_det.visualize.periodic import PeriodicPictures
from kd_det.visualize.subject import find_subject


class VisualizeCallback(Callback):
    """Draw the batch at hand every ``VIS_PERIOD`` iterations, on the main process.

    Args:
        cfg: of the run. Nothing happens in one without distillation.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._pictures: PeriodicPictures | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        distiller = getattr(model, "distiller", None)
        if trainer.is_global_zero and distiller is not None:
            subject = find_subject(self.cfg, model.student, distiller)
            self._pictures = PeriodicPictures(subject, self.cfg.VIS_PERIOD)

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
