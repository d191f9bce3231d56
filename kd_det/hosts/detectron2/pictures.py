"""Pictures of what is distilled in the TensorBoard of a Detectron2 run."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from kd_det.hosts.base import MakePictures, Pictures


class DrawPictures(HookBase):
    """Draws every ``VIS_PERIOD`` iterations, on the main process of a run with distillation.

    Must come before the hook that writes, which takes the images from the event storage.

    Args:
        cfg: the config of the run.
        make: see :data:`kd_det.hosts.base.MakePictures`.
    """

    def __init__(self, cfg: CfgNode, make: MakePictures) -> None:
        self.cfg = cfg
        self.make = make
        self._pictures: Pictures | None = None

    def before_train(self) -> None:
        model = getattr(self.trainer.model, "module", self.trainer.model)  # inside DDP
        if comm.is_main_process():
            self._pictures = self.make(self.cfg, model)

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
