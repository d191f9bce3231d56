"""Pictures of what is distilled in the TensorBoard of a Detectron2 run."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from kd_det.visualize.periodic import PeriodicPictures
from kd_det.visualize.subject import find_subject


class VisualizeHook(HookBase):
    """Draw the batch at hand every ``VIS_PERIOD`` iterations, on the main process.

    The trainer's own writer takes the images from its event storage.

    Args:
        cfg: of the run. Nothing happens in one without distillation.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._pictures: PeriodicPictures | None = None

    def before_train(self) -> None:
        model = getattr(self.trainer.model, "module", self.trainer.model)  # inside DDP
        distiller = getattr(model, "distiller", None)
        if comm.is_main_process() and distiller is not None:
            subject = find_subject(self.cfg, model, distiller)
            self._pictures = PeriodicPictures(subject, self.cfg.VIS_PERIOD)

    def before_step(self) -> None:
        if self._pictures is not None:
            self._pictures.begin(self.trainer.iter)

    def after_step(self) -> None:
        if self._pictures is not None:
            for tag, image in self._pictures.end().items():
                self.trainer.storage.put_image(tag, image)

    def after_train(self) -> None:
        if self._pictures is not None:
            self._pictures.stop()
